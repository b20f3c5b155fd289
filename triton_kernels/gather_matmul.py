"""All-gather and matmul in one launch: y[M, N] = x[M, K] @ w[N, K]^T + bias, with the rows of x from all ranks.

A few programs stay and take tile after tile, this rank's own rows first and then those of the next ranks. Before a
tile they wait until the peers whose rows it touches have said that these are there: a flag for each chunk of
`chunk_rows` rows of each peer. Where the peers' rows are, in their memory or already in this rank's: the table.
"""

import triton
import triton.language as tl

from .formats import decode
from .signals import ABORT, FAILED, at, await_flag, clock, read, report
from .tile_matmul import part, product, row_addresses, store_rows, tile_of


@triton.jit
def await_rows(first, last, table, flags, value, me, chunk_rows, state, limit, operation, WORLD: tl.constexpr):
    """Waits for the peers' chunks that have rows in [first, last). Returns 0, or what went wrong now or before."""
    failure = tl.load(state + FAILED, volatile=True)
    for rank in range(WORLD):
        begin, end = part(table, rank, WORLD)
        low, high = tl.maximum(begin, first) - begin, tl.minimum(end, last) - begin
        if (rank != me) & (low < high):
            for chunk in range(low // chunk_rows, (high - 1) // chunk_rows + 1):
                flag = flags + chunk * WORLD + rank
                if (failure == 0) & (read(flag) < value):
                    abort = at(tl.load(state + ABORT))
                    failure = await_flag(flag, value, rank, clock(state), state, abort, limit)
                    if failure != 0:
                        failure = report(failure, operation + chunk, state)
    tl.debug_barrier()
    return failure


UNSPECIALIZED = ["M", "me", "chunk_rows", "offset", "value", "limit", "operation"]


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=["table", "buffers", "state"])
def gather_matmul_kernel(
    x,  # [rows of rank me, K] fp32, bf16 or fp16, read-only: this rank's rows
    w,  # [N, K] as x, read-only, of any strides
    bias,  # [N] as x, as its bits if of 16, read-only; or None
    out,  # [M, N] fp32, or bits of 16, written
    table,  # [2 * WORLD + 1] int64, read-only: tile_matmul.py; the address of rank `me` is not used
    buffers,  # [WORLD] int64, read-only: address of each rank's flags
    state,  # [STATE_WORDS] int64: signals.py
    M,  # int
    N,  # int
    K,  # int
    stride_n,  # int: elements from a row of w to the next
    stride_k,  # int
    me,  # int
    chunk_rows,  # int
    offset,  # int: byte of the flags of chunk 0; those of the next chunk are WORLD words further
    value,  # int: what they must have reached
    limit,  # int: nanoseconds to wait for a chunk
    operation,  # int: number of what this rank is doing if it waits for chunk 0; of chunk c it is c more
    DTYPE: tl.constexpr,  # dtype code of all
    WORLD: tl.constexpr,
    EVEN: tl.constexpr,  # bool: K and N are multiples of their blocks
    ALIGNED: tl.constexpr,  # bool: rows of x, on every rank, begin at multiples of 16 bytes
    OUT_ALIGNED: tl.constexpr,  # bool: so do rows of out
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # A block that this rank shares with the one before it comes last, as the other's rows do.
    first_block = tl.cdiv(tl.load(table + WORLD + me), BLOCK_M).to(tl.int32)
    flags = at(tl.load(buffers + me) + offset)
    size: tl.constexpr = x.dtype.element_ty.primitive_bitwidth // 8
    for tile in range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0)):
        block_m, block_n = tile_of(tile, blocks_m, blocks_n, first_block, GROUP)
        first, last = block_m * BLOCK_M, tl.minimum((block_m + 1) * BLOCK_M, M)
        failure = await_rows(first, last, table, flags, value, me, chunk_rows, state, limit, operation, WORLD)
        if failure == 0:
            rows, columns = first + tl.arange(0, BLOCK_M), block_n * BLOCK_N + tl.arange(0, BLOCK_N)
            # Rows behind the last one read it once more, so that no load needs a mask for them.
            a = row_addresses(tl.minimum(rows, M - 1), table, K * size, x.to(tl.int64), me, WORLD)
            y = product(a, w, columns, N, K, stride_n, stride_k, EVEN, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_K)
            if bias is not None:
                y += decode(tl.load(bias + columns, columns < N, 0), DTYPE)[None, :]
            targets = out.to(tl.int64) + rows.to(tl.int64) * N * size
            store_rows(targets, columns, y, (rows < M)[:, None] & (columns < N)[None, :], DTYPE, OUT_ALIGNED)


@triton.jit(do_not_specialize=["offset", "value", "me", "peer"], do_not_specialize_on_alignment=["buffers", "state"])
def tell_kernel(
    buffers,  # [world] int64, read-only: address of each rank's flags
    offset,  # int: byte of the set of flags
    value,  # int: to which this rank's flag is raised
    me,  # int
    peer,  # int: where
    state,  # [STATE_WORDS] int64
):
    """Raises this rank's flag at one peer, which then sees all that was enqueued before."""
    if tl.load(state + FAILED) == 0:
        tl.debug_barrier()
        tl.atomic_xchg(at(tl.load(buffers + peer) + offset + 8 * me), value, sem="release", scope="sys")
