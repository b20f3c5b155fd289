"""pyshard.save_checkpoint: a new directory, written by all ranks, then one switch of a pointer."""

import contextlib
import io
import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.optim import Optimizer

from .._version import __version__
from ..comm import PeerError
from ..kernels.launch import is_dtensor
from . import background, files, naming, stages
from .background import AsyncSave
from .ranks import Ranks, ranks_of


@overload
def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    opt: Optimizer | None,
    *,
    keep: int = 2,
    async_save: Literal[False] = False,
    **extra: Any,
) -> None: ...


@overload
def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    opt: Optimizer | None,
    *,
    keep: int = 2,
    async_save: Literal[True],
    **extra: Any,
) -> AsyncSave: ...


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    opt: Optimizer | None,
    *,
    keep: int = 2,
    async_save: bool = False,
    **extra: Any,
) -> AsyncSave | None:
    """Saves model, optimizer and extra values under `path`; all ranks that hold a part of them call it.

    Those are the ranks of the optimizer's process group, or of the mesh of DTensors (with neither, all there are), and
    of the groups of all tensor-parallel and pipeline ranks. The checkpoint gets a directory of its own, in the format
    of torch.distributed.checkpoint, which does not depend on the number of ranks of any kind: it holds whole
    parameters, of all pipeline stages. Each rank writes its part of them and of the optimizer's state, and a share of
    what all have. When all files are on disk, `path`/latest is replaced in one operation. A process that dies before
    that leaves the previous checkpoint in force, one that dies later the new one. The next save removes what dead ones
    have left.

    Args:
        path: a directory, on a file system that all ranks share; made if it is not there. One training run at a time
            saves into it.
        model: as it is trained; names are those without the wrappers of DDP and torch.compile. A pipeline: of the whole
            model.
        opt: the optimizer of its parameters; None saves the model alone.
        keep: how many complete checkpoints stay, the new one included.
        async_save: True: returns when this rank's share is copied to host memory, and writes in the background. Another
            save or load waits for it to end. The copies' memory is kept for the next such save; a save without
            async_save frees it.
        extra: other values, by name: what torch.load(weights_only=True) can load. Those of the group's first rank are
            saved. (The state of random number generators is saved if you pass it.)

    Returns:
        with async_save a handle, whose wait() raises what the save has raised; else None.

    Raises:
        ValueError, TypeError: on all ranks, before anything is written.
        pyshard.checkpoint.CheckpointError: on all ranks; one could not write. Older checkpoints are as they were.
        pyshard.comm.PeerError: another rank is lost; names it and what this one was doing.
        The error of the last asynchronous save, if its wait() was not called: nothing was written.
    """
    ranks = ranks_of("pyshard.save_checkpoint", model, opt)
    root = agreed_path(ranks, path)
    ranks.hint = "Nothing was written."
    prepared: list[tuple[dict[str, Any], bytes | None]] = []

    def prepare() -> tuple[stages.Held, bool]:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep={keep!r}; expected a whole number, at least 1.")
        payload = _packed(extra) if ranks.first else None
        if opt is not None:
            _check_optimizer(opt)
        held = stages.held(model, opt)
        prepared.append((naming.to_save(model, opt), payload))
        return held, bool(async_save)

    def compare(found: list[tuple[stages.Held, bool]]) -> list[stages.Held]:
        for rank, (_, other) in zip(ranks.ranks, found, strict=True):
            if other != bool(async_save):
                raise ValueError(
                    f"async_save={other} on rank {rank} and {bool(async_save)} on rank {ranks.ranks[0]}; expected the "
                    "same on all ranks."
                )
        return [stages.together(ranks.ranks, [held for held, _ in found])] * ranks.world

    with torch.no_grad():
        whole = ranks.agree("looking at model and optimizer", prepare, compare)
        saved, payload = prepared.pop()
        stages.name_groups(saved, whole)
        ranks.hint = f"Complete checkpoints in {root} are as they were."
        directory, previous = ranks.by_first("making a directory", lambda: files.begin(root))
        save = _Save(ranks, directory, previous, payload, keep)
        with save.cleaning():
            save.plan(saved)
            del saved
            if async_save:
                ranks.each("copying what this rank writes", save.copy)
                return background.start(root, save.write)
        background.release()
        save.write()
    return None


class _Save:
    """One save, from an empty directory on."""

    def __init__(self, ranks: Ranks, directory: Path, previous: Path | None, payload: bytes | None, keep: int):
        self.ranks, self.directory, self.previous, self.payload, self.keep = ranks, directory, previous, payload, keep
        self.folder = files.Folder()
        self.writer = FileSystemWriter(directory, sync_files=False)  # the folder does, after flushing
        self.writer.fs = self.folder
        self.planner = DefaultSavePlanner()
        self.values: SavePlanner = self.planner  # where the writer looks up values
        self.switched = False

    @contextlib.contextmanager
    def cleaning(self) -> Iterator[None]:
        """Removes the directory if the save fails."""
        try:
            yield
        except PeerError:
            raise  # the others may still be writing; the next save cleans up
        except BaseException:
            if self.ranks.first and not self.switched:
                with contextlib.suppress(OSError):  # as above
                    files.remove(self.directory)
            raise

    def plan(self, saved: dict[str, Any]) -> None:
        """Who writes what."""

        def plan() -> SavePlan:
            if not self.directory.is_dir():
                raise FileNotFoundError(
                    f"{self.directory}, which the first rank has made for this save, is not there. Save to a path on a "
                    "file system that all ranks share, into which no other run saves."
                )
            self.planner.set_up_planner(saved, self.writer.storage_meta(), self.ranks.first)
            self.writer.set_up_storage_writer(self.ranks.first, rank=self.ranks.rank, use_collectives=True)
            return self.writer.prepare_local_plan(self.planner.create_local_plan())

        def share(plans: list[SavePlan]) -> list[SavePlan]:
            _check_same(self.ranks, plans)
            return self.writer.prepare_global_plan(self.planner.create_global_plan(plans)[0])

        mine = self.ranks.agree("planning who writes what", plan, share)
        self.mine = self.planner.finish_plan(mine)

    def copy(self) -> None:
        """Copies what this rank writes, which may change from then on."""
        self.values = background.Copies(self.mine, self.planner)
        self.planner.state_dict = {}  # fp32 masters of split weights have been made for it

    @torch.no_grad()
    def write(self) -> None:
        """All files, the switch, and the end of old checkpoints."""
        with self.cleaning():
            self.ranks.agree("writing", self._write, self._finish)
        if self.ranks.first:
            try:
                files.prune(self.directory, self.keep)
            except OSError as error:
                warnings.warn(
                    "pyshard.save_checkpoint: the new checkpoint is complete, but an old one could not be removed: "
                    f"{error}. The next save will try again.",
                    stacklevel=3,
                )

    def _write(self) -> tuple[list[WriteResult], dict[str, files.Entry]]:
        results = self.writer.write_data(self.mine, self.values).wait()
        if self.payload is not None:
            with self.folder.create_stream(self.directory / files.EXTRA, "wb") as stream:
                stream.write(self.payload)
        files.sync_directory(self.directory)  # on each host
        return results, dict(self.folder.entries)

    def _finish(self, written: list[tuple[list[WriteResult], dict[str, files.Entry]]]) -> list[None]:
        self.writer.finish(self.planner.metadata, [results for results, _ in written])
        entries = {name: entry for _, found in written for name, entry in found.items()} | self.folder.entries
        made_by = {"pyshard": __version__, "torch": torch.__version__, "ranks": self.ranks.world}
        manifest = {"format": files.FORMAT, **made_by, "block": files.BLOCK, "files": entries}
        files.write_sealed(self.directory / files.MANIFEST, manifest)
        files.make_ready(self.directory, self.previous)
        self.switched = True  # whatever happens from here on, the directory must not be removed
        files.switch(self.directory)
        return [None] * self.ranks.world


def _check_same(ranks: Ranks, plans: list[SavePlan]) -> None:
    """Whole tensors that several ranks have are written by one of them, so they must be the same on all, and whole."""
    seen: dict[str, tuple[int, WriteItemType, TensorWriteData]] = {}
    for rank, plan in zip(ranks.ranks, plans, strict=True):
        for item in plan.items:
            if item.type != WriteItemType.BYTE_IO and item.tensor_data is not None:
                other, kind, known = seen.setdefault(item.index.fqn, (rank, item.type, item.tensor_data))
                mine = item.tensor_data
                if kind != item.type:
                    raise ValueError(
                        f"{item.index.fqn} is a part of a tensor on one of the ranks {other} and {rank}, and a whole "
                        "one on the other; expected a model that is cut alike on all ranks."
                    )
                if (known.size, known.properties.dtype) != (mine.size, mine.properties.dtype):
                    raise ValueError(
                        f"{item.index.fqn} is {known.properties.dtype} {tuple(known.size)} on rank {other} and "
                        f"{mine.properties.dtype} {tuple(mine.size)} on rank {rank}; expected the same model on all "
                        "ranks. Save different models to different paths, each over a process group of its own."
                    )


def agreed_path(ranks: Ranks, path: str | os.PathLike[str]) -> Path:
    """The path as an absolute one, the same on all ranks."""

    def same(paths: list[str]) -> list[str]:
        for rank, other in zip(ranks.ranks, paths, strict=True):
            if other != paths[0]:
                raise ValueError(
                    f"path is {other!r} on rank {rank} and {paths[0]!r} on rank {ranks.ranks[0]}; expected the same on "
                    "all ranks, which write one checkpoint together."
                )
        return paths

    def mine() -> str:
        background.report()  # here, so that all ranks raise it
        return os.path.abspath(os.fspath(path))

    return Path(ranks.agree("comparing paths", mine, same))


def _packed(extra: dict[str, Any]) -> bytes:
    """The extra values as torch.save writes them; tried whether they can be loaded."""
    for name, value in extra.items():
        if not _loads(value):
            where, odd = _odd(name, value)
            kind = f"{type(odd).__module__}.{type(odd).__qualname__}".removeprefix("builtins.")
            raise TypeError(
                f"the extra value {where} ({kind}) cannot be loaded again by torch.load(weights_only=True). Expected "
                f"tensors, numbers, strings, and lists, tuples and dicts of them. {_instead(odd)}"
            )
    data = io.BytesIO()
    torch.save(extra, data)
    return data.getvalue()


def _loads(value: Any) -> bool:
    data = io.BytesIO()
    try:
        torch.save(value, data)
        data.seek(0)
        torch.load(data, weights_only=True)
    except (pickle.UnpicklingError, pickle.PicklingError, AttributeError, RuntimeError, TypeError):
        return False
    return True


def _odd(where: str, value: Any) -> tuple[str, Any]:
    """The innermost part of a value that cannot be loaded, and where it is."""
    parts = value.items() if type(value) is dict else enumerate(value) if type(value) in (list, tuple) else ()
    for key, part in parts:
        if not _loads(part):
            return _odd(f"{where}[{key!r}]", part)
    return where, value


def _instead(value: Any) -> str:
    """What to pass in place of a value that cannot be loaded."""
    if isinstance(value, os.PathLike):
        return "Pass str() of it."
    if type(value).__module__ == "numpy":
        return (
            "Pass torch.from_numpy() of it."
            if hasattr(value, "__array_interface__") and value.ndim
            else ("Pass its item().")
        )
    return "Pass its state_dict(), or a plain form of it."


def _check_optimizer(opt: Optimizer) -> None:
    """What a load could not put back, because the format has names and numbers of list items, and whole tensors.

    Raises:
        ValueError: a hyperparameter has a dict that is empty or has other keys than strings; or the state of a DTensor
            is not a value per element.
    """
    for index, group in enumerate(opt.param_groups):
        for key, value in group.items():
            if key != "params":
                _check_nested(f"{key} of group {index} of the optimizer", value)
        for param in group["params"]:
            for key, value in opt.state.get(param, {}).items() if is_dtensor(param) else ():
                if isinstance(value, torch.Tensor) and value.dim() and value.shape != param.shape:
                    raise ValueError(
                        f"state {key!r} of a parameter of shape {tuple(param.shape)}, which is a DTensor, has shape "
                        f"{tuple(value.shape)}; expected a value per element, which can be cut as the parameter is. "
                        "Use an optimizer such as pyshard.AdamW."
                    )


def _check_nested(what: str, value: Any) -> None:
    if isinstance(value, dict):
        odd = next((key for key in value if not isinstance(key, str)), None)
        if odd is not None or not value:
            got = "is an empty dict" if not value else f"has the key {odd!r} ({type(odd).__name__})"
            raise ValueError(
                f"{what} {got}; expected dicts with strings as keys, which a checkpoint can hold. Use such, or a tuple."
            )
    if isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            _check_nested(f"[{key!r}] in {what}", part)
