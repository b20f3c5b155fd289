"""The instructions under test and what they mean, in Python integers and exact rationals."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .exact import FORMATS, NAN, arithmetic, decode, encode, square_root


@dataclass(frozen=True)
class Case:
    """An instruction, the types of its result and operands, and its meaning on bit patterns."""

    opcode: str
    result: str
    operands: tuple[str, ...]
    meaning: Callable[..., int]
    fixed: tuple[tuple[int, int], ...] = ()  # operands that are literals: (position, value)


def bits_of(kind: str) -> int:
    return 32 if kind == "pred" else 16 if kind == "bf16" else int(kind[1:])


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> bits - 1 else value


def as_type(value: int, kind: str) -> int:
    """The number that a bit pattern stands for."""
    bits = bits_of(kind)
    value &= (1 << bits) - 1
    return signed(value, bits) if kind[0] == "s" else value


def integers(fn: Callable[..., int], kind: str, result: str = "") -> Callable[..., int]:
    """An operation on numbers of the type as one on bit patterns."""
    mask = (1 << bits_of(result or kind)) - 1
    return lambda *args: fn(*(as_type(a, kind) for a in args)) & mask


# Integers.


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def bfe(kind: str) -> Callable[..., int]:
    bits = bits_of(kind)

    def run(a: int, start: int, length: int) -> int:
        start, length = start & 255, length & 255
        sign = 0
        if kind[0] == "s" and length:
            sign = a >> min(start + length - 1, bits - 1) & 1
        picked = (a >> start + i & 1 if i < length and start + i < bits else sign for i in range(bits))
        return sum(bit << i for i, bit in enumerate(picked))

    return run


def bfi(bits: int) -> Callable[..., int]:
    def run(a: int, b: int, start: int, length: int) -> int:
        start, length = start & 255, length & 255
        for i in range(length):
            if start + i < bits:
                b = b & ~(1 << start + i) | (a >> i & 1) << start + i
        return b

    return run


def prmt(a: int, b: int, selector: int) -> int:
    octets = (a | b << 32).to_bytes(8, "little")
    out = b""
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = octets[nibble & 7]
        out += bytes([(255 if byte & 128 else 0) if nibble & 8 else byte])
    return int.from_bytes(out, "little")


def lop3(table: int) -> Callable[..., int]:
    def run(a: int, b: int, c: int, _: int) -> int:
        return sum((table >> (a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1) & 1) << i for i in range(32))

    return run


def bfind(kind: str) -> Callable[..., int]:
    def run(a: int) -> int:
        number = as_type(a, kind)
        return (~number if number < 0 else number).bit_length() - 1 & 0xFFFFFFFF

    return run


def shift(kind: str, left: bool) -> Callable[..., int]:
    bits = bits_of(kind)
    mask = (1 << bits) - 1

    def run(a: int, n: int) -> int:
        n = min(n, 64)
        return (a << n if left else as_type(a, kind) >> n) & mask

    return run


def funnel(left: bool, clamp: bool) -> Callable[..., int]:
    def run(a: int, b: int, c: int) -> int:
        n = min(c, 32) if clamp else c & 31
        both = b << 32 | a
        return (both << n >> 32 if left else both >> n) & 0xFFFFFFFF

    return run


def integer_cases() -> list[Case]:
    out = []
    for bits in (16, 32, 64):
        u, s, b = f"u{bits}", f"s{bits}", f"b{bits}"
        for kind in (u, s):
            out += [
                Case(f"add.{kind}", kind, (kind,) * 2, integers(lambda a, b: a + b, kind)),
                Case(f"sub.{kind}", kind, (kind,) * 2, integers(lambda a, b: a - b, kind)),
                Case(f"mul.lo.{kind}", kind, (kind,) * 2, integers(lambda a, b: a * b, kind)),
                Case(f"mul.hi.{kind}", kind, (kind,) * 2, integers(lambda a, b, n=bits: a * b >> n, kind)),
                Case(f"mad.lo.{kind}", kind, (kind,) * 3, integers(lambda a, b, c: a * b + c, kind)),
                Case(f"min.{kind}", kind, (kind,) * 2, integers(min, kind)),
                Case(f"max.{kind}", kind, (kind,) * 2, integers(max, kind)),
                Case(f"div.{kind}", kind, (kind, f"{kind}!"), integers(truncated, kind)),
                Case(
                    f"rem.{kind}",
                    kind,
                    (kind, f"{kind}!"),
                    integers(lambda a, b: a - truncated(a, b) * b, kind),
                ),
                Case(f"shr.{kind}", kind, (kind, "u32#"), shift(kind, False)),
            ]
            for name, op in (
                ("lt", "<"),
                ("le", "<="),
                ("gt", ">"),
                ("ge", ">="),
                ("eq", "=="),
                ("ne", "!="),
            ):
                compare = eval(f"lambda a, b: int(a {op} b)")
                out.append(Case(f"setp.{name}.{kind}", "pred", (kind,) * 2, integers(compare, kind, "u32")))
            if bits < 64:
                wide = f"{kind[0]}{2 * bits}"
                out.append(Case(f"mul.wide.{kind}", wide, (kind,) * 2, integers(lambda a, b: a * b, kind, wide)))
            if bits > 16:
                out.append(Case(f"bfe.{kind}", kind, (kind, "u32#", "u32#"), bfe(kind)))
                out.append(Case(f"bfind.{kind}", "u32", (kind,), bfind(kind)))
        out += [
            Case(f"abs.{s}", s, (s,), integers(abs, s)),
            Case(f"neg.{s}", s, (s,), integers(lambda a: -a, s)),
            Case(f"not.{b}", b, (b,), integers(lambda a: ~a, b)),
            Case(f"and.{b}", b, (b, b), lambda a, b: a & b),
            Case(f"or.{b}", b, (b, b), lambda a, b: a | b),
            Case(f"xor.{b}", b, (b, b), lambda a, b: a ^ b),
            Case(f"shl.{b}", b, (b, "u32#"), shift(b, True)),
            Case(f"selp.{b}", b, (b, b, "pred"), lambda a, b, p: a if p & 1 else b),
        ]
    for bits in (32, 64):
        b = f"b{bits}"
        out += [
            Case(f"popc.{b}", "u32", (b,), lambda a: a.bit_count()),
            Case(f"clz.{b}", "u32", (b,), lambda a, n=bits: n - a.bit_length()),
            Case(f"brev.{b}", b, (b,), lambda a, n=bits: int(f"{a:0{n}b}"[::-1], 2)),
            Case(f"bfi.{b}", b, (b, b, "u32#", "u32#"), bfi(bits)),
        ]
    out.append(Case("prmt.b32", "b32", ("b32", "b32", "b32"), prmt))
    for table in (0x00, 0x96, 0xE8, 0xCA, 0x1B):
        out.append(Case("lop3.b32", "b32", ("b32",) * 4, lop3(table), fixed=((3, table),)))
    for left in (True, False):
        for clamp in (True, False):
            name = f"shf.{'l' if left else 'r'}.{'clamp' if clamp else 'wrap'}.b32"
            out.append(Case(name, "b32", ("b32", "b32", "u32#"), funnel(left, clamp)))
    return out


# Floats. The sign of an exact zero is left to float64, which has the rules of IEEE 754 as well.


def nonzero(value: Fraction) -> Fraction | None:
    return value or None


def divide(a: float, b: float) -> float:
    with np.errstate(all="ignore"):
        return float(np.divide(np.float64(a), np.float64(b)))


def fused(a: float, b: float, c: float) -> float:
    # For exact zeros, infinities and NaN, two operations give what one gives, but for an overflow between.
    if math.isfinite(a) and math.isfinite(b) and not math.isfinite(c):
        return c
    with np.errstate(all="ignore"):
        return float(np.float64(a) * np.float64(b) + np.float64(c))


def larger(kind: str, sign: int, propagate: bool) -> Callable[..., int]:
    def run(a: int, b: int) -> int:
        x, y = decode(a, kind), decode(b, kind)
        if math.isnan(x) or math.isnan(y):
            if propagate or (math.isnan(x) and math.isnan(y)):
                return NAN[kind]
            return a if math.isnan(y) else b
        order = [(sign * v, sign * math.copysign(1, v), pattern) for v, pattern in ((x, a), (y, b))]
        return max(order)[2]

    return run


COMPARE: dict[str, Callable[[float, float], bool]] = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}


def float_compare(kind: str, name: str) -> Callable[..., int]:
    def run(a: int, b: int) -> int:
        x, y = decode(a, kind), decode(b, kind)
        unordered = math.isnan(x) or math.isnan(y)
        if name in ("num", "nan"):
            return int(unordered == (name == "nan"))
        return int(name.endswith("u") and name != "num") if unordered else int(COMPARE[name[:2]](x, y))

    return run


def float_cases() -> list[Case]:
    out = []
    for kind in ("f32", "f64"):
        two, three = (kind,) * 2, (kind,) * 3
        add = arithmetic(kind, lambda a, b: nonzero(a + b), lambda a, b: a + b)
        sub = arithmetic(kind, lambda a, b: nonzero(a - b), lambda a, b: a - b)
        mul = arithmetic(kind, lambda a, b: nonzero(a * b), lambda a, b: a * b)
        div = arithmetic(kind, lambda a, b: nonzero(a / b) if b else None, divide)
        sqrt = arithmetic(
            kind, lambda a: square_root(a) if a > 0 else None, lambda a: math.sqrt(a) if a >= 0 else math.nan
        )
        rcp = arithmetic(kind, lambda a: 1 / a if a else None, lambda a: divide(1.0, a))
        fma = arithmetic(kind, lambda a, b, c: nonzero(a * b + c), fused)
        out += [
            Case(f"add.rn.{kind}", kind, two, add),
            Case(f"sub.rn.{kind}", kind, two, sub),
            Case(f"mul.rn.{kind}", kind, two, mul),
            Case(f"div.rn.{kind}", kind, two, div),
            Case(f"sqrt.rn.{kind}", kind, (kind,), sqrt),
            Case(f"rcp.rn.{kind}", kind, (kind,), rcp),
            Case(f"fma.rn.{kind}", kind, three, fma),
            Case(f"min.{kind}", kind, two, larger(kind, -1, False)),
            Case(f"max.{kind}", kind, two, larger(kind, 1, False)),
        ]
        for name in (*COMPARE, *(f"{c}u" for c in COMPARE), "num", "nan"):
            out.append(Case(f"setp.{name}.{kind}", "pred", two, float_compare(kind, name)))
    out += [
        Case("min.NaN.f32", "f32", ("f32",) * 2, larger("f32", -1, True)),
        Case("max.NaN.f32", "f32", ("f32",) * 2, larger("f32", 1, True)),
        Case("abs.f32", "f32", ("f32",), lambda a: a & 0x7FFFFFFF),
        Case("abs.f64", "f64", ("f64",), lambda a: a & 0x7FFFFFFFFFFFFFFF),
        Case("neg.f32", "f32", ("f32",), lambda a: a ^ 0x80000000),
        Case("neg.f64", "f64", ("f64",), lambda a: a ^ 1 << 63),
        Case("copysign.f32", "f32", ("f32",) * 2, lambda a, b: a & 0x80000000 | b & 0x7FFFFFFF),
        Case("testp.finite.f32", "pred", ("f32",), lambda a: int(math.isfinite(decode(a, "f32")))),
        Case("testp.notanumber.f64", "pred", ("f64",), lambda a: int(math.isnan(decode(a, "f64")))),
        Case("testp.subnormal.f32", "pred", ("f32",), lambda a: int(0 < a & 0x7FFFFFFF < 0x800000)),
    ]
    for kind in ("f16", "bf16"):
        fma = arithmetic(kind, lambda a, b, c: nonzero(a * b + c), fused)
        out.append(Case(f"fma.rn.{kind}", kind, (kind,) * 3, fma))
    for name, fn in (("add", lambda a, b: a + b), ("mul", lambda a, b: a * b)):
        exact = arithmetic("f16", lambda a, b, fn=fn: nonzero(fn(a, b)), fn)
        out.append(Case(f"{name}.rn.f16", "f16", ("f16",) * 2, exact))
    return out


# Conversions.


def resize(target: str, source: str) -> Callable[[int], int]:
    return integers(lambda a: a, source, target)


def saturate(target: str, source: str) -> Callable[[int], int]:
    low, high = (0, (1 << bits_of(target)) - 1)
    if target[0] == "s":
        low, high = -(1 << bits_of(target) - 1), (1 << bits_of(target) - 1) - 1
    return integers(lambda a: min(max(a, low), high), source, target)


def to_integer(target: str, source: str, mode: str) -> Callable[[int], int]:
    bits = bits_of(target)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if target[0] == "s" else (0, (1 << bits) - 1)
    rounding: dict[str, Callable[[Fraction], int]] = {
        "rni": round,
        "rzi": math.trunc,
        "rmi": math.floor,
        "rpi": math.ceil,
    }

    def run(a: int) -> int:
        value = decode(a, source)
        if math.isnan(value):
            return 1 << bits - 1 if source == "f64" or bits == 64 else 0
        number = (high if value > 0 else low) if math.isinf(value) else rounding[mode](Fraction(value))
        return min(max(number, low), high) & (1 << bits) - 1

    return run


def to_float(target: str, source: str, mode: str) -> Callable[[int], int]:
    if source in FORMATS:
        # A float keeps the sign of zero, infinity and NaN; encode() takes a finite one exactly.
        return lambda a: encode(decode(a, source), target, mode)
    return lambda a: encode(Fraction(as_type(a, source)), target, mode) if as_type(a, source) else 0


def integral(kind: str, mode: str) -> Callable[[int], int]:
    rounding: dict[str, Callable[[Fraction], int]] = {
        "rni": round,
        "rzi": math.trunc,
        "rmi": math.floor,
        "rpi": math.ceil,
    }

    def run(a: int) -> int:
        value = decode(a, kind)
        if not math.isfinite(value):
            return encode(value, kind)
        return encode(math.copysign(float(rounding[mode](Fraction(value))), value), kind)

    return run


def conversion_cases() -> list[Case]:
    out = []
    for target, source in (
        ("u16", "u32"),
        ("s32", "s16"),
        ("u32", "s16"),
        ("u64", "s32"),
        ("s64", "u32"),
        ("u16", "u64"),
    ):
        out.append(Case(f"cvt.{target}.{source}", target, (source,), resize(target, source)))
    for target, source in (("s16", "s32"), ("u16", "s32"), ("s32", "u32"), ("u32", "s64")):
        out.append(Case(f"cvt.sat.{target}.{source}", target, (source,), saturate(target, source)))
    for source in ("f16", "f32", "f64"):
        for target in ("s32", "u32", "s64", "u64", "u16"):
            for mode in ("rni", "rzi", "rmi", "rpi"):
                out.append(Case(f"cvt.{mode}.{target}.{source}", target, (source,), to_integer(target, source, mode)))
    for target in ("f16", "f32", "f64"):
        for source in ("s16", "u32", "s32", "s64", "u64"):
            out.append(Case(f"cvt.rn.{target}.{source}", target, (source,), to_float(target, source, "rn")))
    for mode in ("rz", "rm", "rp"):
        out.append(Case(f"cvt.{mode}.f32.s32", "f32", ("s32",), to_float("f32", "s32", mode)))
        out.append(Case(f"cvt.{mode}.f32.f64", "f32", ("f64",), to_float("f32", "f64", mode)))
        out.append(Case(f"cvt.{mode}.f16.f32", "f16", ("f32",), to_float("f16", "f32", mode)))
    for target, source in (("f32", "f64"), ("f16", "f32"), ("f16", "f64"), ("bf16", "f32")):
        out.append(Case(f"cvt.rn.{target}.{source}", target, (source,), to_float(target, source, "rn")))
    out.append(Case("cvt.rz.bf16.f32", "bf16", ("f32",), to_float("bf16", "f32", "rz")))
    for target, source in (("f32", "f16"), ("f64", "f32"), ("f64", "f16"), ("f32", "bf16")):
        out.append(Case(f"cvt.{target}.{source}", target, (source,), to_float(target, source, "rn")))
    for kind in ("f32", "f64"):
        for mode in ("rni", "rzi", "rmi", "rpi"):
            out.append(Case(f"cvt.{mode}.{kind}.{kind}", kind, (kind,), integral(kind, mode)))
    for target in ("f16", "bf16"):
        half = to_float(target, "f32", "rn")
        out.append(
            Case(
                f"cvt.rn.{target}x2.f32",
                "b32",
                ("f32", "f32"),
                lambda a, b, half=half: half(a) << 16 | half(b),
            )
        )
    return out


CASES = [*integer_cases(), *float_cases(), *conversion_cases()]
