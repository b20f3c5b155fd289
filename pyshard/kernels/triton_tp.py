"""The Triton kernels of tensor-parallel matmuls over peers' memory: launches, and the tables that they take.

As kernels/triton_sharded.py: everything is enqueued on the current stream of the device, and with TRITON_INTERPRET=1
runs in the interpreter, at once, on CPU tensors. Shapes and dtypes are checked by the caller (tp/symm_mem.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .formats import DTYPE_CODES
from .triton import _BITS, _file, _launch
from .triton_sharded import Flags, Peers, _table


@dataclass(frozen=True)
class Tiles:
    """How a matmul is cut: a tile of m rows and n columns is summed k terms at a time by one program."""

    m: int
    n: int
    k: int
    band: int = 8  # blocks of rows that are worked on together
    warps: int = 8
    stages: int = 3  # loads of k terms under way
    programs: int = 0  # at most; 0: one per multiprocessor that is not spared


# Chosen by what compiles for sm_80 and sm_90 without spills, with all stages in shared memory; not measured on a GPU.
_TILES_16 = Tiles(128, 128, 64, stages=4)
_TILES_16_ODD = Tiles(64, 64, 32, warps=4)  # rows that cannot be read 16 bytes at a time
_TILES_32 = Tiles(64, 64, 16, stages=2)  # without tensor cores, which would round fp32 operands
_TILES_INTERPRETED = Tiles(16, 16, 16, band=2, programs=3)  # so that tests have several tiles, and several per program
# Multiprocessors that no program of a matmul holds while it waits: they run what it waits for. Not measured on a GPU.
SPARE_PROCESSORS = 4


def tiles_for(x: Tensor, weight: Tensor) -> Tiles:
    """How x @ weight^T is cut."""
    if x.device.type == "cpu":
        return _TILES_INTERPRETED
    if x.dtype == torch.float32:
        return _TILES_32
    return _TILES_16 if all(width * x.element_size() % 16 == 0 for width in weight.shape) else _TILES_16_ODD


def tell(peers: Peers, peer: int, flags: Flags) -> None:
    """Raises this rank's flag at one peer, which will then see all that was enqueued before."""
    file = _file("gather_matmul")
    arguments = (peers.buffers, flags.offset, flags.value, peers.me, peer, peers.state)
    _launch(file.tell_kernel, 1, peers.buffers.device, *arguments, num_warps=1)


def gather_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    parts: Sequence[int],
    sizes: Sequence[int],
    peers: Peers,
    ready: Flags,
    chunk_rows: int,
    operation: int,
    spare: int = SPARE_PROCESSORS,
    tiles: Tiles | None = None,
) -> None:
    """out = (rows of all ranks) @ weight^T + bias, each tile as soon as the rows that it needs are there.

    Args:
        x: [sizes[me], K], contiguous, fp32, bf16 or fp16: this rank's rows.
        weight: [N, K], any strides. bias: [N], contiguous, or None. out: [M, N], contiguous. All of x's dtype.
        parts: address of each rank's rows; this rank's own is not used.
        sizes: numbers of rows of all ranks; their sum is M.
        ready: flags that say that a peer's rows 0 to chunk_rows - 1 are there. Those of its next chunk are `world`
            words further.
        operation: number of waiting for chunk 0; of chunk c it is c more.
        spare: multiprocessors that are left to other kernels.
    """
    file = _file("gather_matmul")
    (m, n), k = out.shape, x.shape[1]
    tiles = tiles or tiles_for(x, weight)
    pointers = (x, weight, _bits(bias), _bits(out), _parts(parts, sizes, x), peers.buffers, peers.state)
    flags = (peers.me, chunk_rows, ready.offset, ready.value, peers.limit, operation)
    aligned = _aligned(x, k, (a for rank, a in enumerate(parts) if rank != peers.me))
    constants = _constants(x, n, k, sizes, aligned, _aligned(out, n), tiles)
    blocks, device = _programs(m, n, x.device, tiles, spare), x.device
    _launch(file.gather_matmul_kernel, blocks, device, *pointers, m, n, k, *weight.stride(), *flags, **constants)


def matmul_scatter(
    x: Tensor,
    weight: Tensor,
    parts: Sequence[int],
    sizes: Sequence[int],
    counters: Tensor,
    peers: Peers,
    ready: Flags,
    spare: int = SPARE_PROCESSORS,
    tiles: Tiles | None = None,
) -> None:
    """Stores x @ weight^T, rounded to x's dtype, in parts, and raises this rank's flag at each peer for its part.

    Args:
        x: [M, K], contiguous, fp32, bf16 or fp16.
        weight: [N, K] of x's dtype, any strides.
        parts: address to which each rank's rows are written, [sizes[rank], N].
        sizes: numbers of rows of all ranks; their sum is M.
        counters: int64 [world] of zeros, for this launch alone.
        spare: multiprocessors that are left to other kernels.
    """
    file = _file("matmul_scatter")
    (m, k), n = x.shape, weight.shape[0]
    tiles = tiles or tiles_for(x, weight)
    pointers = (x, weight, _parts(parts, sizes, x), counters, peers.buffers, peers.state)
    aligned = n * x.element_size() % 16 == 0 and all(address % 16 == 0 for address in parts)
    constants = _constants(x, n, k, sizes, _aligned(x, k), aligned, tiles)
    arguments = (m, n, k, *weight.stride(), peers.me, ready.offset, ready.value)
    blocks, device = _programs(m, n, x.device, tiles, spare), x.device
    _launch(file.matmul_scatter_kernel, blocks, device, *pointers, *arguments, **constants)


def sum_parts(parts: Sequence[int], bias: Tensor | None, out: Tensor, state: Tensor) -> None:
    """out = parts[0] + parts[1] + ... + bias in fp32 and in this order, rounded once to out's dtype.

    Args:
        parts: addresses, in rank order, of arrays as `out`.
        bias: [N] as out, contiguous, or None. out: [rows, N], contiguous, fp32, bf16 or fp16.
        state: of a Peers; nothing happens if a wait has failed before.
    """
    file, n = _file("matmul_scatter"), out.numel()
    constants = {
        "DTYPE": DTYPE_CODES[out.dtype],
        "ALIGNED": all(address % 16 == 0 for address in parts),
        "SOURCES": len(parts),
        "BLOCK": file.SUM_BLOCK,
    }
    arguments = (_table(tuple(parts), out.device), _bits(bias), _bits(out), state, n, out.shape[1])
    _launch(file.sum_kernel, -(-n // file.SUM_BLOCK), out.device, *arguments, num_warps=file.SUM_WARPS, **constants)


def _bits(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None else tensor.view(_BITS[tensor.dtype])


def _parts(addresses: Sequence[int], sizes: Sequence[int], x: Tensor) -> Tensor:
    """The table of triton_kernels/tile_matmul.py."""
    return _table((*addresses, 0, *accumulate(sizes)), x.device)


def _aligned(tensor: Tensor, width: int, addresses: Any = ()) -> bool:
    """Whether all rows of contiguous arrays of this width begin at multiples of 16 bytes."""
    rows = width * tensor.element_size() % 16 == 0
    return rows and all(address % 16 == 0 for address in (tensor.data_ptr(), *addresses))


def _constants(
    x: Tensor, n: int, k: int, sizes: Sequence[int], aligned: bool, out_aligned: bool, tiles: Tiles
) -> dict[str, Any]:
    return {
        "DTYPE": DTYPE_CODES[x.dtype],
        "WORLD": len(sizes),
        "EVEN": n % tiles.n == 0 and k % tiles.k == 0,
        "ALIGNED": aligned,
        "OUT_ALIGNED": out_aligned,
        "BLOCK_M": tiles.m,
        "BLOCK_N": tiles.n,
        "BLOCK_K": tiles.k,
        # A band of the rows of several ranks would wait for the later ones.
        "GROUP": max(min(tiles.band, max(sizes) // tiles.m), 1),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _programs(m: int, n: int, device: torch.device, tiles: Tiles, spare: int) -> int:
    most = tiles.programs
    if not most:
        most = max(torch.cuda.get_device_properties(device).multi_processor_count - spare, 1)
    return min(-(-m // tiles.m) * -(-n // tiles.n), most)
