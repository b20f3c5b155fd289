"""The step as training sees it: between a backward and the next forward of the demo's model.

There it finds caches full of activations and threads that have just multiplied matrices, with another
runtime's threads perhaps still spinning. Only the step's own time counts, in training and in the tight loop.
"""

import importlib.util

import pytest
import torch

from benchmarks import machine, peers
from benchmarks.harness import Absent, Contestant, Run
from benchmarks.results import Case, no_slower_than

MODEL = {
    "layers": 4,
    "width": 256,
    "heads": 4,
    "context": 128,
}  # and the batch: as examples/options.py has them
BATCH = 8
TIGHT = 10  # the tight loop's sample is the tenth step in a row: the first still meets what others left in the caches


def demo_model() -> type[torch.nn.Module]:
    """The class GPT of examples/gpt.py; examples are programs, not a package."""
    spec = importlib.util.spec_from_file_location("demo_gpt", machine.ROOT / "examples" / "gpt.py")
    if spec is None or spec.loader is None:
        raise ImportError("examples/gpt.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GPT


def _contestants(library: peers.Library, model_class, options: dict, dtype, settings) -> list[Contestant | Absent]:
    """The library's step in training, and in a tight loop, each on a model of its own."""

    def make(training: bool) -> Run:
        torch.manual_seed(0)
        model = model_class(**options).to(settings.device, dtype)
        optimizer = library.build(list(model.parameters()))
        generator = torch.Generator().manual_seed(1)
        shape = (settings.pick(BATCH, 1), options["context"])

        def forward_backward() -> None:
            inputs = torch.randint(256, shape, generator=generator).to(settings.device)
            targets = torch.randint(256, shape, generator=generator).to(settings.device)
            optimizer.zero_grad()
            model.loss(inputs, targets).backward()

        def steps_before() -> None:
            for _ in range(TIGHT - 1):
                optimizer.step()

        forward_backward()
        return Run(optimizer.step, forward_backward if training else steps_before)

    names = {f"{library.name}, training": True, f"{library.name}, tight loop": False}
    reason = peers.missing(library, settings.device, settings.peers)
    if reason:
        return [Absent(name, reason) for name in names]
    role = library.role
    return [
        Contestant(
            name,
            machine.version(library.package),
            lambda training=training: make(training),
            role=role if training or role == "peer" else "ours",
        )
        for name, training in names.items()
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def bench_interleaved(measure, settings, dtype: torch.dtype) -> None:
    options = settings.pick(MODEL, {"layers": 1, "width": 16, "heads": 1, "context": 8})
    model_class = demo_model()
    elements = sum(p.numel() for p in model_class(**options).parameters())
    name = "fp32" if dtype is torch.float32 else "bf16"
    libraries = [peers.PYSHARD, peers.TORCH_FUSED] if name == "fp32" else [peers.PYSHARD]
    entries = [c for library in libraries for c in _contestants(library, model_class, options, dtype, settings)]
    measure(
        Case(
            name=f"interleaved, {name}",
            title=f"AdamW step, {elements:,} {name} parameters of the demo, in training and in a tight loop",
            entries=entries,
            targets=[no_slower_than("pyshard, tight loop", 1.10, subject="pyshard, training")],
            rounds=40,
            facts={"elements": elements},
        )
    )
