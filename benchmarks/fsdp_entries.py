"""Contestants of the benchmarks of full sharding: each is an object in all ranks' processes, timed by the slowest."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks import machine
from benchmarks.distributed_entries import STEPS, Log
from benchmarks.distributed_ranks import Ranks
from benchmarks.harness import Contestant, Run

OURS, OURS_PLAIN = "pyshard.AdamW, DTensors", "pyshard.AdamW, plain local tensors"
FUSED, FUSED_PLAIN = "torch fused, DTensors", "torch fused, plain local tensors"
FOREACH = "torch foreach, DTensors"

# name: (plain, optimizer)
STEP_ALONE = {
    OURS: (False, "pyshard"),
    OURS_PLAIN: (True, "pyshard"),
    FUSED: (False, "fused"),
    FUSED_PLAIN: (True, "fused"),
    FOREACH: (False, "foreach"),
}


def step_alone(ranks: Ranks, name: str, build: str, **arguments: Any) -> Contestant:
    """The optimizer of one row of STEP_ALONE, over what `build`, a function of fsdp_steps.py, makes."""
    plain, optimizer = STEP_ALONE[name]

    def make() -> Run:
        ranks.call(name, f"benchmarks.fsdp_steps:{build}", plain=plain, optimizer=optimizer, **arguments)
        return Run(
            lambda: max(ranks.call(name, "sample", steps=STEPS)),
            result=lambda: torch.tensor(ranks.call(name, "total")),
            times_itself=True,
        )

    return _contestant(name, optimizer, make, subject=name == OURS)


def whole_step(ranks: Ranks, name: str, work: dict[str, Any], by: str, optimizer: str, subject: bool) -> Contestant:
    """Training steps of a model in full sharding."""
    log = Log()

    def make() -> Run:
        ranks.call(name, "benchmarks.fsdp_steps:training", work=work, by=by, optimizer=optimizer)
        found = ranks.call(name, "sizes")
        log.sizes = {key: max(size[key] for size in found) for key in found[0]}
        return Run(
            lambda: log.add(ranks.call(name, "sample", steps=STEPS)),
            result=lambda: torch.tensor(log.losses),
            times_itself=True,
            notes=lambda: (
                {
                    "step() ms": log.median("update") * 1e3,
                    "sent MB": statistics.median(sample["sent"] for sample in log.samples) / 1e6,
                }
                | log.sizes
            ),
        )

    return _contestant(name, optimizer if by == "torch" else "pyshard", make, subject)


def _contestant(name: str, optimizer: str, make: Any, subject: bool) -> Contestant:
    ours = optimizer == "pyshard"
    role = "subject" if subject else "ours" if ours else "peer"
    return Contestant(name, machine.version("pyshard-torch" if ours else "torch"), make, role=role)
