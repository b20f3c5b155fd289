"""The optimizers that race: one builder per library, and the three ways a training loop uses them.

A builder takes parameters and returns a torch-style optimizer. A library that is missing, that does not serve
the device or that fails on its first steps is listed as absent, with the reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks import machine
from benchmarks.harness import Absent, Contestant, Run

LR = 1e-3
HYPER: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
MAX_NORM = 1.0  # far below the norm of random gradients of the sizes measured: clipping really scales

Builder = Callable[[list[Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Library:
    """One optimizer of one library."""

    name: str
    module: str  # what must be importable
    package: str  # whose version is shown
    build: Builder
    devices: tuple[str, ...] = ("cpu", "cuda")
    role: str = "peer"


def pyshard_adamw(**options: Any) -> Builder:
    """A builder of pyshard.AdamW with these options."""
    return lambda params: importlib.import_module("pyshard").AdamW(params, **HYPER, **options)


def _torch(**options: Any) -> Builder:
    return lambda params: torch.optim.AdamW(params, **HYPER, **options)


def _deepspeed(params: list[Parameter]) -> torch.optim.Optimizer:
    # DeepSpeed calls ninja by name to build its kernel on first use; pip puts it beside the interpreter
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    adam = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
    return adam(params, **HYPER, adamw_mode=True)


def _torchao(name: str, **options: Any) -> Builder:
    return lambda params: getattr(importlib.import_module("torchao.optim"), name)(params, **HYPER, **options)


def _bitsandbytes(name: str) -> Builder:
    return lambda params: getattr(importlib.import_module("bitsandbytes").optim, name)(params, **HYPER)


def _apex(params: list[Parameter]) -> torch.optim.Optimizer:
    return importlib.import_module("apex.optimizers").FusedAdam(params, **HYPER, adam_w_mode=True)


def _transformer_engine(params: list[Parameter]) -> torch.optim.Optimizer:
    return importlib.import_module("transformer_engine.pytorch.optimizers").FusedAdam(params, **HYPER)


PYSHARD = Library("pyshard", "pyshard", "pyshard-torch", pyshard_adamw(), role="subject")
PYSHARD_FP32_MASTER = Library(
    "pyshard, fp32 master", "pyshard", "pyshard-torch", pyshard_adamw(master_weights="fp32"), role="ours"
)
TORCH_FUSED = Library("torch fused", "torch", "torch", _torch(fused=True))
TORCH_FOREACH = Library("torch foreach", "torch", "torch", _torch(foreach=True))
DEEPSPEED = Library("DeepSpeedCPUAdam", "deepspeed", "deepspeed", _deepspeed, devices=("cpu",))
TORCHAO = Library("torchao AdamW (compiled)", "torchao", "torchao", _torchao("_AdamW"))
TORCHAO_SR = Library(
    "torchao AdamW, stochastic rounding", "torchao", "torchao", _torchao("_AdamW", bf16_stochastic_round=True)
)
TORCHAO_8BIT = Library(
    "torchao AdamW8bit, stochastic rounding",
    "torchao",
    "torchao",
    _torchao("AdamW8bit", bf16_stochastic_round=True),
)
BITSANDBYTES = Library("bitsandbytes AdamW", "bitsandbytes", "bitsandbytes", _bitsandbytes("AdamW"))
BITSANDBYTES_8BIT = Library("bitsandbytes AdamW8bit", "bitsandbytes", "bitsandbytes", _bitsandbytes("AdamW8bit"))
APEX = Library("apex FusedAdam", "apex", "apex", _apex, devices=("cuda",))
TRANSFORMER_ENGINE = Library(
    "Transformer Engine FusedAdam",
    "transformer_engine",
    "transformer-engine",
    _transformer_engine,
    devices=("cuda",),
)


def fp32_racers(device: str) -> list[Library]:
    """pyshard and every optimizer that steps fp32 parameters on this kind of device."""
    libraries = [
        PYSHARD,
        TORCH_FUSED,
        TORCH_FOREACH,
        DEEPSPEED,
        TORCHAO,
        BITSANDBYTES,
        APEX,
        TRANSFORMER_ENGINE,
    ]
    return [library for library in libraries if device in library.devices]


def missing(library: Library, device: str, wanted: Sequence[str]) -> str:
    """Why a library cannot race, or "" if it can. `wanted`: the packages asked for, ["all"] for every one."""
    if library.role == "peer" and "all" not in wanted and library.package not in wanted:
        return "not asked for (--peers)"
    if device not in library.devices:
        return f"runs on {' and '.join(library.devices)} only"
    if importlib.util.find_spec(library.module) is None:
        return f"{library.module} is not installed (requirements/bench.txt)"
    return ""


@dataclass(frozen=True)
class Tensors:
    """The parameters of a case: how many, how long, of which dtype. Every contestant gets equal values."""

    count: int
    length: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def elements(self) -> int:
        return self.count * self.length

    def values(self, seed: int, scale: float) -> list[Tensor]:
        generator = torch.Generator(self.device).manual_seed(seed)
        options: dict[str, Any] = {"generator": generator, "device": self.device}
        return [(torch.randn(self.length, **options) * scale).to(self.dtype) for _ in range(self.count)]

    def parameters(self) -> list[Parameter]:
        params = [Parameter(value) for value in self.values(1, 1.0)]
        for param, grad in zip(params, self.values(2, 1e-2)):
            param.grad = grad
        return params


def _contestant(
    library: Library,
    tensors: Tensors,
    wanted: Sequence[str],
    bytes_each: int,
    traffic: str,
    make: Callable[[], Run],
    **more: Any,
) -> Contestant | Absent:
    reason = missing(library, tensors.device, wanted)
    name = more.pop("name", library.name)
    if reason:
        return Absent(name, reason)
    nbytes = bytes_each * tensors.elements
    version = machine.version(library.package)
    return Contestant(name, version, make, nbytes, traffic, library.role, **more)


def plain(
    library: Library,
    tensors: Tensors,
    wanted: Sequence[str],
    bytes_each: int,
    traffic: str = "one pass",
    max_norm: float | None = None,
    fresh_grads: bool = False,
    calls: int = 1,
) -> Contestant | Absent:
    """optimizer.step() on parameters whose gradients have their own dtype.

    max_norm: torch's clip_grad_norm_ runs before, for libraries that do not clip in the step. fresh_grads:
    every step finds new gradient tensors at new addresses, as backward leaves them after zero_grad().
    """

    def make() -> Run:
        params = tensors.parameters()
        optimizer = library.build(params)
        before = None
        if fresh_grads:
            source = [p.grad for p in params if p.grad is not None]

            def before() -> None:
                grads = [g.clone() for g in source]  # the old ones still live, so these lie elsewhere
                for param, grad in zip(params, grads):
                    param.grad = grad

        step: Callable[[], object] = optimizer.step
        if max_norm is not None:

            def step() -> None:
                torch.nn.utils.clip_grad_norm_(params, max_norm)
                optimizer.step()

        return Run(step, before, lambda: params[0].detach())

    return _contestant(library, tensors, wanted, bytes_each, traffic, make, calls=calls)


def mixed(
    library: Library, tensors: Tensors, wanted: Sequence[str], max_norm: float | None = None
) -> Contestant | Absent:
    """The loop that people write around an fp32 optimizer to train 16-bit weights exactly.

    Cast the gradients to fp32, clip them, step fp32 master weights, cast those back; no step allocates.
    """

    def make() -> Run:
        weights = tensors.parameters()
        grads = [p.grad for p in weights if p.grad is not None]
        masters = [Parameter(p.detach().float()) for p in weights]
        for master in masters:
            master.grad = torch.zeros_like(master)
        master_grads = [m.grad for m in masters if m.grad is not None]
        optimizer = library.build(masters)

        @torch.no_grad()
        def step() -> None:
            torch._foreach_copy_(master_grads, grads)
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(masters, max_norm)
            optimizer.step()
            torch._foreach_copy_(weights, masters)

        return Run(step, None, lambda: weights[0].detach())

    name = f"{library.name} on fp32 master"
    if max_norm is None:
        return _contestant(library, tensors, wanted, 40, "cast 6 + step 28 + cast 6", make, name=name)
    traffic = "cast 6 + norm 4 + scale 8 + step 28 + cast 6"
    return _contestant(library, tensors, wanted, 52, traffic, make, name=name)
