"""What a checkpoint holds of a model and an optimizer, and by which names.

The keys are those of torch's get_model_state_dict and get_optimizer_state_dict, without the wrappers around a model:

    model.<name>    optimizer.state.<name of the parameter>.<item>    optimizer.param_groups.<i>.<hyperparameter>
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


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
    """A name in an unwrapped model without what torch.compile of its modules puts in."""
    return name.replace("_orig_mod.", "")


def state_of(model: nn.Module) -> dict[str, Any]:
    """The model's state_dict by plain names; its tensors are the model's own."""
    return {plain(name): value for name, value in unwrapped(model).state_dict().items()}


def give(model: nn.Module, state: dict[str, Any]) -> None:
    """Has the model load what state_of() has given and something else has filled."""
    inner = unwrapped(model)
    inner.load_state_dict({name: state[plain(name)] for name in inner.state_dict()})


def names_of(model: nn.Module, optimizer: Optimizer) -> dict[Tensor, str]:
    """The name of each parameter of an optimizer.

    Raises:
        ValueError: a parameter is not the model's.
    """
    names: dict[Tensor, str] = {param: plain(name) for name, param in unwrapped(model).named_parameters()}
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
    """The state_dict that goes to torch.distributed.checkpoint; its tensors are those that train, or copies."""
    settle(optimizer)
    saved: dict[str, Any] = {"model": state_of(model)}
    if optimizer is not None:
        names = names_of(model, optimizer)
        by_index = [names[param] for param in params_of(optimizer)]
        held = optimizer.state_dict()
        groups = held["param_groups"]
        saved["optimizer"] = {
            "state": {by_index[index]: items for index, items in held["state"].items()},
            "param_groups": [{**group, "params": [by_index[i] for i in group["params"]]} for group in groups],
        }
    return saved


def settle(optimizer: Optimizer | None) -> None:
    """Waits for parameters that are still on their way from other ranks."""
    synchronize = getattr(optimizer, "synchronize", None)
    if synchronize is not None:
        synchronize()
