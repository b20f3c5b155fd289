"""Matmul and reduce-scatter: the partial product of all rows, each rank's rows to that rank, and their sum there.

partial[M, N] = x[M, K] @ w[N, K]^T is rounded to the dtype of x and stored where the table says: in memory of the rank
to which the rows belong, or in this rank's, from where it is fetched. A few programs stay and take tile after tile,
the rows of the next rank first and this rank's own last. Whoever stores the last tile of a part raises the flag at its
rank. The sum there is in fp32, in rank order, each addition rounded on its own; then the bias; then it is rounded once.
"""

import triton
import triton.language as tl

from .formats import FLOAT32, decode, encode
from .signals import FAILED, at
from .tile_matmul import part, product, row_addresses, store_rows, tile_of

SUM_BLOCK = 1024  # with SUM_WARPS: 4 neighbours per thread
SUM_WARPS = 8


@triton.jit
def count_rows(first, last, table, counters, buffers, offset, value, me, blocks_n, WORLD, BLOCK_M: tl.constexpr):
    """Counts a stored tile of rows [first, last), and raises the flags of the parts that are complete."""
    tl.debug_barrier()  # of all threads' stores, before one thread counts them
    for rank in range(WORLD):
        begin, end = part(table, rank, WORLD)
        if (begin < last) & (first < end) & (begin < end):
            tiles = ((end - 1) // BLOCK_M - begin // BLOCK_M + 1) * blocks_n
            if tl.atomic_add(counters + rank, 1, sem="acq_rel", scope="sys") == tiles - 1:
                tl.store(counters + rank, 0)
                if rank != me:
                    tl.atomic_xchg(at(tl.load(buffers + rank) + offset + 8 * me), value, sem="release", scope="sys")


UNSPECIALIZED = ["M", "me", "offset", "value"]


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=["table", "counters", "buffers", "state"])
def matmul_scatter_kernel(
    x,  # [M, K] fp32, bf16 or fp16, read-only
    w,  # [N, K] as x, read-only, of any strides
    table,  # [2 * WORLD + 1] int64, read-only: tile_matmul.py; where each rank's rows of the partial are written
    counters,  # [WORLD] int64: zeros, and again when the launch is over
    buffers,  # [WORLD] int64, read-only: address of each rank's flags
    state,  # [STATE_WORDS] int64: signals.py
    M,  # int
    N,  # int
    K,  # int
    stride_n,  # int: elements from a row of w to the next
    stride_k,  # int
    me,  # int
    offset,  # int: byte of the flags of "your rows are there"
    value,  # int: to which they are raised
    DTYPE: tl.constexpr,  # dtype code of all
    WORLD: tl.constexpr,
    EVEN: tl.constexpr,  # bool: K and N are multiples of their blocks
    ALIGNED: tl.constexpr,  # bool: rows of x begin at multiples of 16 bytes
    OUT_ALIGNED: tl.constexpr,  # bool: so do rows of the partial
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_block = (tl.load(table + WORLD + 1 + me) // BLOCK_M).to(tl.int32)  # where the next rank's rows begin
    size: tl.constexpr = x.dtype.element_ty.primitive_bitwidth // 8
    for tile in range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0)):
        if tl.load(state + FAILED, volatile=True) == 0:
            block_m, block_n = tile_of(tile, blocks_m, blocks_n, first_block, GROUP)
            first, last = block_m * BLOCK_M, tl.minimum((block_m + 1) * BLOCK_M, M)
            rows, columns = first + tl.arange(0, BLOCK_M), block_n * BLOCK_N + tl.arange(0, BLOCK_N)
            a = x.to(tl.int64) + tl.minimum(rows, M - 1).to(tl.int64) * K * size
            y = product(a, w, columns, N, K, stride_n, stride_k, EVEN, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_K)
            targets = row_addresses(rows, table, N * size, tl.load(table + me), me, WORLD)
            store_rows(targets, columns, y, (rows < M)[:, None] & (columns < N)[None, :], DTYPE, OUT_ALIGNED)
            count_rows(first, last, table, counters, buffers, offset, value, me, blocks_n, WORLD, BLOCK_M)


@triton.jit(do_not_specialize_on_alignment=["sources", "state"])
def sum_kernel(
    sources,  # [SOURCES] int64, read-only: addresses of arrays of n elements, in rank order
    bias,  # [N], as its bits if of 16, read-only; or None
    out,  # [n] fp32, or bits of 16, written
    state,  # [STATE_WORDS] int64: nothing is done if a wait has failed
    n,  # int: a multiple of N
    N,  # int
    DTYPE: tl.constexpr,  # dtype code of all
    ALIGNED: tl.constexpr,  # bool: all sources are multiples of 16
    SOURCES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(state + FAILED) == 0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = i < n
        total = tl.zeros((BLOCK,), tl.float32)
        for source in tl.static_range(SOURCES):
            if DTYPE == FLOAT32:
                pointer = tl.load(sources + source).to(tl.pointer_type(tl.float32))
            else:
                pointer = tl.load(sources + source).to(tl.pointer_type(tl.uint16))
            if ALIGNED:
                pointer = tl.multiple_of(pointer, 16)
            term = decode(tl.load(pointer + i, mask), DTYPE)
            total = term if source == 0 else total + term
        if bias is not None:
            total += decode(tl.load(bias + i % N, mask), DTYPE)
        tl.store(out + i, encode(total, DTYPE), mask)
