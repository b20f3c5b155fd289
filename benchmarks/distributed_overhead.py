"""One rank of what bench_sharded_overhead.py measures: step() over many tiny tensors, and the optimizer's state."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from benchmarks.distributed_model import Work
from benchmarks.distributed_training import nbytes, tensors_of
from benchmarks.peers import HYPER


class Stepping:
    """An optimizer over `count` tensors of `length` floats, and a backward that makes all gradients; both are timed."""

    def __init__(self, way: str, count: int, length: int, options: dict[str, Any]):
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(length)) for _ in range(count)]
        self.optimizer = WAYS[way](self.params, **options)
        self.factor = torch.ones(length)

    def sample(self, steps: int) -> dict[str, float]:
        """Mean seconds in step() when all ranks arrive together, and in the backward before it."""
        backward = update = 0.0
        for _ in range(steps):
            loss = torch.stack([torch.dot(param, self.factor) for param in self.params]).sum()
            dist.barrier()
            begin = time.perf_counter()
            loss.backward()
            backward += time.perf_counter() - begin
            dist.barrier()
            begin = time.perf_counter()
            if self.optimizer is not None:
                self.optimizer.step()
            update += time.perf_counter() - begin
            for param in self.params:
                param.grad = None
        return {"seconds": update / steps, "backward": backward / steps}


class State:
    """The optimizer's state on this rank after a step of the first `world` ranks; the others have none."""

    def __init__(self, way: str, world: int, work: dict[str, Any], options: dict[str, Any]):
        group, self.held = dist.new_group(range(world)), 0
        if dist.get_rank() >= world:
            return
        params = list(Work(**work).model()[0].parameters())
        optimizer = WAYS[way](params, process_group=group, **options)
        sum(param.sum() for param in params).backward()
        optimizer.step()
        inner = getattr(optimizer, "optim", optimizer)  # ZeroRedundancyOptimizer wraps the one that holds the state
        self.held = nbytes(tensors_of(dict(inner.state)))

    def nbytes(self) -> int:
        return self.held


def pyshard(params: list[nn.Parameter], own_group: bool = False, **options: Any) -> Any:
    """ShardedAdamW over all ranks, or over this one alone."""
    if own_group:
        options["process_group"], _ = dist.new_subgroups(1)
    return importlib.import_module("pyshard").ShardedAdamW(params, **HYPER, **options)


def unsharded(params: list[nn.Parameter]) -> Any:
    return torch.optim.AdamW(params, fused=True, **HYPER)


def zero(params: list[nn.Parameter], **options: Any) -> Any:
    return ZeroRedundancyOptimizer(params, optimizer_class=torch.optim.AdamW, fused=True, **options, **HYPER)


def nothing(params: list[nn.Parameter]) -> None:
    return None


WAYS: dict[str, Callable[..., Any]] = {"pyshard": pyshard, "unsharded": unsharded, "zero": zero, "nothing": nothing}
