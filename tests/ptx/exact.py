"""Reference arithmetic for the tests of the interpreter: exact rationals, rounded once."""

import math
import struct
from collections.abc import Callable
from fractions import Fraction

# Precision with the hidden bit, exponent of the smallest normal number, exponent of the largest number.
FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}
WIDTH = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}
NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FF8000000000000}


def decode(bits: int, kind: str) -> float:
    """The value of a bit pattern. All four formats fit float64."""
    if kind == "bf16":
        return float(struct.unpack("<f", struct.pack("<I", bits << 16))[0])
    letter = {"f16": "e", "f32": "f", "f64": "d"}[kind]
    return float(struct.unpack(f"<{letter}", bits.to_bytes(WIDTH[kind] // 8, "little"))[0])


def encode(value: Fraction | float, kind: str, mode: str = "rn") -> int:
    """The bit pattern of a value, rounded once. A float gives its sign to zero, infinity and NaN."""
    precision, low, high = FORMATS[kind]
    sign_bit = 1 << WIDTH[kind] - 1
    infinity = (high - low + 2) << precision - 1
    if isinstance(value, float):
        if math.isnan(value):
            return NAN[kind]
        sign = sign_bit if math.copysign(1, value) < 0 else 0
        if math.isinf(value):
            return sign | infinity
        if value == 0:
            return sign
    exact = Fraction(value)
    negative = exact < 0
    sign = sign_bit if negative else 0
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    exponent = max(exponent, low)
    scaled = size / Fraction(2) ** (exponent - precision + 1)
    whole = math.floor(scaled)
    rest = scaled - whole
    if mode == "rn":
        up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1)
    else:
        up = rest > 0 and {"rz": False, "rm": negative, "rp": not negative}[mode]
    whole += up
    if whole == 1 << precision:
        whole, exponent = whole // 2, exponent + 1
    if exponent > high:
        away = mode == "rn" or mode == ("rm" if negative else "rp")
        return sign | (infinity if away else infinity - 1)
    field = 0 if whole < 1 << precision - 1 else exponent - low + 1
    return sign | (field << precision - 1) | whole & (1 << precision - 1) - 1


def square_root(value: Fraction) -> Fraction:
    """A rational that rounds like the square root: exact, or strictly between two candidates."""
    shift = 1300  # twice the exponent range of float64 and then some
    scaled = value * 4**shift
    root = math.isqrt(math.floor(scaled))
    if root * root == scaled:
        return Fraction(root, 2**shift)
    return Fraction(2 * root + 1, 2 ** (shift + 1))


def arithmetic(kind: str, exact: Callable[..., Fraction | None], special: Callable[..., float]) -> Callable[..., int]:
    """An IEEE operation on bit patterns: `exact` on rationals; `special` on floats where one is not finite or
    `exact` gives None (no rational result, or a zero whose sign floats know)."""

    def run(*bits: int) -> int:
        values = [decode(b, kind) for b in bits]
        if all(map(math.isfinite, values)):
            result = exact(*map(Fraction, values))
            if result is not None:
                return encode(result, kind)
        return encode(special(*values), kind)

    return run
