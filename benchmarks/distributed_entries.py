"""Ways to train as contestants of a case: who can take part, and what their samples say.

A sample's time is that of the slowest rank.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks import machine
from benchmarks.distributed_model import Work
from benchmarks.distributed_ranks import Ranks
from benchmarks.harness import Absent, Contestant, Run
from benchmarks.results import Target, ratio, within

STEPS = 2  # timed steps per sample, after one without the clock

ALONE, UNSHARDED, DDP = "forward + backward", "torch fused, unsharded", "DDP"
ZERO, FSDP2 = "DDP + ZeroRedundancyOptimizer", "FSDP2"


@dataclass(frozen=True)
class Way:
    """A row of a table: a builder of distributed_ways.py with its options."""

    name: str
    way: str
    options: dict[str, Any] = field(default_factory=dict)
    package: str = "torch"  # whose version is shown
    role: str = "peer"
    dtype: str = "float32"
    alone: str = ALONE  # forward and backward of the same model without the rest


def ours(name: str, role: str = "ours", dtype: str = "float32", alone: str = ALONE, **options: Any) -> Way:
    """A row of pyshard.ShardedAdamW."""
    return Way(name, "pyshard", options, "pyshard-torch", role, dtype, alone)


def missing(way: Way, wanted: Sequence[str]) -> str:
    """Why a way cannot race, or "" if it can. `wanted`: the packages asked for, ["all"] for every one."""
    if way.package == "pyshard-torch":
        return missing_argument(way.options)
    if "all" not in wanted and way.package not in wanted:
        return "not asked for (--peers)"
    if importlib.util.find_spec(way.package) is None:
        return f"{way.package} is not installed (requirements/bench.txt)"
    return ""


def missing_argument(options: dict[str, Any]) -> str:
    """What pyshard.ShardedAdamW lacks to take these options of distributed_ways.pyshard, or ""."""
    try:
        optimizer = importlib.import_module("pyshard").ShardedAdamW
    except (AttributeError, ImportError) as error:
        return str(error)
    names = {"with_model": "model", "wire": "reduce_dtype", "own_group": "process_group"}
    known = {name for kind in optimizer.__mro__ for name in inspect.signature(kind.__init__).parameters}
    unknown = [names.get(option, option) for option in options if names.get(option, option) not in known]
    return f"pyshard.ShardedAdamW has no argument {', '.join(unknown)}" if unknown else ""


@dataclass
class Log:
    """What the ranks told of one contestant."""

    samples: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # mean over ranks at the steps of the last sample
    sizes: dict[str, float] = field(default_factory=dict)  # on the rank that has most

    def add(self, answers: list[dict[str, Any]]) -> float:
        """Seconds per step of the slowest rank."""
        slowest = max(answers, key=lambda answer: answer["seconds"])
        sent = max(answer["sent"] for answer in answers)
        self.samples.append({"seconds": slowest["seconds"], "update": slowest["update"], "sent": sent})
        self.losses = [statistics.fmean(losses) for losses in zip(*(answer["losses"] for answer in answers))]
        return float(slowest["seconds"])

    def median(self, what: str) -> float:
        return statistics.median(sample[what] for sample in self.samples)


class Field:
    """Contestants that train side by side in the same processes.

    Notes of each: time inside step(); what a step takes beyond forward and backward alone; bytes sent per step and
    rank, and the time that a link of `mbit` between the ranks needs for them; memory. Its result, to compare: the
    losses at its last steps, mean over ranks.
    """

    def __init__(self, ranks: Ranks, work: Work, wanted: Sequence[str], mbit: float = 0):
        self.ranks, self.work, self.wanted, self.mbit = ranks, work, wanted, mbit
        self.logs: dict[str, Log] = {}

    def entry(self, way: Way) -> Contestant | Absent:
        """The way as a contestant of harness.py, or why it cannot be one."""
        reason = missing(way, self.wanted)
        if reason:
            return Absent(way.name, reason)

        def make() -> Run:
            log = self.build(way)
            compared = way.way not in ("alone", "unsharded")  # those see the batches of one rank alone
            return Run(
                lambda: log.add(self.ranks.call(way.name, "sample", steps=STEPS)),
                result=(lambda: torch.tensor(log.losses)) if compared else None,
                times_itself=True,
                notes=lambda: self._notes(way, log),
            )

        return Contestant(way.name, machine.version(way.package), make, role=way.role)

    def build(self, way: Way) -> Log:
        """Builds it on all ranks; what it holds is in the log."""
        arguments = {"work": asdict(self.work) | {"dtype": way.dtype}, "way": way.way, "options": way.options}
        self.ranks.call(way.name, "benchmarks.distributed_ways:build", **arguments)
        found = self.ranks.call(way.name, "sizes")
        log = self.logs[way.name] = Log(sizes={key: max(size[key] for size in found) for key in found[0]})
        return log

    def _notes(self, way: Way, log: Log) -> dict[str, float]:
        found: dict[str, float] = {}
        if way.way != "alone":
            found["step() ms"] = log.median("update") * 1e3
        if way.way != "alone" and way.alone in self.logs:
            found["exposed ms"] = (log.median("seconds") - self.logs[way.alone].median("seconds")) * 1e3
        found["sent MB"] = log.median("sent") / 1e6
        if self.mbit:
            found["link ms"] = found["sent MB"] * 8e3 / self.mbit
            found["compute ms"] = self.logs[way.alone].median("seconds") * 1e3
        return found | log.sizes


def times(bound: float, peer: str, subject: str) -> Target:
    """The peer takes at least `bound` times the time of the subject."""
    return Target(f"{subject}: ≥ {bound:g}x {peer}", lambda s: ratio(s, peer, subject), bound)


def share(bound: float, other: str, subject: str) -> Target:
    """The subject takes at most `bound` times the time of the other."""
    return Target(f"{subject}: ≤ {bound:g}x {other}", lambda s: ratio(s, subject, other), bound, at_least=False)


def at_most(ms: float, subject: str) -> Target:
    """The subject's median in milliseconds."""
    return Target(f"{subject}: ≤ {ms:g} ms", within(ms, "ms", subject).measure, ms, at_least=False)


def exposed_within(bound: float, subject: str) -> Target:
    """What a step takes beyond forward and backward is at most `bound` times what the link needs beyond them.

    Not judged where the link needs less than forward and backward, and so could be hidden behind them.
    """

    def measure(summary: dict[str, Any]) -> float | None:
        row = next((row for row in summary["contestants"] if row["name"] == subject), None)
        if row is None or row["notes"]["link ms"] <= row["notes"]["compute ms"]:
            return None
        notes = row["notes"]
        return float(notes["exposed ms"] / (notes["link ms"] - notes["compute ms"]))

    return Target(f"{subject}: exposed ≤ {bound:g}x what the link needs beyond compute", measure, bound, at_least=False)
