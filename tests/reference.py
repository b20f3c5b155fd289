"""What tests compare with: the formulas once more in plain numpy, buffers with sentinels, comparison of bits.

Nothing here imports pyshard, so that no mistake is shared. 16-bit numbers travel as uint16 bits.
"""

import math
import os
from collections.abc import Iterable, Sequence
from decimal import Decimal, localcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.generic]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def session_seed() -> int:
    """The seed that conftest.py printed; for hypothesis.seed()."""
    return int(os.environ["PYSHARD_TEST_SEED"])


# ---- bits ----


def raw_bits(tensor: Tensor) -> Tensor:
    """A contiguous tensor's bits as integers."""
    tensor = tensor.detach().contiguous()
    return tensor.view(_BITS[tensor.element_size()])


def bits_of(tensor: Tensor) -> Tensor:
    """The same with every NaN replaced by one of them."""
    bits = raw_bits(tensor)
    if not tensor.is_floating_point():
        return bits
    nan = torch.full((), math.nan, dtype=tensor.dtype).view(bits.dtype)
    return torch.where(tensor.detach().isnan(), nan, bits)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "tensor") -> None:
    """Equal dtype, shape and bits; any NaN equals any other. Names the first difference."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if torch.equal(raw_bits(actual), raw_bits(expected)):
        return
    got, want = bits_of(actual), bits_of(expected)
    if torch.equal(got, want):
        return
    different = (got != want).nonzero()
    at = tuple(different[0].tolist())
    mask = (1 << 8 * actual.element_size()) - 1
    raise AssertionError(
        f"{what}: {len(different)} of {actual.numel()} elements differ, first at {at}: {actual[at].item()!r} "
        f"({int(got[at]) & mask:#x}), expected {expected[at].item()!r} ({int(want[at]) & mask:#x})"
    )


SENTINEL = 0xA5
_GUARD = 64  # bytes on each side


class Guarded:
    """A 1-d tensor between sentinel bytes, `offset` elements past a 64-byte boundary."""

    def __init__(self, values: Tensor, offset: int = 0):
        values = values.detach().flatten()
        width = values.element_size()
        self._memory = torch.empty(3 * _GUARD + (values.numel() + offset) * width, dtype=torch.uint8)
        first = _GUARD + -self._memory.data_ptr() % _GUARD + offset * width
        self._outside = (self._memory[:first], self._memory[first + values.numel() * width :])
        for side in self._outside:
            side.fill_(SENTINEL)
        self.tensor = self._memory[first : first + values.numel() * width].view(values.dtype)
        self.tensor.copy_(values)

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()

    def check(self, what: str = "tensor") -> None:
        """Fails if a byte outside the tensor has changed."""
        for side, name in zip(self._outside, ("before", "after")):
            changed = (side != SENTINEL).nonzero().flatten()
            if len(changed):
                at = len(side) - int(changed[-1]) if name == "before" else int(changed[0])
                raise AssertionError(f"{what}: {len(changed)} bytes written {name} it, the nearest {at} bytes away")


# Numbers at which formats and formulas break: zeros, subnormals, the ends of each format, ties, inf and NaN.
SPECIAL = np.array(
    [
        *(0, -0.0, 1e-45, -1e-40, 1.17549435e-38, 5.96e-8, 6.1e-5, 65504, 65520, 1 + 2**-8, 1 + 2**-11),
        *(1e-20, 1e20, -1e30, 3.3895314e38, 3.4028235e38, np.inf, -np.inf, np.nan),
    ],
    np.float32,
)


# ---- formats, on integers ----


def bf16_round(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """fp32 to bf16 bits, nearest even."""
    bits = values.view(np.uint32).astype(np.uint64)
    below, odd = bits & 0xFFFF, bits >> 16 & 1
    up = (below > 0x8000) | ((below == 0x8000) & (odd == 1))
    return np.where(np.isnan(values), 0x7FC0, (bits >> 16) + up).astype(np.uint16)


def fp16_round(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """fp32 to fp16 bits, nearest even, by numpy."""
    with np.errstate(all="ignore"):
        return values.astype(np.float16).view(np.uint16)


def bf16_value(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp16_value(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return bits.view(np.float16).astype(np.float32)


def split(master: NDArray[np.float32]) -> tuple[NDArray[np.uint16], NDArray[np.int16]]:
    """Upper half rounded half away from zero, and what is missing to the master; a NaN keeps its sign."""
    bits = master.view(np.uint32).astype(np.int64)
    high = bits // 65536 + (bits % 65536 >= 32768)
    low = bits - high * 65536
    nan = np.isnan(master)
    high = np.where(nan, np.where(bits >> 31 == 1, 0xFFC0, 0x7FC0), high)
    return high.astype(np.uint16), np.where(nan, 0, low).astype(np.int16)


def join(high: NDArray[np.uint16], low: NDArray[np.int16]) -> NDArray[np.float32]:
    """The master of two halves. Halves that no split makes (their sum is NaN) mean the upper half alone."""
    upper = high.astype(np.int64) * 65536
    master = ((upper + low) % 2**32).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(master), upper.astype(np.uint32).view(np.float32), master)


# ---- the update ----


def exact_power(base: float, exponent: int) -> Decimal:
    """base**exponent of the double `base`, to 40 digits."""
    with localcontext() as context:
        context.prec = 40
        return Decimal(base) ** exponent


def adam_scalars(hyper: Sequence[float], grad_scale: float) -> list[float]:
    """The nine scalars of the hyperparameters, in the order of the kernels: in double, with exact powers."""
    lr, beta1, beta2, eps, weight_decay, step, sign, decoupled = hyper
    with localcontext() as context:
        context.prec = 40
        bias1 = float(1 - exact_power(beta1, int(step)))
        bias2 = float(1 - exact_power(beta2, int(step)))
    decay = 1.0 - lr * weight_decay * decoupled
    return [
        *(grad_scale * sign, weight_decay, decay),
        *(1.0 - beta1, beta2, 1.0 - beta2),
        *(lr / bias1, 1.0 / math.sqrt(bias2), eps),
    ]


def adam(
    p: Array, m: Array, v: Array, vmax: Array | None, g: Array, scalars: Sequence[float], coupled: bool
) -> tuple[Array, Array, Array, Array | None]:
    """One step in the dtype of p, fp32 or fp64: numpy rounds each operation on its own, and fuses none."""
    kind = p.dtype.type
    scale, weight_decay, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_bias2, eps = map(
        kind, scalars
    )
    with np.errstate(all="ignore"):
        g = g.astype(kind) * scale
        if coupled:
            g = g + weight_decay * p
        else:
            p = p * decay
        m = m + one_minus_beta1 * (g - m)
        v = beta2 * v + one_minus_beta2 * (g * g)
        h = v
        if vmax is not None:
            h = vmax = np.where((v > vmax) | np.isnan(v), v, vmax)
        p = p - step_size * (m / (np.sqrt(h) * inv_sqrt_bias2 + eps))
    return p, m, v, vmax


# ---- the norm ----


def clip_coefficient(norm: float, limit: float) -> float:
    """What brings a norm down to a limit, as torch.nn.utils.clip_grad_norm_ defines it; NaN stays NaN."""
    if limit == math.inf:
        return 1.0
    coefficient = limit / (norm + 1e-6)
    return 1.0 if coefficient > 1.0 else coefficient


def square_sum(tensors: Iterable[Tensor]) -> float:
    """Sum of squares, correctly rounded: squares of fp32 numbers are exact in double."""
    return math.fsum(x * x for tensor in tensors for x in tensor.detach().double().flatten().tolist())


# ---- one tensor of a step, as the kernels see it ----

PARAM_DTYPES = (
    *(torch.float32, torch.bfloat16, torch.bfloat16),
    *(torch.float16, torch.bfloat16, torch.float16),
)
LOW_DTYPES = (None, torch.int16, torch.float32, torch.float32, None, None)
SPLIT = 1


class Row:
    """The arrays of one tensor between sentinels, as a row of an Adam step, and that step in numpy.

    The weights are small random numbers; in formats with an fp32 master every tenth 16-bit weight is not its
    rounding, as if the user had written it. With `special`, a third of all numbers come from SPECIAL.
    """

    def __init__(self, kind: int, n: int, rng: np.random.Generator, offset: int = 0, special: bool = False):
        self.kind, self.n = kind, n
        self.format, self.coupled, self.amsgrad = kind >> 3, bool(kind & 2), bool(kind & 1)
        param_dtype, low_dtype = PARAM_DTYPES[self.format], LOW_DTYPES[self.format]

        def numbers(scale: float) -> NDArray[np.float32]:
            x = (rng.standard_normal(n) * scale).astype(np.float32)
            if special:
                chosen = rng.random(n) < 1 / 3
                x[chosen] = rng.choice(SPECIAL, int(chosen.sum()))
            return x

        master = torch.from_numpy(numbers(0.1))
        low = None
        if self.format == SPLIT:
            high, rest = split(master.numpy())
            param, low = torch.from_numpy(high).view(torch.bfloat16), torch.from_numpy(rest)
        else:
            param = master.to(param_dtype)
            if low_dtype is not None:
                low = master
                written = torch.from_numpy(rng.random(n) < 0.1)
                param = torch.where(written, torch.from_numpy(numbers(0.1)).to(param_dtype), param)
        values = {
            "param": param,
            "low": low,
            "grad": torch.from_numpy(numbers(1.0)).to(torch.float32 if kind & 4 else param_dtype),
            "exp_avg": torch.from_numpy(numbers(0.1)),
            "exp_avg_sq": torch.from_numpy(np.abs(numbers(0.1))),
            "max_exp_avg_sq": torch.from_numpy(np.abs(numbers(0.1))) if self.amsgrad else None,
        }
        self.arrays = {name: Guarded(x, offset) for name, x in values.items() if x is not None}

    def tensors(self) -> dict[str, Tensor]:
        return {name: array.tensor for name, array in self.arrays.items()}

    def clone(self) -> "Row":
        """The same numbers in arrays of their own, at the same offset from a 64-byte boundary."""
        other = object.__new__(Row)
        other.__dict__.update(self.__dict__)
        other.arrays = {
            name: Guarded(a.tensor, a.address % _GUARD // a.tensor.element_size()) for name, a in self.arrays.items()
        }
        return other

    def addresses(self, hyper: int = 0, begin: int = 0, end: int | None = None) -> list[int]:
        """The row as cpu_adam takes it, of elements [begin, end)."""
        names = ("param", "low", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        found = [self.arrays.get(name) for name in names]
        at = [0 if a is None else a.address + begin * a.tensor.element_size() for a in found]
        return [*at, (self.n if end is None else end) - begin, self.kind, hyper]

    def master(self) -> NDArray[np.float32]:
        """The fp32 weights that a step starts from."""
        param = self.arrays["param"].tensor
        wide = param.float().numpy()
        low = self.arrays["low"].tensor if "low" in self.arrays else None
        if low is None:
            return wide
        stored = param.view(torch.uint16).numpy()
        if self.format == SPLIT:
            return join(stored, low.numpy())
        rounded = (bf16_round if param.dtype == torch.bfloat16 else fp16_round)(low.numpy())
        return np.where(rounded == stored, low.numpy(), wide)

    def expected(self, scalars: Sequence[float]) -> dict[str, Tensor]:
        """All arrays after a step, by numpy."""
        now = self.tensors()
        vmax = now["max_exp_avg_sq"].numpy() if self.amsgrad else None
        p, m, v, vmax = adam(
            *(self.master(), now["exp_avg"].numpy(), now["exp_avg_sq"].numpy(), vmax),
            *(now["grad"].float().numpy(), scalars, self.coupled),
        )
        after = {"grad": now["grad"].clone(), "exp_avg": torch.from_numpy(m), "exp_avg_sq": torch.from_numpy(v)}
        if vmax is not None:
            after["max_exp_avg_sq"] = torch.from_numpy(vmax)
        if self.format == SPLIT:
            high, low = split(p)
            return after | {"param": torch.from_numpy(high).view(torch.bfloat16), "low": torch.from_numpy(low)}
        if "low" in self.arrays:
            after["low"] = torch.from_numpy(p)
        dtype = now["param"].dtype
        if dtype == torch.float32:
            return after | {"param": torch.from_numpy(p)}
        rounded = (bf16_round if dtype == torch.bfloat16 else fp16_round)(p)
        return after | {"param": torch.from_numpy(rounded).view(dtype)}

    def check(self, expected: dict[str, Tensor], what: str = "") -> None:
        """Bits of every array, and the sentinels around it."""
        for name, array in self.arrays.items():
            assert_same_bits(array.tensor, expected[name], f"{name} of kind {self.kind}, n={self.n} {what}")
            array.check(f"{name} of kind {self.kind}, n={self.n} {what}")
