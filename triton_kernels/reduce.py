"""The sum of arrays of several ranks in fp32, in rank order, each addition rounded on its own."""

import triton
import triton.language as tl

from .formats import FLOAT32, decode

BLOCK = 1024  # with NUM_WARPS: 4 neighbours per thread, 16 bytes of fp32
NUM_WARPS = 8


@triton.jit
def add_block(
    sources, out, i, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, SOURCES: tl.constexpr, ACCUMULATE: tl.constexpr
):
    total = tl.zeros(i.shape, tl.float32)
    for source in tl.static_range(SOURCES):
        if DTYPE == FLOAT32:
            pointer = tl.load(sources + source).to(tl.pointer_type(tl.float32))
        else:
            pointer = tl.load(sources + source).to(tl.pointer_type(tl.uint16))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        x = decode(tl.load(pointer + i, mask), DTYPE)
        total = x if source == 0 else total + x
    if ACCUMULATE:
        total = tl.load(out + i, mask) + total
    tl.store(out + i, total, mask)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["sources"])
def reduce_kernel(
    sources,  # [SOURCES] int64, read-only: addresses of arrays of n elements, in rank order
    out,  # [n] fp32, written: their sum; with ACCUMULATE added to what is there
    n,  # int
    DTYPE: tl.constexpr,  # dtype code of the sources
    ALIGNED: tl.constexpr,  # bool: all sources are multiples of 16
    SOURCES: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        add_block(sources, out, i, None, DTYPE, ALIGNED, SOURCES, ACCUMULATE)
    else:
        add_block(sources, out, i, i < n, DTYPE, ALIGNED, SOURCES, ACCUMULATE)
