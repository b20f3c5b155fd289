"""One rank of bench_pp_schedules.py: forward and backward of a GPT-2 of transformers, whole or cut into stages.

All ranks see the same batches, and all ways have the same weights.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from benchmarks.distributed_model import Work
from benchmarks.distributed_training import sent_bytes

MICROBATCHES = 8


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


Step = Callable[[Tensor], list[float] | None]


def whole(work: Work) -> tuple[nn.Module, Step]:
    """The whole model on every rank, one microbatch after the other: what a step computes."""
    model, _, _ = work.model()

    def step(tokens: Tensor) -> list[float]:
        losses = []
        for chunk in tokens.chunk(MICROBATCHES):
            loss = loss_of(model(chunk).logits, chunk)
            (loss / MICROBATCHES).backward()
            losses.append(loss.item())
        return losses

    return model, step


def pyshard(work: Work, schedule: str, balance: str) -> tuple[nn.Module, Step]:
    """pyshard.pp.pipeline."""
    model, _, _ = work.model()
    mesh = importlib.import_module("pyshard").init_mesh(pp=dist.get_world_size())
    example = {"input_ids": torch.zeros(work.batch, work.length, dtype=torch.int64)}
    make = importlib.import_module("pyshard.pp").pipeline
    pipe = make(model, mesh, schedule, MICROBATCHES, loss_of, balance=balance, example=example)
    print(pipe.explain(), flush=True)

    def step(tokens: Tensor) -> list[float]:
        losses: list[float] = pipe.step(tokens, target=tokens).losses.tolist()
        return losses

    return pipe, step


class Half(nn.Module):
    """A stage made by hand, as torch's tutorial does it: the same number of blocks on each rank."""

    def __init__(self, model: Any, rank: int, world: int):
        super().__init__()
        base, blocks = model.transformer, list(model.transformer.h)
        self.blocks = nn.ModuleList(blocks[len(blocks) * rank // world : len(blocks) * (rank + 1) // world])
        self.wte, self.wpe = (base.wte, base.wpe) if rank == 0 else (None, None)
        self.norm, self.head = (base.ln_f, model.lm_head) if rank == world - 1 else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        if self.wte is not None and self.wpe is not None:
            x = self.wte(x) + self.wpe(torch.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return x if self.head is None or self.norm is None else self.head(self.norm(x))


def torch_pipelining(work: Work, schedule: str) -> tuple[nn.Module, Step]:
    """torch.distributed.pipelining alone; the tied weight's gradients are not added up, as it does not do that."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model, _, _ = work.model()
    stage = Half(model, rank, world)
    made = PipelineStage(stage, rank, world, torch.device("cpu"))
    run = get_schedule_class(schedule)(made, MICROBATCHES, loss_of)

    def step(tokens: Tensor) -> list[float] | None:
        losses: list[Tensor] = []
        if rank == 0:
            run.step(tokens)
        else:
            run.step(target=tokens, losses=losses)
        return [float(loss) for loss in losses] or None

    return stage, step


WAYS: dict[str, Callable[..., tuple[nn.Module, Step]]] = {
    "whole": whole,
    "pyshard": pyshard,
    "torch": torch_pipelining,
}


class Passes:
    """Forward and backward of a batch, timed."""

    def __init__(self, work: Work, way: str, options: dict[str, Any]):
        self.model, self.step = WAYS[way](work, **options)
        generator = torch.Generator().manual_seed(1)
        shape = (work.batch * MICROBATCHES, work.length)
        self.tokens = torch.randint(work.vocabulary, shape, generator=generator)
        self.losses: list[float] | None = None

    def sample(self, calls: int) -> dict[str, float]:
        """Seconds and bytes sent per pass, after one without the clock."""
        self._pass()
        dist.barrier()
        before, begin = sent_bytes(), time.perf_counter()
        for _ in range(calls):
            self._pass()
        seconds = time.perf_counter() - begin
        dist.barrier()
        return {"seconds": seconds / calls, "sent": (sent_bytes() - before) / calls}

    def _pass(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.losses = self.step(self.tokens)

    def result(self) -> list[float]:
        """Losses of the microbatches, on all ranks."""
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, self.losses)
        return next(found for found in every if found is not None)

    def notes(self) -> dict[str, float]:
        params = {id(p): p.numel() for p in self.model.parameters()}
        return {"parameters": float(sum(params.values()))}


def build(way: str, options: dict[str, Any], work: dict[str, Any]) -> Passes:
    return Passes(Work(**work), way, options)
