"""Floating-point operations of PTX on numpy arrays, correct to the last bit.

float32 and float64 arrays hold values; bfloat16 is held as its bits in uint16. Single- and half-precision
results that are NaN are the canonical NaN of PTX (0x7fffffff, 0x7fff), not the NaN of the host: code that
rounds NaN bits by hand behaves differently on the two.
"""

import ctypes
import ctypes.util
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Fn = Callable[..., Array]

CANONICAL_NAN: dict[str, Any] = {
    "f16": np.uint16(0x7FFF),
    "bf16": np.uint16(0x7FFF),
    "f32": np.uint32(0x7FFFFFFF),
}
DTYPE: dict[str, np.dtype[Any]] = {
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}
BITS: dict[str, np.dtype[Any]] = {
    "f16": np.dtype(np.uint16),
    "bf16": np.dtype(np.uint16),
    "f32": np.dtype(np.uint32),
}


def widen(bits: Array) -> Array:
    """bfloat16 bits -> the same value in float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(x: Array, kind: str, mode: str = "rn") -> Array:
    """float32 or float64 values rounded once to f16, bf16 (bits) or f32, NaN made canonical."""
    if kind == "bf16":
        return _narrow_bf16(x, mode)
    out = x.astype(DTYPE[kind])
    if mode != "rn":
        wide = out.astype(np.float64)
        exact = x.astype(np.float64)
        toward = DTYPE[kind].type({"rz": 0.0, "rm": -np.inf, "rp": np.inf}[mode])
        past = {"rz": np.abs(wide) > np.abs(exact), "rm": wide > exact, "rp": wide < exact}[mode]
        out = np.where(past, np.nextafter(out, toward), out)
        # nextafter loses the sign of a zero result, rounding keeps it.
        out = np.where(out == 0, np.copysign(out, exact.astype(out.dtype)), out)
    return canonical(out, kind)


def _narrow_bf16(x: Array, mode: str) -> Array:
    if x.dtype == np.float64:
        x = _to_odd_float32(x)
    bits = x.view(np.uint32)
    high = bits >> np.uint32(16)
    if mode == "rn":
        high = (bits + np.uint32(0x7FFF) + (high & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), CANONICAL_NAN["bf16"], high.astype(np.uint16))


def _to_odd_float32(x: Array) -> Array:
    """float64 -> float32 rounded to odd: a later rounding to fewer bits gives what a direct one would."""
    out = narrow(x, "f32", "rz")
    inexact = (out.astype(np.float64) != x) & np.isfinite(x)
    bits = out.view(np.uint32)
    return np.where(inexact, bits | np.uint32(1), bits).view(np.float32)


def canonical(x: Array, kind: str) -> Array:
    """Replace NaN by the canonical one; f64 keeps its payload, about which PTX says nothing."""
    if kind == "f64":
        return x
    nan = np.isnan(x)
    if nan.any():
        bits = np.where(nan, CANONICAL_NAN[kind], x.view(BITS[kind]))
        return bits.view(x.dtype)
    return x


def sum_to_odd(a: Array, b: Array) -> Array:
    """float64 a + b rounded to odd: rounding that to 51 bits or fewer is a single rounding of the exact sum.

    Method: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008.
    """
    s = a + b
    t = s - a
    error = (a - (s - t)) + (b - t)  # Knuth's TwoSum
    even = (s.view(np.uint64) & np.uint64(1)) == 0
    move = np.isfinite(s) & (error != 0) & even
    return np.where(move, np.nextafter(s, np.where(error > 0, np.inf, -np.inf)), s)


def _libm_fma() -> Callable[[float, float, float], float]:
    name = ctypes.util.find_library("m")
    fma = ctypes.CDLL(name or "libm.so.6").fma
    fma.restype = ctypes.c_double
    fma.argtypes = [ctypes.c_double] * 3
    return fma


_FMA64 = _libm_fma()


# Two factors whose lowest 27 of 53 bits are zero, as those of converted float32 are, have an exact product.
_LOW_BITS = np.uint64((1 << 27) - 1)
_SAFE = 2.0**-900  # far enough from underflow


def _fma64(a: Array, b: Array, c: Array) -> Array:
    if not ((a.view(np.uint64) | b.view(np.uint64)) & _LOW_BITS).any():
        product = a * b
        if (np.isfinite(product) & ((np.abs(product) > _SAFE) | (a == 0) | (b == 0))).all():
            return product + c
    a, b, c = np.broadcast_arrays(a, b, c)
    return np.array([_FMA64(*abc) for abc in zip(a.tolist(), b.tolist(), c.tolist())], dtype=np.float64)


def load(x: Array, kind: str) -> Array:
    """Register values of a 16- or 32-bit float type as exact float64 values."""
    return (widen(x) if kind == "bf16" else x).astype(np.float64)


def fma(kind: str) -> Fn:
    """a * b + c with one rounding."""
    if kind == "f64":
        return _fma64

    def run(a: Array, b: Array, c: Array) -> Array:
        product = load(a, kind) * load(b, kind)  # exact: at most 48 bits
        return narrow(sum_to_odd(product, load(c, kind)), kind)

    return run


def rounded(fn: Fn, kind: str) -> Fn:
    """An IEEE operation of numpy as an operation on `kind`, rounded to nearest even.

    float16 and bfloat16 go through float64, whose 53 bits are more than twice theirs plus two: for +, -, *, /
    and the square root the second rounding then changes nothing.
    """
    if kind in ("f16", "bf16"):
        return lambda *args: narrow(fn(*(load(a, kind) for a in args)), kind)
    if kind == "f32":
        return lambda *args: canonical(fn(*args), "f32")
    return fn


def extremum(kind: str, largest: bool, propagate_nan: bool) -> Fn:
    """min and max: -0 < +0; NaN is ignored unless both are, or wins when `propagate_nan`."""
    if propagate_nan:
        pick: Fn = np.maximum if largest else np.minimum
    else:
        pick = np.fmax if largest else np.fmin

    def run(a: Array, b: Array) -> Array:
        if kind == "bf16":
            return narrow(run_values(widen(a), widen(b)), kind)
        return canonical(run_values(a, b), kind)

    def run_values(a: Array, b: Array) -> Array:
        out = pick(a, b)
        zeros = (a == 0) & (b == 0)
        if zeros.any():
            negative = np.signbit(a) & np.signbit(b) if largest else np.signbit(a) | np.signbit(b)
            out = np.where(zeros, np.where(negative, -out.dtype.type(0), out.dtype.type(0)), out)
        return out

    return run


_INTEGRAL: dict[str, Fn] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integral(kind: str, mode: str) -> Fn:
    """Float -> integral value of the same type (cvt.rni.f32.f32 and its like)."""
    return rounded(_INTEGRAL[mode], kind)


def to_integer(kind: str, target: np.dtype[Any], mode: str) -> Fn:
    """Float -> integer, clamped to the range of the target; NaN as PTX has it."""
    info = np.iinfo(target)
    low, high = float(info.min), float(info.max)  # high of a 64-bit type rounds up to 2**63 or 2**64
    top_bit = 1 << (info.bits - 1)
    nan = 0 if kind != "f64" and info.bits < 64 else (info.min if info.min else top_bit)

    def run(x: Array) -> Array:
        r = _INTEGRAL[mode](load(x, kind))
        above, below, none = r >= high, r <= low, np.isnan(r)
        safe = np.where(above | below | none, 0.0, r)
        out = np.where(above, target.type(info.max), safe.astype(target))
        out = np.where(below, target.type(info.min), out)
        return np.where(none, target.type(nan), out)

    return run


def from_integer(kind: str, mode: str, bits: int) -> Fn:
    """Integer -> float; directed rounding only for integers that float64 holds exactly."""
    if kind == "f64":
        if mode != "rn" and bits == 64:
            raise NotImplementedError(f"cvt.{mode}.f64 of a 64-bit integer")
        return lambda x: x.astype(np.float64)
    if kind == "f32" and mode == "rn":
        return lambda x: x.astype(np.float32)
    if mode != "rn" and bits == 64:
        raise NotImplementedError(f"cvt.{mode}.{kind} of a 64-bit integer")
    # To f16, float64 may round a large integer first: what it rounds is far beyond the largest f16.
    return lambda x: narrow(x.astype(np.float64), kind, mode)


def between(target: str, source: str, mode: str) -> Fn:
    """Float -> float of another width."""
    if target == "f64":
        return lambda x: load(x, source)
    if target == "f32" and source in ("f16", "bf16"):
        return lambda x: canonical(widen(x) if source == "bf16" else x.astype(np.float32), "f32")
    if target == "bf16" and mode not in ("rn", "rz"):
        raise NotImplementedError(f"cvt.{mode}.bf16")
    return lambda x: narrow(load(x, source) if source == "bf16" else x, target, mode)


def pack2(target: str, mode: str) -> Fn:
    """cvt.*.f16x2.f32 and bf16x2: the first operand goes to the upper half."""

    def half(x: Array) -> Array:
        return narrow(x, target, mode).view(np.uint16).astype(np.uint32)

    return lambda a, b: (half(a) << np.uint32(16)) | half(b)
