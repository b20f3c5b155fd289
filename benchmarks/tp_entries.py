"""Contestants of the tensor-parallel benchmarks: ways to do one piece of work on all ranks, and targets for them.

A sample's time is that of the slowest rank.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import machine
from benchmarks.distributed_entries import Way, missing
from benchmarks.distributed_ranks import Ranks
from benchmarks.harness import Absent, Contestant, Run
from benchmarks.results import Target

OURS = "pyshard-torch"  # the package of our own ways


def ours(name: str, way: str = "pyshard", role: str = "ours", **options: Any) -> Way:
    """A row of pyshard.tp."""
    return Way(name, way, options, OURS, role)


class Field:
    """Contestants that compute side by side in the same processes.

    Notes of each: its time over that of `alone`, bytes sent per call on the rank that sends most, the time that a link
    of `mbit` needs for them, and what the ranks' own notes() say.

    Args:
        builder: "module:function" that makes on every rank, from way=, options= and the arguments, an object with
            sample(calls), which gives a dict of "seconds" and bytes "sent" per call, result() and notes().
        alone: the way without communication, and `ratio` the name of the note that compares with it.
    """

    def __init__(
        self,
        ranks: Ranks,
        wanted: Sequence[str],
        builder: str,
        arguments: dict[str, Any],
        alone: str,
        calls: int,
        mbit: float = 0.0,
        ratio: str = "/ matmul",
    ):
        self.ranks, self.wanted, self.builder, self.arguments = ranks, wanted, builder, arguments
        self.alone, self.calls, self.mbit, self.ratio = alone, calls, mbit, ratio
        self.seconds: dict[str, list[float]] = {}
        self.sent: dict[str, list[float]] = {}

    def entry(self, way: Way, compared: bool = True) -> Contestant | Absent:
        """The way as a contestant of harness.py, or why it cannot be one."""
        reason = "" if way.package == OURS else missing(way, self.wanted)
        if reason:
            return Absent(way.name, reason)

        def make() -> Run:
            self.ranks.call(way.name, self.builder, way=way.way, options=way.options, **self.arguments)
            self.ranks.call(way.name, "sample", calls=1)  # with what only a first call does
            self.seconds[way.name], self.sent[way.name] = [], []
            return Run(
                lambda: self.sample(way.name),
                result=(lambda: torch.tensor(self.ranks.call(way.name, "result"))) if compared else None,
                times_itself=True,
                notes=lambda: self._notes(way.name),
            )

        return Contestant(way.name, machine.version(way.package), make, role=way.role)

    def sample(self, name: str) -> float:
        """Seconds per call."""
        answers = self.ranks.call(name, "sample", calls=self.calls)
        self.seconds[name].append(max(answer["seconds"] for answer in answers))
        self.sent[name].append(max(answer["sent"] for answer in answers))
        return float(self.seconds[name][-1])

    def _notes(self, name: str) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.alone in self.seconds:
            found[self.ratio] = statistics.median(self.seconds[name]) / statistics.median(self.seconds[self.alone])
        found["sent MB"] = statistics.median(self.sent[name]) / 1e6
        if self.mbit:
            found["link ms"] = found["sent MB"] * 8e3 / self.mbit
        told = self.ranks.call(name, "notes")
        return found | {key: max(rank[key] for rank in told) for key in told[0]}


def alike(bound: float) -> Target:
    """No contestant's result is further than `bound` from the reference's."""

    def measure(summary: dict[str, Any]) -> float | None:
        found = [row["difference"] for row in summary["contestants"] if "difference" in row]
        return max(found, default=None)

    return Target(f"all results the same, within {bound:g}", measure, bound, at_least=False)


def note_share(bound: float, note: str, other: str, subject: str) -> Target:
    """A note of the subject's is at most `bound` times that of the other."""

    def measure(summary: dict[str, Any]) -> float | None:
        notes = {row["name"]: row.get("notes", {}) for row in summary["contestants"]}
        if note not in notes.get(subject, {}) or note not in notes.get(other, {}):
            return None
        return float(notes[subject][note] / notes[other][note])

    return Target(f"{subject}: {note} ≤ {bound:g}x {other}", measure, bound, at_least=False)
