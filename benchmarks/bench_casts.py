"""Casts between fp32 and 16 bits, and split weights, beside torch's own operations.

Into tensors that exist, which times the kernel; and into new ones, as the public functions and `.to()` return
them, where a large tensor's fresh pages cost more than the cast itself.
"""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import machine, peers, roofline
from benchmarks.harness import Absent, Contestant, Run
from benchmarks.results import Case

FP32, BF16, FP16, INT16, INT32 = torch.float32, torch.bfloat16, torch.float16, torch.int16, torch.int32


def kernels(device: str):
    """The module of the backend that `auto` chooses here: functions that write into existing tensors."""
    registry = importlib.import_module("pyshard.kernels.registry")
    return importlib.import_module(registry.choose("auto", torch.device(device), FP32).module)


def racers(settings, nbytes: int, traffic: str, makers: dict[str, Callable[[], Run]]) -> list[Contestant | Absent]:
    """Contestants by name; those whose name begins with pyshard are ours, the first of them the subject."""
    entries: list[Contestant | Absent] = []
    for name, make in makers.items():
        library = peers.PYSHARD if name.startswith("pyshard") else peers.TORCH_FUSED
        reason = peers.missing(library, settings.device, settings.peers)
        role = library.role if name == "pyshard" or library.role == "peer" else "ours"
        version = machine.version(library.package)
        entries.append(Absent(name, reason) if reason else Contestant(name, version, make, nbytes, traffic, role))
    return entries


def values(settings, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(settings.device).manual_seed(0)
    n = settings.pick(2**25, 2**12)
    return torch.randn(n, generator=generator, device=settings.device).to(dtype)


def in_place(call: Callable[..., object], *tensors: Tensor) -> Run:
    """A run of call(*tensors) whose result is the last of them."""
    return Run(lambda: call(*tensors), None, lambda: tensors[-1])


@pytest.mark.parametrize(
    "source, target",
    [(FP32, BF16), (BF16, FP32), (FP32, FP16), (FP16, FP32)],
    ids=lambda dtype: str(dtype)[6:],
)
def bench_cast(measure, settings, source: torch.dtype, target: torch.dtype) -> None:
    def ours() -> Run:
        x = values(settings, source)
        return in_place(kernels(settings.device).cast, x, torch.empty_like(x, dtype=target))

    def ours_new() -> Run:
        x, cast = values(settings, source), importlib.import_module("pyshard.kernels").cast
        return Run(lambda: cast(x, target))

    def torch_copy() -> Run:
        x = values(settings, source)
        return in_place(lambda a, b: b.copy_(a), x, torch.empty_like(x, dtype=target))

    def torch_to() -> Run:
        x = values(settings, source)
        return Run(lambda: x.to(target))

    n = settings.pick(2**25, 2**12)
    makers = {
        "pyshard": ours,
        "torch copy_": torch_copy,
        "pyshard, new tensor": ours_new,
        "torch .to, new tensor": torch_to,
    }
    name = f"cast {str(source)[6:]} to {str(target)[6:]}"
    measure(
        Case(
            name=name,
            title=f"{name}, {n:,} elements",
            entries=[
                *racers(settings, 6 * n, "read + write", makers),
                *roofline.copy_sweeps(6 * n, settings.device),
            ],
            reference="torch copy_",
            facts={"elements": n},
        )
    )


def torch_split(master: Tensor, high: Tensor, low: Tensor) -> None:
    """Split weights in torch's integer operations: the upper half rounded, and what is then left."""
    bits = master.view(INT32)
    high.view(INT16).copy_((bits + 0x8000) >> 16)
    low.copy_(bits)


def torch_join(high: Tensor, low: Tensor, master: Tensor) -> None:
    """The inverse of torch_split."""
    master.view(INT32).copy_((high.view(INT16).to(INT32) << 16) + low)


@pytest.mark.parametrize("which", ["split", "join"])
def bench_split(measure, settings, which: str) -> None:
    def tensors() -> tuple[Tensor, Tensor, Tensor]:
        master = values(settings, FP32)
        high, low = torch.empty_like(master, dtype=BF16), torch.empty_like(master, dtype=INT16)
        torch_split(master, high, low)
        return (master, high, low) if which == "split" else (high, low, torch.empty_like(master))

    makers: dict[str, Callable[[], Run]] = {
        "pyshard": lambda: in_place(getattr(kernels(settings.device), which), *tensors()),
        "torch integer operations": lambda: in_place(torch_split if which == "split" else torch_join, *tensors()),
    }
    n = settings.pick(2**25, 2**12)
    measure(
        Case(
            name=f"{which} weights",
            title=f"{which} fp32 master {'into' if which == 'split' else 'from'} bf16 and rest, {n:,}",
            entries=[
                *racers(settings, 8 * n, "read + write", makers),
                *roofline.copy_sweeps(8 * n, settings.device),
            ],
            reference="torch integer operations",
            facts={"elements": n},
        )
    )
