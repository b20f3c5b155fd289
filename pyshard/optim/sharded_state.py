"""State of a sharded optimizer, saved and loaded: each rank keeps a flat run of each tensor.

In memory: plain 1-d tensors of the runs that this rank owns. In a state_dict: FlatShards, which know what whole tensor
they are a part of.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels import casts
from ..kernels.launch import is_dtensor, local_tensor
from ..kernels.reference import in_memory_order
from ..placement import tensor_shard
from . import state as states
from .flat_shard import FlatShard, check_takes, full, take, whole_of_parts
from .rectangles import cut_of

if TYPE_CHECKING:
    from .adam import Adam

_PARTS = (*states.MOMENTS, "master")


def saved(param: Tensor, kept: dict[str, Any], run: tuple[int, int], ours: bool = True) -> dict[str, Any]:
    """The state as a state_dict holds it: FlatShards in fp32, the remainder joined to a master.

    `ours`: False if another tensor-parallel rank saves the state of parameters that are whole on all of them.
    """
    ours = ours or cut_of(param) is not None
    out = {key: value for key, value in kept.items() if key != "remainder"}
    if "remainder" in kept:
        out["master"] = casts.join(in_memory_order(param.detach())[run[0] : run[1]], kept["remainder"])
    return {key: FlatShard(value, param, run[0], saved=ours) if key in _PARTS else value for key, value in out.items()}


def kept(param: Tensor, loaded: dict[str, Any], run: tuple[int, int]) -> dict[str, Any]:
    """Loaded state as it is kept: this rank's runs, in fp32."""
    out: dict[str, Any] = {}
    for key, boxed in loaded.items():
        value = boxed.value if isinstance(boxed, states.Boxed) else boxed
        if key == "step" and isinstance(value, (Tensor, int, float)):
            value = states.step_count(float(value), param, False)
        elif key in _PARTS and isinstance(boxed, states.Boxed):
            value = take(value, param, *run, torch.float32)
        out[key] = value
    return out


def check_loaded(who: str, name: str, param: Tensor, loaded: dict[str, Any], run: tuple[int, int]) -> None:
    """State of a state_dict, against the parameter it is for and the elements that this rank owns."""
    for key in _PARTS:
        if isinstance(loaded.get(key), FlatShard):
            try:
                check_takes(loaded[key], param, *run)
            except ValueError as error:
                raise ValueError(f"{who}: state {key!r} of {name}: {error}") from error
    # What is left to check of a FlatShard is not of its memory, which is of another shape.
    cut = cut_of(param) is not None
    if cut:
        for key in (key for key in _PARTS if key in loaded):
            try:
                check_takes(loaded[key], param, *run)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{who}: state {key!r} of {name}: {error}") from error
    taken = {key for key, value in loaded.items() if isinstance(value, FlatShard) or (cut and key in _PARTS)}
    whole = {key: param if key in taken else value for key, value in loaded.items()}
    states.check_loaded(who, name, param, whole)


def gathered(optimizer: "Adam", state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict with whole tensors."""
    group, alone = getattr(optimizer, "process_group", None), getattr(optimizer, "world", 1) == 1
    params = [param for each in optimizer.param_groups for param in each["params"]]
    found = {key: dict(items) if isinstance(items, dict) else items for key, items in state_dict["state"].items()}
    # In one order on all ranks, whatever was made or loaded first.
    for index in sorted(key for key in found if isinstance(key, int)):
        for key in sorted(found[index]):
            found[index][key] = _full(found[index][key], params[index], group, alone)
    return {**state_dict, "state": found}


def _full(value: Any, param: Tensor, group: Any, alone: bool) -> Any:
    """The whole tensor of which a value is a part, from all ranks that hold others."""
    if is_dtensor(value):
        return value.full_tensor()
    if not isinstance(value, FlatShard):
        return value
    shard = tensor_shard(param)
    if is_dtensor(param) and shard is not None:
        rows = states._like(param, value.local.view(local_tensor(param).shape))
        return whole_of_parts(rows.full_tensor(), value, shard)  # type: ignore[attr-defined]
    return full(value, group, shard, alone)
