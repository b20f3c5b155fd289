"""Blocks of rows on their way between the ranks of a tensor-parallel group: gathered, or summed and scattered.

A workspace belongs to one process group and takes its memory and messages from a transport (pyshard/comm). Rows are
cut into chunks; each chunk of a call has a slot of its own, so that it can leave while the next one is computed, and so
that calls that overlap in time do not share memory. Slots are reused when all ranks have read them.

Every block starts with a header that says which call it is of, and its shape: ranks that are out of step find an error
and not another's numbers. (On a GPU it is not looked at, since that would wait for the device.)

Like all collectives, calls must come in the same order on all ranks of the group, whichever threads they come from.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm import Arena, PeerError, Transport
from ..comm.choose import choose
from .choose import Choice, Ends, Shape, even
from .splits import bounds
from .sums import sum_in_order

if TYPE_CHECKING:
    from ..comm.symm_mem import SymmMemTransport
    from .symm_mem import SymmMemMatmul

TRANSPORTS = ("auto", "shm", "ring", "symm_mem", "blocking")
_NAMES = {"ring": "collective"}  # what pyshard.comm calls it

_HEADER = 64  # bytes; a cache line, so that rows keep their alignment
# number of the call, checksum of its name, dtype, shape of a block
_FORMAT = struct.Struct("<QIIqqq")
_SMALLEST = 1 << 16  # bytes of a slot; sizes go up by factors of two, so that shapes share slots
# Slots of one size, and so the most chunks of a call. Where memory is read in place chunks have nothing to hide.
_SLOTS, _SLOTS_IN_PLACE = 8, 2

WHOLE = even(1)

# Writes rows [begin, end) of a whole into a tensor [outer, end - begin, columns].
Compute = Callable[[int, int, Tensor], None]


def _copy(source: Tensor, out: Tensor) -> None:
    out.copy_(source)


class Slot:
    """Memory of one chunk on this rank, and its counterparts on the others."""

    def __init__(self, arena: Arena, index: int, busy: list[bool], operation: str):
        self._arena, self._index, self._busy, self._operation = arena, index, busy, operation
        busy[index] = True
        arena.acquire(index, operation)
        self.memory = arena.slot(index)

    def send(self, spans: Sequence[tuple[int, int]]) -> None:
        """Starts bringing bytes spans[r] to rank r."""
        self._arena.send(self._index, spans, self._operation)

    def arrive(self) -> list[Tensor]:
        """The bytes that each rank has sent to this one."""
        self._arena.arrive(self._index, self._operation)
        return self._arena.sources(self._index)

    def release(self) -> None:
        """Nothing reads it any more here."""
        self._arena.release(self._index)
        self._busy[self._index] = False


class Workspace:
    """What the tensor-parallel matmuls of one group use. All ranks make it together.

    Args:
        group: the ranks.
        transport: "shm", "ring", "symm_mem" or "auto"; "blocking" has none: nothing is overlapped.
        device: of the tensors.
        timeout: seconds after which a rank that does not answer is an error.
    """

    def __init__(self, group: dist.ProcessGroup, transport: str, device: torch.device, timeout: float):
        self.group, self.device, self.timeout = group, device, timeout
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.transport: Transport | None = None
        self.name, self.why = "blocking", "asked for by transport='blocking'"
        if transport != "blocking":
            made = self._choose(transport)
            self.transport, self.why = made, made.why
            self.name = "ring" if made.name == "collective" else made.name
        self.fused: SymmMemMatmul | None = None  # matmuls that wait for their peers themselves
        if self.name == "symm_mem":
            from .symm_mem import SymmMemMatmul  # imports Triton, which not every machine has

            self.fused = SymmMemMatmul(cast("SymmMemTransport", self.transport), timeout)
        self.slots = _SLOTS_IN_PLACE if self.in_place else _SLOTS
        self.choices: dict[Shape, Choice] = {}  # what was found best so far
        self._lanes: dict[int, list[tuple[Arena, list[bool]]]] = {}  # by bytes of a slot
        self._turns: dict[int, int] = {}
        self._calls = 0
        self._lock = threading.Lock()

    def _choose(self, transport: str) -> Transport:
        try:
            return choose("pyshard.tp", _NAMES.get(transport, transport), self.group, self.device, self.timeout)
        except RuntimeError as error:
            if isinstance(error, PeerError):
                raise
            raise RuntimeError(str(error).replace("'collective'", "'ring'")) from error

    @property
    def in_place(self) -> bool:
        """True if ranks read each other's memory: nothing has to travel before it is read."""
        return self.transport is not None and self.transport.in_place

    @property
    def nbytes(self) -> int:
        """Memory of all slots on this rank."""
        return sum(size * arena.slots for size, lanes in self._lanes.items() for arena, _ in lanes)

    def call(self) -> int:
        """A number for the next call, the same on all ranks."""
        with self._lock:
            self._calls += 1
            return self._calls

    def take(self, nbytes: int, operation: str) -> Slot:
        """A slot of at least so many bytes; all ranks must ask for the same number. Waits until all have read it."""
        if self.transport is None:
            raise RuntimeError("pyshard.tp: transport 'blocking' has no slots")
        # Headers come on top, or a power of two of rows would take twice its size.
        headers = self.world * _HEADER
        size = max(_SMALLEST, 1 << max(nbytes - headers - 1, 0).bit_length()) + headers
        with self._lock:
            lanes = self._lanes.setdefault(size, [])
            turn = self._turns.get(size, 0)
            lane = next((lane for lane in lanes if not lane[1][turn]), None)
            if lane is None:
                lane = self.transport.arena(0, size, self.slots), [False] * self.slots
                lanes.append(lane)
            self._turns[size] = (turn + 1) % self.slots
            return Slot(lane[0], turn, lane[1], operation)

    def exchange(self, payload: bytes, operation: str) -> list[bytes]:
        """What every rank has passed, in rank order."""
        if self.transport is not None:
            return self.transport.exchange(payload, operation)
        mine = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine, self.group)
        return [part.cpu().numpy().tobytes() for part in parts]

    def abort(self, message: str) -> None:
        """Tells the other ranks that this one has failed inside a call."""
        if self.transport is not None:
            self.transport.abort(message)

    def close(self) -> None:
        """Gives the memory back and leaves the other ranks; harmless when repeated."""
        self._lanes.clear()
        if self.fused is not None:
            self.fused.close()
        if self.transport is not None:
            self.transport.close()


class _Blocks:
    """Where the chunks of all ranks' rows lie in their slots, and the headers in front of them."""

    def __init__(
        self,
        space: Workspace,
        operation: str,
        outer: int,
        sizes: Sequence[int],
        columns: int,
        dtype: torch.dtype,
        ends: Ends,
    ):
        self.space, self.operation, self.outer, self.sizes = space, operation, outer, list(sizes)
        self.columns, self.dtype = columns, dtype
        self._ends = (0.0, *ends)
        self.chunks = len(ends)
        self.number = space.call()
        self._kind = zlib.crc32(operation.encode())

    def rows(self, rank: int, chunk: int) -> tuple[int, int]:
        """[begin, end) of a chunk of a rank's rows, counted in the whole."""
        begin, _ = bounds(self.sizes, rank)
        size = self.sizes[rank]
        return begin + round(size * self._ends[chunk]), begin + round(size * self._ends[chunk + 1])

    def nbytes(self, rows: int) -> int:
        """Of a block of rows with its header, in whole cache lines."""
        return _HEADER + -(-self.outer * rows * self.columns * self.dtype.itemsize // _HEADER) * _HEADER

    def write_header(self, memory: Tensor, rows: int) -> None:
        if memory.device.type == "cpu":
            header = self._header(rows)
            memory[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)

    def block(self, memory: Tensor, rows: int) -> Tensor:
        """[outer, rows, columns] behind the header in memory."""
        nbytes = self.outer * rows * self.columns * self.dtype.itemsize
        return memory[_HEADER : _HEADER + nbytes].view(self.dtype).view(self.outer, rows, self.columns)

    def read(self, memory: Tensor, rank: int, rows: int) -> Tensor:
        """The block that a rank has sent. Raises RuntimeError if it is not of this call and shape."""
        if memory.device.type == "cpu":
            header = memory[: _FORMAT.size].numpy().tobytes()
            if header != self._header(rows):
                self._complain(rank, rows, header)
        return self.block(memory, rows)

    def _header(self, rows: int) -> bytes:
        return _FORMAT.pack(
            self.number, self._kind, zlib.crc32(str(self.dtype).encode()), self.outer, rows, self.columns
        )

    def _complain(self, rank: int, rows: int, header: bytes) -> None:
        number, kind, dtype, *shape = _FORMAT.unpack(header)
        peer = dist.get_process_group_ranks(self.space.group)[rank]
        if (number, kind) != (self.number, self._kind):
            found = (
                f"is in its call {number} of the group, another operation"
                if kind != self._kind
                else (f"is in its call {number} of the group")
            )
            remedy = "All ranks must make the same calls in the same order."
        elif dtype != zlib.crc32(str(self.dtype).encode()):
            found, remedy = "has sent another dtype", "Give all ranks tensors of one dtype."
        else:
            found = f"has sent {shape[0]} x {shape[1]} rows of {shape[2]}"
            remedy = "If ranks hold different numbers of rows, pass sizes= with all of them."
        raise RuntimeError(
            f"pyshard.tp: {self.operation}, call {self.number} of the group: rank {peer} {found}; expected "
            f"{self.outer} x {rows} rows of {self.columns} in {self.dtype}. {remedy}"
        )


class Gather:
    """Rows of all ranks, [outer, sizes[rank], columns] each, sent on construction.

    Args:
        x: of this rank.
        sizes: rows of each rank.
        ends: of the chunks into which each rank's rows are cut on their way; see choose.py.
    """

    def __init__(self, space: Workspace, x: Tensor, sizes: Sequence[int], ends: Ends, operation: str):
        self._x, self._rank = x, space.rank
        self._blocks = blocks = _Blocks(space, operation, x.shape[0], sizes, x.shape[2], x.dtype, ends)
        self._slots = []
        first, _ = bounds(blocks.sizes, space.rank)
        for chunk in range(blocks.chunks):
            counts = [end - begin for begin, end in (blocks.rows(rank, chunk) for rank in range(space.world))]
            slot = space.take(blocks.nbytes(max(counts)), operation)
            begin, end = blocks.rows(space.rank, chunk)
            blocks.write_header(slot.memory, end - begin)
            blocks.block(slot.memory, end - begin).copy_(x[:, begin - first : end - first])
            slot.send([(0, blocks.nbytes(max(counts)))] * space.world)
            self._slots.append(slot)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """(first row in the whole, rows), this rank's own first, the others' as they arrive.

        Rows are memory of a peer or of a message: valid until the next ones are asked for.
        """
        blocks, world = self._blocks, len(self._blocks.sizes)
        if self._x.shape[1]:
            yield bounds(blocks.sizes, self._rank)[0], self._x
        for chunk, slot in enumerate(self._slots):
            sources = slot.arrive()
            for rank in ((self._rank + step) % world for step in range(1, world)):
                begin, end = blocks.rows(rank, chunk)
                rows = blocks.read(sources[rank], rank, end - begin)
                if end > begin:
                    yield begin, rows
            slot.release()

    def whole(self) -> Tensor:
        """[outer, all rows, columns], once everything is here."""
        x = self._x
        whole = x.new_empty(x.shape[0], sum(self._blocks.sizes), x.shape[2])
        for begin, rows in self:
            whole[:, begin : begin + rows.shape[1]] = rows
        return whole


class Scatter:
    """Sums over ranks of [outer, all rows, columns]; each rank gets the rows that are its own.

    run() computes what the other ranks own first, chunk by chunk, each on its way while the next is computed, and this
    rank's own rows last; result() adds up in rank order. Without ends all rows are computed at once.
    """

    def __init__(
        self,
        space: Workspace,
        outer: int,
        sizes: Sequence[int],
        columns: int,
        dtype: torch.dtype,
        ends: Ends,
        operation: str,
    ):
        self._space, self._operation, self._at_once = space, operation, not ends
        self._blocks = _Blocks(space, operation, outer, sizes, columns, dtype, ends or WHOLE)
        self._slots: list[Slot] = []
        self._own = torch.empty(0)

    def run(self, compute: Compute) -> None:
        """Calls compute(begin, end, out) for parts of the rows that together are all of them."""
        blocks = self._blocks
        if self._at_once and self._space.in_place:
            self._fill_at_once(compute)
        elif self._at_once:
            partial = self._empty(sum(blocks.sizes))
            compute(0, partial.shape[1], partial)
            self._fill(lambda begin, end, out: _copy(partial[:, begin:end], out))
        else:
            self._fill(compute)

    def _fill_at_once(self, compute: Compute) -> None:
        """Peers read their rows where they are."""
        blocks = self._blocks
        whole = sum(blocks.sizes)
        slot = self._space.take(blocks.nbytes(whole), self._operation)
        blocks.write_header(slot.memory, whole)
        compute(0, whole, blocks.block(slot.memory, whole))
        slot.send([(0, blocks.nbytes(whole))] * self._space.world)
        self._slots.append(slot)

    def _fill(self, compute: Compute) -> None:
        space, blocks = self._space, self._blocks
        for chunk in range(blocks.chunks):
            rows = [blocks.rows(rank, chunk) for rank in range(space.world)]
            spans, at = [], 0
            for begin, end in rows:
                spans.append((at, at + blocks.nbytes(end - begin)))
                at = spans[-1][1]
            slot = space.take(at, self._operation)
            for rank in ((space.rank + step) % space.world for step in range(1, space.world)):
                (begin, end), memory = rows[rank], slot.memory[spans[rank][0] : spans[rank][1]]
                blocks.write_header(memory, end - begin)
                if end > begin:
                    compute(begin, end, blocks.block(memory, end - begin))
            slot.send(spans)
            self._slots.append(slot)
        begin, end = bounds(blocks.sizes, space.rank)
        self._own = self._empty(end - begin)
        if end > begin:
            compute(begin, end, self._own)

    def result(self, bias: Tensor | None = None) -> Tensor:
        """[outer, this rank's rows, columns]: the sums and the bias."""
        blocks, me = self._blocks, self._space.rank
        first, last = bounds(blocks.sizes, me)
        if self._at_once and self._space.in_place:
            (slot,) = self._slots
            whole = sum(blocks.sizes)
            parts = [blocks.read(memory, r, whole)[:, first:last] for r, memory in enumerate(slot.arrive())]
            own = self._empty(last - first)
            if last > first:
                sum_in_order(parts, own, bias)
            slot.release()
            return own
        for chunk, slot in enumerate(self._slots):
            begin, end = blocks.rows(me, chunk)
            own = self._own[:, begin - first : end - first]
            parts = [
                own if rank == me else blocks.read(memory, rank, end - begin)
                for rank, memory in enumerate(slot.arrive())
            ]
            if end > begin:
                sum_in_order(parts, own, bias)
            slot.release()
        return self._own

    def _empty(self, rows: int) -> Tensor:
        blocks = self._blocks
        return torch.empty(blocks.outer, rows, blocks.columns, dtype=blocks.dtype, device=self._space.device)


class Total:
    """Sums over ranks of [outer, rows, columns], whole on every rank.

    Two ranks send each other all they have and both add it up: as many bytes as a reduce-scatter and an all-gather, in
    one exchange. More ranks do the latter two.
    """

    def __init__(
        self,
        space: Workspace,
        outer: int,
        sizes: Sequence[int],
        columns: int,
        dtype: torch.dtype,
        ends: Ends,
        operation: str,
    ):
        self._space, self._operation, self._ends = space, operation, ends or WHOLE
        self._scatter = None
        if space.world > 2:
            self._scatter = Scatter(space, outer, sizes, columns, dtype, ends, operation)
        else:
            self._blocks = _Blocks(space, operation, outer, [sum(sizes)], columns, dtype, self._ends)
            self._slots: list[Slot] = []

    def run(self, compute: Compute) -> None:
        """As Scatter.run."""
        if self._scatter is not None:
            self._scatter.run(compute)
            return
        for chunk in range(self._blocks.chunks):
            begin, end = self._blocks.rows(0, chunk)
            nbytes = self._blocks.nbytes(end - begin)
            slot = self._space.take(nbytes, self._operation)
            self._blocks.write_header(slot.memory, end - begin)
            compute(begin, end, self._blocks.block(slot.memory, end - begin))
            slot.send([(0, nbytes)] * self._space.world)
            self._slots.append(slot)

    def result(self, bias: Tensor | None = None) -> Tensor:
        """[outer, rows, columns]: the sums and the bias."""
        if self._scatter is not None:
            own = self._scatter.result(bias)
            sizes = self._scatter._blocks.sizes
            return Gather(self._space, own, sizes, self._ends, f"{self._operation}, gathering the sums").whole()
        blocks = self._blocks
        out = torch.empty(
            blocks.outer, sum(blocks.sizes), blocks.columns, dtype=blocks.dtype, device=self._space.device
        )
        for chunk, slot in enumerate(self._slots):
            begin, end = blocks.rows(0, chunk)
            parts = [blocks.read(memory, rank, end - begin) for rank, memory in enumerate(slot.arrive())]
            sum_in_order(parts, out[:, begin:end], bias)
            slot.release()
        return out
