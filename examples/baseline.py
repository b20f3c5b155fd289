"""What the same training takes with torch alone: in one process, and on several ranks by two ways of its own."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel


class TorchAdamW(torch.optim.AdamW):
    """torch.optim.AdamW (fused) over fp32 copies of 16-bit weights, or over the weights where they are fp32.

    One step: gradients to fp32, clip them by their global norm, update the copies, round them to the weights.
    Loads checkpoints of pyshard.AdamW, which hold the fp32 weights as `master`.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, max_grad_norm: float, **settings: Any) -> None:
        self.weights = list(params)
        self.masters = [w if w.dtype == torch.float32 else w.detach().float() for w in self.weights]
        self.max_grad_norm = max_grad_norm
        super().__init__(self.masters, fused=True, **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
        nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm)
        super().step(closure)
        for master, weight in zip(self.masters, self.weights, strict=True):
            weight.copy_(master)
            if master is not weight:
                master.grad = None  # the fp32 copy of a 16-bit gradient is needed only here

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for weight in self.weights:
            weight.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["fused"] = True
        with torch.no_grad():
            for master, weight in zip(self.masters, self.weights, strict=True):
                master.copy_(self.state[master].pop("master", weight))


class ZeroAdamW(ZeroRedundancyOptimizer):
    """torch's own sharded optimizer over torch.optim.AdamW (fused), with clipping; for fp32 weights."""

    def __init__(self, params: Iterable[nn.Parameter], *, max_grad_norm: float, **settings: Any) -> None:
        self.weights = list(params)
        self.max_grad_norm = max_grad_norm
        super().__init__(self.weights, optimizer_class=torch.optim.AdamW, fused=True, **settings)

    def step(self, closure: Callable[[], float] | None = None, **more: Any) -> float | None:
        nn.utils.clip_grad_norm_(self.weights, self.max_grad_norm)
        return super().step(closure, **more)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group in state_dict["param_groups"]:
            group["fused"] = True
        super().load_state_dict(state_dict)


def averaged(model: nn.Module) -> nn.Module:
    """The model as torch trains it on several ranks: a wrapper that averages gradients while backward runs.

    With each .grad a view of the buckets that travel, which saves a second copy of all gradients.
    """
    return DistributedDataParallel(model, gradient_as_bucket_view=True)
