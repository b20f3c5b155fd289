"""Tiles of a matmul whose rows lie in parts, one for each rank, at any addresses: shared by tensor-parallel kernels.

y[M, N] = x[M, K] @ w[N, K]^T, summed in fp32. The parts are of any sizes, also empty; a tile of BLOCK_M rows may touch
several. A table of int64 tells where they are: [WORLD] addresses of the parts' first rows, then [WORLD + 1] prefix sums
of their numbers of rows.
"""

import triton
import triton.language as tl

from .formats import FLOAT32, encode

# The interpreter keeps bf16 as bits, which it cannot multiply.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def tile_of(tile, blocks_m, blocks_n, first, GROUP: tl.constexpr):
    """Block of rows and block of columns of a tile. Begins at block of rows `first`, and goes through bands of GROUP
    blocks of rows, column by column, so that tiles that run at a time share what they read."""
    band = tile // (GROUP * blocks_n)
    height = tl.minimum(blocks_m - band * GROUP, GROUP)
    within = tile - band * GROUP * blocks_n
    return (band * GROUP + within % height + first) % blocks_m, within // height


@triton.jit
def part(table, rank, WORLD: tl.constexpr):
    """Rows [begin, end) of a rank's part."""
    return tl.load(table + WORLD + rank), tl.load(table + WORLD + 1 + rank)


@triton.jit
def row_addresses(rows, table, row_bytes, own, me, WORLD: tl.constexpr):
    """Address of each row; the part of rank `me` lies at `own`. Rows behind the last one are at 0."""
    addresses = tl.zeros(rows.shape, tl.int64)
    for rank in tl.static_range(WORLD):
        begin, end = part(table, rank, WORLD)
        base = tl.load(table + rank)
        if rank == me:
            base = own
        addresses = tl.where((rows >= begin) & (rows < end), base + (rows - begin) * row_bytes, addresses)
    return addresses


@triton.jit
def product(
    addresses,  # [BLOCK_M] int64: of rows of x
    w,
    columns,  # [BLOCK_N] int
    N,
    K,
    stride_n,
    stride_k,
    EVEN: tl.constexpr,  # bool: K and N are multiples of their blocks
    ALIGNED: tl.constexpr,  # bool: rows begin at multiples of 16 bytes
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """fp32 [BLOCK_M, BLOCK_N]."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    k = tl.arange(0, BLOCK_K)
    a = addresses.to(w.dtype)
    if ALIGNED:  # said here, since a function's argument does not carry it
        a = tl.multiple_of(a, 16)
    w += columns.to(tl.int64)[None, :] * stride_n
    for begin in range(0, K, BLOCK_K):
        a_block = a[:, None] + (begin + k)[None, :]
        w_block = w + (begin + k).to(tl.int64)[:, None] * stride_k
        if EVEN:
            left, right = tl.load(a_block), tl.load(w_block)
        else:
            inside = begin + k < K
            left = tl.load(a_block, inside[None, :], 0.0)
            right = tl.load(w_block, inside[:, None] & (columns < N)[None, :], 0.0)
        if INTERPRETED:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def store_rows(addresses, columns, tile, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Rounds a tile to DTYPE and stores it to rows that begin at `addresses`."""
    if DTYPE == FLOAT32:
        rows = addresses.to(tl.pointer_type(tl.float32))
    else:
        rows = addresses.to(tl.pointer_type(tl.uint16))
    if ALIGNED:
        rows = tl.multiple_of(rows, 16)
    tl.store(rows[:, None] + columns[None, :], encode(tile, DTYPE), mask)
