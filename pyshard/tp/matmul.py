"""Matmuls on parts of a tensor [outer, rows, columns], written where they belong, and gradients of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# From so many rows on a matmul for each outer index runs at the speed of one for all of them; fewer rows are computed
# together and then copied. (Measured: see benchmarks/bench_tp_matmul.py.)
_ROWS_ALONE = 128


def matmul_into(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None, add: bool = False) -> None:
    """out = x @ weight.T (+ bias), or out += that.

    Args:
        x: [outer, rows, D]. weight: [F, D], any strides. out: [outer, rows, F], rows of a larger tensor or not.
        add: adds to out, without bias.
    """
    if x.shape[0] == 1 or (x.is_contiguous() and out.is_contiguous()):
        _multiply(x.flatten(0, 1), weight, out.flatten(0, 1), bias, add)
    elif x.shape[1] >= _ROWS_ALONE:
        for one, target in zip(x, out, strict=True):
            _multiply(one, weight, target, bias, add)
    elif add:
        out += F.linear(x, weight)
    else:
        out.copy_(F.linear(x, weight, bias))


def _multiply(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None, add: bool) -> None:
    if add:
        out.addmm_(x, weight.t())
    elif bias is not None:
        torch.addmm(bias, x, weight.t(), out=out)
    else:
        torch.mm(x, weight.t(), out=out)


def input_gradient(grads: Sequence[Tensor], weights: Sequence[Tensor], out: Tensor) -> None:
    """out = sum of grads[i] @ weights[i]: the gradient of what several weights were multiplied with."""
    for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
        matmul_into(grad, weight.t(), out, add=i > 0)
    if not weights:
        out.zero_()


def weight_gradient(grad: Tensor, x: Tensor, buffer: Tensor | None = None) -> Tensor:
    """grad.T @ x over all rows, [F, D]; with a buffer added to it, in its dtype (fp32 for 16-bit inputs).

    CUDA accumulates 16-bit products straight in the buffer; on a CPU they are rounded to 16 bits once on their way,
    since its matmuls have no wider output.
    """
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    if buffer is None:
        return grad.t() @ x
    if buffer.dtype == x.dtype:
        return buffer.addmm_(grad.t(), x)
    if x.device.type == "cuda":
        return torch.addmm(buffer, grad.t(), x, out_dtype=buffer.dtype, out=buffer)
    return buffer.add_(grad.t() @ x)


def bias_gradient(grad: Tensor) -> Tensor:
    """Sum over all rows."""
    return grad.flatten(0, -2).sum(0)
