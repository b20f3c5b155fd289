"""Saving in the background: the handle and its thread, and copies in host memory of what the thread writes.

One save at a time: whatever else is to be done with checkpoints waits for the one that is running. It talks to other
ranks over the connections of pyshard.checkpoint.ranks, which training does not use.
"""

import atexit
import io
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem


class AsyncSave:
    """A save that is going on in the background, from pyshard.save_checkpoint(..., async_save=True).

    Model, optimizer and extra values may change: what is saved are copies. At its end the interpreter waits for it. If
    the process dies before that, the previous checkpoint stays in force.
    """

    def __init__(self, path: Path, run: Callable[[], None]):
        self._path, self._run = path, run
        self._error: BaseException | None = None
        self._told = False
        # No daemon: the interpreter would end in the middle of it.
        self._thread = threading.Thread(target=self._main, name=f"pyshard saves {path}", daemon=False)
        self._thread.start()

    def _main(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self._error = error
        finally:
            del self._run  # and what it holds

    def done(self) -> bool:
        """True if the save has ended, well or not; wait() tells which."""
        return not self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> None:
        """Returns when the checkpoint is complete, and the one that is loaded.

        Args:
            timeout: seconds; None waits to the end.

        Raises:
            pyshard.checkpoint.CheckpointError, pyshard.comm.PeerError: as save_checkpoint does; each time it is called.
            TimeoutError: it is not done yet, and goes on.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(
                f"pyshard: the save to {self._path} is not done after {timeout} s; it goes on. Wait longer, or ask "
                "done()."
            )
        self._told = True
        if self._error is not None:
            raise self._error

    def __repr__(self) -> str:
        state = "going on" if not self.done() else "done" if self._error is None else f"failed: {self._error}"
        return f"AsyncSave({str(self._path)!r}, {state})"


_newest: AsyncSave | None = None
_spare: dict[MetadataIndex, Tensor] = {}  # copies of the last save, whose memory the next one uses


def start(path: Path, run: Callable[[], None]) -> AsyncSave:
    """Runs it in the background."""
    global _newest
    finish()
    _newest = AsyncSave(path, run)
    return _newest


def finish() -> None:
    """Waits until nothing is running."""
    if _newest is not None and threading.current_thread() is not _newest._thread:
        _newest._thread.join()


def report() -> None:
    """Raises the error of the last save, if there is one of which nobody has heard."""
    if _newest is not None and not _newest._told:
        _newest.wait()


@atexit.register  # called when all threads have ended
def _say() -> None:
    try:
        report()
    except BaseException as error:
        path = None if _newest is None else _newest._path
        warnings.warn(f"pyshard: the save to {path} in the background has failed: {error}", stacklevel=2)


class Copies(SavePlanner):
    """Copies in host memory of what a rank writes, for torch's writer in place of the planner that finds it.

    Memory: the bytes that this rank writes. It is kept for the next copies, until release().
    """

    def __init__(self, plan: SavePlan, planner: SavePlanner):
        self._values: dict[MetadataIndex, Tensor | io.BytesIO] = {}
        spare = dict(_spare)
        release()
        for item in plan.items:
            value = planner.resolve_data(item)
            if isinstance(value, Tensor):
                value = _spare[item.index] = _copy(value.detach(), spare.pop(item.index, None))
            self._values[item.index] = value

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._values[write_item.index]

    def _unused(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("only asked for values: the plan has been made")

    set_up_planner = create_local_plan = create_global_plan = finish_plan = _unused


def _copy(value: Tensor, old: Tensor | None) -> Tensor:
    """A copy in host memory, dense and in the order of the value's memory; in an old one's memory if that fits."""
    like = torch.empty_like(value, device="meta")
    pinned = value.device.type == "cuda"
    wanted = (like.shape, like.stride(), like.dtype, pinned)
    if old is None or (old.shape, old.stride(), old.dtype, pinned and old.is_pinned()) != wanted:
        old = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, pin_memory=pinned)
    return old.copy_(value)


def release() -> None:
    """Gives back the memory of copies, as far as no save is using it."""
    _spare.clear()
