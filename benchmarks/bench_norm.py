"""The global norm of the gradients, with its non-finite flag: one read of the gradients.

torch's clip_grad_norm_ stands beside it because that is what a loop calls: it reads once more and writes, to
scale the gradients. pyshard's step takes the scaling into its own pass.
"""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import peers, roofline
from benchmarks.bench_casts import racers
from benchmarks.harness import Run
from benchmarks.results import Case

SHAPES = {"one tensor": (1, 2**25), "many tensors": (2000, 1024)}


def reduced(compute: Callable[[], Tensor]) -> Run:
    """A run of compute() that keeps the last norm, to compare contestants."""
    last: list[Tensor] = [torch.zeros(())]

    def step() -> None:
        last[0] = compute()

    return Run(step, None, lambda: last[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def bench_norm(measure, settings, dtype: torch.dtype, shape: str) -> None:
    count, length = SHAPES[shape]
    tensors = peers.Tensors(settings.pick(count, min(count, 20)), settings.pick(length, 64), dtype, settings.device)

    def ours() -> Run:
        grads, grad_norm = tensors.values(2, 1e-2), importlib.import_module("pyshard.kernels").grad_norm
        return reduced(lambda: grad_norm(grads)[0])

    def torch_norm() -> Run:
        grads = tensors.values(2, 1e-2)
        return reduced(lambda: torch.nn.utils.get_total_norm(grads))

    def torch_clip() -> Run:
        params = tensors.parameters()
        return Run(lambda: torch.nn.utils.clip_grad_norm_(params, peers.MAX_NORM))

    nbytes = dtype.itemsize * tensors.elements
    norms = {"pyshard": ours, "torch get_total_norm": torch_norm}
    clip = racers(settings, 3 * nbytes, "norm + scaling", {"torch clip_grad_norm_": torch_clip})
    sweeps = roofline.read_sweeps(nbytes, settings.device)
    name = "fp32" if dtype is torch.float32 else "bf16"
    measure(
        Case(
            name=f"norm, {name}, {shape}",
            title=f"Global norm, {name}, {tensors.count:,} x {tensors.length:,} elements",
            entries=[*racers(settings, nbytes, "one read", norms), *clip, *sweeps],
            reference="torch get_total_norm",
            facts={"elements": tensors.elements, "tensors": tensors.count},
        )
    )
