"""The arguments of an optimizer: what pyshard adds to torch's, and the hyperparameters of a group.

All are checked before they are used, at construction and whenever they have changed.
"""

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from torch import Tensor

from ..kernels.registry import requested

# Attribute of a whole weight that full sharding has gathered for a while: the name of the parameter whose place it has.
GATHERED = "_pyshard_gathered"

_CHOICES = {
    "master_weights": ("auto", "fp32", "split", "none"),
    "moments": ("fp32", "int8"),
    "nonfinite": ("propagate", "skip", "raise"),
}


@dataclass(frozen=True)
class Options:
    """What pyshard adds to torch's arguments; the same for all groups."""

    master_weights: str
    moments: str
    nonfinite: str
    max_grad_norm: float | None
    backend: str

    def check(self, who: str) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{who}: {name}={getattr(self, name)!r}; expected one of {', '.join(choices)}.")
        if self.moments == "int8":
            raise ValueError(f"{who}: moments='int8' is not built yet; expected 'fp32'. Leave the argument out.")
        norm = self.max_grad_norm
        if norm is not None and not (isinstance(norm, (int, float)) and norm > 0):
            raise ValueError(
                f"{who}: max_grad_norm={norm!r}; expected a positive number, or None for no clipping. "
                "float('inf') computes grad_norm without clipping."
            )
        requested(self.backend)

    def needs_norm(self) -> bool:
        """True if a step looks at all gradients first."""
        return self.max_grad_norm is not None or self.nonfinite != "propagate"


def values(group: dict[str, Any]) -> tuple[Any, ...]:
    """(lr, beta1, beta2, eps, weight_decay, decoupled, ...): what check_group looks at and a step needs."""
    betas = group["betas"] if isinstance(group["betas"], (tuple, list)) else (group["betas"],)
    keys = ("eps", "weight_decay", "decoupled_weight_decay", "maximize", "differentiable", "fused", "foreach")
    return (group["lr"], *betas, *(group[key] for key in keys))


def check_lasting(who: str, group: dict[str, Any]) -> None:
    """Raises for parameters that fully sharded modules will put others in the place of."""
    for index, param in enumerate(group["params"]):
        if (name := getattr(param, GATHERED, None)) is not None:
            raise ValueError(
                f"{who}: parameter {index} of the group, of shape {tuple(param.shape)}, is {name} gathered by full "
                "sharding, a copy that goes; expected its shard, a DTensor. Make the optimizer before the model runs, "
                "or after reshard() of each FSDPModule in it."
            )


def rate(group: dict[str, Any]) -> float:
    """The learning rate on the host; 0 for one that stays on the device, where the kernels will read it."""
    lr = group["lr"]
    stays = isinstance(lr, Tensor) and lr.device.type != "cpu" and group["capturable"]
    return 0.0 if stays else float(lr)


def check_group(who: str, group: dict[str, Any]) -> None:
    """Raises for hyperparameters that torch would refuse, and for those that would train to NaN."""
    misplaced = [option.name for option in fields(Options) if option.name in group]
    if misplaced:
        raise ValueError(
            f"{who}: a parameter group has {', '.join(misplaced)}; expected it as an argument of the optimizer, since "
            "it holds for all groups. Move it there, or make two optimizers."
        )
    if group["differentiable"]:
        raise ValueError(f"{who}: differentiable=True is not supported; expected False. Use torch.optim's for that.")
    if group["fused"] and group["foreach"]:
        raise RuntimeError(
            f"{who}: fused=True and foreach=True; expected at most one. Leave both out: every step is fused."
        )
    lr, betas = group["lr"], group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{who}: betas={betas!r}; expected two numbers in [0, 1), such as (0.9, 0.999).")
    limits = [("eps", group["eps"], math.inf), ("weight_decay", group["weight_decay"], math.inf)]
    limits += [(f"betas[{i}]", beta, 1.0) for i, beta in enumerate(betas)]
    if isinstance(lr, Tensor) and lr.device.type != "cpu" and lr.numel() == 1:
        pass  # looking at it would wait for the device
    else:
        limits.append(("lr", lr, math.inf))
    for name, value, below in limits:
        if isinstance(value, Tensor):
            number = value.numel() == 1 and not value.is_complex() and value.device.type != "meta"
        else:
            number = isinstance(value, Real)
        if not number or not 0.0 <= float(value) < below:
            wanted = "a finite number, at least 0" if below == math.inf else "a number in [0, 1)"
            raise ValueError(f"{who}: {name}={value!r}; expected {wanted}, or a tensor of one.")
