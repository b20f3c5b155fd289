"""Transport `shm`: CPU tensors of ranks on one host, which read and write each other's memory in place.

Each rank has a control block (small payloads, counters, what it does) and, for each arena, memory with counters, its
parameters and its slots; all ranks map all of them. That ranks share a host is proven by a random token: it goes
through the process group, and every rank must find it in the memory that it has mapped.
"""

import json
import os
import secrets
import socket
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _C
from .memory import available_memory
from .transport import IN_PLACE_BUCKET_BYTES, Arena, PeerError, Spans, Transport

_PAGE = 4096  # params and slots start at a page, so that writes of one rank touch no line that another reads
_LINE = 64  # bytes of a counter
# MemAvailable is an estimate, and memory that ends is found by a kill: stay a little below.
_USABLE = 0.95

_PUBLISHED = 0  # counters of an arena: this one, then two for each slot
_PROCESS_STATES = {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for a disk", "Z": "ended"}


def _sent(index: int) -> int:
    return 1 + 2 * index


def _released(index: int) -> int:
    return 2 + 2 * index


class Offer(NamedTuple):
    """Where a rank's control block is, and the token at its start."""

    host: str
    pid: int
    fd: int
    size: int
    token: bytes


class ShmTransport(Transport):
    """The ranks of a group on one host. Made by create()."""

    name = "shm"
    in_place = True
    bucket_bytes = IN_PLACE_BUCKET_BYTES

    def __init__(self, mailbox: "_C.Mailbox", rank: int, ranks: list[int], pids: list[int], timeout: float):
        self.rank, self.ranks, self.world = rank, ranks, len(ranks)
        self.why = f"all {self.world} ranks run on this host and have mapped each other's memory"
        self._mailbox, self._pids, self._timeout = mailbox, pids, timeout

    @classmethod
    def create(cls, group: dist.ProcessGroup | None, timeout: float) -> "ShmTransport | str":
        """The transport of a group (None: the default one), or on all ranks one text that says why there can be none.

        All ranks of the group call it; `timeout` in seconds is for everything that waits later. The group is used
        here only.

        Raises:
            ValueError: if the timeout is not above 0.
        """
        if not timeout > 0:
            raise ValueError(f"shm: timeout is {timeout}; expected seconds above 0. Pass timeout=600, for example.")
        rank = dist.get_rank(group)
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        own: Any = None
        try:
            own = _C.SharedMemory(_C.Mailbox.block_bytes)
            offer: Offer | str = _offer(own)
        except RuntimeError as error:
            offer = f"rank {ranks[rank]} on {socket.gethostname()} cannot make shared memory: {error}"
        offers = _gather(offer, group)
        for found in offers:
            if isinstance(found, str):
                return found

        pids = [peer.pid for peer in offers]
        mailbox: Any = None
        problem = ""
        try:
            memories = [own if peer == rank else _map(offers[peer], ranks[peer]) for peer in range(len(ranks))]
            mailbox = _C.Mailbox(memories, pids, rank)
        except RuntimeError as error:
            problem = f"rank {ranks[rank]} on {socket.gethostname()} cannot reach the memory of its peers: {error}"
        for text in _gather(problem, group):
            if text:
                return text
        own.seal_off()
        return cls(mailbox, rank, ranks, pids, timeout)

    def exchange(self, payload: bytes, operation: str) -> list[bytes]:
        trouble, results = self._mailbox.exchange(payload, operation, self._timeout)
        if trouble is not None:
            raise self._error(trouble, operation)
        return results

    def arena(self, param_bytes: int, slot_bytes: int, slots: int) -> "ShmArena":
        layout = _Layout(param_bytes, slot_bytes, slots)
        problem = self._too_large(layout)
        memories: list[_C.SharedMemory] = []
        if not problem:
            memories, problem = self._map_arena(layout)
        if problem:
            memories.clear()  # the error's traceback must not keep them
            raise MemoryError(
                f"shm: no memory for {layout}: {problem}. Use a smaller bucket_mb, fewer ranks on this host, or "
                "transport='collective'."
            )
        return ShmArena(self, memories, layout)

    def abort(self, message: str) -> None:
        self._mailbox.abort(message)

    def close(self) -> None:
        """Leaves the other ranks. Tensors over the memory of arenas stay valid, and keep it, until they are dropped."""
        self._mailbox.close()

    def wait(self, counters: "_C.Counters", index: int, target: int, operation: str) -> None:
        """Waits until a counter of all ranks has reached the target."""
        trouble = self._mailbox.wait(counters, index, target, operation, self._timeout)
        if trouble is not None:
            raise self._error(trouble, operation)

    def advance(self, counters: "_C.Counters", index: int, operation: str) -> None:
        """Counts one more on this rank's counter."""
        trouble = self._mailbox.advance(counters, index, operation)
        if trouble is not None:
            raise self._error(trouble, operation)

    def _share(self, text: str, operation: str) -> list[str]:
        """The texts of all ranks, of any length."""
        data = text.encode()
        sizes = [int.from_bytes(size, "little") for size in self.exchange(len(data).to_bytes(8, "little"), operation)]
        padded = self.exchange(data.ljust(max(sizes), b"\0"), operation)
        return [data[:size].decode() for data, size in zip(padded, sizes)]

    def _first(self, problem: str, operation: str) -> str:
        """The first rank's problem, the same on all ranks; "" if none has one."""
        for rank, text in zip(self.ranks, self._share(problem, operation)):
            if text:
                return f"rank {rank}: {text}"
        return ""

    def _too_large(self, layout: "_Layout") -> str:
        """What of the memory that all ranks are about to take is not there, the same on all ranks; "" if all is."""
        try:
            own: dict | str = available_memory()
        except OSError as error:
            own = str(error)
        limits = [json.loads(text) for text in self._share(json.dumps(own), "looking at free memory")]
        for rank, found in zip(self.ranks, limits):
            if isinstance(found, str):
                return f"rank {rank}: {found}"
        # With page tables, 8 bytes a page, for all of its own memory and its share of each peer's.
        each = layout.size + 2 * layout.size // 512
        for name in sorted({name for found in limits for name in found}):
            left = min(found[name] for found in limits if name in found)
            sharers = [rank for rank, found in zip(self.ranks, limits) if name in found]
            if len(sharers) * each > _USABLE * left:
                return (
                    f"{name} leaves {_mib(left)}, of which {_USABLE:.0%} may be taken; ranks "
                    f"{', '.join(map(str, sharers))} need {_mib(each)} each, {_mib(len(sharers) * each)} together"
                )
        return ""

    def _map_arena(self, layout: "_Layout") -> "tuple[list[_C.SharedMemory], str]":
        """The memories of all ranks, or what has failed, the same on all ranks."""
        memories: list[_C.SharedMemory] = []
        own: Any = None
        problem = ""
        try:
            own = _C.SharedMemory(layout.size)
        except RuntimeError as error:
            problem = str(error)
        if problem := self._first(problem, "taking memory for an arena"):
            return memories, problem
        fds = self._share(str(own.fd), "mapping an arena")
        try:
            for peer, (pid, fd) in enumerate(zip(self._pids, fds)):
                memories.append(own if peer == self.rank else _C.SharedMemory(pid, int(fd), layout.size))
            # A peer's pages are mapped as they are touched: of each peer's memory that is this rank's share.
            own.populate()
        except RuntimeError as error:
            problem = str(error)
        problem = self._first(problem, "mapping an arena")
        own.seal_off()
        return memories, problem

    def _error(self, trouble: "_C.Trouble", operation: str) -> PeerError:
        """What has happened, to whom, in what, and what can be done."""
        peer, kind = trouble.rank, trouble.kind
        who, doings = f"rank {self.ranks[peer]} (process {self._pids[peer]})", self._doings(peer)
        if kind == "died":
            what = f"{who} has died. {doings} {_LOOK_THERE}"
        elif kind == "failed":
            what = f"{who} has failed: {_text(self._mailbox.message(peer))}. {doings} {_LOOK_THERE}"
        elif kind == "left":
            what = f"{who} has closed its transport. {doings} {_SAME_CALLS}"
        elif kind == "blamed":
            witness = self.ranks[trouble.witness]
            what = f"rank {witness} has ended because of {self._late(peer)} {_LOOK_THERE}"
        elif kind == "gave_up":
            what = (
                f"{who} has ended because it waited for this rank in vain. {doings} Was this process stopped, or only "
                "slow? Start all ranks again, with a larger timeout if it was slow."
            )
        elif kind == "length":
            what = f"{who} has passed another number of bytes. {doings} {_SAME_CALLS}"
        else:
            late = " ".join(self._late(peer) for peer in trouble.late)
            what = f"waited {self._timeout:g} s in vain for {late} {_SAME_CALLS} If it is slow, pass a larger timeout."
        here = f"shm: rank {self.ranks[self.rank]} in '{operation}': "
        return PeerError(here + what, self.ranks[peer], operation)

    def _late(self, peer: int) -> str:
        pid = self._pids[peer]
        return f"rank {self.ranks[peer]} (process {pid}, {_process_state(pid)}). {self._doings(peer)}"

    def _doings(self, peer: int) -> str:
        operation = _text(self._mailbox.operation(peer))
        if not operation:
            return "It had called nothing yet."
        return f"It waited in '{operation}'." if self._mailbox.waiting(peer) else f"Its last call was '{operation}'."


_LOOK_THERE = (
    "Its own output says why; if there is none, it may have been killed for lack of memory (dmesg). Start all ranks "
    "again from the last checkpoint."
)
_SAME_CALLS = "All ranks must make the same calls in the same order."


class _Layout:
    """Where things lie in an arena's memory, the same on all ranks."""

    def __init__(self, param_bytes: int, slot_bytes: int, slots: int):
        if min(param_bytes, slot_bytes, slots) < 0:
            raise ValueError(f"shm: an arena of {param_bytes} bytes and {slots} slots of {slot_bytes}: negative size")
        self.param_bytes, self.slot_bytes, self.slots = param_bytes, slot_bytes, slots
        self.counters = 1 + 2 * slots
        self.params = _to_page(self.counters * _LINE)
        self.first_slot = self.params + _to_page(param_bytes)
        self.size = self.first_slot + slots * _to_page(slot_bytes)

    def slot(self, index: int) -> int:
        return self.first_slot + index * _to_page(self.slot_bytes)

    def __str__(self) -> str:
        slots = f"{self.slots} slots of {_mib(self.slot_bytes)}"
        return f"{_mib(self.param_bytes)} of parameters and {slots}, {_mib(self.size)} for each rank"


class ShmArena(Arena):
    """Parameters and slots of all ranks, mapped by each."""

    def __init__(self, transport: ShmTransport, memories: "list[_C.SharedMemory]", layout: _Layout):
        self._transport, self._layout, self._rank = transport, layout, transport.rank
        self.slot_bytes, self.slots = layout.slot_bytes, layout.slots
        self._counters = _C.Counters(memories, transport.rank, 0, layout.counters)
        # A tensor keeps the memory under it.
        self._all = [torch.frombuffer(memory, dtype=torch.uint8) for memory in memories]
        params = [memory.narrow(0, layout.params, layout.param_bytes) for memory in self._all]
        self.params = params[self._rank]
        self.targets = params[: self._rank] + params[self._rank + 1 :]
        own = self._all[self._rank]
        self._slots = [own.narrow(0, layout.slot(index), layout.slot_bytes) for index in range(layout.slots)]
        self._states = ["free"] * layout.slots
        self._sends = [0] * layout.slots
        self._spans = [(0, 0)] * layout.slots
        self._published = 0

    def slot(self, index: int) -> Tensor:
        return self._slots[index]

    def acquire(self, index: int, operation: str, block: bool = True) -> bool:
        self._expect(index, "acquire", "free", "acquired")
        if self._reached(_released(index), self._sends[index], operation, block):
            self._states[index] = "acquired"
            return True
        return False

    def send(self, index: int, spans: Spans, operation: str) -> None:
        self._expect(index, "send", "acquired")
        begin, end = spans[self._rank]
        if not (len(spans) == self._transport.world and 0 <= begin <= end <= self._layout.slot_bytes):
            raise ValueError(
                f"shm: spans of '{operation}' are {list(spans)}; expected one for each of {self._transport.world} "
                f"ranks, inside {self._layout.slot_bytes} bytes"
            )
        self._transport.advance(self._counters, _sent(index), operation)
        self._sends[index] += 1
        self._spans[index] = (begin, end)
        self._states[index] = "sent"

    def arrive(self, index: int, operation: str, block: bool = True) -> bool:
        self._expect(index, "arrive", "sent", "arrived")
        if self._reached(_sent(index), self._sends[index], operation, block):
            self._states[index] = "arrived"
            return True
        return False

    def sources(self, index: int) -> list[Tensor]:
        self._expect(index, "sources", "arrived")
        begin, end = self._spans[index]
        start = self._layout.slot(index)
        return [memory.narrow(0, start + begin, end - begin) for memory in self._all]

    def release(self, index: int) -> None:
        self._expect(index, "release", "arrived")
        self._transport.advance(self._counters, _released(index), f"release of slot {index}")
        self._states[index] = "free"

    def publish(self, begin: int, end: int, spans: Spans, operation: str) -> int:
        self._transport.advance(self._counters, _PUBLISHED, operation)
        self._published += 1
        return self._published

    def published(self, ticket: int, operation: str) -> None:
        if not 0 < ticket <= self._published:
            raise ValueError(f"shm: ticket {ticket} in '{operation}'; expected one that publish() has returned")
        self._reached(_PUBLISHED, ticket, operation, True)

    def _reached(self, counter: int, target: int, operation: str, block: bool) -> bool:
        """Whether all ranks' counters have; with block, waits until they have."""
        if self._counters.reached(counter, target):
            return True
        if block:
            self._transport.wait(self._counters, counter, target, operation)
        return block

    def _expect(self, index: int, call: str, *states: str) -> None:
        if self._states[index] not in states:
            raise RuntimeError(
                f"shm: {call} of slot {index}, which is {self._states[index]}; expected {' or '.join(states)}. "
                "A slot goes round: acquire, send, arrive, release."
            )


def _offer(memory: "_C.SharedMemory") -> Offer:
    """What the peers need in order to map this rank's control block and to know that it is the right one."""
    token = secrets.token_bytes(32)
    memoryview(memory)[: len(token)] = token
    return Offer(socket.gethostname(), os.getpid(), memory.fd, _C.Mailbox.block_bytes, token)


def _map(offer: Offer, rank: int) -> "_C.SharedMemory":
    """The control block of a peer; RuntimeError if it cannot be mapped or is not of that rank."""
    who = f"rank {rank} (process {offer.pid} on {offer.host})"
    if offer.size != _C.Mailbox.block_bytes:
        raise RuntimeError(f"{who} has another version of pyshard")
    try:
        memory = _C.SharedMemory(offer.pid, offer.fd, offer.size)
    except RuntimeError as error:
        raise RuntimeError(f"{who}: {error}") from None
    if bytes(memoryview(memory)[: len(offer.token)]) != offer.token:
        raise RuntimeError(f"{who}: the process with that number here does not have its token")
    return memory


def _gather(value: object, group: dist.ProcessGroup | None) -> list:
    values: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _process_state(pid: int) -> str:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "ended"
    return _PROCESS_STATES.get(state, "alive")


def _text(note: bytes) -> str:
    return note.decode(errors="replace")  # it may have been cut inside a character


def _to_page(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
