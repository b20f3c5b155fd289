"""The lane-wise instructions of PTX: opcode text -> numpy function and types.

`inexact(opcode)` says why an opcode has no single specified result; `lookup(opcode)` gives its function.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import floats, integers
from .errors import UnknownInstructionError
from .floats import Array, Fn

FLOATS = ("f16", "bf16", "f32", "f64")
ROUNDINGS = ("rn", "rz", "rm", "rp")
# What a value of each type looks like while it is computed with; bf16 stays bits.
DTYPES: dict[str, np.dtype[Any]] = {
    **{f"{k}{n}": np.dtype(f"{'i' if k == 's' else 'u'}{n // 8}") for k in "bus" for n in (8, 16, 32, 64)},
    **floats.DTYPE,
    "bf16": np.dtype(np.uint16),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
    "pred": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class Alu:
    """A lane-wise instruction. `divisor` is set where a zero second operand has no specified result."""

    fn: Fn
    result: str
    operands: tuple[str, ...]
    divisor: bool = False


def inexact(opcode: str, strict: bool) -> str | None:
    """Why the result of an opcode is not fixed to the last bit, or None.

    `strict` adds what is exact only as long as nothing rewrites it: additions and multiplications without
    `.rn`, which may be contracted into fma.
    """
    base, *rest = opcode.split(".")
    kinds = set(rest)
    is_float = bool(rest) and (rest[-1] in FLOATS or rest[-1] in ("f16x2", "bf16x2", "f32x2"))
    if kinds & {"approx", "full"}:
        return "is an approximation"
    if base in ("sin", "cos", "lg2", "ex2", "tanh", "rsqrt"):
        return "is an approximation"
    if "ftz" in kinds:
        return "flushes subnormal numbers to zero"
    if base in ("atom", "red") and "add" in kinds and is_float:
        return "adds floating-point numbers in no specified order"
    rounded = kinds & set(ROUNDINGS)
    if base in ("div", "sqrt", "rcp", "fma", "mad") and is_float and not rounded:
        return "has no rounding modifier, so its precision is not specified"
    if strict and base in ("add", "sub", "mul") and is_float and not rounded:
        return "has no rounding modifier, so it may be contracted into fma; compile with --fmad=false"
    return None


def lookup(opcode: str) -> Alu | None:
    """The lane-wise meaning of an opcode; None if it is not a lane-wise one.

    Raises UnknownInstructionError for a modifier or type that is not modelled.
    """
    base, *rest = opcode.split(".")
    build = _TABLE.get(base)
    if build is None:
        return None
    if not rest:
        raise UnknownInstructionError(f"{opcode} has no type")
    try:
        return build(base, rest[:-1], rest[-1])
    except (KeyError, NotImplementedError) as error:
        raise UnknownInstructionError(f"{opcode} is not modelled ({error})") from None


def _only(modifiers: list[str], *allowed: str) -> None:
    for m in modifiers:
        if m not in allowed:
            raise NotImplementedError(f"modifier .{m}")


# Arithmetic.

_ARITHMETIC: dict[str, Fn] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "sqrt": np.sqrt,
    "rcp": lambda a: np.divide(a.dtype.type(1), a),
}


def _float_arithmetic(base: str, modifiers: list[str], kind: str) -> Alu:
    _only(modifiers, "rn")
    arity = 1 if base in ("sqrt", "rcp") else 2
    return Alu(floats.rounded(_ARITHMETIC[base], kind), kind, (kind,) * arity)


def _arithmetic(base: str, modifiers: list[str], kind: str) -> Alu:
    if kind in FLOATS:
        return _float_arithmetic(base, modifiers, kind)
    dtype = DTYPES[kind]
    if base in ("add", "sub"):
        _only(modifiers)
        return Alu(_ARITHMETIC[base], kind, (kind, kind))
    if base == "div":
        _only(modifiers)
        return Alu(integers.quotient(dtype), kind, (kind, kind), divisor=True)
    if base != "mul" or len(modifiers) != 1:
        raise NotImplementedError(f"{base} of {kind}")
    fn, result = _multiply(modifiers[0], kind)
    return Alu(fn, result, (kind, kind))


def _multiply(part: str, kind: str) -> tuple[Fn, str]:
    if part == "lo":
        return np.multiply, kind
    if part == "hi":
        return integers.multiply_high(DTYPES[kind]), kind
    if part == "wide":
        return integers.multiply_wide(DTYPES[kind]), f"{kind[0]}{2 * int(kind[1:])}"
    raise NotImplementedError(f"modifier .{part}")


def _mad(base: str, modifiers: list[str], kind: str) -> Alu:
    if kind in FLOATS:
        return _fma(base, modifiers, kind)
    _only(modifiers[1:])
    multiply, result = _multiply(modifiers[0], kind)
    return Alu(lambda a, b, c: multiply(a, b) + c, result, (kind, kind, result))


def _fma(base: str, modifiers: list[str], kind: str) -> Alu:
    _only(modifiers, "rn")
    return Alu(floats.fma(kind), kind, (kind,) * 3)


def _rem(base: str, modifiers: list[str], kind: str) -> Alu:
    _only(modifiers)
    return Alu(integers.remainder(DTYPES[kind]), kind, (kind, kind), divisor=True)


def _sign(base: str, modifiers: list[str], kind: str) -> Alu:
    _only(modifiers)
    if kind == "bf16":
        sign = np.uint16(0x8000)
        return Alu((lambda a: a & ~sign) if base == "abs" else (lambda a: a ^ sign), kind, (kind,))
    return Alu(np.abs if base == "abs" else np.negative, kind, (kind,))


def _extremum(base: str, modifiers: list[str], kind: str) -> Alu:
    if kind in FLOATS:
        _only(modifiers, "NaN")
        return Alu(floats.extremum(kind, base == "max", "NaN" in modifiers), kind, (kind, kind))
    _only(modifiers)
    return Alu(np.maximum if base == "max" else np.minimum, kind, (kind, kind))


def _copysign(base: str, modifiers: list[str], kind: str) -> Alu:
    _only(modifiers)
    return Alu(lambda a, b: np.copysign(b, a), kind, (kind, kind))


# Comparison and choice.

_COMPARE: dict[str, Fn] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_COMPARE |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
_BOOLEAN: dict[str, Fn] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name: str, kind: str) -> Fn:
    if kind not in FLOATS:
        return _COMPARE[name]
    value: Callable[[Array], Array] = floats.widen if kind == "bf16" else (lambda x: x)
    if name in ("num", "nan"):
        wanted = name == "nan"
        return lambda a, b: (np.isnan(value(a)) | np.isnan(value(b))) == wanted
    if name.endswith("u") and name[:-1] in _COMPARE:
        # Unordered or true: the negation of the opposite comparison, which is false on NaN.
        opposite = {"eq": "ne", "ne": "eq", "lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}[name[:-1]]
        if opposite == "ne":  # != is the one comparison of numpy that is true on NaN
            return lambda a, b: (value(a) == value(b)) | np.isnan(value(a)) | np.isnan(value(b))
        fn = _COMPARE[opposite]
        return lambda a, b: ~fn(value(a), value(b))
    if name == "ne":
        return lambda a, b: (value(a) < value(b)) | (value(a) > value(b))
    fn = _COMPARE[name]
    return lambda a, b: fn(value(a), value(b))


def _setp(base: str, modifiers: list[str], kind: str) -> Alu:
    compare = _comparison(modifiers[0], kind)
    if len(modifiers) == 1:
        return Alu(compare, "pred", (kind, kind))
    combine = _BOOLEAN[modifiers[1]]
    _only(modifiers[2:])
    return Alu(lambda a, b, p: combine(compare(a, b), p), "pred", (kind, kind, "pred"))


def _testp(base: str, modifiers: list[str], kind: str) -> Alu:
    tiny = np.finfo(DTYPES[kind]).tiny
    tests: dict[str, Fn] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (np.abs(a) < tiny) & (a != 0),
    }
    _only(modifiers[1:])
    return Alu(tests[modifiers[0]], "pred", (kind,))


def _select(a: Array, b: Array, p: Array) -> Array:
    return np.where(p, a, b)


def _selp(base: str, modifiers: list[str], kind: str) -> Alu:
    _only(modifiers)
    bits = f"b{DTYPES[kind].itemsize * 8}"
    return Alu(_select, bits, (bits, bits, "pred"))


# Bits.


def _bitwise(base: str, modifiers: list[str], kind: str) -> Alu:
    _only(modifiers)
    if base == "not":
        return Alu(np.invert, kind, (kind,))
    fn: Fn = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[base]
    return Alu(fn, kind, (kind, kind))


def _shift(base: str, modifiers: list[str], kind: str) -> Alu:
    _only(modifiers)
    make = integers.shift_left if base == "shl" else integers.shift_right
    return Alu(make(DTYPES[kind]), kind, (kind, "u32"))


def _funnel(base: str, modifiers: list[str], kind: str) -> Alu:
    left, clamp = {"l": True, "r": False}[modifiers[0]], {"clamp": True, "wrap": False}[modifiers[1]]
    return Alu(integers.funnel(left, clamp), "b32", ("b32", "b32", "u32"))


def _field(base: str, modifiers: list[str], kind: str) -> Alu:
    _only(modifiers)
    if base == "bfe":
        return Alu(integers.extract_field(DTYPES[kind]), kind, (kind, "u32", "u32"))
    return Alu(integers.insert_field(DTYPES[kind]), kind, (kind, kind, "u32", "u32"))


def _bytes_and_tables(base: str, modifiers: list[str], kind: str) -> Alu:
    _only(modifiers)
    if kind != "b32":
        raise NotImplementedError(f"type .{kind}")
    if base == "prmt":
        return Alu(integers.permute_bytes, kind, (kind,) * 3)
    return Alu(integers.logic3, kind, (kind,) * 4)


def _count(base: str, modifiers: list[str], kind: str) -> Alu:
    _only(modifiers)
    if base == "brev":
        return Alu(integers.reverse_bits, kind, (kind,))
    if base == "bfind":
        return Alu(integers.find_first(DTYPES[kind]), "u32", (kind,))
    if base == "clz":
        return Alu(integers.leading_zeros, "u32", (kind,))
    return Alu(lambda a: np.bitwise_count(a).astype(np.uint32), "u32", (kind,))


# Moves and conversions.


def _move(base: str, modifiers: list[str], kind: str) -> Alu:
    _only(modifiers)
    bits = "pred" if kind == "pred" else f"b{DTYPES[kind].itemsize * 8}"
    return Alu(lambda a: a, bits, (bits,))


def _cvta(base: str, modifiers: list[str], kind: str) -> Alu:
    # Global, constant and parameter addresses are host addresses, in their own space and in the generic one.
    _only(modifiers, "to", "global", "const", "param")
    return Alu(lambda a: a, kind, (kind,))


def _cvt(base: str, modifiers: list[str], source: str) -> Alu:
    *modifiers, target = modifiers
    mode = next((m for m in modifiers if m in ROUNDINGS), "")
    integral = next((m for m in modifiers if m in ("rni", "rzi", "rmi", "rpi")), "")
    _only(modifiers, *ROUNDINGS, "rni", "rzi", "rmi", "rpi", "sat")
    saturate = "sat" in modifiers
    if target in ("f16x2", "bf16x2"):
        if saturate or source != "f32" or mode not in ("rn", "rz"):
            raise NotImplementedError("conversion")
        return Alu(floats.pack2(target[:-2], mode), target, ("f32", "f32"))
    from_float, to_float = source in FLOATS, target in FLOATS
    if saturate and (to_float or from_float):
        raise NotImplementedError("modifier .sat of a floating-point conversion")
    if not from_float and not to_float:
        fn = _saturated(DTYPES[target]) if saturate else (lambda x: x.astype(DTYPES[target]))
        return Alu(fn, target, (source,))
    if not to_float:
        if not integral:
            raise NotImplementedError("no rounding to an integer")
        return Alu(floats.to_integer(source, DTYPES[target], integral), target, (source,))
    if not from_float:
        if not mode:
            raise NotImplementedError("no rounding")
        bits = DTYPES[source].itemsize * 8
        return Alu(floats.from_integer(target, mode, bits), target, (source,))
    if integral:
        if source != target:
            raise NotImplementedError("integer rounding between float types")
        return Alu(floats.to_integral(source, integral), target, (source,))
    if source == target:
        return Alu(lambda x: x, target, (source,))
    narrowing = DTYPES[target].itemsize < DTYPES[source].itemsize
    if narrowing != bool(mode) or {source, target} == {"f16", "bf16"}:
        raise NotImplementedError("rounding")
    return Alu(floats.between(target, source, mode), target, (source,))


def _saturated(target: np.dtype[Any]) -> Fn:
    info = np.iinfo(target)

    def run(x: Array) -> Array:
        have = np.iinfo(x.dtype)
        low, high = max(info.min, have.min), min(info.max, have.max)
        return np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(target)

    return run


_TABLE: dict[str, Callable[[str, list[str], str], Alu]] = {
    **dict.fromkeys(("add", "sub", "mul", "div"), _arithmetic),
    **dict.fromkeys(("sqrt", "rcp"), _float_arithmetic),
    **dict.fromkeys(("abs", "neg"), _sign),
    **dict.fromkeys(("min", "max"), _extremum),
    **dict.fromkeys(("and", "or", "xor", "not"), _bitwise),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(("bfe", "bfi"), _field),
    **dict.fromkeys(("prmt", "lop3"), _bytes_and_tables),
    **dict.fromkeys(("popc", "clz", "brev", "bfind"), _count),
    "mad": _mad,
    "fma": _fma,
    "rem": _rem,
    "copysign": _copysign,
    "setp": _setp,
    "testp": _testp,
    "selp": _selp,
    "shf": _funnel,
    "mov": _move,
    "cvta": _cvta,
    "cvt": _cvt,
}
