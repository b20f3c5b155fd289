"""One training step of a small GPT-2 on two ranks of one host: sharded optimizers beside DDP, FSDP2 and DeepSpeed.

Every contestant has a model of its own in both processes, and all of them see the same batches.
"""

import pytest

from benchmarks.distributed_entries import ALONE, DDP, FSDP2, UNSHARDED, ZERO, Field, Way, ours, share, times
from benchmarks.distributed_model import GPT2, TINY
from benchmarks.distributed_ranks import Ranks
from benchmarks.results import Case

WORLD = 2
SHM, SHM_1 = "pyshard shm, stage 2", "pyshard shm, stage 1"
COLLECTIVE, OVERLAPPED = "pyshard collective, stage 2", "pyshard collective, stage 2, model="
COLLECTIVE_1 = "pyshard collective, stage 1"


WAYS = [
    Way(ALONE, "alone"),
    Way(UNSHARDED, "unsharded"),
    ours(SHM, "subject", stage=2, transport="shm"),
    ours(SHM_1, stage=1, transport="shm"),
    ours(COLLECTIVE, stage=2, transport="collective"),
    ours(OVERLAPPED, stage=2, transport="collective", with_model=True),
    ours(COLLECTIVE_1, stage=1, transport="collective"),
    Way(DDP, "ddp"),
    Way(ZERO, "ddp", {"zero": True}),
    Way(FSDP2, "fsdp2"),
    Way("DeepSpeed ZeRO-1", "deepspeed", {"stage": 1}, "deepspeed"),
    Way("DeepSpeed ZeRO-2", "deepspeed", {"stage": 2}, "deepspeed"),
]


def bench_sharded_step(measure, settings) -> None:
    if settings.device != "cpu":
        pytest.skip("processes of one thread on one host; see the CPU result")
    work = settings.pick(GPT2, TINY)
    if work.missing():
        pytest.skip(work.missing())
    with Ranks(WORLD) as ranks:
        field = Field(ranks, work, settings.peers)
        measure(
            Case(
                name="sharded step",
                title=f"Training step, {work.title()}, {WORLD} ranks of 1 thread on one host",
                entries=[field.entry(way) for way in WAYS],
                targets=[
                    share(1.0, UNSHARDED, SHM),
                    times(1.3, DDP, SHM),
                    times(1.5, ZERO, SHM),
                    times(2.4, "DeepSpeed ZeRO-1", SHM),
                    share(1.0, DDP, COLLECTIVE),
                    share(1.0, DDP, OVERLAPPED),
                ],
                rounds=10,
                warmup=0,  # every contestant has trained when its memory was measured
                reference=DDP,
                facts={"ranks": WORLD, "batch": [work.batch, work.length]},
                ranks=True,
            )
        )
