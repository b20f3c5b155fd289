"""2,000 tensors of 1,024 elements: what a step costs apart from its bytes.

Once with gradients that stay where they are, and once with new gradient tensors in every step, as backward
leaves them after zero_grad(set_to_none=True): addresses that a library has cached are then wrong.
"""

import pytest

from benchmarks import peers, roofline
from benchmarks.results import Case, faster_than

BYTES = 28


@pytest.mark.parametrize("fresh", [False, True], ids=["same gradients", "fresh gradients"])
def bench_many_small(measure, settings, fresh: bool) -> None:
    tensors = peers.Tensors(settings.pick(2000, 20), settings.pick(1024, 64), device=settings.device)
    libraries = peers.fp32_racers(settings.device)
    racers = [peers.plain(lib, tensors, settings.peers, BYTES, fresh_grads=fresh) for lib in libraries]
    kind = "fresh gradients" if fresh else "same gradients"
    measure(
        Case(
            name=f"many small, {kind}",
            title=f"AdamW step, fp32, {tensors.count:,} tensors of {tensors.length:,}, {kind} each step",
            entries=[*racers, *roofline.update_sweeps(BYTES * tensors.elements, settings.device)],
            targets=[faster_than("torch fused", 8.0), faster_than("DeepSpeedCPUAdam", 6.0)],
            rounds=40,
            reference="torch fused",
            facts={"elements": tensors.elements, "tensors": tensors.count, "fresh_gradients": fresh},
        )
    )
