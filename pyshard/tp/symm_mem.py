"""Tensor-parallel matmuls over memory that GPUs map from each other: one persistent kernel each, tiles that wait.

all_gather_matmul: a rank brings its rows to its peers, chunk by chunk, and raises a flag for each chunk; the kernel
works on its own rows meanwhile, and waits before each tile only for the chunks that the tile needs.
matmul_reduce_scatter: the kernel stores each tile of the partial product for the rank that owns its rows, and raises a
flag there when the last one is stored; the owner waits for all ranks and sums in rank order.

By default what travels is *brought*: every row crosses the link once, into memory of the rank that reads it. With
in_place=True it stays in memory of the rank that made it, and the readers fetch it: less memory, but the rows of x
cross the link once for each block of columns of the weights.

Memory is used again every second call. Before a rank overwrites what it gave in a call, it waits for flags of all
peers that say that they have read it; so a fast rank is at most two calls ahead of a slow one. Calls that run on
different streams at a time have different memory, and one that takes memory again waits for the call that had it.

Flags, waiting and errors: triton_kernels/signals.py and comm/symm_mem.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm.symm_mem import SymmMemTransport
from ..kernels import triton_sharded, triton_tp
from ..kernels.formats import DTYPE_CODES
from ..kernels.triton_sharded import Flags

_WORD = 8  # bytes of a flag
_SLOTS = 2  # calls of one kind whose memory is apart
MAX_CHUNKS = 8  # of one rank's rows
# A chunk is worth its copy and its flag, some 10 us at 400 GB/s. Not measured on a GPU.
CHUNK_BYTES = 4 << 20
_GATHER, _SCATTER = "all_gather_matmul", "matmul_reduce_scatter"


class SymmMemMatmul:
    """Matmuls of one process group. All ranks make one, and call its methods in the same order with the same sizes.

    What a method returns is enqueued on the current stream, not waited for. A peer that does not answer makes the
    kernels leave after `timeout`; the method then, or the next one called, raises PeerError, which names the rank and
    what was missing, and outputs since are garbage.

    Args:
        group: a process group, None for the default one, or a transport that the caller has and closes itself.
        timeout: seconds until a rank that does not answer is an error; a transport has its own.
        device: of the tensors; None: the current CUDA device, else the CPU (in Triton's interpreter, for tests).
        in_place: see the top of this file.
        spare_processors: multiprocessors of a GPU that its matmuls leave to what they wait for, and to other streams.

    Raises:
        RuntimeError: the group cannot use symmetric memory; says why.
        PeerError: a rank does not come.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | SymmMemTransport | None,
        timeout: float = 60.0,
        *,
        device: torch.device | None = None,
        in_place: bool = False,
        spare_processors: int = triton_tp.SPARE_PROCESSORS,
    ):
        self._owned = not isinstance(group, SymmMemTransport)
        if isinstance(group, SymmMemTransport):
            transport: SymmMemTransport | str = group
        else:
            here = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
            transport = SymmMemTransport.create(group, here, timeout)
        if isinstance(transport, str):
            raise RuntimeError(
                f"pyshard.tp: symm_mem cannot be used here: {transport}. Use transport='auto', 'ring' or 'blocking'."
            )
        self.transport, self.in_place = transport, in_place
        self.rank, self.world, self.device = transport.rank, transport.world, transport.device
        self.spare_processors = spare_processors
        self.tiles: triton_tp.Tiles | None = None  # instead of those that fit the shapes
        self.chunk_bytes = CHUNK_BYTES
        self.pause: Callable[[str], None] = lambda what: None  # called before this rank gives something; for tests
        self._gather = _Memory(transport, _GATHER, MAX_CHUNKS)
        self._scatter = _Memory(transport, _SCATTER, 1)
        self._counters = torch.zeros(_SLOTS, self.world, dtype=torch.int64, device=self.device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # Numbers in a row: the kernel adds the chunk's.
        numbers = [transport.number(f"{_GATHER}, chunk {chunk}") for chunk in range(MAX_CHUNKS)]
        self._chunk_number = numbers[0]
        if numbers != list(range(numbers[0], numbers[0] + MAX_CHUNKS)):
            raise RuntimeError(f"pyshard.tp: operations of the transport have numbers {numbers}; expected a row")

    def all_gather_matmul(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], sizes: Sequence[int]
    ) -> list[Tensor]:
        """[x of all ranks] @ weight^T + bias, for each weight: [S, F] each, summed in fp32 and rounded once.

        Args:
            x: [sizes[rank], D], fp32, bf16 or fp16: this rank's rows. Read until the stream has passed this call.
            weights: [F, D] each, of any strides. biases: [F] or None, one for each. All of x's dtype and device.
            sizes: numbers of rows of all ranks, in rank order; some may be 0.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices do not fit. PeerError: a rank is lost, failed or silent.
        """
        self._check(_GATHER, x, weights, biases, sizes, rows=sizes[self.rank] if len(sizes) == self.world else -1)
        x = x.contiguous()
        rows, row_bytes = sum(sizes), x.shape[1] * x.element_size()
        held = max(sizes) if self.in_place else rows
        slot = self._gather.take(held * row_bytes)
        begins = [0, *accumulate(sizes)]
        if self.in_place:
            parts = [buffer.data_ptr() for buffer in slot.buffers]
        else:
            parts = [slot.buffers[self.rank].data_ptr() + begin * row_bytes for begin in begins[:-1]]
        parts[self.rank] = 0
        chunk_rows = self._chunk_rows(max(sizes), row_bytes)
        outs = [x.new_empty(rows, weight.shape[0]) for weight in weights]
        with self._beside():
            self._give_rows(slot, x, 0 if self.in_place else begins[self.rank], chunk_rows)
        ready, cut = Flags(slot.ready, slot.epoch), (self.spare_processors, self.tiles)
        peers, number = self._gather.peers, self._chunk_number
        for weight, bias, out in zip(weights, biases, outs, strict=True):
            bias = bias if bias is None else bias.contiguous()
            triton_tp.gather_matmul(x, weight, bias, out, parts, sizes, peers, ready, chunk_rows, number, *cut)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)  # x is free after this
        slot.release()
        self.transport.check()
        return outs

    def matmul_reduce_scatter(self, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> Tensor:
        """This rank's rows of the sum over ranks of x @ weight^T, and bias: [sizes[rank], F].

        Each rank's product is summed in fp32 and rounded to x's dtype; these are summed in fp32 in rank order, the
        bias is added, and the result is rounded once.

        Args:
            x: [S, D], fp32, bf16 or fp16. weight: [F, D], any strides. bias: [F], the same on all ranks, or None.
            sizes: numbers of rows of all ranks, in rank order, which sum up to S; some may be 0.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices do not fit. PeerError: a rank is lost, failed or silent.
        """
        self._check(_SCATTER, x, [weight], [bias], sizes, rows=sum(sizes))
        x = x.contiguous()
        rows, row_bytes = sizes[self.rank], weight.shape[0] * x.element_size()
        held = sum(sizes) if self.in_place else self.world * max(sizes)
        slot = self._scatter.take(held * row_bytes)
        begins, own = [0, *accumulate(sizes)], slot.buffers[self.rank].data_ptr()
        if self.in_place:
            parts = [own + begin * row_bytes for begin in begins[:-1]]
            sources = [buffer.data_ptr() + begins[self.rank] * row_bytes for buffer in slot.buffers]
        else:
            parts = [buffer.data_ptr() + self.rank * size * row_bytes for buffer, size in zip(slot.buffers, sizes)]
            sources = [own + rank * rows * row_bytes for rank in range(self.world)]
        ready, counters = Flags(slot.ready, slot.epoch), self._counters[slot.index]
        out = x.new_empty(rows, weight.shape[0])
        slot.reclaim()
        self.pause(_SCATTER)
        triton_tp.matmul_scatter(
            x, weight, parts, sizes, counters, self._scatter.peers, ready, self.spare_processors, self.tiles
        )
        if out.numel():
            if self.world > 1:
                number = self.transport.number(f"{_SCATTER}, the chunk of rank {self.transport.ranks[self.rank]}")
                triton_sharded.wait(self._scatter.peers, ready, number)
            bias = bias if bias is None else bias.contiguous()
            triton_tp.sum_parts(sources, bias, out, self.transport.state)
        slot.release()
        self.transport.check()
        return out

    def close(self) -> None:
        """Gives back the memory, once this rank's work is done; harmless when repeated. No rank may call more then."""
        if self._stream is not None:
            torch.cuda.synchronize(self.device)
        self._gather.close()
        self._scatter.close()
        if self._owned:
            self.transport.close()

    # ---- giving ----

    def _chunk_rows(self, rows: int, row_bytes: int) -> int:
        """Rows of a chunk, the same on all ranks."""
        chunks = min(max(-(-rows * row_bytes // self.chunk_bytes), 1), MAX_CHUNKS)
        return max(-(-rows // chunks), 1)

    def _give_rows(self, slot: _Slot, x: Tensor, first: int, chunk_rows: int) -> None:
        """Brings this rank's rows to where the peers look for them, row `first` on, and tells them of each chunk."""
        slot.reclaim()
        if self.world == 1:
            return
        # Rank r needs those of r + 1 first: so each rank gives to the one before it first, and no two to the same.
        peers = [(self.rank - step) % self.world for step in range(1, self.world)]
        for target in [self.rank] if self.in_place else peers:
            memory = slot.buffers[target].view(x.dtype)[first * x.shape[1] :][: x.numel()].view(x.shape)
            for chunk, begin in enumerate(range(0, x.shape[0], chunk_rows)):
                self.pause(f"{_GATHER}, chunk {chunk}")
                memory[begin : begin + chunk_rows].copy_(x[begin : begin + chunk_rows])
                flags = Flags(slot.ready + chunk * self.world * _WORD, slot.epoch)
                if self.in_place:
                    triton_sharded.signal(self._gather.peers, flags)
                else:
                    triton_tp.tell(self._gather.peers, target, flags)

    def _beside(self) -> AbstractContextManager[Any]:
        """A stream of its own, after what the current one has been given."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)

    # ---- checks ----

    def _check(
        self,
        what: str,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        sizes: Sequence[int],
        rows: int,
    ) -> None:
        who = f"pyshard.tp, symm_mem, {what}"
        self.transport.check()
        if len(sizes) != self.world or min(sizes) < 0:
            raise ValueError(f"{who}: sizes {list(sizes)}; expected {self.world} numbers of rows, one for each rank.")
        if x.dim() != 2 or x.shape[0] != rows:
            raise ValueError(
                f"{who}: x has shape {tuple(x.shape)}; expected 2 dimensions and {rows} rows, as sizes says."
            )
        if x.dtype not in DTYPE_CODES:
            raise TypeError(f"{who}: x is {x.dtype}; expected float32, bfloat16 or float16. Use transport='ring'.")
        if len(biases) != len(weights):
            raise ValueError(f"{who}: {len(weights)} weights and {len(biases)} biases; expected one for each, or None.")
        for weight, bias in zip(weights, biases):
            if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
                raise ValueError(
                    f"{who}: weight has shape {tuple(weight.shape)}; expected [out, {x.shape[1]}], as x has columns."
                )
            if bias is not None and bias.shape != weight.shape[:1]:
                raise ValueError(f"{who}: bias has shape {tuple(bias.shape)}; expected [{weight.shape[0]}].")
        for tensor in (x, *weights, *(bias for bias in biases if bias is not None)):
            if tensor.dtype != x.dtype or tensor.device != self.device:
                raise TypeError(
                    f"{who}: got a {tensor.dtype} tensor on {tensor.device}; expected x's {x.dtype} on {self.device}. "
                    "Convert it first."
                )


class _Slot:
    """Memory and flags of a call; those of a later one come after its release."""

    def __init__(self, transport: SymmMemTransport, memory: _Memory, index: int, ready: int, read: int):
        self.index = index
        self.ready, self.read = ready, read  # bytes of the flags; the first of the ready ones
        self.buffers: list[Tensor] = []  # uint8, of all ranks
        self.epoch = 0  # calls that have taken it
        self._transport, self._memory = transport, memory
        self._done = torch.cuda.Event() if transport.device.type == "cuda" else None

    def take(self) -> None:
        """For a new call, after the one that had it, be it on another stream."""
        self.epoch += 1
        if self._done is not None and self.epoch > 1:
            torch.cuda.current_stream(self._transport.device).wait_event(self._done)

    def reclaim(self) -> None:
        """Holds the stream until all peers have read what the last call gave."""
        if self._transport.world > 1 and self.epoch > 1:
            number = self._transport.number(f"{self._memory.what}, reading of the call before the last")
            triton_sharded.wait(self._memory.peers, Flags(self.read, self.epoch - 1), number)

    def release(self) -> None:
        """Tells the peers that what they gave in this call has been read."""
        if self._transport.world > 1:
            triton_sharded.signal(self._memory.peers, Flags(self.read, self.epoch))
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(self._transport.device))


class _Memory:
    """The slots of one kind of call."""

    def __init__(self, transport: SymmMemTransport, what: str, chunks: int):
        self.what = what
        self._transport = transport
        stride = (chunks + 1) * transport.world * _WORD
        self._flags = transport.map(_SLOTS * stride)
        self.peers = transport.peers(self._flags)
        ends = [stride * (index + 1) for index in range(_SLOTS)]
        reads = [end - transport.world * _WORD for end in ends]
        self._slots = [_Slot(transport, self, i, stride * i, read) for i, read in enumerate(reads)]
        self._bytes = self._calls = 0

    def take(self, nbytes: int) -> _Slot:
        """The next slot, with `nbytes` on each rank; all ranks ask for the same."""
        if not self._calls or nbytes > self._bytes:
            self._grow(nbytes)
        slot = self._slots[self._calls % _SLOTS]
        self._calls += 1
        slot.take()
        return slot

    def _grow(self, nbytes: int) -> None:
        """New memory for all slots. What the old one held has been read everywhere before this returns."""
        size = 256 << max(math.ceil(math.log2(max(nbytes, 1) / 256)), 0)
        if self._transport.device.type == "cuda":
            torch.cuda.synchronize(self._transport.device)
        self._transport.exchange(b"", f"{self.what}, memory for larger matmuls")
        buffers = self._transport.map(size * _SLOTS)
        for slot in self._slots:
            slot.buffers = [buffer[size * slot.index :][:size] for buffer in buffers]
        self._bytes = size

    def close(self) -> None:
        for slot in self._slots:
            slot.buffers = []
        self._flags = []
