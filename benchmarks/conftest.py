"""Options, the `settings` and `measure` fixtures, the tables at the end and the result file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from benchmarks import machine, results
from benchmarks.harness import SUBJECT_CLOCK, Race

T = TypeVar("T")
SUMMARIES = pytest.StashKey[dict[bool, dict[str, dict[str, Any]]]]()  # in one process; in one process per rank


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pyshard benchmarks")
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where to measure")
    group.addoption("--threads", type=int, default=0, help="CPU threads; 0: as torch chooses")
    group.addoption("--peers", default="all", help="packages to measure against: all, or torch,deepspeed,...")
    group.addoption("--quick", action="store_true", help="tiny sizes, three rounds, no result file")
    group.addoption(
        "--result",
        default="",
        help="file to write; default benchmarks/results/<machine>.json. Cases of several processes: *-distributed.json",
    )


@dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    device: str
    peers: list[str]
    quick: bool

    def pick(self, full: T, quick: T) -> T:
        """A size for a real run, and the one that only proves that the code runs."""
        return quick if self.quick else full


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> Settings:
    device = pytestconfig.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device here; leave the option out for the CPU")
    threads = pytestconfig.getoption("--threads")
    if threads:
        torch.set_num_threads(threads)
    return Settings(device, pytestconfig.getoption("--peers").split(","), pytestconfig.getoption("--quick"))


@pytest.fixture
def measure(
    benchmark: Any, settings: Settings, pytestconfig: pytest.Config
) -> Iterator[Callable[[results.Case], None]]:
    """Runs a case: sets the contestants up, hands the rounds to pytest-benchmark, keeps the summary."""
    races: list[Race] = []

    def run(case: results.Case) -> None:
        race = Race(list(case.entries), settings.device)
        races.append(race)
        race.set_up(warmup=1 if settings.quick else case.warmup)
        if not race.present:
            pytest.skip("; ".join(f"{entry.name}: {entry.reason}" for entry in race.absent))
        benchmark.pedantic(race.round, rounds=3 if settings.quick else case.rounds)
        summary = results.summarise(case, race)
        benchmark.extra_info |= summary
        pytestconfig.stash[SUMMARIES].setdefault(case.ranks, {})[case.name] = summary

    yield run
    for race in races:
        race.release()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SUMMARIES] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # pytest-benchmark's own table then shows the subject's times, see SubjectClock
        item.add_marker(pytest.mark.benchmark(timer=SUBJECT_CLOCK, group="pyshard, as pytest-benchmark saw it"))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    write, device = terminalreporter.write_line, config.getoption("--device")
    chosen = config.getoption("--result")
    for ranks, summaries in config.stash[SUMMARIES].items():
        environment = machine.environment(device, ranks)
        terminalreporter.section(f"pyshard and its peers{', one process per rank' if ranks else ''}")
        write(results.header(environment))
        for summary in summaries.values():
            write("")
            write(results.table(summary))
        if config.getoption("--quick") and not chosen:
            write("\nquick run: these times mean nothing, no result written")
            continue
        path = Path(chosen) if chosen else results.RESULTS / f"{machine.slug(device)}.json"
        if ranks:
            path = path.with_stem(path.stem + results.DISTRIBUTED)
        results.save(path, environment, summaries)
        write(f"\nwritten: {path}")
