"""The ranks that make or read a checkpoint together: one exchange, in which a failure of one is an error of all.

Every rank sends a message to the first one, which answers each. The connections are gloo's, one between each pair of
processes: when a process dies they close, so the first rank knows at once who is gone, and tells the others.

Writing a checkpoint may take longer than the timeout of the process group. So a rank that is at work says so in the
group's store from time to time, and is waited for as long as it does; the timeout is for one that says nothing.
"""

import math
import pickle
import re
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..comm import PeerError
from ..kernels.launch import is_dtensor
from ..placement import pipeline_share, tensor_shard
from . import background, naming

T = TypeVar("T")
R = TypeVar("R")

_NOTE_TIME = timedelta(seconds=1)  # how long the first rank may take to leave word
_BEAT = 10.0  # seconds at most between two signs of life; a quarter of the timeout if that is less
_NO_SUCH_TAG = 2**31 - 1
# Errors that say what a caller did wrong are raised on all ranks as what they are.
_OF_THE_CALLER: tuple[type[Exception], ...] = (ValueError, TypeError, FileNotFoundError)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read on one of the ranks; raised on all of them.

    Attributes:
        rank: global rank of the one that failed.
        operation: what it was doing.
    """

    def __init__(self, message: str, rank: int, operation: str):
        super().__init__(message)
        self.rank = rank
        self.operation = operation


@dataclass
class _Failure:
    """What one rank tells the others instead of a result."""

    rank: int  # global
    operation: str
    text: str
    kind: str  # name of an error of the caller's, "lost" if the rank is, "before" if a save before this failed, or ""


class Ranks:
    """The processes of a group, or this one alone if there is no group.

    Args:
        who: opens error messages.
        group: data-parallel ranks; None: those of `meshes`, and without any all ranks there are.
        levels: the tensor-parallel and the pipeline group of this rank, each with what it is called. The ranks are
            those of the data-parallel groups of all ranks of the first level, of all ranks of the second.
        meshes: ranks of the meshes over which parameters are DTensors.
    """

    def __init__(
        self,
        who: str,
        group: "dist.ProcessGroup | None",
        levels: "Sequence[tuple[str, dist.ProcessGroup]]" = (),
        meshes: Collection[int] = (),
    ):
        self.who = who
        self.hint = ""  # closes error messages: in which state things are left, and what to do
        self.rank, self.world, self.ranks = 0, 1, [0]
        background.finish()
        if not dist.is_available() or not dist.is_initialized():
            return
        world = dist.distributed_c10d._get_default_group()
        everyone = dist.get_process_group_ranks(world)
        if group is not None and dist.get_rank(group) < 0:
            raise ValueError(
                f"{who}: this process, rank {dist.get_rank()}, is not in the optimizer's process group; expected one "
                "of its ranks. Call this on those only."
            )
        here = {*meshes, *(everyone if group is None else dist.get_process_group_ranks(group))}
        if group is None and meshes:
            here = {*meshes, dist.get_rank()}
        levels = [(name, level) for name, level in levels if not here.issuperset(dist.get_process_group_ranks(level))]
        if len(here) * math.prod(level.size() for _, level in levels) == len(everyone):
            here = set(everyone)  # these are independent of each other, so nobody needs to be asked
        for name, level in levels:
            if len(here) < len(everyone):
                here = self._join(here, name, level)
        if group is None or here != set(dist.get_process_group_ranks(group)):
            group = world
            self.ranks = sorted(here)
        else:
            self.ranks = dist.get_process_group_ranks(group)
        self.rank, self.world = self.ranks.index(dist.get_rank()), len(self.ranks)
        if self.world > 1:
            self._wire = _wire(who, group, self.ranks)

    def _join(self, here: set[int], name: str, level: "dist.ProcessGroup") -> set[int]:
        """These ranks, and those that other ranks of a group are together with."""
        every: list[Any] = [None] * level.size()
        try:
            dist.all_gather_object(every, sorted(here), group=level)
        except RuntimeError as error:
            raise PeerError(
                f"{self.who}: a rank of the {name} group {dist.get_process_group_ranks(level)} is lost or does not "
                f"answer ({_plain(error)}); expected all of them to call this.",
                None,
                "connecting",
            ) from error
        return {rank for each in every for rank in each}

    @property
    def first(self) -> bool:
        """True on the rank that decides."""
        return self.rank == 0

    def agree(self, operation: str, mine: Callable[[], T], decide: Callable[[list[T]], list[R]]) -> R:
        """Runs mine() on all ranks, then decide(their results) on the first one; each rank gets its answer.

        Raises:
            what mine() or decide() has raised on any rank: on all ranks, with the same message.
            PeerError: a rank is gone or silent; on all others.
        """
        if self.world == 1:
            return self._agree(operation, mine, decide)
        with self._wire.at_work():
            return self._agree(operation, mine, decide)

    def _agree(self, operation: str, mine: Callable[[], T], decide: Callable[[list[T]], list[R]]) -> R:
        cause: BaseException | None = None
        message: T | _Failure
        try:
            message = mine()
        except BaseException as error:
            cause, message = error, self._failure(operation, error)
        answer: R | _Failure
        if self.first:
            messages = [message, *self._receive_all(operation)] if self.world > 1 else [message]
            failures = [m for m in messages if isinstance(m, _Failure)]
            # A loss comes first: what else fails may be its consequence.
            failures.sort(key=lambda failure: failure.kind != "lost")
            answers: list[Any] = failures[:1] * self.world
            if not failures:
                try:
                    answers = list(decide(cast(list[T], messages)))
                except BaseException as error:
                    cause, answers = error, [self._failure(operation, error)] * self.world
            for rank in range(1, self.world):
                with suppress(RuntimeError):  # it is gone: the next exchange will say so, if there is one
                    self._wire.send(answers[rank], rank)
            answer = answers[0]
        else:
            try:
                self._wire.send(message, 0)
                answer = self._wire.receive(0)
            except RuntimeError as error:
                answer = self._wire.read_note() or self._loss(operation, 0, error)
        if cause is not None and not isinstance(cause, Exception):
            raise cause
        if isinstance(answer, _Failure):
            raise self._error(answer) from cause
        return answer

    def each(self, operation: str, mine: Callable[[], T]) -> T:
        """Runs mine() on all ranks; each keeps its result."""
        kept: list[T] = []
        self.agree(operation, lambda: kept.append(mine()), lambda _: [None] * self.world)
        return kept[0]

    def by_first(self, operation: str, decide: Callable[[], R]) -> R:
        """Runs decide() on the first rank; each gets the result."""
        return self.agree(operation, lambda: None, lambda _: [decide()] * self.world)

    # ---- errors ----

    def _failure(self, operation: str, error: BaseException) -> _Failure:
        rank, kind = self.ranks[self.rank], type(error)
        if kind in _OF_THE_CALLER:
            return _Failure(rank, operation, str(error), kind.__name__)
        if isinstance(error, CheckpointError):
            return _Failure(error.rank, error.operation, str(error), "before")
        if isinstance(error, PeerError):  # of an optimizer that waits for others
            return _Failure(rank if error.rank is None else error.rank, error.operation, str(error), "lost elsewhere")
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):  # torch.save hides a full disk behind its own error
            cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
        error = cause or error
        return _Failure(rank, operation, f"{type(error).__name__}: {error}", "")

    def _loss(self, operation: str, rank: int, error: Exception) -> _Failure:
        return _Failure(self.ranks[rank], operation, _plain(error), "lost")

    def _error(self, failure: _Failure) -> Exception:
        rank, operation, end = failure.rank, failure.operation, f" {self.hint}" if self.hint else ""
        for kind in _OF_THE_CALLER:
            if failure.kind == kind.__name__:
                return kind(f"{self.who}: {failure.text}{end}")
        if failure.kind == "before":
            text = f"{self.who}: the save in the background before this has failed: {failure.text}"
            return CheckpointError(text + end, rank, operation)
        if failure.kind == "lost elsewhere":
            return PeerError(f"{self.who}: {failure.text}{end}", rank, operation)
        if failure.kind == "lost":
            text = (
                f"rank {rank} is lost or does not answer while {operation} ({failure.text}). Look at what it has said "
                "itself, then start all ranks again."
            )
            return PeerError(f"{self.who}: {text}{end}", rank, operation)
        where = f" on rank {rank}" if self.world > 1 else ""
        text = f"{self.who}: failed{where} while {operation}: {failure.text}."
        return CheckpointError(text + end, rank, operation)

    def _receive_all(self, operation: str) -> list[Any]:
        """The messages of all ranks but the first; a failure in place of one that is lost."""
        expected: list[Any] = []
        for rank in range(1, self.world):
            try:
                expected.append(self._wire.expect(rank))
            except RuntimeError as error:
                expected.append(self._loss(operation, rank, error))
        received = []
        for rank, message in enumerate(expected, start=1):
            if not isinstance(message, _Failure):
                try:
                    message = self._wire.receive(rank, message)
                except RuntimeError as error:
                    message = self._loss(operation, rank, error)
                    self._wire.write_note(message)
            received.append(message)
        return received


class _Wire:
    """Connections of its own between processes of a group, over gloo on the CPU whatever the group's backend."""

    def __init__(self, group: "dist.ProcessGroup", ranks: list[int]):
        backend = group._get_backend(group._device_types[0])
        self.timeout: timedelta = getattr(getattr(backend, "options", None), "_timeout", timedelta(minutes=30))
        c10d: Any = dist  # whose types do not tell of these
        self._store = _store(group, ranks)
        self._store.set(f"here/{dist.get_rank()}", "")
        self._gloo = c10d.ProcessGroupGloo(self._store, ranks.index(dist.get_rank()), len(ranks), self.timeout)
        self._exchange = 0  # counts alike on all ranks

    def send(self, value: object, rank: int) -> None:
        data = pickle.dumps(value)
        self._await(self._gloo.send([torch.tensor([len(data)])], rank, 0), rank)
        self._gloo.send([torch.frombuffer(bytearray(data), dtype=torch.uint8)], rank, 0).wait(self.timeout)

    def expect(self, rank: int) -> tuple[Tensor, Any]:
        """Starts to receive the length of a rank's message."""
        length = torch.empty(1, dtype=torch.int64)
        return length, self._gloo.recv([length], rank, 0)

    def receive(self, rank: int, expected: tuple[Tensor, Any] | None = None) -> Any:
        length, work = expected or self.expect(rank)
        self._await(work, rank)
        data = torch.empty(int(length), dtype=torch.uint8)
        self._gloo.recv([data], rank, 0).wait(self.timeout)
        return pickle.loads(data.numpy().tobytes())

    # ---- patience with a rank that is at work ----

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """One exchange, in which this rank gives signs of life."""
        self._exchange += 1
        done = threading.Event()

        def beat(exchange: int) -> None:
            every, count = min(self.timeout.total_seconds() / 4, _BEAT), 0
            while not done.wait(every):
                count += 1
                with suppress(RuntimeError):  # the store is gone
                    self._store.set(f"beat/{self._gloo.rank()}", f"{exchange} {count}")

        thread = threading.Thread(target=beat, args=(self._exchange,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(1.0)  # it ends at once, unless a store whose host is gone holds it

    def _await(self, work: Any, rank: int) -> None:
        """Waits for an operation as long as the other rank gives signs of life, or its timeout for the next one.

        gloo's own wait closes all connections when its time is up, so it gets all the time there is, in a thread.
        """
        errors: list[RuntimeError] = []

        def wait() -> None:
            try:
                work.wait(timedelta(days=365))
            except RuntimeError as error:
                errors.append(error)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        seen, end = "", time.monotonic() + self.timeout.total_seconds()
        while thread.is_alive():
            thread.join(max(end - time.monotonic(), 0.0))
            if thread.is_alive() and time.monotonic() >= end:
                last, seen = seen, self._beat_of(rank)
                if seen in ("", last):
                    self._close()
                    raise RuntimeError(f"no sign of life for {self.timeout.total_seconds():g} s")
                end = time.monotonic() + self.timeout.total_seconds()
        if errors:
            raise errors[0]

    def _beat_of(self, rank: int) -> str:
        """The last sign of life of a rank in this exchange; empty if there is none."""
        with suppress(RuntimeError):
            if self._store.check([f"beat/{rank}"]):
                found = self._store.get(f"beat/{rank}").decode()
                return found if found.split()[0] == str(self._exchange) else ""
        return ""

    def _close(self) -> None:
        """Closes the connections, so that others do not wait for this rank: a wait that ends by its timeout does."""
        for rank in range(self._gloo.size()):
            if rank != self._gloo.rank():
                with suppress(RuntimeError):
                    nothing = torch.empty(1, dtype=torch.uint8)
                    self._gloo.recv([nothing], rank, _NO_SUCH_TAG).wait(timedelta(milliseconds=1))

    # When connections have been closed, what the first rank has to say goes another way.

    def write_note(self, failure: _Failure) -> None:
        with suppress(RuntimeError):
            self._store.set("note", pickle.dumps(failure))

    def read_note(self) -> _Failure | None:
        with suppress(RuntimeError):  # none came, or the store was the first rank's and is gone with it
            self._store.wait(["note"], _NOTE_TIME)
            return cast(_Failure, pickle.loads(self._store.get("note")))
        return None


_wires: "weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], _Wire]]" = weakref.WeakKeyDictionary()


def _store(group: "dist.ProcessGroup", ranks: list[int]) -> Any:
    c10d: Any = dist  # whose types do not tell of it
    return c10d.PrefixStore(f"pyshard/checkpoint/{'-'.join(map(str, ranks))}", group.get_group_store())


def _is_here(group: "dist.ProcessGroup", ranks: list[int], rank: int) -> bool:
    try:
        return bool(_store(group, ranks).check([f"here/{rank}"]))
    except RuntimeError:  # the store is gone with the process that kept it
        return True


def _plain(error: Exception) -> str:
    """What gloo says, without the line of its source and its advice."""
    return re.sub(r"^\[\S*\] |\. This is typically.*", "", str(error).splitlines()[0])


def _wire(who: str, group: "dist.ProcessGroup", ranks: list[int]) -> _Wire:
    """The connections between ranks of a group, which come here together, the first time."""
    wires = _wires.setdefault(group, {})
    if tuple(ranks) not in wires:
        try:
            wires[tuple(ranks)] = _Wire(group, ranks)
        except RuntimeError as error:
            missing = [rank for rank in ranks if not _is_here(group, ranks, rank)]
            raise PeerError(
                f"{who}: could not connect to all ranks of the process group ({_plain(error)}); expected all of them "
                f"to call this. {f'Ranks {missing} have not.' if missing else ''}".rstrip(),
                missing[0] if missing else None,
                "connecting",
            ) from error
    return wires[tuple(ranks)]


def ranks_of(who: str, model: nn.Module, opt: Optimizer | None) -> Ranks:
    """The ranks that hold the parts of a model and its optimizer.

    Data-parallel ones are those of the optimizer's process group, and of the meshes of DTensors (with all dimensions
    that these have been cut from); without any all ranks there are. With them come the tensor-parallel ranks and the
    pipeline's, which parameters tell: those of fully sharded modules are their shards from here on.
    """
    naming.reshard(model)
    levels: dict[str, dist.ProcessGroup] = {}
    meshes: set[int] = set()
    roots: set[int] = set()
    for param in model.parameters():
        for name, part in (("tensor-parallel", tensor_shard(param)), ("pipeline", pipeline_share(param))):
            if part is not None:
                levels.setdefault(name, part.group)
        if is_dtensor(param):
            mesh = param.device_mesh  # type: ignore[attr-defined]
            if id(mesh) not in roots:
                roots.add(id(mesh))
                meshes |= set(mesh._get_root_mesh().mesh.flatten().tolist())
    # In one order on all ranks, whose exchanges would wait for each other otherwise.
    order = [(name, levels[name]) for name in ("tensor-parallel", "pipeline") if name in levels]
    return Ranks(who, getattr(opt, "process_group", None), order, meshes)
