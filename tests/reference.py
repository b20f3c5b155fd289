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


def bits_of(tensor: Tensor) -> Tensor:
    """A contiguous tensor's bits as integers, every NaN replaced by one and the same."""
    tensor = tensor.detach().contiguous()
    bits = tensor.view(_BITS[tensor.element_size()])
    if not tensor.is_floating_point():
        return bits
    nan = torch.full((), math.nan, dtype=tensor.dtype).view(bits.dtype)
    return torch.where(tensor.isnan(), nan, bits)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "tensor") -> None:
    """Equal dtype, shape and bits; any NaN equals any other. Names the first difference."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
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
        self._memory = torch.full(
            (3 * _GUARD + (values.numel() + offset) * width,), SENTINEL, dtype=torch.uint8
        )
        first = _GUARD + -self._memory.data_ptr() % _GUARD + offset * width
        self._span = slice(first, first + values.numel() * width)
        self.tensor = self._memory[self._span].view(values.dtype)
        self.tensor.copy_(values)

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()

    def check(self, what: str = "tensor") -> None:
        """Fails if a byte outside the tensor has changed."""
        outside = self._memory.clone()
        outside[self._span] = SENTINEL
        changed = (outside != SENTINEL).nonzero().flatten() - self._span.start
        assert not len(changed), (
            f"{what}: written outside, first at byte {int(changed[0])} of {self.tensor.nbytes}"
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


def square_sum(tensors: Iterable[Tensor]) -> float:
    """Sum of squares, correctly rounded: squares of fp32 numbers are exact in double."""
    return math.fsum(x * x for tensor in tensors for x in tensor.detach().double().flatten().tolist())
