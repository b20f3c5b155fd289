"""The plain reference: every kernel in torch operations, on any device, one rounding per operation.

This is the text to read first and the one that the other backends are held to, bit by bit. It is slow: each
operation is a pass over memory. fp64 parameters run here with the same formula in double. The formula itself is
csrc/adam.h's, line for line; no lerp, addcmul or alpha=, because those may fuse a multiplication with an addition.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .formats import Format

NORM_LANES = 128
NORM_BLOCK = 4096


def power(base: float, exponent: int) -> float:
    """base**exponent by binary exponentiation, in the order of csrc/adam.h."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result = result * base
        base = base * base
        exponent >>= 1
    return result


def adam_scalars(hyper: list[float], grad_scale: float) -> list[float]:
    """The nine scalars of (lr, beta1, beta2, eps, weight_decay, step, sign, decoupled), in double, not yet rounded."""
    lr, beta1, beta2, eps, weight_decay, step, sign, decoupled = hyper
    bias1 = 1.0 - power(beta1, int(step))
    bias2 = 1.0 - power(beta2, int(step))
    return [
        grad_scale * sign,
        weight_decay,
        1.0 - lr * weight_decay * decoupled,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        lr / bias1,
        1.0 / math.sqrt(bias2),
        eps,
    ]


def clip_coefficient(norm: float, max_norm: float) -> float:
    """Factor that brings `norm` down to `max_norm`, at most 1; NaN stays NaN."""
    coefficient = max_norm / (norm + 1e-6)
    return 1.0 if coefficient > 1.0 else coefficient


def adam_update(
    p: Tensor, m: Tensor, v: Tensor, vmax: Tensor | None, g: Tensor, scalars: list[float], coupled: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One Adam step out of place, all tensors in the working dtype (fp32 or fp64).

    `scalars` are adam_scalars(); torch rounds a Python float once to the dtype of the tensor it meets.
    """
    (
        grad_scale,
        weight_decay,
        decay,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        step_size,
        inv_sqrt_bias2,
        eps,
    ) = scalars
    g = g * grad_scale
    if coupled:
        g = g + p * weight_decay
    else:
        p = p * decay
    m = m + (g - m) * one_minus_beta1
    v = v * beta2 + (g * g) * one_minus_beta2
    h = v
    if vmax is not None:
        h = vmax = torch.where((v > vmax) | (v != v), v, vmax)
    p = p - (m / (_sqrt(h) * inv_sqrt_bias2 + eps)) * step_size
    return p, m, v, vmax


def _sqrt(h: Tensor) -> Tensor:
    """Correctly rounded in fp32: torch's own goes through a vector library on CPUs and is off by an ulp at times.

    The root of a 24-bit number is never near a tie of fp32, so rounding the double again is exact.
    """
    return h.double().sqrt().to(h.dtype)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Splits fp32 into a bf16 upper half, rounded half away from zero, and the int16 remainder."""
    bits = master.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    high = torch.where(nan, (bits >> 16) | 0x40, (bits + 0x8000) >> 16)
    low = torch.where(nan, 0, bits)
    return _int16(high).view(torch.bfloat16), _int16(low)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 master of a bf16 upper half and its int16 remainder; exact inverse of split.

    Halves that no split makes, whose sum is NaN, mean the upper one alone.
    """
    upper = high.view(torch.int16).to(torch.int64) << 16
    bits = (upper + low.to(torch.int64)) & 0xFFFFFFFF
    bits = torch.where((bits & 0x7FFFFFFF) > 0x7F800000, upper & 0xFFFFFFFF, bits)
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def _int16(bits: Tensor) -> Tensor:
    bits = bits & 0xFFFF
    return torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16)


def adam_(
    fmt: Format | None,
    param: Tensor,
    low: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    scalars: list[float],
    coupled: bool,
) -> None:
    """One step of one parameter in place: param, low and the moments change. `fmt` None is fp64."""
    work = torch.float64 if fmt is None else torch.float32
    weight = param.to(work)
    if fmt == Format.BF16_SPLIT and low is not None:
        weight = join(param, low)
    elif low is not None:  # an fp32 master counts as long as the parameter is its rounding
        same = low.to(param.dtype).view(torch.int16) == param.view(torch.int16)
        weight = torch.where(same, low, weight)
    p, m, v, vmax = adam_update(weight, exp_avg, exp_avg_sq, max_exp_avg_sq, grad.to(work), scalars, coupled)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    if max_exp_avg_sq is not None and vmax is not None:
        max_exp_avg_sq.copy_(vmax)
    if fmt == Format.BF16_SPLIT and low is not None:
        high, remainder = split(p)
        param.copy_(high)
        low.copy_(remainder)
    else:
        if low is not None:
            low.copy_(p)
        param.copy_(p)


def _lanes(blocks: Tensor) -> Tensor:
    """Sums blocks [n, 4096] of doubles: 128 lanes in row order, then a halving tree."""
    rows = blocks.view(-1, NORM_BLOCK // NORM_LANES, NORM_LANES)
    lanes = torch.zeros_like(rows[:, 0])
    for row in range(rows.shape[1]):
        lanes = lanes + rows[:, row]
    width = NORM_LANES // 2
    while width:
        lanes = lanes[:, :width] + lanes[:, width : 2 * width]
        width //= 2
    return lanes[:, 0]


def _padded(values: Tensor) -> Tensor:
    size = math.ceil(values.numel() / NORM_BLOCK) * NORM_BLOCK
    return torch.nn.functional.pad(values, (0, size - values.numel())).view(-1, NORM_BLOCK)


def reduce(sources: Sequence[Tensor]) -> Tensor:
    """s0 + s1 + s2 + ... in fp32, from the left, each sum rounded; of one source its values in fp32."""
    total = sources[0].float()
    for source in sources[1:]:
        total = total + source.float()
    return total


def block_sums(grads: Sequence[Tensor]) -> Tensor:
    """One double per block of 4096 elements of each gradient, in order: the sum of its squares. Shape [blocks].

    Gradients are read in the order of memory, which for dense tensors is the order of their elements' addresses.
    """
    parts = [torch.zeros(0, dtype=torch.float64, device=grads[0].device if grads else None)]
    for grad in grads:
        flat = in_memory_order(grad).double()
        parts.append(_lanes(_padded(flat * flat)))
    return torch.cat(parts)


def sum_blocks(values: Tensor) -> Tensor:
    """The total of block_sums() as a 0-d double, in the fixed order; 0 of no blocks."""
    while values.numel() > 1:
        values = _lanes(_padded(values))
    return values.sum()


def square_sum(grads: Sequence[Tensor]) -> Tensor:
    """Sum of squares of all gradients as a 0-d double, in the fixed order of blocks; inf or NaN if an element is."""
    return sum_blocks(block_sums(grads))


def in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as a 1-d view in the order of their addresses; a copy if it is not dense."""
    if tensor.is_contiguous():
        return tensor.reshape(-1)
    stride = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: (-stride[d], d))
    return tensor.permute(order).reshape(-1).contiguous()  # reshape alone keeps a single stride, as of x[::2]


def unavailable(device_type: str) -> str | None:
    """Never: these are torch's own operations."""
    return None
