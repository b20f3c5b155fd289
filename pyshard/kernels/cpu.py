"""The C++ kernels for CPU tensors: thin calls into pyshard._C. Tensors are checked by the caller (checks.py)."""

import torch
from torch import Tensor

from .. import _C
from .formats import DTYPE_CODES


def unavailable(device_type: str) -> str | None:
    """Never: pyshard does not import without them."""
    return None


def square_sum(grads: list[Tensor]) -> Tensor:
    """Sum of squares of dense fp32, bf16 or fp16 tensors, a 0-d double."""
    tensors = [(g.data_ptr(), g.numel(), DTYPE_CODES[g.dtype]) for g in grads]
    return torch.tensor(_C.cpu_square_sum(tensors, torch.get_num_threads()), dtype=torch.float64)


def cast(src: Tensor, dst: Tensor) -> None:
    """dst = src, between fp32 and bf16 or fp16, rounded to nearest even; contiguous tensors of equal numel."""
    _C.cpu_cast(
        src.data_ptr(),
        DTYPE_CODES[src.dtype],
        dst.data_ptr(),
        DTYPE_CODES[dst.dtype],
        src.numel(),
        torch.get_num_threads(),
    )


def split(master: Tensor, high: Tensor, low: Tensor) -> None:
    """high, low = halves of the fp32 master; contiguous tensors of equal numel."""
    _C.cpu_split(master.data_ptr(), high.data_ptr(), low.data_ptr(), master.numel(), torch.get_num_threads())


def join(high: Tensor, low: Tensor, master: Tensor) -> None:
    """master = the fp32 weight whose halves are high and low; contiguous tensors of equal numel."""
    _C.cpu_join(high.data_ptr(), low.data_ptr(), master.data_ptr(), master.numel(), torch.get_num_threads())
