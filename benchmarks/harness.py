"""Interleaved timing: every contestant once per round, in an order that changes from round to round.

A machine's speed drifts (clock, neighbours, page placement), so times taken one library after the other do
not compare. Here a round calls every contestant once. The order rotates, and every other round is reversed,
so that nobody always runs after the same neighbour. Medians over the rounds are what is reported.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Run:
    """One contestant, set up: what is called, and what is not part of its time."""

    step: Callable[[], object]  # timed
    before: Callable[[], object] | None = None  # not timed; before every sample
    result: Callable[[], torch.Tensor] | None = None  # what the steps have made, to compare contestants
    times_itself: bool = False  # step() returns its own seconds (work done in another process), or MB
    notes: Callable[[], dict[str, float]] | None = None  # further numbers, named with their unit, after all rounds


@dataclass(frozen=True)
class Contestant:
    """A library's way to do the work of a case. `make` allocates; it runs once, before the first round."""

    name: str
    version: str
    make: Callable[[], Run]
    nbytes: int = 0  # read + written by one call; 0: not a question of bandwidth
    traffic: str = ""  # how nbytes comes about
    role: str = "peer"  # subject | peer | sweep
    calls: int = 1  # calls per sample; more where one call is too short for the clock


@dataclass(frozen=True)
class Absent:
    """A contestant that cannot run here, and why: it stays in the table."""

    name: str
    reason: str


class SubjectClock:
    """Seconds the subject has run so far: the clock that pytest-benchmark reads.

    pytest-benchmark calls one function per round, and a round here holds every contestant. With this clock
    its statistics are the subject's own times, on a GPU too, where they come from events.
    """

    def __init__(self) -> None:
        self.elapsed = 0.0

    def __call__(self) -> float:
        return self.elapsed


SUBJECT_CLOCK = SubjectClock()


def _time_cpu(run: Run, calls: int) -> float:
    step = run.step
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def _time_cuda(run: Run, calls: int) -> float:
    step = run.step
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()  # nothing of the previous contestant runs into this one's time
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


@dataclass
class Race:
    """Contestants measured together. `samples[name]` holds seconds per call, one entry per round."""

    entries: list[Contestant | Absent]
    device: str = "cpu"
    samples: dict[str, list[float]] = field(default_factory=dict)
    absent: list[Absent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.present: list[Contestant] = []
        self._runs: dict[str, Run] = {}
        self._round = 0

    def set_up(self, warmup: int) -> None:
        """Builds every contestant and warms it up; a peer that fails is absent, with its error."""
        for entry in self.entries:
            if isinstance(entry, Absent):
                self.absent.append(entry)
                continue
            try:
                run = self._runs[entry.name] = entry.make()
                for _ in range(warmup):
                    self._sample(entry, run)
            except Exception as error:
                if entry.role != "peer":  # our own failure is a failure, not a line in a table
                    raise
                self._runs.pop(entry.name, None)
                self.absent.append(Absent(entry.name, f"{type(error).__name__}: {str(error).splitlines()[0]}"))
                continue
            self.present.append(entry)
            self.samples[entry.name] = []
        gc.collect()

    def _sample(self, entry: Contestant, run: Run) -> float:
        if run.before is not None:
            run.before()
        if run.times_itself:
            seconds = run.step()
            if not isinstance(seconds, float):
                raise TypeError(f"{entry.name}: step() returned {seconds!r}, expected its seconds as a float")
            return seconds
        return (_time_cuda if self.device == "cuda" else _time_cpu)(run, entry.calls)

    def round(self) -> None:
        """One round: one sample of every contestant."""
        count = len(self.present)
        order = [self.present[(self._round // 2 + i) % count] for i in range(count)]
        if self._round % 2:
            order.reverse()
        self._round += 1
        for entry in order:
            seconds = self._sample(entry, self._runs[entry.name])
            self.samples[entry.name].append(seconds)
            if entry.role == "subject":
                SUBJECT_CLOCK.elapsed += seconds

    def result(self, name: str) -> torch.Tensor | None:
        """What the contestant's steps have made so far, or None if it has nothing to compare."""
        run = self._runs.get(name)
        return None if run is None or run.result is None else run.result()

    def notes(self, name: str) -> dict[str, float]:
        """Further numbers of a contestant, {} if it has none."""
        run = self._runs.get(name)
        return {} if run is None or run.notes is None else run.notes()

    def release(self) -> None:
        """Drops every contestant's memory before the next case allocates its own."""
        self._runs.clear()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
