"""One rank of the benchmarks of full sharding: an optimizer over shards by itself, and whole training steps.

Called by name in the ranks' processes; fsdp_entries.py has the side that asks.
"""

from __future__ import annotations

import importlib
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from benchmarks.distributed_model import Work
from benchmarks.distributed_training import Training, pss
from benchmarks.distributed_ways import SMALL
from benchmarks.peers import HYPER


def optimizer_of(name: str, params: Any) -> torch.optim.Optimizer:
    """pyshard, fused or foreach."""
    if name == "pyshard":
        return importlib.import_module("pyshard").AdamW(params, **HYPER)  # type: ignore[no-any-return]
    return torch.optim.AdamW(params, **{name: True}, **HYPER)


# ---- the optimizer alone ----


class Steps:
    """Steps of one optimizer over this rank's shards, as DTensors or as plain tensors of the same memory layout.

    Before each step, without the clock, all gradients are new, as FSDP2 leaves them: views of one flat tensor that has
    just been written, in DTensors that share the specification of their parameter.
    """

    def __init__(self, params: list[DTensor], plain: bool, optimizer: str):
        self.specs = [None if plain else param._spec for param in params]
        locals_ = [param.to_local().detach() for param in params]
        self.params = [nn.Parameter(part.clone()) for part in locals_] if plain else params
        generator = torch.Generator().manual_seed(1 + dist.get_rank())
        self.flat = torch.randn(sum(part.numel() for part in locals_), generator=generator)
        self.sizes = [part.shape for part in locals_]
        self.optimizer = optimizer_of(optimizer, self.params)

    def gradients(self) -> None:
        flats = self.flat.clone().split([size.numel() for size in self.sizes])
        for param, flat, size, spec in zip(self.params, flats, self.sizes, self.specs):
            grad = flat.view(size)
            param.grad = grad if spec is None else DTensor(grad, spec, requires_grad=False)

    def sample(self, steps: int) -> float:
        """Seconds per step, after one without the clock."""
        dist.barrier()
        seconds = 0.0
        for step in range(steps + 1):
            self.gradients()
            begin = time.perf_counter()
            self.optimizer.step()
            seconds += (time.perf_counter() - begin) * (step > 0)
        return seconds / steps

    def total(self) -> list[float]:
        """Sums of the parameters, to compare."""
        return [
            float(getattr(param, "_local_tensor", param).detach().sum(dtype=torch.float64)) for param in self.params
        ]


def of_model(work: dict[str, Any], plain: bool, optimizer: str) -> Steps:
    """Over the shards of a model that FSDP2 has cut by its blocks."""
    model, blocks, _ = Work(**work).model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh)
    return Steps(list(model.parameters()), plain, optimizer)  # type: ignore[arg-type]


def many_small(count: int, length: int, plain: bool, optimizer: str) -> Steps:
    """Over `count` DTensors of `length` elements each, of which a rank has its part."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    params = [nn.Parameter(distribute_tensor(torch.randn(length), mesh, [Shard(0)])) for _ in range(count)]
    return Steps(params, plain, optimizer)  # type: ignore[arg-type]


# ---- whole steps ----


def training(work: dict[str, Any], by: str, optimizer: str) -> Training:
    """Forward, backward and step of a model in full sharding, in the parameters' own dtype.

    by: "torch", each block and the root given to torch's fully_shard; "pyshard", the model to pyshard's.
    """
    first = _training(replace(Work(**work), **SMALL), by, optimizer)  # type: ignore[arg-type]
    first.sample(1)
    del first
    before = pss()
    made = _training(Work(**work), by, optimizer)
    made.sample(2)
    made.measure(before)
    return made


def _training(work: Work, by: str, name: str) -> Training:
    model, blocks, loss = work.model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if by == "pyshard":
        importlib.import_module("pyshard").fully_shard(model, mesh, param_dtype=None, reduce_dtype=None)
    else:
        for module in [*blocks, model]:
            fully_shard(module, mesh=mesh)
    optimizer = optimizer_of(name, model.parameters())

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Training(model, lambda batch: loss(model, batch), update, lambda: dict(optimizer.state), work.batches())
