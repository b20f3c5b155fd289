"""What a checkpoint holds of a model and an optimizer, and by which names.

The keys are those of torch's get_model_state_dict and get_optimizer_state_dict, without the wrappers around a model:

    model.<name>    optimizer.state.<name of the parameter>.<item>    optimizer.param_groups.<i>.<hyperparameter>

A parameter of which tensor-parallel ranks hold parts is one tensor, the whole; each rank gives its part as a FlatShard.
Pipeline stages give what they hold by the names of the whole model.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optim import state as states
from ..optim.flat_shard import FlatShard
from ..optim.rectangles import cut_of
from ..placement import pipeline_share, tensor_shard


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP and torch.compile.

    Raises:
        TypeError: it has modules of FSDP's first version, whose parameters do not say what they are parts of.
    """
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FullyShardedDataParallel

        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise TypeError(
                "the model has FullyShardedDataParallel modules, whose parameters are plain tensors of unknown place; "
                "expected whole parameters or DTensors. Use torch's fully_shard."
            )
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def plain(name: str) -> str:
    """A name in an unwrapped model without what torch.compile and activation checkpointing of its modules put in."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def reshard(model: nn.Module) -> None:
    """Fully sharded modules have their shards again as parameters, in the place of whole weights.

    A forward without backward leaves those of the outermost ones gathered: plain tensors that no optimizer knows.
    """
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def state_of(model: nn.Module) -> dict[str, Any]:
    """The model's state_dict by plain names; its tensors are the model's own."""
    held = unwrapped(model).state_dict(keep_vars=True)
    return {plain(name): value.detach() if isinstance(value, Tensor) else value for name, value in held.items()}


def cut_params(model: nn.Module) -> dict[str, Tensor]:
    """By plain names, the parameters of which this rank holds a part.

    Raises:
        ValueError: the model's state_dict() has something else under the name of one of them.
    """
    held = unwrapped(model).state_dict(keep_vars=True)
    found = {plain(name): value for name, value in held.items() if isinstance(value, Tensor) and cut_of(value)}
    for name, param in unwrapped(model).named_parameters(remove_duplicate=False):
        if cut_of(param) is not None and found.get(plain(name)) is not param:
            raise ValueError(
                f"{name} is a part of a parameter of shape {tuple(whole_shape(param))}, and the model's state_dict() "
                "does not have it under its name; expected the parameter itself. Leave out hooks that change the "
                "state_dict of tensor-parallel modules."
            )
    return found


def whole_shape(param: Tensor) -> torch.Size:
    """The shape of a parameter as a checkpoint has it."""
    cut = cut_of(param)
    return param.shape if cut is None else torch.Size(cut.whole)


def give(model: nn.Module, state: dict[str, Any]) -> None:
    """Has the model load what state_of() has given and something else has filled."""
    inner = unwrapped(model)
    inner.load_state_dict({name: state[plain(name)] for name in inner.state_dict()})


def names_of(model: nn.Module, optimizer: Optimizer) -> dict[Tensor, str]:
    """The name of each parameter of an optimizer; of a pipeline's the one that the whole model has first for it.

    Raises:
        ValueError: a parameter is not the model's.
    """
    names: dict[Tensor, str] = {}
    for name, own in unwrapped(model).named_parameters():
        share = pipeline_share(own)
        names[own] = plain(name if share is None else share.name)
    for index, param in enumerate(params_of(optimizer)):
        if param not in names:
            raise ValueError(
                f"parameter {index} of the optimizer, of shape {tuple(param.shape)}, is not in the model; expected the "
                "model whose parameters it trains. Pass that model."
            )
    return names


def params_of(optimizer: Optimizer) -> Iterator[Tensor]:
    return (param for group in optimizer.param_groups for param in group["params"])


def to_save(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
    """The state_dict that goes to torch.distributed.checkpoint; its tensors are those that train, or copies.

    Parameter groups have the parameters of this rank's pipeline stages; stages.together() knows all.
    """
    reshard(model)
    settle(optimizer)
    parts = {name: states.as_whole(param, param) for name, param in cut_params(model).items()}
    saved: dict[str, Any] = {"model": state_of(model) | parts}
    if optimizer is not None:
        names = names_of(model, optimizer)
        params = list(params_of(optimizer))
        by_index = [names[param] for param in params]
        held = optimizer.state_dict()
        groups = held["param_groups"]
        ours = _saves_whole_state(model)
        saved["optimizer"] = {
            "state": {
                by_index[i]: _of_wholes(by_index[i], params[i], items, ours)
                for i, items in held["state"].items()
                if (share := pipeline_share(params[i])) is None or share.counted
            },
            "param_groups": [{**group, "params": [by_index[i] for i in group["params"]]} for group in groups],
        }
    return saved


def _saves_whole_state(model: nn.Module) -> bool:
    """True on the first of the tensor-parallel ranks, which saves the state of what is whole on all of them.

    A sharded optimizer cuts it into runs, at other places on each of them if their parts have different sizes.
    """
    shards = (tensor_shard(param) for param in model.parameters())
    return all(shard is None or shard.rank == 0 for shard in shards)


def _of_wholes(name: str, param: Tensor, items: dict[str, Any], ours: bool) -> dict[str, Any]:
    """State of a parameter; where this rank holds a part, also that of an optimizer that knows nothing of it."""
    found = dict(items)
    if cut_of(param) is None:
        for value in found.values():
            if isinstance(value, FlatShard):
                value.saved = ours
        return found
    for key, value in items.items():
        if not isinstance(value, Tensor) or isinstance(value, FlatShard) or value.dim() == 0:
            continue
        if value.shape != param.shape:
            raise ValueError(
                f"state {key!r} of {name} has shape {tuple(value.shape)}, and the parameter, which is a part of a "
                f"whole one, {tuple(param.shape)}; expected a value per element, which can be put together with those "
                "of other ranks. Use an optimizer such as pyshard.AdamW."
            )
        found[key] = states.as_whole(value, param)
    return found


def settle(optimizer: Optimizer | None) -> None:
    """Waits for parameters that are still on their way from other ranks."""
    synchronize = getattr(optimizer, "synchronize", None)
    if synchronize is not None:
        synchronize()
