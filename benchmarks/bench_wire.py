"""A reduce-scatter of fp32 gradients between two ranks of one host: the collective transport beside gloo's own.

Each rank has a bucket and ends with the mean of one half of it. pyshard sends every rank its span and sums up in fp32
in rank order; gloo's reduce_scatter is an all-reduce of which each rank keeps a part. What was sent is read from the
loopback device.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from benchmarks import machine
from benchmarks.distributed_ranks import Ranks
from benchmarks.distributed_training import sent_bytes
from benchmarks.harness import Contestant, Run
from benchmarks.results import Case, faster_than

WORLD, MEGABYTE = 2, 1_000_000
SIZES = (1, 4, 16, 64)  # MB of gradients per rank
CALLS = {1: 20, 4: 10, 16: 4, 64: 2}  # per sample
PEERS = ("gloo reduce_scatter", "gloo all_reduce", "gloo all_to_all")


class Reduction:
    """One way to reduce, on one rank."""

    def __init__(self, way: str, nbytes: int):
        rank, world, n = dist.get_rank(), dist.get_world_size(), nbytes // 4
        gradients = torch.randn(n, generator=torch.Generator().manual_seed(rank))
        self._own = torch.empty(n // world)
        self._close: Callable[[], None] = lambda: None
        self.reduce = getattr(self, f"_{way.replace(' ', '_')}")(gradients, rank, world)

    def _pyshard(self, gradients: torch.Tensor, rank: int, world: int) -> Callable[[], None]:
        from pyshard.comm.collective import CollectiveTransport

        transport = CollectiveTransport(None, torch.device("cpu"), 60.0)
        nbytes = gradients.nbytes
        arena = transport.arena(0, nbytes, 1)
        arena.slot(0).copy_(gradients.view(torch.uint8))
        spans = [(nbytes // world * r, nbytes // world * (r + 1)) for r in range(world)]
        self._close = transport.close

        def reduce() -> None:
            arena.acquire(0, "a reduction")
            arena.send(0, spans, "a reduction")
            arena.arrive(0, "a reduction")
            first, second, *others = (source.view(torch.float32) for source in arena.sources(0))
            torch.add(first, second, out=self._own)
            for other in others:
                self._own.add_(other)
            self._own.div_(world)
            arena.release(0)

        return reduce

    def _gloo_reduce_scatter(self, gradients: torch.Tensor, rank: int, world: int) -> Callable[[], None]:
        def reduce() -> None:
            dist.reduce_scatter_tensor(self._own, gradients)
            self._own.div_(world)

        return reduce

    def _gloo_all_reduce(self, gradients: torch.Tensor, rank: int, world: int) -> Callable[[], None]:
        whole = gradients.clone()

        def reduce() -> None:
            # The values change from call to call, which does not matter for the time; the first one is looked at.
            dist.all_reduce(whole)
            self._own.copy_(whole.chunk(world)[rank]).div_(world)
            whole.mul_(0.5)

        return reduce

    def _gloo_all_to_all(self, gradients: torch.Tensor, rank: int, world: int) -> Callable[[], None]:
        received = torch.empty_like(gradients)

        def reduce() -> None:
            dist.all_to_all_single(received, gradients)
            torch.sum(received.view(world, -1), 0, out=self._own)
            self._own.div_(world)

        return reduce

    def first(self) -> list[float]:
        """A part of what the first call gives on this rank."""
        self.reduce()
        return self._own[:1000].tolist()

    def sample(self, calls: int) -> tuple[float, float]:
        """Seconds and bytes sent per call."""
        dist.barrier()
        before, start = sent_bytes(), time.perf_counter()
        for _ in range(calls):
            self.reduce()
        seconds = time.perf_counter() - start
        dist.barrier()  # so that the bytes of both ranks are in
        return seconds / calls, (sent_bytes() - before) / calls

    def close(self) -> None:
        self._close()


def contestant(ranks: Ranks, way: str, nbytes: int, calls: int) -> Contestant:
    """A way to reduce as a contestant; a sample's time is that of the slower rank."""
    sent: list[float] = []
    first: list[list[float]] = []

    def make() -> Run:
        ranks.call(way, "benchmarks.bench_wire:Reduction", way=way, nbytes=nbytes)
        first[:] = ranks.call(way, "first")
        return Run(
            step, result=lambda: torch.tensor(first), times_itself=True, notes=lambda: {"sent MB": min(sent) / 1e6}
        )

    def step() -> float:
        answers = ranks.call(way, "sample", calls=calls)
        sent.append(max(answer[1] for answer in answers))
        return float(max(answer[0] for answer in answers))

    role = "subject" if way == "pyshard" else "peer"
    version = machine.version("pyshard-torch" if way == "pyshard" else "torch")
    return Contestant(way, version, make, role=role)


@pytest.mark.parametrize("megabytes", SIZES)
def bench_wire(measure, settings, megabytes: int) -> None:
    if settings.device != "cpu":
        pytest.skip("gloo's messages between CPU tensors; see the CPU result")
    nbytes, calls = settings.pick(megabytes * MEGABYTE, 80_000), settings.pick(CALLS[megabytes], 1)
    with Ranks(WORLD) as ranks:
        measure(
            Case(
                name=f"reduce-scatter, {megabytes} MB",
                title=f"Reduce-scatter of {megabytes} MB of fp32 between {WORLD} ranks of 1 thread on one host",
                entries=[contestant(ranks, way, nbytes, calls) for way in ("pyshard", *PEERS)],
                targets=[faster_than("gloo reduce_scatter", 2.0)],
                reference="gloo all_reduce",
                rounds=20,
                facts={"ranks": WORLD, "bytes": nbytes},
                ranks=True,
            )
        )
        ranks.call("pyshard", "close")
