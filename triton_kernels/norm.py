"""Sums of squares in one fixed order, whatever the number of tensors, programs and threads.

A block of 4096 elements, counted from its own tensor's start, is 32 rows of 128 lanes. Element i is added to
the fp64 accumulator of lane i % 128, rows in order; then acc[l] += acc[l + s] for s = 64, 32, ..., 1.
sum_kernel combines the blocks' values in the same order. The bits are those of csrc/cpu/kernels.cpp.
"""

import triton
import triton.language as tl

from .adam_math import F32, FP16_MASTER, FP16_NONE
from .formats import BFLOAT16, FLOAT16, FLOAT32, decode
from .rows import GRAD, KIND, N, find_row, stored_array

LANES = tl.constexpr(128)
ROWS = tl.constexpr(32)
BLOCK = 4096
NUM_WARPS = 1  # of 32 threads with 4 neighbouring lanes each, which is 16 bytes of fp32
# Rows whose loads are issued before the first addition: 4 KiB of fp32 in flight per warp.
AHEAD = tl.constexpr(8)


@triton.jit
def combine_lanes(lanes):
    """acc[l] += acc[l + s] for s = 64, ..., 1. Each tl.sum adds two values, which has one order only."""
    for step in tl.static_range(7):
        lanes = tl.sum(lanes.reshape(2, 64 >> step), axis=0)
    return tl.sum(lanes, axis=0)


@triton.jit
def add_rows(
    values,  # pointer to the block, read-only: fp32 or fp64, or the bits of a 16-bit format in uint16
    count,  # int64: elements of the block
    DTYPE: tl.constexpr,  # of the values; FLOAT32 also stands for fp64
    SQUARE: tl.constexpr,  # bool: add the squares
    WHOLE: tl.constexpr,  # bool: all 4096 elements exist
):
    lane = tl.arange(0, LANES)
    lanes = tl.zeros((LANES,), tl.float64)
    for row in range(0, ROWS, AHEAD):
        for ahead in tl.static_range(AHEAD):
            i = (row + ahead) * LANES + lane
            x = tl.load(values + i) if WHOLE else tl.load(values + i, i < count, other=0)
            x = decode(x, DTYPE).to(tl.float64)
            # The square of an fp32 is exact in fp64: fused or not, there is one rounding.
            lanes = tl.fma(x, x, lanes) if SQUARE else lanes + x
    return combine_lanes(lanes)


@triton.jit
def square_sum_block(row, start, count, DTYPE: tl.constexpr):
    if (count == LANES * ROWS) & (tl.load(row + GRAD) % 16 == 0):
        total = add_rows(stored_array(row, GRAD, start, DTYPE, True), count, DTYPE, True, True)
    else:
        total = add_rows(stored_array(row, GRAD, start, DTYPE, False), count, DTYPE, True, False)
    return total


@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=["rows", "first_block", "partials"],  # read or written one by one
)
def square_sum_kernel(
    rows,  # [n_rows, 8] int64, read-only: the table
    first_block,  # [n_rows + 1] int64, read-only: prefix sums of the rows' block counts
    n_rows,  # int
    partials,  # [n_blocks] fp64, written: one sum of squares of gradients per block
):
    block = tl.program_id(0).to(tl.int64)
    index = find_row(first_block, n_rows, block)
    row = rows + index * 8
    start = (block - tl.load(first_block + index)) * (LANES * ROWS)
    count = tl.minimum(tl.load(row + N) - start, LANES * ROWS)
    kind = tl.load(row + KIND).to(tl.int32)
    format = kind // 8
    if (kind & 4) != 0 or format == F32:
        total = square_sum_block(row, start, count, FLOAT32)
    elif format == FP16_MASTER or format == FP16_NONE:
        total = square_sum_block(row, start, count, FLOAT16)
    else:
        total = square_sum_block(row, start, count, BFLOAT16)
    tl.store(partials + block, total)


@triton.jit(do_not_specialize=["n"])
def sum_kernel(
    values,  # [n] fp64, read-only
    out,  # [ceil(n / 4096)] fp64, written: one sum per block
    n,  # int
):
    block = tl.program_id(0).to(tl.int64)
    start = block * (LANES * ROWS)
    count = tl.minimum(n - start, LANES * ROWS)
    tl.store(out + block, add_rows(values + start, count, FLOAT32, False, False))
