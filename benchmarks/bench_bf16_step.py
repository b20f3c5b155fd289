"""bf16 weights and gradients with an fp32-exact master, with and without clipping of the global norm.

pyshard keeps the master as the weight and a 16-bit remainder: 26 bytes per element, 28 with the norm's own
pass over the gradients. The baseline is the loop people write around torch's fused AdamW on fp32 masters.
Libraries that step bf16 weights without any master do less: small updates are rounded away.
"""

from dataclasses import replace

import pytest
import torch

from benchmarks import peers, roofline
from benchmarks.results import Case, faster_than, of_roofline

NO_MASTER = [  # library, bytes per element: weight and gradient 2 each, moments as the library keeps them
    (peers.DEEPSPEED, 22, "no master, fp32 moments"),
    (peers.BITSANDBYTES, 22, "no master, fp32 moments"),
    (peers.TORCHAO_SR, 14, "no master, bf16 moments"),
    (peers.BITSANDBYTES_8BIT, 10, "no master, 8-bit moments"),
    (peers.TORCHAO_8BIT, 10, "no master, 8-bit moments"),
]


@pytest.mark.parametrize("clip", [False, True], ids=["no clipping", "clipping"])
def bench_bf16_step(measure, settings, clip: bool) -> None:
    tensors = peers.Tensors(1, settings.pick(2**25, 2**12), torch.bfloat16, settings.device)
    max_norm = peers.MAX_NORM if clip else None
    norm_bytes, norm_text = (2, "norm 2 + ") if clip else (0, "")

    def ours(library: peers.Library, step_bytes: int, **options: object):
        build = peers.pyshard_adamw(max_grad_norm=max_norm, **options)
        traffic = f"{norm_text}step {step_bytes}"
        return peers.plain(replace(library, build=build), tensors, settings.peers, step_bytes + norm_bytes, traffic)

    racers = [
        ours(peers.PYSHARD, 26),
        ours(peers.PYSHARD_FP32_MASTER, 28, master_weights="fp32"),
        peers.mixed(peers.TORCH_FUSED, tensors, settings.peers, max_norm),
        peers.mixed(peers.DEEPSPEED, tensors, settings.peers, max_norm),
    ]
    if not clip:
        racers += [peers.plain(lib, tensors, settings.peers, size, text) for lib, size, text in NO_MASTER]

    nbytes = (26 + norm_bytes) * tensors.elements
    measure(
        Case(
            name=f"bf16 step, {'clipping' if clip else 'no clipping'}",
            title=f"AdamW step, bf16 with fp32-exact master, {'clipping' if clip else 'no clipping'}, "
            f"one tensor of {tensors.elements:,} elements",
            entries=[*racers, *roofline.update_sweeps(nbytes, settings.device)],
            targets=[faster_than("torch fused on fp32 master", 2.6 if clip else 2.0), of_roofline(0.92)],
            rounds=20,
            reference="torch fused on fp32 master",
            facts={"elements": tensors.elements, "tensors": 1},
        )
    )
