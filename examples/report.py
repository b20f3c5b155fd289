"""What a run leaves behind: its losses, its times, the bytes that it holds, and the table made of them."""

import math
from statistics import fmean, median
from typing import Any

import torch
from gpt import GPT
from torch import Tensor

MEAN_OVER = 50  # steps in the training loss of the table: the loss of one batch alone is too noisy to compare
KINDS = ("weights", "gradients", "moments", "master weights")


class Run:
    """One training run by one optimizer, and what it recorded."""

    model: GPT
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR

    def __init__(self, name: str, title: str, optimizer_class: Any) -> None:
        self.name = name
        self.title = title
        self.optimizer_class = optimizer_class
        self.losses: list[float] = []
        self.compute: list[float] = []  # milliseconds of each step in forward and backward
        self.update: list[float] = []  # milliseconds of each step in the optimizer: clipping, update and casts
        self.validation_loss = math.nan

    def record(self, loss: float, begin: float, middle: float, end: float) -> None:
        """One step: its loss, and the seconds at which it began, entered the optimizer and ended."""
        self.losses.append(loss)
        self.compute.append((middle - begin) * 1e3)
        self.update.append((end - middle) * 1e3)

    def progress(self, tokens: int) -> str:
        """The last ten steps, each of so many tokens, in a few words for the progress bar."""
        compute, update = median(self.compute[-10:]), median(self.update[-10:])
        speed = tokens / (compute + update) * 1e3
        loss = fmean(self.losses[-10:])
        return f"{self.name} loss {loss:.3f}, {speed:,.0f} tokens/s, optimizer {update:.1f} ms"

    @torch.no_grad()
    def validate(self, tokens: Tensor, targets: Tensor) -> None:
        self.validation_loss = self.model.loss(tokens, targets).item()

    def memory(self) -> dict[str, int]:
        """Bytes by kind of the tensors that model and optimizer hold now, after a step and before zero_grad.
        A master is any tensor that carries a weight, or the rest of one, beside the model's own."""
        weights = list(self.model.parameters())
        optimized = [p for group in self.optimizer.param_groups for p in group["params"]]
        masters: list[Tensor] = [p for p in optimized if all(p is not w for w in weights)]
        gradients = [p.grad for p in weights + masters if p.grad is not None]
        moments = []
        for state in self.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    (masters if name in ("master", "remainder") else moments).append(value)
        groups = zip(KINDS, (weights, gradients, moments, masters), strict=True)
        return {kind: sum(t.numel() * t.element_size() for t in tensors) for kind, tensors in groups}


def table(runs: list[Run]) -> str:
    """The runs side by side: losses, median milliseconds per step, bytes held."""
    last = min(MEAN_OVER, len(runs[0].losses))
    held = [run.memory() for run in runs]
    steps = [[a + b for a, b in zip(run.compute, run.update, strict=True)] for run in runs]
    rows = [
        (f"training loss, last {last} steps", ".4f", [fmean(run.losses[-last:]) for run in runs]),
        ("validation loss", ".4f", [run.validation_loss for run in runs]),
        ("ms per step, median", ".2f", [median(step) for step in steps]),
        ("    forward and backward", ".2f", [median(run.compute) for run in runs]),
        ("    optimizer: clip, update, casts", ".2f", [median(run.update) for run in runs]),
        ("bytes held", ",.0f", [sum(kinds.values()) for kinds in held]),
        *((f"    {kind}", ",.0f", [kinds[kind] for kinds in held]) for kind in KINDS),
    ]
    head = f"{'':36}" + "".join(f"{run.title:>19}" for run in runs)
    lines = ["", head + ("     ratio" if len(runs) > 1 else "")]
    for label, form, values in rows:
        line = f"{label:36}" + "".join(f"{value:>19{form}}" for value in values)
        compared = len(values) > 1 and form != ".4f" and values[0] > 0
        lines.append(line + (f"{values[1] / values[0]:>9.2f}x" if compared else ""))
    return "\n".join(lines)
