"""Sums over ranks: in fp32, in rank order, rounded once. All transports use this one function, hence the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sum_in_order(parts: Sequence[Tensor], out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """((parts[0] + parts[1]) + parts[2]) + ... + bias, each sum in fp32 (fp64 of fp64), rounded to the parts' dtype.

    Args:
        parts: tensors of one shape and dtype, one for each rank.
        out: where the result goes; may be one of the parts. None: a new tensor.
        bias: [last dimension], added once.
    """
    first = parts[0]
    if out is None:
        out = torch.empty_like(first, memory_format=torch.contiguous_format)
    wide = first.dtype in (torch.float32, torch.float64)
    if len(parts) == 1 and bias is None:
        return out.copy_(first) if out is not first else out
    if len(parts) == 2 and bias is None:
        return torch.add(first, parts[1], out=out)  # 16-bit operands too are added in fp32 and rounded once
    if not wide:
        total = first.float()
        for part in parts[1:]:
            total.add_(part)
        return out.copy_(total if bias is None else total.add_(bias))
    terms = [*parts[1:]] + ([bias] if bias is not None else [])
    if any(out is term for term in terms[1:]):  # it is still needed after the first sum
        total = torch.add(first, terms[0])
        for term in terms[1:]:
            total.add_(term)
        return out.copy_(total)
    torch.add(first, terms[0], out=out)
    for term in terms[1:]:
        out.add_(term)
    return out
