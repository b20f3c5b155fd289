"""A matmul with its collective between two hosts, over a link as fast as the matmul: where overlap can gain most.

The hosts are two network namespaces on this machine, one core each. The matmul is measured first; then the link gets
the rate at which the rows that must travel take just as long. Hidden wholly, the two take the time of one.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from benchmarks import two_hosts
from benchmarks.bench_tp_matmul import ALONE, COLLECTIVE, TINY, TOLERANCES
from benchmarks.distributed_entries import Way
from benchmarks.distributed_ranks import Ranks
from benchmarks.results import Case, Target
from benchmarks.tp_entries import Field, alike, ours
from benchmarks.tp_matmul import ALL_GATHER, REDUCE_SCATTER

WORLD, CALLS, ROUNDS = 2, 2, 5
SHAPE, DTYPE = [1024, 1024, 4096], "float32"
LEAST_MBIT, MOST_MBIT = 10.0, 10_000.0  # of links that the kernel's clock can shape
SUBJECT, BOUND = "pyshard ring", 1.1
# Told which transport: processes of one machine would find that they can share memory.
WAYS = [
    Way(ALONE, "alone"),
    ours(SUBJECT, role="subject", transport="ring"),
    ours("pyshard ring, no overlap", transport="ring", chunks=0),
    Way(COLLECTIVE, "collective"),
]
BUILDER = "benchmarks.tp_matmul:matmul"


def travelling(collective: str, rows: int, inputs: int, outputs: int) -> int:
    """Bytes that one of two ranks must send: fp32, half of the rows."""
    return rows // 2 * (inputs if collective == ALL_GATHER else outputs) * 4


def link_rate(nbytes: int, seconds: float) -> float:
    """Mbit/s at which these bytes take so long."""
    return min(max(nbytes * 8 / seconds / 1e6, LEAST_MBIT), MOST_MBIT)


def hidden_within(bound: float, subject: str) -> Target:
    """At most `bound` times the longer of the matmul alone, in this race, and the communication alone."""

    def measure(summary: dict[str, Any]) -> float | None:
        medians = {row["name"]: row["median"] for row in summary["contestants"]}
        if subject not in medians or ALONE not in medians:
            return None
        return float(medians[subject] / max(medians[ALONE], summary["facts"]["communication ms"]))

    return Target(f"{subject}: ≤ {bound:g}x max(matmul, communication)", measure, bound, at_least=False)


@pytest.fixture(scope="module")
def matmul_seconds(settings) -> float:
    """Of the matmul alone, on both cores at once; the same for both collectives."""
    arguments = {"collective": ALL_GATHER, "shape": settings.pick(SHAPE, TINY), "dtype": DTYPE}
    with Ranks(WORLD) as ranks:
        ranks.call(ALONE, BUILDER, way="alone", options={}, **arguments)
        samples = [ranks.call(ALONE, "sample", calls=CALLS) for _ in range(settings.pick(7, 2))]
    return statistics.median(max(answer["seconds"] for answer in answers) for answers in samples)


@pytest.mark.parametrize("collective", [ALL_GATHER, REDUCE_SCATTER])
def bench_tp_two_hosts(measure, settings, request, collective: str) -> None:
    if settings.device != "cpu":
        pytest.skip("processes of one thread on one machine; see the CPU result")
    reason = two_hosts.unavailable()
    if reason:
        pytest.skip(reason)
    shape = settings.pick(SHAPE, TINY)
    nbytes = travelling(collective, *shape)
    mbit = round(link_rate(nbytes, request.getfixturevalue("matmul_seconds")), 1)
    link = (two_hosts.ADDRESSES[0], two_hosts.PORT, two_hosts.INTERFACES)
    with two_hosts.TwoHosts(mbit) as hosts, Ranks(WORLD, hosts.start, *link) as ranks:
        arguments = {"collective": collective, "shape": shape, "dtype": DTYPE}
        field = Field(ranks, settings.peers, BUILDER, arguments, ALONE, settings.pick(CALLS, 1), mbit)
        gathers = collective == ALL_GATHER
        what = f"{collective}, {'x'.join(map(str, SHAPE))} fp32"
        measure(
            Case(
                name=f"tp two hosts, {what}",
                title=f"{what[0].upper()}{what[1:]}, two hosts of one rank and 1 thread, {mbit:g} Mbit/s between them",
                entries=[field.entry(way, compared=gathers or way.name != ALONE) for way in WAYS],
                targets=[hidden_within(BOUND, SUBJECT), alike(TOLERANCES[DTYPE])],
                rounds=ROUNDS,
                warmup=0,
                reference=ALONE if gathers else COLLECTIVE,
                facts={
                    "ranks": WORLD,
                    "shape": shape,
                    "mbit_per_s": mbit,
                    "bytes": nbytes,
                    "communication ms": nbytes * 8e-3 / mbit,
                },
                ranks=True,
            )
        )
