"""The ways to train that race: one builder each, on a model that all of them build with the same values.

Every builder is called on all ranks and gives a Training. Peers are set up as their documentation has it, and where a
setting was tried that changes their speed, with the faster one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from benchmarks.distributed_model import Work
from benchmarks.distributed_training import Training, pss
from benchmarks.peers import HYPER

SMALL = {"layers": 1, "width": 16, "heads": 2, "vocabulary": 64}


def build(way: str, work: dict[str, Any], options: dict[str, Any]) -> Training:
    """A contestant that has trained for a few steps, with its sizes.

    A small one comes and goes before: what a library's code takes in a process is no contestant's memory.
    """
    first = WAYS[way](replace(Work(**work), **SMALL), **options)
    first.sample(1)
    first.close()
    del first
    before = pss()
    training = WAYS[way](Work(**work), **options)
    training.sample(2)
    training.measure(before)
    return training


def _torch_adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, fused=True, **HYPER)


def _training(
    work: Work,
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    optimizer: Any,
    inner: Any = None,
    **more: Callable[..., object],
) -> Training:
    """Backward, step(), zero_grad(). inner: the optimizer that holds the state, where another one wraps it."""

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Training(model, loss, update, lambda: dict((inner or optimizer).state), work.batches(), **more)


def alone(work: Work) -> Training:
    """Forward and backward, and nothing else."""
    model, _, loss = work.model()
    return Training(model, lambda batch: loss(model, batch), None, list, work.batches())


def unsharded(work: Work) -> Training:
    """Each rank for itself with torch's fused AdamW: no communication."""
    model, _, loss = work.model()
    return _training(work, model, lambda batch: loss(model, batch), _torch_adamw(model.parameters()))


def ddp(work: Work, zero: bool = False, bf16_wire: bool = False, **options: Any) -> Training:
    """DistributedDataParallel with torch's fused AdamW, in a ZeroRedundancyOptimizer if asked for."""
    model, _, loss = work.model()
    wrapped = DistributedDataParallel(model, **options)
    if bf16_wire:
        wrapped.register_comm_hook(None, _bf16_wire)
    if zero:
        sharded = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW, fused=True, **HYPER)
        return _training(work, model, lambda batch: loss(wrapped, batch), sharded, inner=sharded.optim)
    return _training(work, model, lambda batch: loss(wrapped, batch), _torch_adamw(model.parameters()))


def _bf16_wire(state, bucket):  # bare, as DDP takes annotations only as objects
    """torch's bf16_compress_hook, which DDP refuses by its name outside NCCL, though gloo sums bf16."""
    return default_hooks.bf16_compress_hook(state, bucket)


def fsdp2(work: Work) -> Training:
    """fully_shard of every block and of the root, with torch's fused AdamW on the shards."""
    model, blocks, loss = work.model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh)
    return _training(work, model, lambda batch: loss(model, batch), _torch_adamw(model.parameters()))


def deepspeed(work: Work, stage: int, **zero: Any) -> Training:
    """DeepSpeed ZeRO with torch's fused AdamW as client optimizer.

    reduce_scatter: over gloo one all-reduce took 0.87 of the time of its default, a reduce to each rank.
    """
    library = importlib.import_module("deepspeed")
    # An all-reduce in shared memory that serves inference alone: compiled for a minute, and it leaves files there.
    importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    model, _, loss = work.model()
    config = {
        "train_micro_batch_size_per_gpu": work.batch,
        "zero_optimization": {"stage": stage, "reduce_scatter": False, **zero},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # it clips to 1.0 unasked, and no other contestant does
        "steps_per_print": 10**9,
    }
    engine, optimizer, _, _ = library.initialize(
        model=model, optimizer=_torch_adamw(model.parameters()), config=config, dist_init_required=False
    )

    def state() -> Any:
        return [dict(optimizer.optimizer.state), optimizer.single_partition_of_fp32_groups]

    return Training(
        model, lambda batch: loss(engine, batch), engine.step, state, work.batches(), backward=engine.backward
    )


def pyshard(work: Work, with_model: bool = False, wire: str = "", **options: Any) -> Training:
    """pyshard.ShardedAdamW on the bare model."""
    model, _, loss = work.model()
    if with_model:
        options["model"] = model
    if wire:
        options["reduce_dtype"] = getattr(torch, wire)
    optimizer = importlib.import_module("pyshard").ShardedAdamW(model.parameters(), **HYPER, **options)
    return _training(
        work,
        model,
        lambda batch: loss(model, batch),
        optimizer,
        settle=optimizer.synchronize,
        close=optimizer.close,
    )


WAYS: dict[str, Callable[..., Training]] = {
    "alone": alone,
    "unsharded": unsharded,
    "ddp": ddp,
    "fsdp2": fsdp2,
    "deepspeed": deepspeed,
    "pyshard": pyshard,
}
