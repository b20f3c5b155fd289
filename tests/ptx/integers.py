"""Integer and bit operations of PTX on numpy arrays. All arithmetic wraps; all shifts are total."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Fn = Callable[..., Array]
DType = np.dtype[Any]

WIDER = {np.dtype(f"{k}{n}"): np.dtype(f"{k}{2 * n}") for k in "iu" for n in (1, 2, 4)}


def unsigned(dtype: DType) -> DType:
    return np.dtype(f"u{dtype.itemsize}")


def multiply_high(dtype: DType) -> Fn:
    """Upper half of the product."""
    bits = dtype.itemsize * 8
    if bits < 64:
        wide = WIDER[dtype]
        return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(dtype)

    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)

    def high(a: Array, b: Array) -> Array:
        a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
        middle = a1 * b0 + ((a0 * b0) >> half)
        carry = ((middle & low) + a0 * b1) >> half
        return a1 * b1 + (middle >> half) + carry

    def signed_high(a: Array, b: Array) -> Array:
        ua, ub = a.view(np.uint64), b.view(np.uint64)
        zero = np.uint64(0)
        out = high(ua, ub) - np.where(a < 0, ub, zero) - np.where(b < 0, ua, zero)
        return out.view(np.int64)

    return signed_high if dtype.kind == "i" else high


def multiply_wide(dtype: DType) -> Fn:
    wide = WIDER[dtype]
    return lambda a, b: a.astype(wide) * b.astype(wide)


def quotient(dtype: DType) -> Fn:
    """Division that truncates, as in C; the caller has checked for zero divisors."""

    def run(a: Array, b: Array) -> Array:
        if dtype.kind == "u":
            return a // np.where(b == 0, dtype.type(1), b)
        u = unsigned(dtype)
        ua, ub = np.abs(a).view(u), np.abs(b).view(u)  # abs(MIN) wraps to MIN, whose bits are 2**(n-1)
        q = ua // np.where(ub == 0, u.type(1), ub)
        return np.where((a < 0) != (b < 0), -q.view(dtype), q.view(dtype))

    return run


def remainder(dtype: DType) -> Fn:
    divide = quotient(dtype)
    return lambda a, b: a - divide(a, b) * b


def shift_left(dtype: DType) -> Fn:
    bits = dtype.itemsize * 8

    def run(a: Array, n: Array) -> Array:
        shifted = a << np.minimum(n, np.uint32(bits - 1)).astype(dtype)
        return np.where(n >= bits, dtype.type(0), shifted)

    return run


def shift_right(dtype: DType) -> Fn:
    bits = dtype.itemsize * 8

    def run(a: Array, n: Array) -> Array:
        shifted = a >> np.minimum(n, np.uint32(bits - 1)).astype(dtype)
        return shifted if dtype.kind == "i" else np.where(n >= bits, dtype.type(0), shifted)

    return run


def funnel(left: bool, clamp: bool) -> Fn:
    """shf.{l,r}.{wrap,clamp}.b32: a window of the 64 bits (b, a)."""

    def run(a: Array, b: Array, c: Array) -> Array:
        n = (np.minimum(c, np.uint32(32)) if clamp else c & np.uint32(31)).astype(np.uint64)
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        if left:
            # Two shifts of at most 32: a single one by 64 - 0 would be undefined.
            return ((both << n) >> np.uint64(32)).astype(np.uint32)
        return (both >> n).astype(np.uint32)

    return run


def field_mask(length: Array, dtype: DType) -> Array:
    """The lowest `length` bits set."""
    bits = dtype.itemsize * 8
    one = dtype.type(1)
    partial = (one << np.minimum(length, np.uint32(bits - 1)).astype(dtype)) - one
    return np.where(length >= bits, ~dtype.type(0), partial)


def extract_field(dtype: DType) -> Fn:
    """bfe: `length` bits from `start`, extended with the field's sign for signed types."""
    u = unsigned(dtype)
    top = dtype.itemsize * 8 - 1

    def run(a: Array, start: Array, length: Array) -> Array:
        start, length = start & np.uint32(255), length & np.uint32(255)
        bits = a.view(u)
        mask = field_mask(length, u)
        out = shift_right(u)(bits, start) & mask
        if dtype.kind == "i":
            last = np.minimum(start + length - np.uint32(1), np.uint32(top))
            sign = (shift_right(u)(bits, last) & u.type(1)).astype(bool) & (length > 0)
            valid = field_mask(np.minimum(length, np.uint32(top + 1) - np.minimum(start, np.uint32(top + 1))), u)
            out = np.where(sign, out | ~valid, out)
        return out.view(dtype)

    return run


def insert_field(dtype: DType) -> Fn:
    """bfi: the lowest `length` bits of a replace those of b from `start` on."""
    u = unsigned(dtype)

    def run(a: Array, b: Array, start: Array, length: Array) -> Array:
        start, length = start & np.uint32(255), length & np.uint32(255)
        mask = shift_left(u)(field_mask(length, u), start)
        return (b & ~mask) | (shift_left(u)(a, start) & mask)

    return run


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """prmt in its default mode: each nibble of the selector picks a byte of (b, a), or spreads its sign."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    out = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint32) & np.uint32(255)
        spread = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        out = out | (np.where(nibble & np.uint32(8), spread, byte) << np.uint32(8 * i))
    return out


def logic3(a: Array, b: Array, c: Array, table: Array) -> Array:
    """lop3: bit (a, b, c) of the table, for each bit position."""
    lut = int(table[0])
    out = np.zeros(np.broadcast(a, b, c).shape, a.dtype)
    for i in range(8):
        if lut >> i & 1:
            out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return out


def leading_zeros(a: Array) -> Array:
    """clz of unsigned values: spread the highest bit downwards, then count what stays clear."""
    bits = a.dtype.itemsize * 8
    one = a.dtype.type
    shift = 1
    while shift < bits:
        a = a | (a >> one(shift))
        shift *= 2
    return np.uint32(bits) - np.bitwise_count(a).astype(np.uint32)


def find_first(dtype: DType) -> Fn:
    """bfind: position of the highest bit that differs from the sign, or 0xffffffff."""
    top = np.uint32(dtype.itemsize * 8 - 1)

    def run(a: Array) -> Array:
        magnitude = (np.where(a < 0, ~a, a) if dtype.kind == "i" else a).view(unsigned(dtype))
        return top - leading_zeros(magnitude)  # 31 - 32 wraps to 0xffffffff, as specified

    return run


def reverse_bits(a: Array) -> Array:
    octets = np.ascontiguousarray(a).view(np.uint8).reshape(-1, a.dtype.itemsize)
    bits = np.unpackbits(octets, axis=1, bitorder="little")[:, ::-1]
    return np.packbits(bits, axis=1, bitorder="little").reshape(-1).view(a.dtype)
