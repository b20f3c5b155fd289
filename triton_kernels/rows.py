"""The table of a step as kernels read it: which row a block belongs to, and where a row's arrays are.

A row is 8 int64: addresses of param, low, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, then n, then
kind | hyper << 32. Offsets are int64: a row may have more than 2^31 elements.
"""

import triton
import triton.language as tl

from .formats import FLOAT32

PARAM = tl.constexpr(0)
LOW = tl.constexpr(1)
GRAD = tl.constexpr(2)
EXP_AVG = tl.constexpr(3)
EXP_AVG_SQ = tl.constexpr(4)
MAX_EXP_AVG_SQ = tl.constexpr(5)
N = tl.constexpr(6)
KIND = tl.constexpr(7)


@triton.jit
def find_row(first_block, n_rows, block):
    """The row with first_block[row] <= block < first_block[row + 1]; rows without elements have no block."""
    low = tl.full((), 0, tl.int64)
    high = low + n_rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(first_block + middle) <= block:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def array(row, field: tl.constexpr, start, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element `start` of a row's array. ALIGNED promises that 4 elements make one access."""
    pointer = tl.load(row + field).to(tl.pointer_type(dtype)) + start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 4 * dtype.primitive_bitwidth // 8)
    return pointer


@triton.jit
def stored_array(row, field: tl.constexpr, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The same for an array of DTYPE as formats.decode takes it: fp32, or 16-bit values as their bits."""
    if DTYPE == FLOAT32:
        return array(row, field, start, tl.float32, ALIGNED)
    else:
        return array(row, field, start, tl.uint16, ALIGNED)
