"""DTensor parameters (FSDP2, torch's tensor parallel layers): what their placements mean for a step.

A step updates local shards, which needs no communication. Only what concerns all gradients does: their norm, and
whether one of them is not finite. The sums of squares travel over the mesh dimensions along which parameters are cut
(levels.py), so that every rank gets the same bits and takes the same decision. Replicated and plain parameters count
once: their gradients are the same on all ranks already.
"""

from typing import Any

from torch import Tensor

from ..kernels.launch import is_dtensor


def shard_groups(param: Tensor) -> tuple[Any, ...]:
    """The process groups over which the shards of a DTensor are spread; empty for any other parameter."""
    if not is_dtensor(param):
        return ()
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    sharded = [i for i, placement in enumerate(placements) if not placement.is_replicate() and mesh.size(i) > 1]
    return tuple(mesh.get_group(i) for i in sharded)


def same_placements(param: Tensor, grad: Tensor) -> bool:
    """True if the gradient is cut as its parameter; else Launch.gather redistributes it at each step."""
    if not is_dtensor(param):
        return True
    return bool(param.placements == grad.placements)  # type: ignore[attr-defined]


def check_grad(who: str, name: str, param: Tensor, grad: Tensor) -> None:
    """What a DTensor parameter asks of itself and its gradient."""
    if is_dtensor(param) != is_dtensor(grad):
        raise TypeError(
            f"{who}: {name} is a {type(param).__name__} and its gradient a {type(grad).__name__}; expected both or "
            "neither to be a DTensor. Let backward of the sharded model make the gradient."
        )
    if not is_dtensor(param):
        return
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"{who}: {name} has placements {placements}; expected Shard or Replicate, since an update of partial sums "
            "is not one of their total. Use param.redistribute()."
        )
    if grad.device_mesh != mesh or grad.shape != param.shape:  # type: ignore[attr-defined]
        raise ValueError(
            f"{who}: {name} has shape {tuple(param.shape)} on {mesh} and its gradient {tuple(grad.shape)} on "
            f"{grad.device_mesh}; expected one shape and mesh. Let backward of the model make the gradient."  # type: ignore[attr-defined]
        )


def check_norm(who: str, name: str, param: Tensor) -> None:
    """Refuses parameters that are shards without saying of what: FSDP's first version makes plain tensors of them."""
    if getattr(param, "_fsdp_flattened", False) or getattr(param, "_is_flat_param", False):
        raise ValueError(
            f"{who}: {name} is this rank's part of a FullyShardedDataParallel module, so max_grad_norm and nonfinite "
            "would look at this rank alone; expected whole parameters or DTensors. Use torch's fully_shard, or leave "
            "these options out and call the module's clip_grad_norm_() before step()."
        )
