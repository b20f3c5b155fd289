"""The kernels as torch.library operators, torch.ops.pyshard.*: they survive torch.compile and torch.library.opcheck.

Each has a fake implementation, so that shapes and dtypes are known without running it. The optimizers do not come
through here: an operator call costs more than a small step.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from . import casts, functional, norm


@custom_op("pyshard::cast", mutates_args=())
def cast(x: Tensor, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    """pyshard.kernels.cast; differentiable as Tensor.to is."""
    return casts.cast(x, dtype, backend)


@cast.register_fake
def _(x: Tensor, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _remember_dtype(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, torch.dtype, str], output: Tensor
) -> None:
    ctx.dtype = inputs[0].dtype  # type: ignore[attr-defined]


def _cast_backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad.to(ctx.dtype), None, None  # type: ignore[attr-defined]


cast.register_autograd(_cast_backward, setup_context=_remember_dtype)


@custom_op("pyshard::split", mutates_args=())
def split(master: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """pyshard.kernels.split."""
    return casts.split(master, backend)


@split.register_fake
def _(master: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    return torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)


@custom_op("pyshard::join", mutates_args=())
def join(high: Tensor, low: Tensor, backend: str = "auto") -> Tensor:
    """pyshard.kernels.join."""
    return casts.join(high, low, backend)


@join.register_fake
def _(high: Tensor, low: Tensor, backend: str = "auto") -> Tensor:
    return torch.empty_like(high, dtype=torch.float32)


@custom_op("pyshard::grad_norm", mutates_args=())
def grad_norm(tensors: list[Tensor], backend: str = "auto") -> tuple[Tensor, Tensor]:
    """pyshard.kernels.grad_norm."""
    return norm.grad_norm(tensors, backend)


@grad_norm.register_fake
def _(tensors: list[Tensor], backend: str = "auto") -> tuple[Tensor, Tensor]:
    device = tensors[0].device if tensors else torch.device("cpu")
    return torch.empty((), dtype=torch.float64, device=device), torch.empty((), dtype=torch.bool, device=device)


@custom_op("pyshard::adam_", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "lows"))
def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    lows: list[Tensor],
    step: Tensor,
    lr: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    maximize: bool = False,
    grad_scale: float = 1.0,
    backend: str = "auto",
) -> None:
    """pyshard.kernels.adam_."""
    functional.adam_(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, lows, step, lr,
        beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, decoupled=decoupled, maximize=maximize,
        grad_scale=grad_scale, backend=backend,
    )  # fmt: skip


@adam_.register_fake
def _(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    lows: list[Tensor],
    step: Tensor,
    lr: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    maximize: bool = False,
    grad_scale: float = 1.0,
    backend: str = "auto",
) -> None:
    return None
