"""What sharding costs and saves apart from the work: time of step() over tiny tensors, optimizer state per rank, and
the time to cut a large model over many ranks."""

import importlib
import statistics
from dataclasses import asdict

import pytest
import torch

from benchmarks import machine
from benchmarks.distributed_entries import UNSHARDED, Way, at_most, missing, ours
from benchmarks.distributed_model import GPT2, TINY
from benchmarks.distributed_ranks import Ranks
from benchmarks.harness import Absent, Contestant, Run
from benchmarks.results import Case, fact_within, within

BUCKET_BYTES = 25 << 20  # ShardedAdamW's default


def cpu_only(settings) -> None:
    if settings.device != "cpu":
        pytest.skip("host work alone; see the CPU result")


TENSORS, LENGTH = 500, 64  # the kernels need some 20 µs for so few elements
SUBJECT, ONE_RANK = "pyshard shm, stage 2, 2 ranks", "pyshard, 1 rank"
STEPS = [  # ways of distributed_overhead.py
    ours(SUBJECT, "subject", stage=2, transport="shm"),
    ours("pyshard shm, stage 1, 2 ranks", stage=1, transport="shm"),
    ours(ONE_RANK, own_group=True),
    Way(UNSHARDED, "unsharded"),
    Way("ZeroRedundancyOptimizer, 2 ranks", "zero"),
    Way("backward alone", "nothing"),
]


def bench_sharded_overhead(measure, settings) -> None:
    cpu_only(settings)
    count, calls = settings.pick(TENSORS, 20), settings.pick(3, 2)

    def contestant(ranks: Ranks, way: Way) -> Contestant | Absent:
        reason = missing(way, settings.peers)
        if reason:
            return Absent(way.name, reason)
        backwards: list[float] = []

        def make() -> Run:
            arguments = {"way": way.way, "count": count, "length": LENGTH, "options": way.options}
            ranks.call(way.name, "benchmarks.distributed_overhead:Stepping", **arguments)
            return Run(step, times_itself=True, notes=lambda: {"backward ms": statistics.median(backwards) * 1e3})

        def step() -> float:
            # a broadcast per tensor, some 400 ms: one step of it is enough for a sample
            answers = ranks.call(way.name, "sample", steps=1 if way.way == "zero" else calls)
            backwards.append(max(answer["backward"] for answer in answers))
            return float(max(answer["seconds"] for answer in answers))

        return Contestant(way.name, machine.version(way.package), make, role=way.role)

    with Ranks(2) as ranks:
        measure(
            Case(
                name="sharded, host overhead",
                title=f"step() over {count} tensors of {LENGTH} floats, 1 thread per rank, all ranks at once",
                entries=[contestant(ranks, way) for way in STEPS],
                targets=[at_most(1.0, SUBJECT), at_most(1.0, ONE_RANK)],
                rounds=30,
                warmup=1,
                facts={"elements": count * LENGTH, "tensors": count},
                ranks=True,
            )
        )


WORLDS = [1, 2, 3, 4]
STATE_BYTES = 8  # two moments in fp32


def most_owned(sizes: list[int], world: int) -> int:
    """Elements on the rank that owns most of fp32 parameters of these sizes, by the layout alone."""
    layout = importlib.import_module("pyshard.optim.layout")
    owned = [0] * world
    specs = [layout.Spec(n, torch.float32, torch.float32) for n in sizes]
    for bucket in layout.make_layout(specs, world, BUCKET_BYTES):
        for place in bucket.places:
            for rank in range(world):
                begin, end = bucket.run(place, rank)
                owned[rank] += end - begin
    return max(owned)


def bench_sharded_state(measure, settings) -> None:
    cpu_only(settings)
    work = settings.pick(GPT2, TINY)
    if work.missing():
        pytest.skip(work.missing())
    sizes = [param.numel() for param in work.model()[0].parameters()]
    facts: dict[str, object] = {"elements": sum(sizes), "tensors": len(sizes)}

    def contestant(ranks: Ranks, way: Way, world: int) -> Contestant | Absent:
        name = f"{way.name}, {world} rank{'s' * (world > 1)}"
        reason = missing(way, settings.peers)
        if reason:
            return Absent(name, reason)
        ideal = sum(sizes) * STATE_BYTES / world / 1e6
        notes = {"total / ranks MB": ideal}

        def make() -> Run:
            arguments = {"way": way.way, "options": way.options, "world": world, "work": asdict(work)}
            ranks.call(name, "benchmarks.distributed_overhead:State", **arguments)
            most = max(ranks.call(name, "nbytes")) / 1e6
            if way.package == "pyshard-torch":
                notes["by the layout MB"] = most_owned(sizes, world) * STATE_BYTES / 1e6
                facts[f"of total / ranks, {world} ranks"] = round(most / ideal, 5)
            return Run(lambda: most, times_itself=True, notes=lambda: notes)

        return Contestant(name, machine.version(way.package), make, role=way.role)

    rows = [(ours("pyshard", "subject" if w == 2 else "ours", transport="collective"), w) for w in WORLDS]
    rows += [(Way("ZeroRedundancyOptimizer", "zero"), w) for w in WORLDS[1:]]
    with Ranks(max(WORLDS)) as ranks:
        measure(
            Case(
                name="sharded, state per rank",
                title=f"Optimizer state of {work.title()}, on the rank that holds most",
                entries=[contestant(ranks, way, world) for way, world in rows],
                targets=[
                    fact_within(f"of total / ranks, {w} ranks", 1.01, f"{w} ranks: ≤ 1.01 of total / ranks")
                    for w in WORLDS
                ],
                rounds=1,
                warmup=0,
                unit="MB",
                facts=facts,
                ranks=True,
            )
        )


def large_model(layers: int) -> list[torch.nn.Parameter]:
    """The parameters of a Llama of width 4096 on the meta device: with 33 layers 6.9 B in 300 tensors."""
    width, hidden, vocabulary = 4096, 11008, 32000
    layer = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden)] + [(width,)] * 2
    shapes = [(vocabulary, width), *layer * layers, (width,), (vocabulary, width)]
    return [torch.nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta")) for shape in shapes]


def bench_sharded_layout(measure, settings) -> None:
    cpu_only(settings)
    world, params = 1024, large_model(settings.pick(33, 1))
    elements = sum(param.numel() for param in params)
    generation, wires = importlib.import_module("pyshard.optim.shards").Generation, [p.dtype for p in params]
    version = machine.version("pyshard-torch")

    def make() -> Run:
        return Run(lambda: generation(params, wires, world, world // 2, BUCKET_BYTES))

    measure(
        Case(
            name="sharded, layout",
            title=f"Cutting {elements / 1e9:.1f} B parameters in {len(params)} tensors over {world} ranks, on one rank",
            entries=[Contestant("pyshard", version, make, role="subject")],
            targets=[within(1000, "ms")],
            rounds=10,
            warmup=1,
            facts={"elements": elements, "tensors": len(params), "ranks": world},
            ranks=True,
        )
    )
