"""Forward and backward of a small Llama cut over two ranks of one host: pyshard.tp.parallelize beside torch's own.

torch's parallelize_module cuts the layers by rows and columns, with and without the embedding and the output layer, or
all that and the hidden states between the layers along the sequence, which is what ours does by default.
"""

from __future__ import annotations

from dataclasses import asdict

import pytest

from benchmarks.distributed_entries import Way, share
from benchmarks.distributed_ranks import Ranks
from benchmarks.results import Case
from benchmarks.tp_entries import Field, alike, note_share, ours
from benchmarks.tp_llama import LLAMA, TINY

WORLD, CALLS, ROUNDS = 2, 1, 5
UNSHARDED, SUBJECT = "unsharded on each rank", "pyshard"
MODULE, MODULE_LAYERS = "torch parallelize_module", "torch parallelize_module, layers only"
MODULE_SEQUENCE = "torch parallelize_module, sequence parallel"
MODULES = [MODULE, MODULE_LAYERS, MODULE_SEQUENCE]
WAYS = [
    Way(UNSHARDED, "unsharded"),
    ours(SUBJECT, role="subject"),
    ours("pyshard, no sequence parallel", sequence_parallel=False),
    ours("pyshard, cut logits", gather_logits=False),
    Way(MODULE, "module", {"ends": True}),
    Way(MODULE_LAYERS, "module", {"ends": False}),
    Way(MODULE_SEQUENCE, "module", {"ends": True, "sequence": True}),
]
TOLERANCE = 1e-3  # of losses near ln 4096 = 8.3, and of elements of a gradient of about 1


def bench_tp_llama(measure, settings) -> None:
    if settings.device != "cpu":
        pytest.skip("processes of one thread on one host; see the CPU result")
    work = settings.pick(LLAMA, TINY)
    if work.missing():
        pytest.skip(work.missing())
    with Ranks(WORLD) as ranks:
        arguments = {"work": asdict(work)}
        field = Field(
            ranks, settings.peers, "benchmarks.tp_llama:build", arguments, UNSHARDED, CALLS, ratio="/ unsharded"
        )
        measure(
            Case(
                name="tp llama",
                title=f"Forward and backward, {work.title()}, {WORLD} ranks of 1 thread on one host",
                entries=[field.entry(way) for way in WAYS],
                targets=[
                    *(share(0.85, other, SUBJECT) for other in MODULES),
                    *(note_share(1.0, "activations MB", other, SUBJECT) for other in MODULES),
                    alike(TOLERANCE),
                ],
                rounds=ROUNDS,
                warmup=0,
                reference=UNSHARDED,
                facts={"ranks": WORLD, "batch": [work.batch, work.length]},
                ranks=True,
            )
        )
