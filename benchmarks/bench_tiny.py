"""One tensor of 10 elements: the cost of calling step() at all."""

from benchmarks import peers
from benchmarks.results import Case, faster_than

CALLS = 200  # about 2 ms per sample: far above the clock's resolution and a stray interrupt


def bench_tiny(measure, settings) -> None:
    tensors = peers.Tensors(1, 10, device=settings.device)
    libraries = peers.fp32_racers(settings.device)
    calls = settings.pick(CALLS, 2)
    measure(
        Case(
            name="tiny",
            title="AdamW step, fp32, one tensor of 10 elements, per call",
            entries=[peers.plain(lib, tensors, settings.peers, 0, "", calls=calls) for lib in libraries],
            targets=[faster_than("torch fused", 1.0)],
            rounds=60,
            unit="µs",
            reference="torch fused",
            facts={"elements": 10, "tensors": 1, "calls_per_sample": calls},
        )
    )
