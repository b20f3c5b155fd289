"""fp32 <-> bf16 and fp16, and an fp32 master <-> its split form. 16-bit values are passed as their bits."""

import triton
import triton.language as tl

from .formats import decode, encode, join_master, split_master

BLOCK = 1024  # with NUM_WARPS: 4 neighbours per thread, 16 bytes of fp32
NUM_WARPS = 8


@triton.jit
def cast_block(src, dst, i, mask, FROM: tl.constexpr, TO: tl.constexpr):
    tl.store(dst + i, encode(decode(tl.load(src + i, mask), FROM), TO), mask)


@triton.jit(do_not_specialize=["n"])
def cast_kernel(
    src,  # [n] fp32 or uint16 bits, read-only
    dst,  # [n] fp32 or uint16 bits, written
    n,  # int
    FROM: tl.constexpr,  # dtype code of src: FLOAT32, BFLOAT16 or FLOAT16 of formats.py
    TO: tl.constexpr,  # dtype code of dst
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        cast_block(src + start, dst + start, i, None, FROM, TO)
    else:
        cast_block(src + start, dst + start, i, i < n - start, FROM, TO)


@triton.jit
def split_block(master, high, low, i, mask):
    bits, remainder = split_master(tl.load(master + i, mask))
    tl.store(high + i, bits, mask)
    tl.store(low + i, remainder, mask)


@triton.jit(do_not_specialize=["n"])
def split_kernel(
    master,  # [n] fp32, read-only
    high,  # [n] uint16, written: bf16 bits
    low,  # [n] int16, written: remainder
    n,  # int
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        split_block(master + start, high + start, low + start, i, None)
    else:
        split_block(master + start, high + start, low + start, i, i < n - start)


@triton.jit
def join_block(high, low, master, i, mask):
    tl.store(master + i, join_master(tl.load(high + i, mask), tl.load(low + i, mask)), mask)


@triton.jit(do_not_specialize=["n"])
def join_kernel(
    high,  # [n] uint16, read-only: bf16 bits
    low,  # [n] int16, read-only: remainder
    master,  # [n] fp32, written
    n,  # int
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        join_block(high + start, low + start, master + start, i, None)
    else:
        join_block(high + start, low + start, master + start, i, i < n - start)
