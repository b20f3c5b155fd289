"""The same training step on two hosts: two network namespaces, joined by a link of 1 or 4 Gbit/s.

Both run on this machine, one core each; what they send to each other goes through the link's rate limit. Beside each
time stands what the link needs for the bytes that were sent (headers included), since no way to train can be faster
than that, and what a step takes beyond forward and backward alone.
"""

import pytest

from benchmarks import two_hosts
from benchmarks.distributed_entries import (
    ALONE,
    DDP,
    FSDP2,
    ZERO,
    Field,
    Way,
    exposed_within,
    ours,
    share,
    times,
)
from benchmarks.distributed_model import GPT2, TINY
from benchmarks.distributed_ranks import Ranks
from benchmarks.results import Case

ALONE_BF16 = "forward + backward, bf16 model"
FP32, BF16_WIRE, BF16 = "pyshard, fp32", "pyshard, bf16 gradients on the wire", "pyshard, bf16 model"

WAYS = [
    Way(ALONE, "alone"),
    ours(FP32, "subject", transport="collective", with_model=True),
    ours(BF16_WIRE, transport="collective", with_model=True, wire="bfloat16"),
    Way(DDP, "ddp"),
    Way("DDP, bf16 gradients on the wire", "ddp", {"bf16_wire": True}),
    Way(ZERO, "ddp", {"zero": True}),
    Way(FSDP2, "fsdp2"),
    Way(ALONE_BF16, "alone", dtype="bfloat16"),
    ours(BF16, transport="collective", with_model=True, dtype="bfloat16", alone=ALONE_BF16),
    Way("DDP, bf16 model", "ddp", dtype="bfloat16", alone=ALONE_BF16),
]


@pytest.mark.parametrize("gbit", [1, 4])
def bench_sharded_two_hosts(measure, settings, gbit: int) -> None:
    if settings.device != "cpu":
        pytest.skip("processes of one thread on one machine; see the CPU result")
    work = settings.pick(GPT2, TINY)
    reason = work.missing() or two_hosts.unavailable()
    if reason:
        pytest.skip(reason)
    link = (two_hosts.ADDRESSES[0], two_hosts.PORT, two_hosts.INTERFACES)
    with two_hosts.TwoHosts(1000 * gbit) as hosts, Ranks(2, hosts.start, *link) as ranks:
        field = Field(ranks, work, settings.peers, mbit=1000 * gbit)
        measure(
            Case(
                name=f"two hosts, {gbit} Gbit/s",
                title=f"Training step, {work.title()}, two hosts of one rank and 1 thread, {gbit} Gbit/s between them",
                entries=[field.entry(way) for way in WAYS],
                targets=[
                    share(0.85, DDP, FP32),
                    # With fp32 parameters the link alone needs more than half of DDP's time; a bf16 model has both
                    # directions in bf16.
                    times(2.0, DDP, BF16_WIRE),
                    times(2.0, DDP, BF16),
                    *(exposed_within(1.1, subject) for subject in (FP32, BF16_WIRE, BF16)),
                ],
                rounds=5 if gbit == 1 else 6,
                warmup=0,
                reference=DDP,
                facts={"ranks": 2, "batch": [work.batch, work.length], "gbit_per_s": gbit},
                ranks=True,
            )
        )
