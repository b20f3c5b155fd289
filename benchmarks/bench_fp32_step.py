"""fp32 parameters and gradients, one large tensor: the step is one pass of 28 bytes per element."""

from benchmarks import peers, roofline
from benchmarks.results import Case, faster_than, of_roofline

BYTES = 28  # read p, g, m, v; write p, m, v


def bench_fp32_step(measure, settings) -> None:
    tensors = peers.Tensors(1, settings.pick(2**25, 2**12), device=settings.device)
    racers = [
        # foreach makes many passes, but 28 bytes are what the work needs
        peers.plain(lib, tensors, settings.peers, BYTES, "many passes" if lib is peers.TORCH_FOREACH else "one pass")
        for lib in peers.fp32_racers(settings.device)
    ]
    measure(
        Case(
            name="fp32 step",
            title=f"AdamW step, fp32, one tensor of {tensors.elements:,} elements",
            entries=[*racers, *roofline.update_sweeps(BYTES * tensors.elements, settings.device)],
            targets=[
                faster_than("torch fused", 1.2),
                faster_than("DeepSpeedCPUAdam", 1.0),
                of_roofline(0.95),
            ],
            reference="torch fused",
            facts={"elements": tensors.elements, "tensors": 1},
        )
    )
