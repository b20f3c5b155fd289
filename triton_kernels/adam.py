"""One Adam/AdamW step of every row of a table, whatever the rows' formats, in one launch.

Per element: the update of adam_math.py, which names its sources, on the fp32 weight behind the stored one.
A program serves one block of BLOCK consecutive elements of one row. What it does to the block is shared with
sharded.py, where the gradient is a sum over ranks and the weight goes to all of them.
"""

import triton
import triton.language as tl

from .adam_math import BF16_MASTER, BF16_SPLIT, F32, FP16_MASTER, FP16_NONE, adam_update, live_master
from .formats import BFLOAT16, FLOAT16, FLOAT32, decode, encode, join_master, split_master
from .rows import (
    EXP_AVG,
    EXP_AVG_SQ,
    GRAD,
    KIND,
    LOW,
    MAX_EXP_AVG_SQ,
    PARAM,
    N,
    array,
    find_row,
    stored_array,
)

# A thread owns 4 neighbours: 16 bytes of fp32, 8 of a 16-bit format, whole lines for a warp. With 8 of them
# Triton exchanges data through shared memory (6 barriers) before the fp32 stores, to write whole sectors.
BLOCK = 1024
NUM_WARPS = 8
SKIP = tl.constexpr(5)  # field of the control array


@triton.jit
def distant_array(row, field: tl.constexpr, delta, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """stored_array of another rank, whose array lies `delta` bytes from the row's."""
    address = tl.load(row + field) + delta
    if DTYPE == FLOAT32:
        pointer = address.to(tl.pointer_type(tl.float32)) + start
        return tl.multiple_of(pointer, 16) if ALIGNED else pointer
    else:
        pointer = address.to(tl.pointer_type(tl.uint16)) + start
        return tl.multiple_of(pointer, 8) if ALIGNED else pointer


@triton.jit
def gradient(row, deltas, start, i, mask, other, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, SOURCES: tl.constexpr):
    """The row's own gradient in fp32, or with SOURCES the sum of theirs, one after the other."""
    if SOURCES == 0:
        return decode(tl.load(stored_array(row, GRAD, start, DTYPE, ALIGNED) + i, mask, other), DTYPE)
    else:
        first = distant_array(row, GRAD, tl.load(deltas), start, DTYPE, ALIGNED) + i
        total = decode(tl.load(first, mask, other), DTYPE)
        for source in tl.static_range(1, SOURCES):
            next = distant_array(row, GRAD, tl.load(deltas + source), start, DTYPE, ALIGNED) + i
            total = total + decode(tl.load(next, mask, other), DTYPE)
        return total


@triton.jit
def adam_block(
    row,  # int64 *, read-only: the row in the table
    s,  # tuple of 9 fp32: AdamScalars
    start,  # int64: first element of the block
    n,  # int64: elements of the row
    source_deltas,  # [SOURCES] int64, read-only: bytes from the row's gradient to each rank's
    target_deltas,  # [TARGETS] int64, read-only: bytes from the row's parameter to each other rank's
    ROW_KIND: tl.constexpr,  # int
    ALIGNED: tl.constexpr,  # bool: the row's arrays are 16-byte aligned, those of other ranks too
    QUADS: tl.constexpr,  # bool: the block ends with the row or a multiple of 4 elements
    BLOCK: tl.constexpr,  # int
    SOURCES: tl.constexpr,  # int: 0 for the row's own gradient alone
    TARGETS: tl.constexpr,  # int
):
    FORMAT: tl.constexpr = ROW_KIND // 8
    COUPLED: tl.constexpr = ROW_KIND // 2 % 2 == 1
    AMSGRAD: tl.constexpr = ROW_KIND % 2 == 1
    SPLIT: tl.constexpr = FORMAT == BF16_SPLIT
    MASTER: tl.constexpr = (FORMAT == BF16_MASTER) or (FORMAT == FP16_MASTER)
    HALF: tl.constexpr = FLOAT16 if (FORMAT == FP16_MASTER) or (FORMAT == FP16_NONE) else BFLOAT16
    DTYPE: tl.constexpr = FLOAT32 if FORMAT == F32 else HALF
    GRAD_DTYPE: tl.constexpr = FLOAT32 if ROW_KIND // 4 % 2 == 1 else DTYPE

    i = tl.arange(0, BLOCK)
    # A limit that the compiler sees to be a multiple of 4 keeps accesses of 4 elements whole.
    mask = i < ((n - start) // 4 * 4 if QUADS else n - start)

    param = stored_array(row, PARAM, start, DTYPE, ALIGNED) + i
    stored = tl.load(param, mask)
    if SPLIT:
        low = array(row, LOW, start, tl.int16, ALIGNED) + i
        p = join_master(stored, tl.load(low, mask))
    else:
        p = decode(stored, DTYPE)
    if MASTER:
        low = array(row, LOW, start, tl.float32, ALIGNED) + i
        master = tl.load(low, mask)
        p = live_master(master, encode(master, DTYPE), stored, p)

    g = gradient(row, source_deltas, start, i, mask, None, GRAD_DTYPE, ALIGNED, SOURCES)
    exp_avg = array(row, EXP_AVG, start, tl.float32, ALIGNED) + i
    exp_avg_sq = array(row, EXP_AVG_SQ, start, tl.float32, ALIGNED) + i
    m = tl.load(exp_avg, mask)
    v = tl.load(exp_avg_sq, mask)
    vmax = v
    if AMSGRAD:
        max_exp_avg_sq = array(row, MAX_EXP_AVG_SQ, start, tl.float32, ALIGNED) + i
        vmax = tl.load(max_exp_avg_sq, mask)

    p, m, v, vmax = adam_update(p, m, v, vmax, g, s, COUPLED, AMSGRAD)
    tl.store(exp_avg, m, mask)
    tl.store(exp_avg_sq, v, mask)
    if AMSGRAD:
        tl.store(max_exp_avg_sq, vmax, mask)

    if SPLIT:
        stored, remainder = split_master(p)
        tl.store(low, remainder, mask)
    else:
        stored = encode(p, DTYPE)
    if MASTER:
        tl.store(low, p, mask)
    tl.store(param, stored, mask)
    for target in tl.static_range(TARGETS):
        copy = distant_array(row, PARAM, tl.load(target_deltas + target), start, DTYPE, ALIGNED) + i
        tl.store(copy, stored, mask)


@triton.jit
def adam_of_block(
    rows,  # [n_rows, 8] int64, read-only: the table
    first_block,  # [n_rows + 1] int64, read-only: prefix sums of the rows' block counts
    n_rows,  # int
    block,  # int64: which block of all rows
    scalars,  # [k, 9] fp32, read-only: AdamScalars, by the row's hyper
    source_deltas,  # as adam_block
    target_deltas,  # as adam_block
    KINDS: tl.constexpr,  # int: bit k is set if a row has kind k; only those branches are compiled
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    SOURCES: tl.constexpr,
    TARGETS: tl.constexpr,
):
    index = find_row(first_block, n_rows, block)
    row = rows + index * 8
    start = (block - tl.load(first_block + index)) * BLOCK
    n = tl.load(row + N)
    packed = tl.load(row + KIND)
    kind = packed.to(tl.int32)
    own = scalars + (packed >> 32) * 9
    s = (
        tl.load(own),
        tl.load(own + 1),
        tl.load(own + 2),
        tl.load(own + 3),
        tl.load(own + 4),
        tl.load(own + 5),
        tl.load(own + 6),
        tl.load(own + 7),
        tl.load(own + 8),
    )
    for present in tl.static_range(4, 48):
        if (KINDS >> present) & 1:
            if kind == present:
                if ALIGNED and ((start + BLOCK <= n) | (n % 4 == 0)):
                    adam_block(
                        row, s, start, n, source_deltas, target_deltas, present, ALIGNED, True, BLOCK, SOURCES, TARGETS
                    )
                else:
                    adam_block(
                        row, s, start, n, source_deltas, target_deltas, present, ALIGNED, False, BLOCK, SOURCES, TARGETS
                    )


@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=["rows", "first_block", "scalars", "control"],  # read one by one
)
def adam_kernel(
    rows,  # [n_rows, 8] int64, read-only: the table
    first_block,  # [n_rows + 1] int64, read-only: prefix sums of the rows' block counts
    n_rows,  # int
    scalars,  # [k, 9] fp32, read-only: AdamScalars, by the row's hyper
    control,  # [8] fp64, read-only: nothing happens if control[SKIP] != 0
    KINDS: tl.constexpr,  # int: bit k is set if a row has kind k; only those branches are compiled
    ALIGNED: tl.constexpr,  # bool: every address in rows is a multiple of 16
    BLOCK: tl.constexpr,
):
    if tl.load(control + SKIP) == 0.0:
        block = tl.program_id(0).to(tl.int64)
        adam_of_block(rows, first_block, n_rows, block, scalars, None, None, KINDS, ALIGNED, BLOCK, 0, 0)
