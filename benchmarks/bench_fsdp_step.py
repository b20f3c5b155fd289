"""Full sharding on two ranks of one host: the optimizer's step over DTensors by itself, and whole training steps.

A step over DTensors should cost what one over plain tensors of the same memory costs: what is looked at and updated is
the same. torch's optimizers go through DTensor's dispatcher with every operator.
"""

from dataclasses import asdict

import pytest

from benchmarks.distributed_entries import share, times
from benchmarks.distributed_model import GPT2, TINY
from benchmarks.distributed_ranks import Ranks
from benchmarks.fsdp_entries import FOREACH, FUSED, OURS, OURS_PLAIN, STEP_ALONE, step_alone, whole_step
from benchmarks.results import Case

WORLD = 2
THEIRS = "FSDP2 + torch fused"
WITH_OURS = "FSDP2 + pyshard.AdamW"
ALL_OURS = "pyshard.fully_shard + pyshard.AdamW"


def on_cpu(settings) -> None:
    if settings.device != "cpu":
        pytest.skip("processes of one thread on one host; see the CPU result")


def bench_fsdp_optimizer(measure, settings) -> None:
    on_cpu(settings)
    work = settings.pick(GPT2, TINY)
    if work.missing():
        pytest.skip(work.missing())
    with Ranks(WORLD) as ranks:
        measure(
            Case(
                name="fsdp optimizer step",
                title=f"AdamW step over the shards of {work.title()}, {WORLD} ranks of 1 thread on one host",
                entries=[step_alone(ranks, name, "of_model", work=asdict(work)) for name in STEP_ALONE],
                targets=[share(1.05, OURS_PLAIN, OURS), times(1.15, FUSED, OURS)],
                rounds=30,
                warmup=1,
                reference=FUSED,
                facts={"ranks": WORLD},
                ranks=True,
            )
        )


def bench_fsdp_many_small(measure, settings) -> None:
    on_cpu(settings)
    count, length = settings.pick((2000, 1024), (20, 64))
    names = [name for name in STEP_ALONE if name != FOREACH]
    with Ranks(WORLD) as ranks:
        measure(
            Case(
                name="fsdp many small",
                title=f"AdamW step, {count:,} DTensors of {length:,} elements, {WORLD} ranks of 1 thread on one host",
                entries=[step_alone(ranks, name, "many_small", count=count, length=length) for name in names],
                targets=[times(8.0, FUSED, OURS)],
                rounds=20,
                warmup=1,
                reference=FUSED,
                facts={"ranks": WORLD, "tensors": count, "length": length},
                ranks=True,
            )
        )


def bench_fsdp_step(measure, settings) -> None:
    on_cpu(settings)
    work = settings.pick(GPT2, TINY)
    if work.missing():
        pytest.skip(work.missing())
    rows = {
        THEIRS: ("torch", "fused"),
        WITH_OURS: ("torch", "pyshard"),
        ALL_OURS: ("pyshard", "pyshard"),
        "pyshard.fully_shard + torch fused": ("pyshard", "fused"),
    }
    with Ranks(WORLD) as ranks:
        measure(
            Case(
                name="fsdp step",
                title=f"Training step in full sharding, {work.title()}, {WORLD} ranks of 1 thread on one host",
                entries=[
                    whole_step(ranks, name, asdict(work), by, optimizer, subject=name == ALL_OURS)
                    for name, (by, optimizer) in rows.items()
                ],
                targets=[share(1.0, THEIRS, WITH_OURS), share(1.0, THEIRS, ALL_OURS)],
                rounds=10,
                warmup=0,  # every contestant has trained when its memory was measured
                reference=THEIRS,
                facts={"ranks": WORLD, "batch": [work.batch, work.length]},
                ranks=True,
            )
        )
