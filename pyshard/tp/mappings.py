"""What stands between tensor-parallel layers and the rest of a model: copies, cuts, gathers and sums with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import collectives
from .splits import bounds


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return all_reduce(grad, ctx.group), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return collectives.all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return copy_to_ranks(grad, ctx.group), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.sizes, ctx.group = dim, sizes, group
        begin, end = bounds(list(sizes), dist.get_rank(group))
        return x.narrow(dim, begin, end - begin).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return gather(grad, ctx.dim, ctx.sizes, ctx.group), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: Sequence[int], group: dist.ProcessGroup, summed: bool) -> Tensor:
        ctx.dim, ctx.sizes, ctx.group, ctx.summed = dim, sizes, group, summed
        return collectives.all_gather(x, dim, sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        back = reduce_scatter if ctx.summed else split
        return back(grad, ctx.dim, ctx.sizes, ctx.group), None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.sizes, ctx.group = dim, sizes, group
        return collectives.reduce_scatter(x, dim, sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # Each rank's x has gone into all parts, so its gradient is the whole of their gradients, once.
        return gather(grad, ctx.dim, ctx.sizes, ctx.group, summed=True), None, None, None


def copy_to_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, which is the same on all ranks and goes into different work on each; backward sums the gradients."""
    return x if dist.get_world_size(group) == 1 else _Copy.apply(x, group)


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, whose gradient is the same on all ranks; backward passes it on."""
    return x if dist.get_world_size(group) == 1 else _AllReduce.apply(x, group)


def split(x: Tensor, dim: int, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """This rank's part along dim of x, which is the same on all ranks; backward gathers the gradients."""
    return x if dist.get_world_size(group) == 1 else _Split.apply(x, dim, sizes, group)


def gather(x: Tensor, dim: int, sizes: Sequence[int], group: dist.ProcessGroup, *, summed: bool = False) -> Tensor:
    """The parts of all ranks along dim.

    Args:
        sizes: of the parts of all ranks.
        summed: True if ranks then do different work with the whole: backward adds their gradients up. False if all
            do the same with it: backward takes this rank's part.
    """
    return x if dist.get_world_size(group) == 1 else _Gather.apply(x, dim, sizes, group, summed)


def reduce_scatter(x: Tensor, dim: int, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """This rank's part along dim of the sum over ranks; backward gathers the gradients."""
    return x if dist.get_world_size(group) == 1 else _ReduceScatter.apply(x, dim, sizes, group)
