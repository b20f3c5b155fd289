"""The inputs of a pipeline's step: by name, what of them is cut into microbatches, and what ranks compare of them."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def input_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the inputs of a model that can be given by place."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return tuple(p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds)


def bind(who: str, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs by name. Raises TypeError if there are too many, or one comes twice."""
    if len(args) > len(names):
        raise TypeError(f"{who}: {len(args)} inputs; expected at most {len(names)}: {', '.join(names)}.")
    inputs = dict(zip(names, args, strict=False))
    twice = [name for name in kwargs if name in inputs]
    if twice:
        raise TypeError(f"{who}: {', '.join(twice)} was given twice, by place and by name; expected once.")
    return inputs | kwargs


def cut_along_batch(who: str, inputs: dict[str, Any], target: Tensor | None, microbatches: int) -> dict[str, bool]:
    """Which inputs are cut along the batch; the others go to every microbatch whole.

    Raises:
        ValueError: the batch is not divisible, or an input or the target cannot be used.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    if not tensors or not next(iter(tensors.values())).dim():
        raise ValueError(f"{who}: no tensor [batch, ...] among the inputs {list(inputs)}; expected one.")
    first, batch = next((name, value.shape[0]) for name, value in tensors.items())
    if batch % microbatches or batch == 0:
        raise ValueError(
            f"{who}: {first} has a batch of {batch}; expected a multiple of n_microbatches={microbatches}. Change one "
            "of them."
        )
    asking = [name for name, value in tensors.items() if value.requires_grad]
    if asking:
        raise ValueError(
            f"{who}: {', '.join(asking)} requires a gradient; expected inputs that do not, since every stage gets them "
            "anew. Make what is trained a parameter of the model."
        )
    if target is not None and (not isinstance(target, Tensor) or target.shape[:1] != (batch,)):
        got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"{who}: target is {got}; expected a tensor with the batch of {batch} first, as {first}.")
    return {n: isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == batch for n, v in inputs.items()}


def signature(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must be the same on all ranks and for one Run: shapes and dtypes of tensors, other values if plain."""

    def of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return repr(value) if isinstance(value, bool | int | float | str | None) else type(value).__name__
        return tuple(value.shape), str(value.dtype)

    return tuple((name, of(inputs[name])) for name in sorted(inputs))


def contents(inputs: Mapping[str, Any]) -> int:
    """A checksum of the integers among the inputs that are on the CPU, such as token ids.

    It finds a loader that gives each rank of a pipeline another batch.
    """
    found = 0
    for name in sorted(inputs):
        value = inputs[name]
        if isinstance(value, Tensor) and value.device.type == "cpu" and not value.is_floating_point():
            found = zlib.crc32(value.contiguous().numpy().tobytes(), found)
    return found
