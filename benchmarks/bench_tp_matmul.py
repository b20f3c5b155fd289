"""The matmul of a tensor-parallel layer with its collective, beside the matmul alone: two ranks of one host.

All-gather + matmul: each rank has S/2 rows of x [S, D] and multiplies all of them with its own weight [F, D]. Matmul +
reduce-scatter: each rank multiplies its own features of all rows and ends with S/2 rows of the sum [S, F].
"""

from __future__ import annotations

import pytest

from benchmarks.distributed_entries import Way, share
from benchmarks.distributed_ranks import Ranks
from benchmarks.results import Case
from benchmarks.tp_entries import Field, alike, ours
from benchmarks.tp_matmul import ALL_GATHER, REDUCE_SCATTER

WORLD, ROUNDS = 2, 7
CALLS = {"float32": 2, "bfloat16": 3}  # per sample: about 0.2 s
ALONE, SUBJECT, COLLECTIVE = "matmul alone", "pyshard", "torch collective, then one after the other"
FUSED = "torch symm_mem.fused_*, its fallback"
WAYS = [
    Way(ALONE, "alone"),
    ours(SUBJECT, role="subject"),
    ours("pyshard ring", transport="ring"),
    ours("pyshard blocking", transport="blocking"),
    Way(COLLECTIVE, "collective"),
    Way(FUSED, "fused"),
]
# S, D, F, dtype: at most so many times the matmul alone.
SHAPES = {
    (1024, 1024, 4096, "float32"): {ALL_GATHER: 1.03, REDUCE_SCATTER: 1.05},
    (1024, 1024, 4096, "bfloat16"): {ALL_GATHER: 1.05, REDUCE_SCATTER: 1.06},
    (2048, 2048, 2048, "bfloat16"): {ALL_GATHER: 1.03, REDUCE_SCATTER: 1.06},
    (512, 4096, 4096, "bfloat16"): {ALL_GATHER: 1.03, REDUCE_SCATTER: 1.04},
}
TINY = [64, 48, 80]
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
# Of sums of about 1. fp32: orders of summation differ. bf16: a unit in the last place of two rounded products.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}


@pytest.mark.parametrize("collective", [ALL_GATHER, REDUCE_SCATTER])
@pytest.mark.parametrize("rows, inputs, outputs, dtype", SHAPES)
def bench_tp_matmul(measure, settings, rows: int, inputs: int, outputs: int, dtype: str, collective: str) -> None:
    if settings.device != "cpu":
        pytest.skip("processes of one thread on one host; see the CPU result")
    shape = settings.pick([rows, inputs, outputs], TINY)
    what = f"{collective}, {rows}x{inputs}x{outputs} {SHORT[dtype]}"
    arguments = {"collective": collective, "shape": shape, "dtype": dtype}
    with Ranks(WORLD) as ranks:
        field = Field(
            ranks, settings.peers, "benchmarks.tp_matmul:matmul", arguments, ALONE, settings.pick(CALLS[dtype], 1)
        )
        gathers = collective == ALL_GATHER
        measure(
            Case(
                name=f"tp {what}",
                title=f"{what[0].upper()}{what[1:]}, {WORLD} ranks of 1 thread on one host",
                # Without communication there is no sum to compare.
                entries=[field.entry(way, compared=gathers or way.name != ALONE) for way in WAYS],
                targets=[
                    share(SHAPES[rows, inputs, outputs, dtype][collective], ALONE, SUBJECT),
                    alike(TOLERANCES[dtype]),
                ],
                rounds=ROUNDS,
                warmup=0,  # every contestant is warm when it is built
                reference=ALONE if gathers else COLLECTIVE,
                facts={"ranks": WORLD, "shape": shape, "dtype": dtype},
                ranks=True,
            )
        )
