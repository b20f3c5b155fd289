"""Matmuls of tensor-parallel layers with their communication inside: public functions, with gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from . import unfused
from .splits import split_sizes


def all_gather_matmul(x, weight, bias=None, *, group, dim=-2, sizes=None):  # type: ignore[no-untyped-def]
    weights, biases, one = _several(weight, bias)
    sizes = list(sizes) if sizes is not None else [x.shape[dim]] * dist.get_world_size(group)
    outs = unfused.all_gather_matmul(x, weights, biases, sizes, dim, group)
    return outs[0] if one else outs


def copied_matmul(x, weight, bias=None, *, group):  # type: ignore[no-untyped-def]
    weights, biases, one = _several(weight, bias)
    outs = unfused.copied_matmul(x, weights, biases, group)
    return outs[0] if one else outs


def matmul_reduce_scatter(x, weight, bias=None, *, group, dim=-2, sizes=None):  # type: ignore[no-untyped-def]
    sizes = list(sizes) if sizes is not None else split_sizes(x.shape[dim], dist.get_world_size(group))
    return unfused.matmul_reduce_scatter(x, weight, bias, sizes, dim, group)


def matmul_all_reduce(x, weight, bias=None, *, group):  # type: ignore[no-untyped-def]
    return unfused.matmul_all_reduce(x, weight, bias, group)


def _several(
    weight: Tensor | Sequence[Tensor], bias: Tensor | Sequence[Tensor | None] | None
) -> tuple[list[Tensor], list[Tensor | None], bool]:
    if isinstance(weight, Tensor):
        return [weight], [bias], True  # type: ignore[list-item]
    return list(weight), [None] * len(weight) if bias is None else list(bias), False  # type: ignore[arg-type]
