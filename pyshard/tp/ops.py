"""The tensor-parallel matmuls as operators of torch: torch.ops.pyshard.tp_column and tp_row, with gradients.

They take the name of a process group, so that graphs can hold them, and their fake implementations know shapes only.
gradients.py ties the forward operators to the backward ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import engine
from .matmul import bias_gradient


def group_of(name: str) -> dist.ProcessGroup:
    """The process group of a name."""
    c10d: Any = dist.distributed_c10d  # whose types do not tell of this
    return c10d._resolve_process_group(name)


def present(biases: Sequence[Tensor]) -> list[Tensor | None]:
    """None for each that stands for none: operators take lists of tensors only."""
    return [bias if bias.dim() == 1 else None for bias in biases]


def absent(biases: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """A tensor [0, 0] for each None; a bias of no features is [0]."""
    return [like.new_empty(0, 0) if bias is None else bias for bias in biases]


def _filled(tensors: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """An empty tensor for each None."""
    return [like.new_empty(0) if tensor is None else tensor for tensor in tensors]


def _rows(x: Tensor, dim: int) -> Tensor:
    """x as [outer, rows, columns]: dimensions between dim and the last become rows too."""
    outer = math.prod(x.shape[:dim])
    return x.reshape(outer, math.prod(x.shape[dim:-1]), x.shape[-1])


def _inner(x: Tensor, dim: int) -> int:
    return math.prod(x.shape[dim + 1 : -1])


def _scaled(sizes: Sequence[int], x: Tensor, dim: int) -> list[int]:
    inner = _inner(x, dim)
    return [size * inner for size in sizes]


def _shape(x: Tensor, dim: int, rows: Any, columns: Any) -> list[Any]:
    return [*x.shape[:dim], rows, *x.shape[dim + 1 : -1], columns]


@torch.library.custom_op("pyshard::tp_column", mutates_args=())
def tp_column(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    sizes: Sequence[int],
    features: Sequence[int],
    dim: int,
    gathered: bool,
    group: str,
) -> list[Tensor]:
    """Outputs of all weights on x: gathered along dim from all ranks, or whole on each. See functional.py.

    biases: one for each weight; see absent().
    """
    given = present(biases)
    if not gathered:
        return [torch.nn.functional.linear(x, w, b) for w, b in zip(weights, given, strict=True)]
    space = engine.workspace(group_of(group), x.device)
    outs = engine.column_forward(space, _rows(x, dim), weights, given, _scaled(sizes, x, dim), features)
    return [out.view(_shape(x, dim, sum(sizes), w.shape[0])) for out, w in zip(outs, weights, strict=True)]


@tp_column.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    sizes: Sequence[int],
    features: Sequence[int],
    dim: int,
    gathered: bool,
    group: str,
) -> list[Tensor]:
    rows = sum(sizes) if gathered else x.shape[dim]
    return [x.new_empty(_shape(x, dim, rows, weight.shape[0])) for weight in weights]


def column_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    sizes: Sequence[int],
    features: Sequence[int],
    dim: int,
    gathered: bool,
    group: str,
    need_x: bool,
    need_weights: Sequence[bool],
    need_biases: Sequence[bool],
    buffers: Sequence[Tensor | None],
) -> list[Tensor]:
    """Gradients of x, all weights, all biases; empty where not needed. Those of weights with a buffer are added to it,
    and the buffer is what is returned."""
    space = engine.workspace(group_of(group), x.device)
    dx, dws = engine.column_backward(
        space,
        [_rows(grad, dim) for grad in grads],
        _rows(x, dim),
        weights,
        _scaled(sizes, x, dim),
        features,
        gathered,
        need_x,
        need_weights,
        buffers,
    )
    dbs = [bias_gradient(grad) if needed else None for grad, needed in zip(grads, need_biases, strict=True)]
    return _filled([None if dx is None else dx.view(x.shape), *dws, *dbs], x)


@torch.library.custom_op("pyshard::tp_column_backward", mutates_args=())
def tp_column_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    sizes: Sequence[int],
    features: Sequence[int],
    dim: int,
    gathered: bool,
    group: str,
    need_x: bool,
    need_weights: Sequence[bool],
    need_biases: Sequence[bool],
) -> list[Tensor]:
    """column_backward() as an operator, without buffers."""
    none = [None] * len(weights)
    return column_backward(
        grads, x, weights, sizes, features, dim, gathered, group, need_x, need_weights, need_biases, none
    )


@tp_column_backward.register_fake
def _(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    sizes: Sequence[int],
    features: Sequence[int],
    dim: int,
    gathered: bool,
    group: str,
    need_x: bool,
    need_weights: Sequence[bool],
    need_biases: Sequence[bool],
) -> list[Tensor]:
    found = [x.new_empty(x.shape if need_x else (0,))]
    found += [w.new_empty(w.shape if needed else (0,)) for w, needed in zip(weights, need_weights, strict=True)]
    found += [w.new_empty(w.shape[0] if needed else 0) for w, needed in zip(weights, need_biases, strict=True)]
    return found


@torch.library.custom_op("pyshard::tp_row", mutates_args=())
def tp_row(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    features: int,
    dim: int,
    scattered: bool,
    group: str,
) -> Tensor:
    """The sum over ranks of x @ weight.T, and bias: this rank's part along dim, or all. See functional.py."""
    own = group_of(group)
    space = engine.workspace(own, x.device)
    out = engine.row_forward(space, _rows(x, dim), weight, bias, _scaled(sizes, x, dim), features, scattered)
    rows = sizes[dist.get_rank(own)] if scattered else x.shape[dim]
    return out.view(_shape(x, dim, rows, weight.shape[0]))


@tp_row.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    features: int,
    dim: int,
    scattered: bool,
    group: str,
) -> Tensor:
    rows = sizes[dist.get_rank(group_of(group))] if scattered else x.shape[dim]
    return x.new_empty(_shape(x, dim, rows, weight.shape[0]))


def row_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    features: int,
    dim: int,
    scattered: bool,
    group: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    buffer: Tensor | None,
) -> list[Tensor]:
    """Gradients of x, weight and bias; empty where not needed. With a buffer that of the weight is added to it."""
    space = engine.workspace(group_of(group), x.device)
    dx, dw, db = engine.row_backward(
        space,
        _rows(grad, dim),
        _rows(x, dim),
        weight,
        _scaled(sizes, x, dim),
        features,
        scattered,
        need_x,
        need_weight,
        need_bias,
        buffer,
    )
    return _filled([None if dx is None else dx.view(x.shape), dw, db], x)


@torch.library.custom_op("pyshard::tp_row_backward", mutates_args=())
def tp_row_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    features: int,
    dim: int,
    scattered: bool,
    group: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> list[Tensor]:
    """row_backward() as an operator, without a buffer."""
    return row_backward(grad, x, weight, sizes, features, dim, scattered, group, need_x, need_weight, need_bias, None)


@tp_row_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    features: int,
    dim: int,
    scattered: bool,
    group: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> list[Tensor]:
    return [
        x.new_empty(x.shape if need_x else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    ]
