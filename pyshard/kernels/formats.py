"""How a parameter, its master weight and its gradient are stored: the numbers that csrc/adam.h gives them.

A kind is ``(format * 2 + grad_is_fp32) * 4 + coupled * 2 + amsgrad``; it picks the kernel of a row.
"""

from enum import IntEnum

import torch


class Format(IntEnum):
    """Storage of a parameter; the same numbers as ``Format`` in csrc/adam.h."""

    F32 = 0
    BF16_SPLIT = 1
    BF16_MASTER = 2
    FP16_MASTER = 3
    BF16_NONE = 4
    FP16_NONE = 5


DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# State key of the tensor beside the parameter that completes its master weight.
LOW_KEY = {Format.BF16_SPLIT: "remainder", Format.BF16_MASTER: "master", Format.FP16_MASTER: "master"}
LOW_DTYPE = {"remainder": torch.int16, "master": torch.float32}

_BY_CHOICE = {
    (torch.bfloat16, "auto"): Format.BF16_SPLIT,
    (torch.bfloat16, "split"): Format.BF16_SPLIT,
    (torch.bfloat16, "fp32"): Format.BF16_MASTER,
    (torch.bfloat16, "none"): Format.BF16_NONE,
    (torch.float16, "auto"): Format.FP16_MASTER,
    (torch.float16, "fp32"): Format.FP16_MASTER,
    (torch.float16, "none"): Format.FP16_NONE,
}
_DTYPE = {
    Format.F32: torch.float32,
    Format.BF16_SPLIT: torch.bfloat16,
    Format.BF16_MASTER: torch.bfloat16,
    Format.FP16_MASTER: torch.float16,
    Format.BF16_NONE: torch.bfloat16,
    Format.FP16_NONE: torch.float16,
}


def format_of(dtype: torch.dtype, master_weights: str) -> Format | None:
    """The format of a parameter of `dtype`; None for fp64, which only the reference path serves.

    Raises KeyError for fp16 with master_weights="split": 16 bits of remainder do not complete an fp16 number.
    """
    if dtype == torch.float32:
        return Format.F32
    if dtype == torch.float64:
        return None
    return _BY_CHOICE[dtype, master_weights]


def param_dtype(fmt: Format) -> torch.dtype:
    """Dtype of a parameter stored in `fmt`."""
    return _DTYPE[fmt]


def kind_of(fmt: Format, grad_dtype: torch.dtype, coupled: bool, amsgrad: bool) -> int:
    """The number that picks the kernel of a row."""
    return (fmt * 2 + (grad_dtype == torch.float32)) * 4 + coupled * 2 + amsgrad


def unpack_kind(kind: int) -> tuple[Format, torch.dtype, bool, bool]:
    """Format, gradient dtype, coupled, amsgrad of a kind."""
    fmt = Format(kind >> 3)
    grad_dtype = torch.float32 if kind & 4 else param_dtype(fmt)
    return fmt, grad_dtype, bool(kind & 2), bool(kind & 1)


VALID_KINDS = tuple(kind for kind in range(8 * len(Format)) if kind >> 3 != Format.F32 or kind & 4)
