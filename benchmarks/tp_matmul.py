"""One rank of the benchmarks of tensor-parallel matmuls: a matmul with its collective in several ways, and a column
and a row layer with their gradients.

All ways of a case use the same operands. The weight is the local part of each rank: [F, D], scaled so that products
are about 1.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional
from torch.distributed import _symmetric_memory as symmetric
from torch.nn.functional import linear

from benchmarks.distributed_training import sent_bytes

ALL_GATHER, REDUCE_SCATTER = "all-gather + matmul", "matmul + reduce-scatter"
STRIDE = 97  # between the elements that are compared; a prime, so that all rows and columns come


@dataclass(frozen=True)
class Operands:
    """x [S, D]: the rows of all ranks, or, before a reduce-scatter, this rank's features of them."""

    collective: str
    x: Tensor
    weight: Tensor  # [F, D]

    @property
    def gathers(self) -> bool:
        return self.collective == ALL_GATHER

    @property
    def own(self) -> Tensor:
        """[S / world, D]: the rows of this rank."""
        return self.x.chunk(dist.get_world_size())[dist.get_rank()]


def random(seed: int, rows: int, columns: int, dtype: str, scale: float = 1.0) -> Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return values.mul_(scale).to(getattr(torch, dtype))


@functools.lru_cache(maxsize=1)
def operands(collective: str, rows: int, inputs: int, outputs: int, dtype: str) -> Operands:
    rank = dist.get_rank()
    x = random(0 if collective == ALL_GATHER else 1 + rank, rows, inputs, dtype)
    return Operands(collective, x, random(100 + rank, outputs, inputs, dtype, inputs**-0.5))


def newest(module: Any, *names: str) -> Callable[..., Any]:
    """The first of these functions that this torch has; newer versions have renamed some."""
    found = [getattr(module, name) for name in names if hasattr(module, name)]
    if not found:
        raise AttributeError(f"{module.__name__} has none of {', '.join(names)}")
    return found[0]


def own_group(**settings: Any) -> dist.ProcessGroup:
    """All ranks once more, set up by pyshard.tp.configure."""
    group = dist.new_group()
    if settings:
        importlib.import_module("pyshard").tp.configure(group, **settings)
    return group


# ---- a matmul with its collective ----


def alone(work: Operands) -> Callable[[], Tensor]:
    """The matmul of all rows, without communication."""
    return lambda: linear(work.x, work.weight)


def pyshard(work: Operands, **settings: Any) -> Callable[[], Tensor]:
    tp, group = importlib.import_module("pyshard").tp, own_group(**settings)
    if work.gathers:
        return lambda: tp.all_gather_matmul(work.own, work.weight, group=group)
    return lambda: tp.matmul_reduce_scatter(work.x, work.weight, group=group)


def collective(work: Operands) -> Callable[[], Tensor]:
    """torch's collective before or after the matmul."""
    if work.gathers:
        gather = newest(dist, "all_gather_single", "all_gather_into_tensor")

        def gathered() -> Tensor:
            x = torch.empty_like(work.x)
            gather(x, work.own)
            return linear(x, work.weight)

        return gathered
    scatter = newest(dist, "reduce_scatter_single", "reduce_scatter_tensor")

    def scattered() -> Tensor:
        partial = linear(work.x, work.weight)
        out = partial.new_empty(partial.shape[0] // dist.get_world_size(), partial.shape[1])
        scatter(out, partial)
        return out

    return scattered


def fused(work: Operands) -> Callable[[], Tensor]:
    """What torch.ops.symm_mem.fused_* comes down to where there is no symmetric memory."""
    name, weight = dist.group.WORLD.group_name, work.weight.t()  # type: ignore[union-attr]
    if work.gathers:
        gather_matmul = newest(symmetric, "_fused_all_gather_matmul_fallback")
        return lambda: gather_matmul(work.own, [weight], 0, name, return_A=False)[1][0]
    matmul_scatter = newest(symmetric, "_fused_matmul_reduce_scatter_fallback")
    return lambda: matmul_scatter(work.x, weight, "sum", 0, name)


WAYS: dict[str, Callable[..., Callable[[], Tensor]]] = {
    "alone": alone,
    "pyshard": pyshard,
    "collective": collective,
    "fused": fused,
}


class Calls:
    """One way on this rank: call() does the work and gives what it made."""

    def __init__(self, call: Callable[[], Tensor | list[Tensor]]):
        self._call = call
        self._made: Tensor | list[Tensor] = []

    def sample(self, calls: int) -> dict[str, float]:
        """Seconds and bytes sent per call.

        One call comes first, without the clock: it fills the caches after the contestant before. Then all ranks begin
        together.
        """
        self._made = self._call()
        dist.barrier()
        before, begin = sent_bytes(), time.perf_counter()
        for _ in range(calls):
            self._made = self._call()
        seconds = time.perf_counter() - begin
        dist.barrier()  # so that the bytes of all ranks are in
        return {"seconds": seconds / calls, "sent": (sent_bytes() - before) / calls}

    def result(self) -> list[float]:
        """Every STRIDE-th element of what the last call made."""
        made = [self._made] if isinstance(self._made, Tensor) else self._made
        return [value for tensor in made for value in tensor.detach().flatten()[::STRIDE].float().tolist()]

    def notes(self) -> dict[str, float]:
        """None."""
        return {}


def matmul(way: str, options: dict[str, Any], collective: str, shape: list[int], dtype: str) -> Calls:
    """A matmul [S, D] x [F, D]; shape is S, D, F."""
    return Calls(WAYS[way](operands(collective, *shape, dtype), **options))


# ---- a column and a row layer, forward and backward ----

Layers = Callable[[Tensor, Tensor, Tensor], Tensor]


def layers_alone() -> Layers:
    """The matmuls of all rows, without communication."""
    return lambda x, column, row: linear(linear(x, column), row)


def layers_pyshard(**settings: Any) -> Layers:
    tp, group = importlib.import_module("pyshard").tp, own_group(**settings)

    def forward(x: Tensor, column: Tensor, row: Tensor) -> Tensor:
        hidden = tp.all_gather_matmul(x, column, group=group)
        return tp.matmul_reduce_scatter(hidden, row, group=group)

    return forward


def layers_collective() -> Layers:
    """torch's differentiable collectives; the gathered rows are kept for backward, so it gathers nothing again."""
    gather = newest(functional, "all_gather_single_autograd", "all_gather_tensor_autograd")
    scatter = newest(functional, "reduce_scatter_single_autograd", "reduce_scatter_tensor_autograd")
    group = dist.group.WORLD

    def forward(x: Tensor, column: Tensor, row: Tensor) -> Tensor:
        hidden = linear(functional.wait_tensor(gather(x, 0, group)), column)
        return functional.wait_tensor(scatter(linear(hidden, row), "sum", 0, group))

    return forward


LAYERS: dict[str, Callable[..., Layers]] = {
    "alone": layers_alone,
    "pyshard": layers_pyshard,
    "collective": layers_collective,
}


@functools.lru_cache(maxsize=1)
def layer_operands(rows: int, width: int, features: int, dtype: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and the output's gradient [S, D], the column's weight [F, D], the row's [D, F]."""
    rank = dist.get_rank()
    return (
        random(0, rows, width, dtype),
        random(1, rows, width, dtype),
        random(100 + rank, features, width, dtype, width**-0.5),
        random(200 + rank, width, features, dtype, features**-0.5),
    )


def layers(way: str, options: dict[str, Any], shape: list[int], dtype: str) -> Calls:
    """Forward and backward of a column layer D -> F and a row layer F -> D; shape is S, D, F, with F of one rank."""
    x, gradient, column, row = layer_operands(*shape, dtype)
    if way != "alone":
        world, rank = dist.get_world_size(), dist.get_rank()
        x, gradient = x.chunk(world)[rank], gradient.chunk(world)[rank]
    leaves = [tensor.detach().requires_grad_() for tensor in (x, column, row)]
    forward = LAYERS[way](**options)

    def call() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        out = forward(*leaves)
        out.backward(gradient)
        return [out, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    return Calls(call)
