"""Forward and backward of a column and a row layer, with sequence parallel, beside their matmuls alone.

Backward has three matmuls with communication: the row's gradient is gathered, the column's input is gathered again, and
the sums of its gradient are scattered.
"""

from __future__ import annotations

import pytest

from benchmarks.bench_tp_matmul import ALONE, SHORT, SUBJECT, TINY, WORLD
from benchmarks.distributed_entries import Way
from benchmarks.distributed_ranks import Ranks
from benchmarks.results import Case, faster_than
from benchmarks.tp_entries import Field, alike, ours

CALLS, ROUNDS = 1, 5
COLLECTIVE = "torch collectives with gradients"
WAYS = [
    Way(ALONE, "alone"),
    ours(SUBJECT, role="subject"),
    ours("pyshard ring", transport="ring"),
    ours("pyshard blocking", transport="blocking"),
    Way(COLLECTIVE, "collective"),
]
SHAPES = [(1024, 1024, 4096, "bfloat16"), (2048, 2048, 2048, "bfloat16")]
# Gradients of weights are sums of up to 2048 products of about 1, and so up to 250, where a unit of bf16 is 1.
TOLERANCE = 4.0


@pytest.mark.parametrize("rows, width, features, dtype", SHAPES)
def bench_tp_backward(measure, settings, rows: int, width: int, features: int, dtype: str) -> None:
    if settings.device != "cpu":
        pytest.skip("processes of one thread on one host; see the CPU result")
    shape = settings.pick([rows, width, features], TINY)
    what = f"{rows} rows, {width} -> {features} -> {width}, {SHORT[dtype]}"
    with Ranks(WORLD) as ranks:
        arguments = {"shape": shape, "dtype": dtype}
        field = Field(ranks, settings.peers, "benchmarks.tp_matmul:layers", arguments, ALONE, CALLS)
        measure(
            Case(
                name=f"tp layers, {what}",
                title=f"Column and row layer, forward and backward, {what}, {WORLD} ranks of 1 thread on one host",
                entries=[field.entry(way, compared=way.name != ALONE) for way in WAYS],
                targets=[faster_than(COLLECTIVE, 1.0), alike(TOLERANCE)],
                rounds=ROUNDS,
                warmup=0,
                reference=COLLECTIVE,
                facts={"ranks": WORLD, "shape": shape, "dtype": dtype},
                ranks=True,
            )
        )
