"""What each rank was doing when a collective of torch.distributed failed, told to the others through the group's store.

torch's own error says that a connection closed or that time ran out, and not whose fault it was. So a rank whose
operation fails leaves a note in the store of the group, and reads those of the others for up to a second. From them
it tells apart a rank that died (no note, a closed connection), one that is late or hangs (no note, time ran out), one
that is in another operation (its note names it), and one that failed by itself (it says why).

A failure of a group is one on all its ranks, and the last one: connections over gloo do not come back. Ranks count
failures all the same, and read only notes of their own count, so that an old note is never taken for a new one. And
none that is older than their process: torchrun keeps a store when it restarts its workers.

A rank that fails in one group leaves the others waiting in its other groups, where it would look like the one to blame.
So it leaves a note in each of those that it knows (know()), which says whose fault it was, and ends its part in them.
Its neighbours do the same in theirs, and so all ranks of a mesh learn of the one that was first.
"""

import json
import os
import re
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .transport import PeerError

SECONDS = 1.0  # which an error may wait for the notes of others, in all
_POLL = 0.02  # seconds
_TEXT = 2000  # characters of a note's operation, and of its text
_NO_SUCH_TAG = 2**31 - 1

CLOSED, TIMEOUT, OTHER, FAILED, ELSEWHERE = "closed", "timeout", "other", "failed", "elsewhere"

# Failures of each group so far on this rank; attribute of exceptions: the groups that have a note of it already.
_failures: "weakref.WeakKeyDictionary[dist.ProcessGroup, int]" = weakref.WeakKeyDictionary()
_groups: "weakref.WeakSet[dist.ProcessGroup]" = weakref.WeakSet()  # that this process knows
_ended: "weakref.WeakKeyDictionary[dist.ProcessGroup, PeerError]" = weakref.WeakKeyDictionary()  # because of this one
_told = "_pyshard_told"


@dataclass(frozen=True)
class _Note:
    """What one rank says."""

    rank: int  # global
    kind: str  # what its error was: CLOSED, TIMEOUT, OTHER; or it has FAILED by itself, or because of another group
    operation: str
    text: str
    blames: int | None = None  # the rank because of which it failed, if that is another one
    order: int = 0  # of its arrival in the store
    time: float = 0.0  # when it was written, in seconds since the epoch


class Notes:
    """The notes of the ranks of one group.

    Args:
        who: opens error messages.
        group: of torch.distributed; any backend, since notes go through its store.
        hint: closes error messages: in which state things are left.
    """

    def __init__(self, who: str, group: dist.ProcessGroup, hint: str = ""):
        self.who, self.group, self.hint = who, group, hint
        self.ranks = dist.get_process_group_ranks(group)
        self.rank = dist.get_rank()
        know(group)

    def error(self, operation: str, error: BaseException) -> PeerError:
        """The error to raise `from error`, which a collective in `operation` gave; takes up to a second.

        Leaves this rank's note, closes its connections in the group, so that ranks which wait for this one fail now
        and not at their timeout, and reads the notes of the others. Its `rank` is the one to blame: None if that is
        not known, and this rank's own if it was too late for the others. A PeerError is given back as it is.
        """
        if isinstance(error, PeerError):
            return error
        if (ended := self.ended(operation)) is not None:
            return ended
        reason = plain(error)
        mine = _Note(self.rank, _kind(reason), operation, reason)
        end = time.monotonic() + SECONDS
        left = self._leave(mine, error, end)
        abort(self.group)
        notes: dict[int, _Note] = {}
        if left:  # else the store is gone
            _bounded(lambda: self._read(_failures[self.group], notes, end), end)
        notes.setdefault(self.rank, mine)
        rank, text = self._verdict(mine, notes)
        text = text.rstrip(".")
        others = [notes[other] for other in self.ranks if other in notes and other != self.rank]
        words = [f"rank {note.rank} was in: {note.operation}" for note in others if note.operation not in text]
        told = f" R{'; '.join(words)[1:]}." if words else ""
        hint = f" {self.hint}" if self.hint else ""
        found = PeerError(
            f"{self.who}: {operation} failed on rank {self.rank}: {text}.{told}{hint} Look at the first error of that "
            "rank, then start all ranks again from the last checkpoint.",
            rank,
            operation,
        )
        self._tell_other_groups(operation, found)
        return found

    def mismatch(self, operation: str, where: dict[str, list[int]]) -> PeerError:
        """The error of ranks that have found themselves in different operations, each with its ranks; on all of them.

        Connections in this group stay as they are. Other groups are told.
        """
        alone = [ranks[0] for ranks in where.values() if len(ranks) == 1]
        others = [rank for rank in self.ranks if rank != self.rank]
        rank = alone[0] if len(alone) == 1 else others[0] if len(others) == 1 else None
        places = "; ".join(f"{_list(ranks)} in {place}" for place, ranks in where.items())
        hint = f" {self.hint}" if self.hint else ""
        found = PeerError(
            f"{self.who}: {operation} failed on rank {self.rank}: ranks are in different operations: {places}; "
            f"expected the same calls in the same order on all ranks.{hint}",
            rank,
            operation,
        )
        self._tell_other_groups(operation, found)
        return found

    def ended(self, operation: str) -> PeerError | None:
        """The error of whatever is begun in a group that this rank has left because of another group's failure."""
        cause = _ended.get(self.group)
        if cause is None:
            return None
        text = f"{self.who}: {operation} failed on rank {self.rank}: this rank has left the group before: {cause}"
        return PeerError(text, cause.rank, operation)

    def leave(self, operation: str, error: BaseException) -> None:
        """This rank has failed by itself in `operation`: says so, for the others to read when they miss it.

        They notice at once if abort(group) follows. Never raises for a store that is gone. `error` may be a PeerError
        of another group: the others then learn whose fault it was there.
        """
        kind, blames = (ELSEWHERE, error.rank) if isinstance(error, PeerError) else (FAILED, self.rank)
        text = f"{type(error).__name__}: {error}"
        self._leave(_Note(self.rank, kind, operation, text, blames), error, time.monotonic() + SECONDS)
        self._tell_other_groups(operation, error)

    def _tell_other_groups(self, operation: str, error: BaseException) -> None:
        """Leaves notes in all groups that this process knows, and ends its part in them."""
        end = time.monotonic() + SECONDS
        blames = error.rank if isinstance(error, PeerError) else self.rank
        kind = ELSEWHERE if isinstance(error, PeerError) else FAILED
        note = _Note(self.rank, kind, operation, f"{type(error).__name__}: {error}", blames)
        for group in list(_groups):
            if group is not self.group and group not in _ended:
                Notes(self.who, group)._leave(note, error, end)
                _ended[group] = PeerError(note.text, blames, operation)
                abort(group)

    # ---- the store ----

    def _store(self, count: int) -> Any:
        c10d: Any = dist  # whose types do not tell of it
        return c10d.PrefixStore(f"pyshard/notes/{'-'.join(map(str, self.ranks))}/{count}", self.group.get_group_store())

    def _leave(self, note: _Note, error: BaseException, end: float) -> bool:
        """Writes a note, once for each failure: an exception may pass several layers. False if it could not."""
        told: frozenset[str] = getattr(error, _told, frozenset())
        if self.group.group_name in told:
            return True
        count = _failures[self.group] = _failures.get(self.group, 0) + 1
        setattr(error, _told, told | {self.group.group_name})
        return _bounded(lambda: self._write(count, note), end)

    def _write(self, count: int, note: _Note) -> None:
        store = self._store(count)
        data = asdict(note) | {"order": store.add("order", 1), "time": time.time()}
        data |= {"operation": note.operation[:_TEXT], "text": note.text[:_TEXT]}
        store.set(str(note.rank), json.dumps(data))

    def _read(self, count: int, notes: dict[int, _Note], end: float) -> None:
        """Fills in notes until all are there, or one says that its rank has failed by itself, or time is up."""
        store, born = self._store(count), _born()
        while len(notes) < len(self.ranks) and time.monotonic() < end:
            for rank in self.ranks:
                if rank not in notes and store.check([str(rank)]):
                    note = _Note(**json.loads(store.get(str(rank))))
                    if note.time > born:
                        notes[rank] = note
            if any(note.kind in (FAILED, ELSEWHERE) for note in notes.values()):
                return
            time.sleep(_POLL)

    # ---- what they mean ----

    def _verdict(self, mine: _Note, notes: dict[int, _Note]) -> tuple[int | None, str]:
        """The rank to blame, and what is known of it."""
        inorder = sorted(notes.values(), key=lambda note: note.order)
        others = [rank for rank in self.ranks if rank != self.rank]
        for note in inorder:
            if note.kind == ELSEWHERE:
                why = "" if note.blames is None else f", because of rank {note.blames}"
                return note.blames, f"rank {note.rank} left in {note.operation}{why} ({note.text})"
            if note.kind == FAILED:
                return note.rank, f"rank {note.rank} has failed by itself in {note.operation}: {note.text}"
        first = _first(notes)
        silent = [rank for rank in others if rank not in notes]
        if silent:
            ranks, one = _list(silent), len(silent) == 1
            why = f"{mine.text}" if first.rank == self.rank else f"rank {first.rank}: {first.text}"
            if first.kind == TIMEOUT:
                text = f"{ranks} {'does' if one else 'do'} not answer, hanging or far slower than the others ({why})"
            elif first.kind == CLOSED:
                text = f"{ranks} {'is' if one else 'are'} lost{'' if one else ', or one of them is'} ({why})"
            else:
                text = f"{ranks} {'is' if one else 'are'} lost or {'does' if one else 'do'} not answer ({why})"
            return (silent[0] if one else None), text
        where: dict[str, list[int]] = {}
        for note in sorted(notes.values(), key=lambda note: note.rank):
            where.setdefault(note.operation, []).append(note.rank)
        if len(where) > 1 and first.kind != CLOSED:  # those would wait for each other until their timeout
            places = "; ".join(f"{_list(ranks)} in {place}" for place, ranks in where.items())
            alone = [ranks[0] for ranks in where.values() if len(ranks) == 1]
            odd = alone[0] if len(alone) == 1 else others[0] if len(others) == 1 else None
            text = (
                f"ranks are in different operations: {places} ({mine.text}); expected the same steps on all ranks, or "
                "one came to its operation later than the timeout. TORCH_DISTRIBUTED_DEBUG=DETAIL compares every call"
            )
            return odd, text
        if mine.kind != TIMEOUT and first.kind == TIMEOUT and first.rank != self.rank:
            return self.rank, f"this rank came too late, rank {first.rank} had given up waiting ({first.text})"
        return (
            others[0] if len(others) == 1 else None,
            f"all ranks have left word, so a connection broke or a rank came later than the timeout ({mine.text})",
        )


def know(group: dist.ProcessGroup) -> None:
    """Has failures of other groups be told to this one, of more than one rank."""
    if group.size() > 1:
        _groups.add(group)


def suspect(operation: str, error: BaseException) -> None:
    """Leaves word in all known groups that this rank has failed by itself in an operation without the others.

    Whoever misses it later reads so, unless another failure of this rank comes before that.
    """
    end = time.monotonic() + SECONDS
    for group in list(_groups):
        ours = Notes("", group)
        note = _Note(ours.rank, FAILED, operation, f"{type(error).__name__}: {error}", ours.rank)
        count = _failures.get(group, 0) + 1  # that of the next failure
        _bounded(lambda ours=ours, note=note, count=count: ours._write(count, note), end)  # type: ignore[misc]


def abort(group: dist.ProcessGroup) -> None:
    """Ends this rank's part in a group at once: operations of other ranks that wait for it fail now.

    Over gloo, ProcessGroup.abort() and shutdown() do nothing (torch 2.13), but a wait that ends by its timeout closes
    all connections of the process in the group; so this waits for a message that nobody sends, for a millisecond.
    Other backends are aborted as torch does it. Nothing can be sent in this group afterwards; harmless when repeated.
    """
    c10d: Any = dist  # whose types do not tell of these
    for device in group._device_types:
        with suppress(RuntimeError):  # of connections that are closed already
            backend = group._get_backend(device)
            backend = getattr(backend, "wrapped_pg", backend)  # TORCH_DISTRIBUTED_DEBUG=DETAIL
            if not isinstance(backend, c10d.ProcessGroupGloo):
                backend.abort()
                continue
            for rank in range(group.size()):
                if rank != group.rank():
                    with suppress(RuntimeError):
                        nothing = torch.zeros(1, dtype=torch.uint8)
                        backend.recv([nothing], rank, _NO_SUCH_TAG).wait(timedelta(milliseconds=1))


def _first(notes: dict[int, _Note]) -> _Note:
    """Of what went wrong first. A wait that ends by its timeout closes connections before its rank can say so."""
    return min(notes.values(), key=lambda note: (note.kind != TIMEOUT, note.order))


def _born() -> float:
    """When this process started, in seconds since the epoch."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age


def plain(error: BaseException) -> str:
    """The first line of an error, without the place in gloo's source and its advice."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[\S*\] |\. This is typically.*", "", line)


def _kind(reason: str) -> str:
    if re.search(r"timed? ?out", reason, re.IGNORECASE) and "closure" not in reason:  # closed by an earlier timeout
        return TIMEOUT
    return CLOSED if re.search(r"clos|reset|refused|broken pipe|aborted", reason, re.IGNORECASE) else OTHER


def _list(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _bounded(call: Callable[[], None], end: float) -> bool:
    """Runs it in a thread of its own until a time, since a store whose host is gone may not answer, or raise.

    True if it has returned.
    """
    done: list[bool] = []

    def run() -> None:
        with suppress(Exception):
            call()
            done.append(True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(0.0, end - time.monotonic()))
    return bool(done)
