"""Storage formats: bf16, fp16 and split weights, encoded and decoded. Line for line as csrc/formats.h.

16-bit values travel as their bits (uint16, the remainder of a split weight as int16). Conversions are integer
arithmetic or exact fp32 operations, so that a GPU, the interpreter and the CPU kernels give the same bits.
"""

import triton
import triton.language as tl

FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)
FP16_SPACING = tl.constexpr(2.0**-24)  # between subnormals


@triton.jit
def float_bits(value):
    return value.to(tl.uint32, bitcast=True)


@triton.jit
def bits_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def is_nan(bits):
    return (bits & 0x7FFFFFFF) > 0x7F800000


# ---- bf16: the upper half of an fp32 ----


@triton.jit
def bf16_to_float(half):
    return bits_float(half.to(tl.uint32) << 16)


@triton.jit
def float_to_bf16(value):
    """Rounds to nearest, ties to even; NaN stays NaN (quieted), overflow gives inf."""
    bits = float_bits(value)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return tl.where(is_nan(bits), quiet, rounded).to(tl.uint16)


# ---- fp16: 1 sign, 5 exponent, 10 mantissa bits ----


@triton.jit
def fp16_to_float(half):
    bits = half.to(tl.uint32)
    sign = (bits & 0x8000) << 16
    magnitude = bits & 0x7FFF
    normal = (magnitude << 13) + 0x38000000  # rebias the exponent from 15 to 127
    special = (magnitude << 13) | 0x7F800000
    subnormal = float_bits(magnitude.to(tl.int32).to(tl.float32) * FP16_SPACING)
    finite = tl.where(magnitude < 0x0400, subnormal, normal)
    return bits_float(sign | tl.where(magnitude >= 0x7C00, special, finite))


@triton.jit
def float_to_fp16(value):
    """Rounds to nearest, ties to even; NaN stays NaN (quieted), overflow gives inf, subnormals are kept."""
    bits = float_bits(value)
    sign = (bits >> 16) & 0x8000
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude + 0xC8000FFF + ((magnitude >> 13) & 1)) >> 13
    # Below 2^-14 the sum with 0.5 rounds to a multiple of 2^-24, the spacing of fp16 subnormals.
    subnormal = float_bits(bits_float(magnitude) + 0.5) - 0x3F000000
    special = tl.where(magnitude > 0x7F800000, 0x7E00 | ((magnitude >> 13) & 0x3FF), 0x7C00)
    finite = tl.where(magnitude < 0x38800000, subnormal, normal)
    return (sign | tl.where(magnitude >= 0x47800000, special, finite)).to(tl.uint16)


# ---- by dtype: FLOAT32 is stored as it is, BFLOAT16 and FLOAT16 as their bits ----


@triton.jit
def decode(stored, DTYPE: tl.constexpr):
    if DTYPE == BFLOAT16:
        return bf16_to_float(stored)
    elif DTYPE == FLOAT16:
        return fp16_to_float(stored)
    else:
        return stored


@triton.jit
def encode(value, DTYPE: tl.constexpr):
    if DTYPE == BFLOAT16:
        return float_to_bf16(value)
    elif DTYPE == FLOAT16:
        return float_to_fp16(value)
    else:
        return value


# ---- split weights: bf16 upper half (rounded half away from zero) + int16 remainder ----


@triton.jit
def split_master(master):
    """(high uint16, low int16) with join_master(high, low) == master for all but NaN, which stays NaN."""
    bits = float_bits(master)
    nan = is_nan(bits)  # rounding up could carry a NaN into -0 or inf
    high = tl.where(nan, (bits >> 16) | 0x40, (bits + 0x8000) >> 16)
    low = tl.where(nan, 0, bits & 0xFFFF)
    return high.to(tl.uint16), low.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def join_master(high, low):
    """Halves that no split makes, whose sum is NaN, mean the upper one alone."""
    upper = high.to(tl.uint32) << 16
    bits = upper + low.to(tl.int32).to(tl.uint32, bitcast=True)
    return bits_float(tl.where(is_nan(bits), upper, bits))
