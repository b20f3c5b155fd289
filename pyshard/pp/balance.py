"""How many blocks each stage gets: the split into runs whose largest cost is least."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..placement import tensor_shard
from .parts import Parts
from .stage import Stage

_ROUNDS = 3  # of which the median counts, after one that is not measured


class Costs:
    """Costs of the parts of a model, in any one unit: `first` and `last` of what lies before and after the blocks."""

    def __init__(self, first: float, blocks: Sequence[float], last: float):
        self.first, self.blocks, self.last = first, list(blocks), last

    def values(self) -> list[float]:
        return [self.first, *self.blocks, self.last]

    @classmethod
    def of(cls, values: Sequence[float]) -> Costs:
        return cls(values[0], values[1:-1], values[-1])


def split(costs: Costs, stages: int) -> list[tuple[int, int]]:
    """[begin, end) of the blocks of each stage, at least one each, such that the largest cost of a stage is least.

    Among equal splits, one whose early stages have fewer blocks: they hold the activations of more microbatches.
    """
    sums = [0.0]
    for cost in costs.blocks:
        sums.append(sums[-1] + cost)
    n = len(costs.blocks)

    def of_run(stage: int, begin: int, end: int) -> float:
        ends = (costs.first if stage == 0 else 0.0) + (costs.last if stage == stages - 1 else 0.0)
        return sums[end] - sums[begin] + ends

    # best[s][e]: the least largest cost of the first s stages over the first e blocks, and where the last one begins
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for stage in range(stages):
        row: dict[int, tuple[float, int]] = {}
        for end in range(stage + 1, n - (stages - 1 - stage) + 1):
            row[end] = min(
                (max(best[stage][begin][0], of_run(stage, begin, end)), begin) for begin in best[stage] if begin < end
            )
        best.append(row)
    bounds, end = [], n
    for stage in range(stages, 0, -1):
        begin = best[stage][end][1]
        bounds.append((begin, end))
        end = begin
    return bounds[::-1]


def by_parameters(model: nn.Module, parts: Parts) -> Costs:
    """Numbers of parameters; a tied weight counts in both places.

    Of what tensor-parallel ranks hold parts of, the whole counts: their parts differ, and their stages must not.
    """

    def count(module: nn.Module) -> int:
        shapes = [p.shape if (cut := tensor_shard(p)) is None else cut.shape for p in module.parameters()]
        return sum(math.prod(shape) for shape in shapes)

    ends = [sum(count(model.get_submodule(name)) for name in names) for names in (parts.first, parts.last)]
    return Costs(ends[0], [count(block) for block in model.get_submodule(parts.blocks).children()], ends[1])


def by_time(
    model: nn.Module, parts: Parts, inputs: dict[str, Any], loss: Callable[[Tensor], Tensor], wait: Callable[[], None]
) -> Costs:
    """Seconds of forward and backward of each part, measured on one microbatch. Gradients are left as they were.

    `wait` returns when the device is done.
    """
    n = len(list(model.get_submodule(parts.blocks).children()))
    rng = torch.get_rng_state()
    hidden = _hidden(model, parts, inputs, n)
    first = _time(Stage(model, parts, 0, 2, 0, 1), (), inputs, None, wait)
    blocks = [_time(Stage(model, parts, 1, 3, i, i + 1), (hidden,), inputs, None, wait) for i in range(n)]
    last = _time(Stage(model, parts, 1, 2, n - 1, n), (hidden,), inputs, loss, wait)
    torch.set_rng_state(rng)
    # Both ends were measured with the block next to them.
    return Costs(max(first - blocks[0], 0.0), blocks, max(last - blocks[-1], 0.0))


def _hidden(model: nn.Module, parts: Parts, inputs: dict[str, Any], n: int) -> Tensor:
    """Hidden states as they come out of the first block."""
    stage = Stage(model, parts, 0, 2, 0, min(1, n))
    with torch.no_grad():
        output: Tensor = stage(**inputs)
    return output


def _time(
    stage: Stage,
    hidden: tuple[Tensor, ...],
    inputs: dict[str, Any],
    loss: Callable[[Tensor], Tensor] | None,
    wait: Callable[[], None],
) -> float:
    times = []
    params = [param for param in stage.parameters() if param.requires_grad]
    for _ in range(_ROUNDS + 1):
        given = tuple(x.detach().requires_grad_() for x in hidden)
        wait()
        begin = time.perf_counter()
        output = stage(*given, **inputs)
        if loss is not None:
            output = loss(output)
        wanted = [*given, *params]
        if output.requires_grad and wanted:  # without touching .grad
            torch.autograd.grad(output, wanted, torch.ones_like(output), allow_unused=True)
        wait()
        times.append(time.perf_counter() - begin)
    return median(times[1:])
