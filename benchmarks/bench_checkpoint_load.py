"""Loading a checkpoint of two ranks of ShardedAdamW in one process, and in two that are sharded otherwise, against the
time of reading the same bytes; and the memory that it takes. Files are in the page cache."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest

from benchmarks import machine
from benchmarks.checkpoint_ranks import LAYERS, WIDTH
from benchmarks.distributed_ranks import Ranks
from benchmarks.harness import Absent, Contestant, Run
from benchmarks.results import Case, fact_within, no_slower_than

OURS, READ = "pyshard.load_checkpoint", "read the bytes"
NEW, READ_NEW = f"{OURS}, new state", f"{READ}, 2/3 of them into new memory"
BOUND = 1.5  # of the time of reading
# What is not in proportion to the state: the metadata, and Python objects.
MEMORY_BOUND = 1.10


@pytest.fixture
def shape(settings: Any) -> dict[str, Any]:
    if settings.device != "cpu":
        pytest.skip("host work alone; see the CPU result")
    return {"width": settings.pick(WIDTH, 32), "layers": settings.pick(LAYERS, 2)}


@pytest.mark.parametrize("world", [1, 2])
def bench_checkpoint_load(measure: Any, settings: Any, shape: dict[str, Any], world: int) -> None:
    threads = 2 if world == 1 else 1  # one process may have both cores

    with tempfile.TemporaryDirectory() as path:
        with Ranks(2) as savers:
            savers.call("save", "benchmarks.checkpoint_ranks:Save", path=path, **shape)
            size = savers.call("save", "bytes")[0]
        with Ranks(world) as ranks:

            def entry(
                name: str, kind: str, role: str = "peer", package: str = "torch", threads: int = 1, **options: Any
            ) -> Contestant | Absent:
                if package == "torch" and "all" not in settings.peers and package not in settings.peers:
                    return Absent(name, "not asked for (--peers)")
                fresh = options.pop("fresh", False)

                def make() -> Run:
                    key = f"{kind} {options}"  # those of one kind share their memory
                    if key not in made:
                        made.add(key)
                        ranks.call(key, f"benchmarks.checkpoint_ranks:{kind}", path=path, **options)
                    return Run(
                        lambda: max(a["seconds"] for a in ranks.call(key, "sample", threads=threads, fresh=fresh)),
                        times_itself=True,
                    )

                return Contestant(name, machine.version(package), make, size, "the files, once", role=role)

            made: set[str] = set()
            mine: dict[str, Any] = {"kind": "Load", "package": "pyshard-torch", "way": "pyshard", **shape}
            entries = [
                entry(OURS, role="subject", **mine),
                entry(READ, "Read"),
                entry(NEW, role="ours", fresh=True, **mine),
                entry(READ_NEW, "Read", fresh=True),
                entry("dcp.load, nothing verified", "Load", way="dcp", **shape),
            ]
            targets = [no_slower_than(READ, BOUND, OURS), no_slower_than(READ_NEW, BOUND, NEW)]
            if threads > 1:
                entries += [
                    entry(f"{OURS}, {threads} threads", role="ours", threads=threads, **mine),
                    entry(f"{READ}, {threads} threads", "Read", threads=threads),
                ]
                targets.append(no_slower_than(READ, BOUND, f"{OURS}, {threads} threads"))
            where = "one process" if world == 1 else "2 ranks of FSDP2"
            measure(
                Case(
                    name=f"checkpoint, load, {where}",
                    title=f"A checkpoint of 2 ranks of ShardedAdamW into {where}: {size / 1e9:.2f} GB, two thirds of "
                    "them moments",
                    entries=entries,
                    targets=targets,
                    rounds=10,
                    warmup=1,
                    facts={"bytes": size},
                    ranks=True,
                )
            )


def bench_checkpoint_memory(measure: Any, shape: dict[str, Any]) -> None:
    """Processes that have just started, with weights and without optimizer state."""
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as path:
        with Ranks(2) as savers:
            savers.call("save", "benchmarks.checkpoint_ranks:Save", path=path, **shape)

        def contestant(world: int) -> Contestant:
            def make() -> Run:
                with Ranks(world) as ranks:
                    ranks.call("load", "benchmarks.checkpoint_ranks:Load", path=path, way="pyshard", **shape)
                    found = max(ranks.call("load", "peak"), key=lambda each: each["grown"])
                facts[f"of the state, {world}"] = round(found["grown"] / found["state"], 4)
                notes = {"state MB": found["state"] / 1e6}
                return Run(lambda: found["grown"] / 1e6, times_itself=True, notes=lambda: notes)

            name = "pyshard.load_checkpoint, " + ("1 process" if world == 1 else f"{world} ranks of FSDP2")
            return Contestant(name, machine.version("pyshard-torch"), make, role="subject" if world == 1 else "ours")

        measure(
            Case(
                name="checkpoint, memory of a load",
                title="Growth of a process's memory while it loads a checkpoint of 2 ranks and makes its state",
                entries=[contestant(1), contestant(2)],
                targets=[
                    fact_within(f"of the state, {w}", MEMORY_BOUND, f"{w}: ≤ {MEMORY_BOUND:g} of the state")
                    for w in (1, 2)
                ],
                rounds=1,
                warmup=0,
                unit="MB",
                facts=facts,
                ranks=True,
            )
        )
