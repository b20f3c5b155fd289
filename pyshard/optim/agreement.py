"""What all ranks must agree on before a sharded optimizer can work, and an error on every rank where they do not."""

import platform
import struct
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._version import __version__
from ..comm import agree
from ..placement import tensor_shard

Items = list[tuple[str, Any]]

OPERATION = "comparison of settings"


def describe(
    who: str, options: dict[str, Any], groups: list[dict[str, Any]], whole: bool = False, params: bool = True
) -> Items:
    """(what, value) of everything that must be the same on all ranks, the most general first.

    `whole`: of the parameters of which ranks hold parts, what is the same for all parts. `params`: False for ranks that
    hold other parameters, as pipeline stages do.
    """
    items: Items = [
        ("the optimizer", who),
        ("the version of pyshard", __version__),
        ("the version of torch", torch.__version__),
        ("the machine", platform.machine()),
        *((f"the argument {name}", value) for name, value in options.items()),
        ("the number of parameter groups", len(groups)),
    ]
    for index, group in enumerate(groups):
        if params:
            items.append((f"the number of parameters of group {index}", len(group["params"])))
        if params and group.get("param_names"):
            items.append((f"the parameter names of group {index}", list(group["param_names"])))
        items += [
            (f"{key} of group {index}", _plain(value))
            for key, value in group.items()
            if key not in ("params", "param_names")
        ]
    position = 0
    for group in groups if params else []:
        for param in group["params"]:
            kind = "trained" if param.requires_grad else "frozen"
            dtype = str(param.dtype).removeprefix("torch.")
            shape = _shape(param, whole)
            items.append((f"parameter {position}", f"{dtype} {shape} {param.device.type}, {kind}"))
            position += 1
    return items


def _shape(param: Tensor, whole: bool) -> str:
    """The shape of a parameter, and of what it is a part."""
    shard = tensor_shard(param)
    if shard is None or shard.dim is None or len(shard.pieces) == 1:
        return f"{tuple(param.shape)}"
    part = f"{shard.shape} cut along {shard.dim}"
    if whole:
        return f"{part} into {shard.pieces}"
    return f"{tuple(param.shape)}, part {shard.rank} of {part} over {len(shard.pieces)} ranks"


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item) for item in value)
    return value


def check(
    who: str, group: dist.ProcessGroup | None, ranks: list[int], items: Items, problem: Exception | None = None
) -> None:
    """Raises ValueError on all ranks, naming the first difference, if `items` are not the same on all of them.

    A `problem` of this rank is raised here, and as a ValueError on the others. PeerError: a rank does not answer.
    """
    mine = items if problem is None else f"{problem}"
    every = agree.objects(who, group, OPERATION, mine, hint="Nothing was changed.")
    if problem is not None:
        raise problem
    for rank, theirs in zip(ranks, every, strict=True):
        if isinstance(theirs, str):
            raise ValueError(f"{who}: on rank {rank}: {theirs}")
    for rank, theirs in zip(ranks, every, strict=True):
        difference = _first_difference(every[0], theirs)
        if difference is not None:
            what, first, other = difference
            raise ValueError(
                f"{who}: {what} is {first!r} on rank {ranks[0]} and {other!r} on rank {rank}; expected the same on all "
                "ranks of the process group. Build model and optimizer from the same settings and seed on every rank."
            )


def _first_difference(first: Items, other: Items) -> tuple[str, Any, Any] | None:
    for (what, mine), (other_what, theirs) in zip(first, other, strict=False):
        if what != other_what:
            return "the list of settings", what, other_what
        if mine != theirs:
            return what, mine, theirs
    if len(first) != len(other):
        return "the number of settings", len(first), len(other)
    return None


def broadcast(params: list[Tensor], group: dist.ProcessGroup | None, first: int) -> None:
    """Gives parameters the values that they have on rank `first`, in place."""
    works, copies = [], []
    for param in params:
        if param.device.type == "meta" or param.numel() == 0:
            continue
        data = param.detach()
        if not data.is_contiguous():
            data = data.contiguous()
            copies.append((param, data))
        works.append(dist.broadcast(data, src=first, group=group, async_op=True))
    for work in works:
        if work is not None:
            work.wait()
    with torch.no_grad():
        for param, data in copies:
            param.copy_(data)


def digest(groups: list[list[float]], members: list[int]) -> int:
    """A number that differs, but for chance, if hyperparameters or the trained parameters differ."""
    flat = [value for group in groups for value in group]
    return zlib.crc32(struct.pack(f"<{len(flat)}d{len(members)}q", *flat, *members))
