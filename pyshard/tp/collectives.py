"""All-gather, reduce-scatter and all-reduce of tensors that no matmul goes with, over the transport of their group.

The sums are those of the matmuls: in fp32, in rank order, rounded once. No autograd; mappings.py has that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from . import blocking, engine
from .splits import resized, split_sizes
from .workspace import WHOLE, Compute, Gather, Scatter, Total


def all_gather(x: Tensor, dim: int, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """The parts of all ranks in rank order, whole along dim.

    Args:
        x: this rank's part, sizes[rank] long in dimension dim.
        sizes: of all ranks' parts.
    """
    space = engine.workspace(group, x.device)
    if space.transport is None:
        return blocking.all_gather(x, dim, sizes, group)
    name = "all-gather"
    with engine.telling(space, name):
        whole = Gather(space, _rows(x, dim), sizes, WHOLE, name).whole()
    return whole.view(resized(x, dim, sum(sizes)))


def reduce_scatter(x: Tensor, dim: int, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """This rank's part along dim of the sum of all ranks' x.

    Args:
        x: whole along dim on every rank.
        sizes: of the parts of all ranks; their sum is x's size.
    """
    space = engine.workspace(group, x.device)
    if space.transport is None:
        return blocking.reduce_scatter(x, dim, sizes, group)
    name, rows = "reduce-scatter", _rows(x, dim)
    with engine.telling(space, name):
        sums = Scatter(space, rows.shape[0], sizes, rows.shape[2], x.dtype, WHOLE, name)
        sums.run(_copier(rows))
        return sums.result().view(resized(x, dim, sizes[space.rank]))


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all ranks' x."""
    space = engine.workspace(group, x.device)
    if space.transport is None:
        return blocking.all_reduce(x, group)
    name, rows = "all-reduce", x.reshape(1, -1, x.shape[-1] if x.dim() > 1 else 1)
    with engine.telling(space, name):
        sums = Total(space, 1, split_sizes(rows.shape[1], space.world), rows.shape[2], x.dtype, WHOLE, name)
        sums.run(_copier(rows))
        return sums.result().view(x.shape)


def _copier(rows: Tensor) -> Compute:
    def copy(begin: int, end: int, out: Tensor) -> None:
        out.copy_(rows[:, begin:end])

    return copy


def _rows(x: Tensor, dim: int) -> Tensor:
    """x as [outer, its size along dim, the rest]."""
    dim %= x.dim()
    return x.reshape(math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :]))
