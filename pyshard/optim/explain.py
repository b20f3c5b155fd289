"""The text of optimizer.explain(): which parameters take which path, with what state, and why."""

from collections import defaultdict
from typing import TYPE_CHECKING

from torch import Tensor

from ..kernels.launch import local_tensor
from ..kernels.registry import requested

if TYPE_CHECKING:
    from .adam import Adam

_WHY = {
    None: "fp64, computed in double by the reference path",
    "F32": "fp32 parameter, no master needed",
    "BF16_SPLIT": "bf16 parameter = upper half of the fp32 master, int16 remainder",
    "BF16_MASTER": "bf16 parameter, fp32 master",
    "FP16_MASTER": "fp16 parameter, fp32 master",
    "BF16_NONE": "bf16 parameter, no master (master_weights='none')",
    "FP16_NONE": "fp16 parameter, no master (master_weights='none')",
}


def explain(optimizer: "Adam") -> str:
    """One line for each path that parameters take, and one for what each step reads."""
    options = optimizer.options
    asked = requested(options.backend)
    lines = [f"pyshard.{type(optimizer).__name__}, backend={asked!r}, master_weights={options.master_weights!r}"]
    plan = optimizer._plan
    if plan is None:
        lines.append("  no step taken yet: paths are chosen at the first step()")
        return "\n".join(lines)
    for launch in plan.launches:
        by_format = defaultdict(list)
        for entry in launch.entries:
            by_format[None if entry.fmt is None else entry.fmt.name].append(entry)
        for name, entries in by_format.items():
            elements = sum(e.local.numel() for e in entries)
            kept = sum(_bytes(value) for e in entries for value in e.state.values())
            lines.append(
                f"  {launch.backend} on {launch.device}: {len(entries)} tensors, {elements:,} elements, "
                f"{kept:,} bytes of state: {_WHY[name]}"
            )
        if launch.copied:
            lines.append(
                f"    {len(launch.copied)} of them copied to and fro each step: their elements or their gradients do "
                "not lie in memory in the order of the moments"
            )
    if optimizer._peers is not None:
        lines += optimizer._peers.explain(optimizer)
    norm = options.needs_norm()
    lines.append(
        f"  each step: {'a pass over the gradients for their norm, then ' if norm else ''}one pass over everything "
        f"(max_grad_norm={options.max_grad_norm}, nonfinite={options.nonfinite!r})"
    )
    return "\n".join(lines)


def _bytes(value: object) -> int:
    if not isinstance(value, Tensor):
        return 0
    local = local_tensor(value)
    return local.numel() * local.element_size()
