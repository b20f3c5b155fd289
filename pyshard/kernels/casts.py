"""Casts between fp32 and 16-bit weights, and split weights: checked, allocated here, computed by the backend."""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from . import checks, reference
from .registry import choose

_HALF = (torch.bfloat16, torch.float16)


def cast(x: Tensor, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    """x as `dtype`: fp32 to bf16 or fp16 (round to nearest even, overflow to inf, NaN stays NaN), or back, exactly.

    Args:
        x: [...] fp32, bf16 or fp16, any dense layout; read only.
        dtype: the other of fp32 and a 16-bit type.
    Returns:
        a new tensor of x's shape and layout.
    Raises:
        TypeError: a pair of dtypes that is not fp32 and a 16-bit one, or a DTensor. ValueError: x has no memory.
        RuntimeError: the backend cannot serve x.
    """
    _check_tensors("cast", x=x)
    if (x.dtype, dtype) not in {(a, b) for h in _HALF for a, b in ((torch.float32, h), (h, torch.float32))}:
        raise TypeError(
            f"pyshard.cast: got {x.dtype} to {dtype}; expected float32 to bfloat16 or float16, or back. "
            "Use x.to(dtype) for other pairs."
        )
    kernels = _kernels("cast", backend, x=x)
    src = _dense(x)
    out = torch.empty_like(src, dtype=dtype)
    if kernels is None:
        out.copy_(src)
    elif src.numel():
        kernels.cast(src, out)
    return out


def split(master: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The two halves of an fp32 tensor: bf16 (rounded half away from zero) and the int16 remainder.

    join(*split(x)) is x, bit for bit, for every x but NaN, which stays NaN of the same sign.

    Args:
        master: [...] fp32, any dense layout; read only.
    Returns:
        (high, low): bf16 and int16 tensors of the same shape and layout.
    Raises:
        TypeError: another dtype, or a DTensor. ValueError: it has no memory. RuntimeError: the backend cannot serve it.
    """
    _check_tensors("split", master=master)
    if master.dtype != torch.float32:
        raise TypeError(f"pyshard.split: got {master.dtype}; expected float32. Convert with .float() first.")
    kernels = _kernels("split", backend, master=master)
    src = _dense(master)
    high = torch.empty_like(src, dtype=torch.bfloat16)
    low = torch.empty_like(src, dtype=torch.int16)
    if kernels is None:
        for out, half in zip((high, low), reference.split(src), strict=True):
            out.copy_(half)
    elif src.numel():
        kernels.split(src, high, low)
    return high, low


def join(high: Tensor, low: Tensor, backend: str = "auto") -> Tensor:
    """The fp32 tensor whose halves are `high` (bf16) and `low` (int16): the inverse of split.

    Args:
        high, low: [...] bf16 and int16 of one shape and device; read only.
    Returns:
        fp32 of the same shape and of high's layout.
    Raises:
        TypeError: other dtypes, or DTensors. ValueError: shapes or devices differ, or one has no memory.
        RuntimeError: the backend cannot serve them.
    """
    _check_tensors("join", high=high, low=low)
    if high.dtype != torch.bfloat16 or low.dtype != torch.int16:
        raise TypeError(f"pyshard.join: got {high.dtype} and {low.dtype}; expected bfloat16 and int16.")
    if high.shape != low.shape or high.device != low.device:
        raise ValueError(
            f"pyshard.join: got {tuple(high.shape)} on {high.device} and {tuple(low.shape)} on {low.device}; "
            "expected one shape and one device. Pass the two halves of one split()."
        )
    kernels = _kernels("join", backend, high=high, low=low)
    upper = _dense(high)
    lower = low if low.stride() == upper.stride() else torch.empty_like(upper, dtype=torch.int16).copy_(low)
    out = torch.empty_like(upper, dtype=torch.float32)
    if kernels is None:
        out.copy_(reference.join(upper, lower))
    elif upper.numel():
        kernels.join(upper, lower, out)
    return out


def _kernels(who: str, backend: str, **tensors: Tensor) -> ModuleType | None:
    """The backend's module, or None for the reference; it serves the first of the tensors, and all have memory."""
    first = next(iter(tensors.values()))
    chosen = choose(backend, first.device, first.dtype)
    for name, tensor in tensors.items():
        checks.check_memory(f"pyshard.{who}", name, tensor)
    return None if chosen.name == "reference" else importlib.import_module(chosen.module)


def _dense(x: Tensor) -> Tensor:
    """x itself if its elements fill its memory without gaps, else a dense copy; detached."""
    x = x.detach().resolve_neg()  # a view may owe its sign to a bit that kernels do not see
    fresh = torch.empty_like(x, device="meta", memory_format=torch.preserve_format)
    return x if x.stride() == fresh.stride() else torch.empty_like(x).copy_(x)


def _check_tensors(who: str, **tensors: object) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"pyshard.{who}: {name} is {type(tensor).__name__}; expected a tensor. Use torch.as_tensor."
            )
        if tensor.layout != torch.strided:
            raise TypeError(
                f"pyshard.{who}: {name} has layout {tensor.layout}; expected a dense (strided) tensor. Use .to_dense()."
            )
