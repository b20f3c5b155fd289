"""The global norm of a list of tensors: checked here, summed by the backend in one fixed order."""

import importlib
from collections.abc import Iterable

import torch
from torch import Tensor

from . import checks, device, reference
from .registry import BACKENDS, choose, requested


def grad_norm(tensors: Iterable[Tensor], backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The 2-norm over all elements of all tensors, and whether any element is inf or NaN.

    norm = sqrt(sum of x*x) with exact products and sums in double: over blocks of 4096 elements of each tensor, then
    over the blocks. The order is fixed, so the bits depend on neither threads nor backend; nothing over- or underflows
    that fits fp32.

    Args:
        tensors: fp32, bf16, fp16 (or fp64: reference) tensors on one device, any layout; read only. May be empty.
        backend: "auto" or a backend's name.
    Returns:
        (norm, nonfinite): 0-d fp64 and 0-d bool tensors on the tensors' device.
    Raises:
        TypeError: another dtype, a sparse tensor or a DTensor. ValueError: several devices, a tensor without memory,
            or an unknown backend.
        RuntimeError: the backend cannot serve them.
    """
    requested(backend)
    if isinstance(tensors, Tensor):
        raise TypeError("pyshard.grad_norm: got a Tensor; expected a list of tensors. Put it into a list: [tensor].")
    tensors = list(tensors)
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
            got = f"{tensor.dtype}, {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(
                f"pyshard.grad_norm: tensor {i} is {got}; expected a dense fp32, bf16, fp16 or fp64 tensor. "
                "Convert it first."
            )
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"pyshard.grad_norm: tensor {i} is on {tensor.device} and tensor 0 on {tensors[0].device}; expected "
                "one device. Call it once a device and combine the squares."
            )
    for i, tensor in enumerate(tensors):
        checks.check_memory("pyshard.grad_norm", f"tensor {i}", tensor)
    if not tensors:
        return torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.bool)
    dense = [reference.in_memory_order(t.detach().resolve_neg()) for t in tensors]
    backends = {choose(backend, tensors[0].device, dtype) for dtype in {t.dtype for t in dense}}
    chosen = backends.pop() if len(backends) == 1 else BACKENDS["reference"]  # fp64 beside other dtypes
    if chosen.on_device:
        total = device.square_sum(chosen.name, dense)
    else:
        total = importlib.import_module(chosen.module).square_sum(dense)
    # Squares of finite fp32 numbers cannot overflow a double, so the sum tells; fp64 is looked at itself.
    nonfinite = ~torch.isfinite(total)
    if any(t.dtype == torch.float64 for t in dense):
        nonfinite = torch.stack([~torch.isfinite(t).all() for t in dense]).any()
    return total.sqrt(), nonfinite
