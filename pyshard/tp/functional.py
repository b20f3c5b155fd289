"""Matmuls of tensor-parallel layers with their communication inside: public functions, with gradients.

The shapes below are those of one rank of a group of `world`; S rows in all, of which rank r holds S_r.

Method: matmul and collective are cut into chunks along the rows, and the transfer of one chunk hides behind the matmul
of another (Wang et al., "Overlap Communication with Dependent Computation via Decomposition in Large Deep Learning
Models", ASPLOS 2023); between ranks of one host matmuls read their peers' rows in place. Sums over ranks are taken in
fp32 in rank order, so that their bits depend on neither chunks nor transport. (Those of the products before them may:
libraries multiply few rows in another order than many. tp.configure(group, chunks=...) fixes the cut.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
import torch.distributed as dist
from torch import Tensor

from . import gradients as gradients  # registers them
from . import ops
from .splits import split_sizes

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@overload
def all_gather_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: dist.ProcessGroup,
    dim: int = -2,
    sizes: Sequence[int] | None = None,
    features: Sequence[int] | None = None,
) -> Tensor: ...
@overload
def all_gather_matmul(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    *,
    group: dist.ProcessGroup,
    dim: int = -2,
    sizes: Sequence[int] | None = None,
    features: Sequence[int] | None = None,
) -> list[Tensor]: ...
def all_gather_matmul(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None = None,
    *,
    group: dist.ProcessGroup,
    dim: int = -2,
    sizes: Sequence[int] | None = None,
    features: Sequence[int] | None = None,
) -> Tensor | list[Tensor]:
    """The rows of x of all ranks, times weight.T (+ bias): the column-parallel linear layer after a cut sequence.

    Backward gathers x again while the gradient of the whole x is computed, and reduce-scatters that while the gradient
    of the weight is computed. Saved for it: this rank's rows of x only.

    Args:
        x: [..., S_r, ..., D], fp32, bf16, fp16 or fp64; rows lie along dim.
        weight: [F, D], any strides; or several, which share one gather, and one reduction in backward.
        bias: [F]; or as many as there are weights, each may be None.
        group: the tensor-parallel group; all its ranks make the same calls in the same order.
        dim: any but the last.
        sizes: S_r of all ranks; None: all hold as many rows as this one, which is checked when they meet.
        features: out features of all ranks together, for each weight: calls that differ in it alone are measured and
            overlapped apart. None: they share what the first of them found best.

    Returns:
        [..., S, ..., F] with the rows in rank order; a list for several weights.

    Raises:
        ValueError, TypeError: shapes, dtypes or sizes do not fit; nothing has been sent.
        RuntimeError: ranks make different calls. pyshard.comm.PeerError: a rank is lost or silent.
    """
    who = "pyshard.tp.all_gather_matmul"
    weights, biases, one = _several(who, weight, bias)
    x, weights, biases = _cast(x, weights, biases)
    world = _world(who, group)
    dim = _check(who, x, weights, biases, dim)
    sizes = _check_sizes(who, sizes, [x.shape[dim]] * world, world)
    rank = dist.get_rank(group)
    if sizes[rank] != x.shape[dim]:
        raise ValueError(
            f"{who}: x has {x.shape[dim]} rows along dim {dim}; expected sizes[{rank}] = {sizes[rank]} on this rank "
            "of the group. Pass the rows that each rank holds."
        )
    if world == 1:
        outs = [torch.nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    else:
        outs = ops.tp_column(
            x, weights, ops.absent(biases, x), sizes, _features(features, weights), dim, True, group.group_name
        )
    return outs[0] if one else outs


@overload
def copied_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: dist.ProcessGroup,
    features: Sequence[int] | None = None,
) -> Tensor: ...
@overload
def copied_matmul(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    *,
    group: dist.ProcessGroup,
    features: Sequence[int] | None = None,
) -> list[Tensor]: ...
def copied_matmul(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None = None,
    *,
    group: dist.ProcessGroup,
    features: Sequence[int] | None = None,
) -> Tensor | list[Tensor]:
    """x, which is the same on all ranks, times weight.T (+ bias): the column-parallel linear layer without a cut
    sequence.

    Backward all-reduces the gradient of x while that of the weight is computed.

    Args:
        x: [..., D], fp32, bf16, fp16 or fp64.
        weight: [F, D], any strides; or several, which share one all-reduce in backward.
        bias: [F]; or as many as there are weights, each may be None.
        group: the tensor-parallel group.
        features: out features of all ranks together, for each weight: calls that differ in it alone are measured and
            overlapped apart. None: they share what the first of them found best.

    Returns:
        [..., F]; a list for several weights.

    Raises:
        As all_gather_matmul.
    """
    who = "pyshard.tp.copied_matmul"
    weights, biases, one = _several(who, weight, bias)
    x, weights, biases = _cast(x, weights, biases)
    world = _world(who, group)
    rows = x if x.dim() > 1 else x[None]
    dim = _check(who, rows, weights, biases, -2)
    if world == 1 or not torch.is_grad_enabled():  # forward exchanges nothing
        outs = [torch.nn.functional.linear(rows, w, b) for w, b in zip(weights, biases, strict=True)]
    else:
        sizes = split_sizes(rows.shape[dim], world)
        outs = ops.tp_column(
            rows, weights, ops.absent(biases, x), sizes, _features(features, weights), dim, False, group.group_name
        )
    outs = [out if x.dim() > 1 else out[0] for out in outs]
    return outs[0] if one else outs


def matmul_reduce_scatter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: dist.ProcessGroup,
    dim: int = -2,
    sizes: Sequence[int] | None = None,
    features: int | None = None,
) -> Tensor:
    """This rank's rows of the sum over ranks of x @ weight.T, and bias: the row-parallel linear layer before a cut
    sequence.

    Backward gathers the gradient in chunks that go into those of x and the weight as they arrive.

    Args:
        x: [..., S, ..., D_r]: all rows, this rank's features; rows lie along dim.
        weight: [F, D_r], any strides.
        bias: [F], whole and the same on all ranks; added once, after the sum. Its gradient is the whole one on all.
        group: the tensor-parallel group.
        dim: any but the last.
        sizes: rows that each rank gets; None: as even as can be (pyshard.tp.split_sizes).
        features: in features of all ranks together: calls that differ in it alone are measured and overlapped apart.
            None: they share what the first of them found best.

    Returns:
        [..., S_r, ..., F]. 16-bit products are rounded before the sum, which is taken in fp32 in rank order and
        rounded once.

    Raises:
        As all_gather_matmul.
    """
    who = "pyshard.tp.matmul_reduce_scatter"
    x, (weight,), (bias,) = _cast(x, [weight], [bias])
    world = _world(who, group)
    dim = _check(who, x, [weight], [bias], dim)
    sizes = _check_sizes(who, sizes, split_sizes(x.shape[dim], world), world)
    if sum(sizes) != x.shape[dim]:
        raise ValueError(
            f"{who}: x has {x.shape[dim]} rows along dim {dim}, and sizes {sizes} add up to {sum(sizes)}; expected "
            "the same. Pass the rows that each rank gets."
        )
    if world == 1:
        return torch.nn.functional.linear(x, weight, bias)
    return ops.tp_row(x, weight, bias, sizes, features or 0, dim, True, group.group_name)


def matmul_all_reduce(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: dist.ProcessGroup,
    features: int | None = None,
) -> Tensor:
    """The sum over ranks of x @ weight.T, and bias, on every rank: the row-parallel linear layer without a cut
    sequence.

    Args:
        x: [..., D_r]: this rank's features.
        weight: [F, D_r], any strides.
        bias: [F], whole and the same on all ranks; added once, after the sum.
        group: the tensor-parallel group.
        features: in features of all ranks together: calls that differ in it alone are measured and overlapped apart.
            None: they share what the first of them found best.

    Returns:
        [..., F], the same bits on all ranks; sums as matmul_reduce_scatter.

    Raises:
        As all_gather_matmul.
    """
    who = "pyshard.tp.matmul_all_reduce"
    x, (weight,), (bias,) = _cast(x, [weight], [bias])
    world = _world(who, group)
    rows = x if x.dim() > 1 else x[None]
    _check(who, rows, [weight], [bias], -2)
    if world == 1:
        return torch.nn.functional.linear(x, weight, bias)
    # Sums are cut over all rows, so that one sequence of one token too has something for each rank.
    flat = rows.flatten(0, -2)
    sizes = split_sizes(flat.shape[0], world)
    out = ops.tp_row(flat, weight, bias, sizes, features or 0, -2, False, group.group_name)
    return out.view(*x.shape[:-1], weight.shape[0])


def _features(features: Sequence[int] | None, weights: Sequence[Tensor]) -> list[int]:
    """0: not told. This rank's own would not do, since all ranks must take the same for the same call."""
    return [0] * len(weights) if features is None else list(features)


def _several(
    who: str, weight: Tensor | Sequence[Tensor], bias: Tensor | Sequence[Tensor | None] | None
) -> tuple[list[Tensor], list[Tensor | None], bool]:
    if isinstance(weight, Tensor):
        if bias is not None and not isinstance(bias, Tensor):
            raise TypeError(f"{who}: bias is a {type(bias).__name__} for one weight; expected a tensor or None")
        return [weight], [bias], True
    weights = list(weight)
    if isinstance(bias, Tensor):
        raise TypeError(f"{who}: bias is one tensor for {len(weights)} weights; expected one, or None, for each")
    biases: list[Tensor | None] = [None] * len(weights) if bias is None else list(bias)
    if not weights or len(biases) != len(weights):
        raise ValueError(f"{who}: {len(weights)} weights and {len(biases)} biases; expected as many, one at least")
    return weights, biases, False


def _cast(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """All in autocast's dtype where it is on, as torch's own linear."""
    kind = x.device.type if isinstance(x, Tensor) else "cpu"
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
        biases = [None if bias is None else bias.to(dtype) for bias in biases]
    return x, list(weights), list(biases)


def _world(who: str, group: dist.ProcessGroup) -> int:
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{who}: group is a {type(group).__name__}; expected a process group, such as mesh['tp'].get_group()"
        )
    return dist.get_world_size(group)


def _check(who: str, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], dim: int) -> int:
    """dim counted from the end; raises if shapes, dtypes or devices do not fit."""
    if not isinstance(x, Tensor) or x.dim() < 2:
        found = f"has shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"is a {type(x).__name__}"
        raise ValueError(f"{who}: x {found}; expected a tensor of two dimensions or more, [..., rows, features]")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{who}: x is {x.dtype}; expected one of {', '.join(map(str, _DTYPES))}")
    count = x.dim()
    if not -count <= dim < count or dim in (-1, count - 1):
        raise ValueError(f"{who}: dim is {dim} for x of shape {tuple(x.shape)}; expected any but the last")
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        name = f"weight {i}" if len(weights) > 1 else "weight"
        if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
            raise ValueError(
                f"{who}: {name} has shape {tuple(weight.shape)} and x {tuple(x.shape)}; expected [out, {x.shape[-1]}]"
            )
        if weight.dtype != x.dtype or weight.device != x.device:
            raise TypeError(
                f"{who}: {name} is {weight.dtype} on {weight.device} and x {x.dtype} on {x.device}; expected the "
                "same. Convert one of them, or use torch.autocast."
            )
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
            raise ValueError(
                f"{who}: the bias of {name} is {bias.dtype} of shape {tuple(bias.shape)}; expected {x.dtype} of "
                f"shape ({weight.shape[0]},)"
            )
    return dim - count if dim >= 0 else dim


def _check_sizes(who: str, sizes: Sequence[int] | None, default: list[int], world: int) -> list[int]:
    if sizes is None:
        return default
    if len(sizes) != world or any(size < 0 for size in sizes):
        raise ValueError(f"{who}: sizes is {list(sizes)}; expected the rows of each of {world} ranks, from 0 on")
    return list(sizes)
