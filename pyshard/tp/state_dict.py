"""Whole weights into a model that is cut over tensor-parallel ranks, and out of it again: same names, same bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..placement import TensorShard, tensor_shard
from . import blocking


def full_state_dict(model: nn.Module, *, rank0_only: bool = False) -> dict[str, Any]:
    """What state_dict() of the unsharded model would be, with the same bits. Every rank of the group calls it.

    Args:
        rank0_only: the first rank of each tensor-parallel group gets it, the others an empty dict; these hold one whole
            weight at a time on the way. Putting one together takes twice its size for a moment.

    Returns new tensors for what is cut, and the model's own for what is whole, as state_dict() does; tied weights are
    one tensor under all their names.
    """
    state = model.state_dict(keep_vars=True)
    known: dict[int, Tensor] = {}
    whole: dict[str, Any] = {}
    keeps = True
    for name, value in state.items():
        shard = tensor_shard(value) if isinstance(value, Tensor) else None
        if shard is not None and rank0_only:
            keeps = keeps and shard.rank == 0
        if not isinstance(value, Tensor):
            whole[name] = value
            continue
        if id(value) not in known:
            full = value.detach()
            if shard is not None and shard.dim is not None:
                full = _gather(full, shard)
            # Ranks that keep nothing remember that it has been gathered, so that all gather the same.
            known[id(value)] = full if keeps else full.new_empty(0)
        whole[name] = known[id(value)]
    return whole if keeps else {}


def load_state_dict(model: nn.Module, full_state_dict: Mapping[str, Any], strict: bool = True) -> Any:
    """Copies this rank's parts of an unsharded model's state_dict into the model. No communication.

    Of tied weights one name is enough. Returns what nn.Module.load_state_dict returns: missing and unexpected keys.

    Raises RuntimeError, with nothing changed, if a shape is not the unsharded model's, or, under `strict`, if keys are
    missing or unexpected.
    """
    own = model.state_dict(keep_vars=True)
    local: dict[str, Any] = {}
    wrong = []
    for name, value in full_state_dict.items():
        param = own.get(name)
        local[name] = value
        if not isinstance(param, Tensor) or not isinstance(value, Tensor):
            continue
        shard = tensor_shard(param)
        shape = tuple(param.shape) if shard is None else shard.shape
        if tuple(value.shape) != shape:
            wrong.append(f"{name} has shape {tuple(value.shape)}, expected {shape}")
        elif shard is not None:
            local[name] = shard.cut(value)
    given = {id(own[name]): local[name] for name in local if isinstance(own.get(name), Tensor)}
    for name, param in own.items():
        if name not in local and isinstance(param, Tensor) and id(param) in given:
            local[name] = given[id(param)]
    missing = [name for name in own if name not in local]
    unexpected = [name for name in local if name not in own]
    if strict:
        wrong += [f"{name} is missing" for name in missing] + [f"{name} is unexpected" for name in unexpected]
    if wrong:
        raise RuntimeError(
            f"pyshard.tp.load_state_dict: {len(wrong)} entries do not fit {type(model).__name__}: "
            f"{'; '.join(wrong)}. Expected the unsharded model's names and shapes; nothing was loaded."
        )
    return model.load_state_dict(local, strict=strict)


def _gather(part: Tensor, shard: TensorShard) -> Tensor:
    """The whole of a tensor that is cut."""
    dim = shard.dim
    assert dim is not None  # by the caller
    world, sizes = dist.get_world_size(shard.group), shard.sizes
    with torch.no_grad():
        parts = blocking.all_gather(part, dim, sizes, shard.group).split(sizes, dim)
        whole = part.new_empty(shard.shape)
        for rank in range(world):
            shard.place(parts[rank], whole, rank)
    return whole
