"""Forward and backward of a small GPT-2 over two pipeline stages of one host, beside the whole model on one core.

The limit is what two cores can do: half of the whole model's time, and the time that one of them waits in the schedule
for the first and the last microbatch.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from benchmarks.distributed_entries import Way
from benchmarks.distributed_model import GPT2, Work
from benchmarks.distributed_ranks import Ranks
from benchmarks.pp_training import MICROBATCHES
from benchmarks.results import Case, Target, ratio
from benchmarks.tp_entries import Field, alike, ours

WORLD, CALLS, ROUNDS = 2, 1, 7
SMALL = Work(layers=4, width=32, heads=2, vocabulary=256, positions=8, batch=1, length=8)
WHOLE, SUBJECT = "whole model on each rank", "pyshard 1f1b"
WAYS = [
    Way(WHOLE, "whole"),
    ours(SUBJECT, role="subject", schedule="1f1b", balance="time"),
    ours("pyshard 1f1b, balanced by parameters", schedule="1f1b", balance="parameters"),
    ours("pyshard gpipe", schedule="gpipe", balance="time"),
    ours("pyshard interleaved_1f1b", schedule="interleaved_1f1b", balance="time"),
    ours("pyshard zbv_zero_bubble", schedule="zbv_zero_bubble", balance="time"),
    Way("torch 1F1B, as many blocks each", "torch", {"schedule": "1F1B"}),
    Way("torch GPipe, as many blocks each", "torch", {"schedule": "GPipe"}),
]
# Losses near ln 8192 = 9, of the same operations.
TOLERANCE = 1e-5
# Of a schedule without interleaving: the others wait for (ranks - 1) microbatches at each end.
LIMIT = (1 + (WORLD - 1) / MICROBATCHES) / WORLD


def over_limit(bound: float) -> Target:
    """The subject takes at most `bound` times the whole model's time over the ranks, with the schedule's bubble."""

    def measure(summary: dict[str, Any]) -> float | None:
        found = ratio(summary, SUBJECT, WHOLE)
        return None if found is None else found / LIMIT

    return Target(f"{SUBJECT}: ≤ {bound:g}x (compute / {WORLD} + bubble)", measure, bound, at_least=False)


def bench_pp_schedules(measure, settings) -> None:
    if settings.device != "cpu":
        pytest.skip("processes of one thread on one host; see the CPU result")
    work = settings.pick(GPT2, SMALL)
    if work.missing():
        pytest.skip(work.missing())
    with Ranks(WORLD) as ranks:
        arguments = {"work": asdict(work)}
        builder = "benchmarks.pp_training:build"
        field = Field(ranks, settings.peers, builder, arguments, WHOLE, CALLS, ratio="/ whole")
        measure(
            Case(
                name="pp schedules",
                title=f"Forward and backward of {MICROBATCHES} microbatches, {work.title()}, {WORLD} stages",
                entries=[field.entry(way) for way in WAYS],
                targets=[over_limit(1.10), alike(TOLERANCE)],
                rounds=ROUNDS,
                warmup=0,
                reference=WHOLE,
                facts={"ranks": WORLD, "microbatches": MICROBATCHES, "limit / whole": LIMIT},
                ranks=True,
            )
        )
