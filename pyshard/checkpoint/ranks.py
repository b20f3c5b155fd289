"""The ranks that make or read a checkpoint together: one exchange, in which a failure of one is an error of all.

Every rank sends a message to the first one, which answers each. The connections are gloo's, one between each pair of
processes: when a process dies they close, so the first rank knows at once who is gone, and tells the others.
"""

import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm import PeerError

T = TypeVar("T")
R = TypeVar("R")

_TAG = 0x5AFE  # of our messages, among others of the group
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
    kind: str  # name of an error of the caller's, "lost", or ""
    filename: str | None = None


class Ranks:
    """The processes of a group, or this one alone if there is no group.

    Args:
        who: opens error messages.
        group: None is the default group.
    """

    def __init__(self, who: str, group: "dist.ProcessGroup | None"):
        self.who = who
        self.hint = ""  # closes error messages: in which state things are left, and what to do
        self.rank, self.world, self.ranks = 0, 1, [0]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) != 1:
            self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
            self.ranks = dist.get_process_group_ranks(group)
            if self.rank < 0:
                raise ValueError(
                    f"{who}: this process (rank {dist.get_rank()}) is not in the optimizer's process group; expected "
                    f"one of its ranks {self.ranks}. Call this on these ranks only."
                )
            self._group = _gloo(group)
            backend = self._group._get_backend(torch.device("cpu"))
            self._timeout: timedelta = getattr(getattr(backend, "options", None), "_timeout", timedelta(minutes=30))

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
        cause: BaseException | None = None
        message: T | _Failure
        try:
            message = mine()
        except BaseException as error:
            cause, message = error, self._failure(operation, error)
        answer: R | _Failure
        if self.first:
            messages = [message, *self._receive_all(operation)]
            failures = [m for m in messages if isinstance(m, _Failure)]
            # A loss comes first: what else fails may be its consequence.
            failures.sort(key=lambda failure: failure.kind != "lost")
            answers: list[Any] = failures[:1] * self.world
            if not failures:
                try:
                    answers = list(decide(messages))
                except BaseException as error:
                    cause, answers = error, [self._failure(operation, error)] * self.world
            for rank in range(1, self.world):
                self._try_to_send(answers[rank], rank)
            answer = answers[0]
        else:
            # The first rank waits as long as one timeout for each of the others.
            try:
                self._send(message, 0)
                answer = self._receive(0, self._timeout * 2)
            except RuntimeError as error:
                answer = self._loss(operation, 0, error)
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
        kinds = [kind.__name__ for kind in _OF_THE_CALLER if type(error) is kind]
        text = str(error) if kinds else f"{type(error).__name__}: {error}"
        return _Failure(self.ranks[self.rank], operation, text, *kinds or [""])

    def _loss(self, operation: str, rank: int, error: Exception) -> _Failure:
        return _Failure(self.ranks[rank], operation, str(error).splitlines()[0], "lost")

    def _error(self, failure: _Failure) -> Exception:
        rank, operation, end = failure.rank, failure.operation, f" {self.hint}" if self.hint else ""
        for kind in _OF_THE_CALLER:
            if failure.kind == kind.__name__:
                return kind(f"{self.who}: {failure.text}{end}")
        if failure.kind == "lost":
            text = f"rank {rank} is lost or does not answer while {operation} ({failure.text})."
            return PeerError(f"{self.who}: {text}{end}", rank, operation)
        where = f" on rank {rank}" if self.world > 1 else ""
        text = f"{self.who}: failed{where} while {operation}: {failure.text}."
        return CheckpointError(text + end, rank, operation)

    # ---- messages ----

    def _send(self, value: object, rank: int) -> None:
        data = pickle.dumps(value)
        for tensor in (torch.tensor([len(data)]), torch.frombuffer(bytearray(data), dtype=torch.uint8)):
            work = dist.isend(tensor, self.ranks[rank], group=self._group, tag=_TAG)
            if work is not None:
                work.wait()

    def _try_to_send(self, value: object, rank: int) -> None:
        try:
            self._send(value, rank)
        except RuntimeError:  # it is gone: the next exchange will say so, or there is none
            pass

    def _receive(self, rank: int, timeout: timedelta, size: "tuple[Tensor, Any] | None" = None) -> Any:
        length, work = size or self._expect(rank)
        work.wait(timeout)
        data = torch.empty(int(length), dtype=torch.uint8)
        work = dist.irecv(data, self.ranks[rank], group=self._group, tag=_TAG)
        if work is not None:
            work.wait(timeout)
        return pickle.loads(data.numpy().tobytes())

    def _expect(self, rank: int) -> tuple[Tensor, Any]:
        """Starts to receive the length of a rank's message."""
        length = torch.empty(1, dtype=torch.int64)
        return length, dist.irecv(length, self.ranks[rank], group=self._group, tag=_TAG)

    def _receive_all(self, operation: str) -> list[Any]:
        """The messages of all ranks but the first; a failure in place of one that is lost."""
        expected: list[Any] = []
        for rank in range(1, self.world):
            try:
                expected.append(self._expect(rank))
            except RuntimeError as error:
                expected.append(self._loss(operation, rank, error))
        received = []
        for rank, size in enumerate(expected, start=1):
            if not isinstance(size, _Failure):
                try:
                    size = self._receive(rank, self._timeout, size)
                except RuntimeError as error:
                    size = self._loss(operation, rank, error)
            received.append(size)
        return received


_siblings: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()


def _gloo(group: "dist.ProcessGroup | None") -> Any:
    """The group if gloo serves it on the CPU, else one of the same ranks that gloo serves, made once."""
    known = group or dist.distributed_c10d._get_default_group()
    if "cpu:gloo" in dist.get_backend_config(known):
        return known
    if known not in _siblings:
        ranks = dist.get_process_group_ranks(known)
        _siblings[known] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return _siblings[known]
