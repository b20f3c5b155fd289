"""Sums of squares of gradients that are sums over ranks, read from peers' memory; in the order of norm.py."""

import triton
import triton.language as tl

from .adam import gradient
from .adam_math import F32, FP16_MASTER, FP16_NONE
from .formats import BFLOAT16, FLOAT16, FLOAT32
from .norm import LANES, ROWS, combine_lanes
from .rows import KIND, N, find_row

NUM_WARPS = 1  # of 32 threads with 4 neighbouring lanes each
AHEAD = tl.constexpr(8)  # loads issued before the first addition, as norm.py; at least one per rank


@triton.jit
def square_sum_of_block(
    row, deltas, start, count, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr, SOURCES: tl.constexpr
):
    """The sum of squares of a block of summed gradients, in the order of norm.py."""
    lane = tl.arange(0, LANES)
    lanes = tl.zeros((LANES,), tl.float64)
    ahead: tl.constexpr = AHEAD // SOURCES if SOURCES < 8 else 1
    for first in range(0, ROWS, ahead):
        for next in tl.static_range(ahead):
            i = (first + next) * LANES + lane
            if WHOLE:
                x = gradient(row, deltas, start, i, None, None, DTYPE, ALIGNED, SOURCES)
            else:
                x = gradient(row, deltas, start, i, i < count, 0, DTYPE, ALIGNED, SOURCES)
            x = x.to(tl.float64)
            lanes = tl.fma(x, x, lanes)  # the square is exact: one rounding
    return combine_lanes(lanes)


@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=["rows", "first_block", "source_deltas", "partials"],
)
def sharded_square_sum_kernel(
    rows,  # [n_rows, 8] int64, read-only: the table, of this rank's parts
    first_block,  # [n_rows + 1] int64, read-only: prefix sums of the rows' numbers of blocks of 4,096 elements
    n_rows,  # int
    source_deltas,  # [SOURCES] int64, read-only: bytes from a row's gradient to each rank's, in rank order
    partials,  # [n_blocks] fp64, written: one sum of squares of summed gradients per block
    ALIGNED: tl.constexpr,  # bool: every gradient, on every rank, is a multiple of 16
    SOURCES: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    index = find_row(first_block, n_rows, block)
    row = rows + index * 8
    start = (block - tl.load(first_block + index)) * (LANES * ROWS)
    count = tl.minimum(tl.load(row + N) - start, LANES * ROWS)
    kind = tl.load(row + KIND).to(tl.int32)
    format = kind // 8
    if (kind & 4) != 0 or format == F32:
        total = square_sum_of_count(row, source_deltas, start, count, FLOAT32, ALIGNED, SOURCES)
    elif format == FP16_MASTER or format == FP16_NONE:
        total = square_sum_of_count(row, source_deltas, start, count, FLOAT16, ALIGNED, SOURCES)
    else:
        total = square_sum_of_count(row, source_deltas, start, count, BFLOAT16, ALIGNED, SOURCES)
    tl.store(partials + block, total)


@triton.jit
def square_sum_of_count(row, deltas, start, count, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, SOURCES: tl.constexpr):
    if count == LANES * ROWS:
        total = square_sum_of_block(row, deltas, start, count, DTYPE, ALIGNED, True, SOURCES)
    else:
        total = square_sum_of_block(row, deltas, start, count, DTYPE, ALIGNED, False, SOURCES)
    return total
