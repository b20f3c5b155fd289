"""Which modules of a model lie before its blocks, and which after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..blocks import block_list


@dataclass(frozen=True)
class Plan:
    """Where the parts of a model are used.

    Attributes:
        blocks: name of its list of blocks.
        first: names of the modules with parameters that it uses before the blocks.
        last: of those that it uses after them. A module may be in both, such as an embedding whose weight also makes
            the logits: the first and the last stage have a copy each, and their gradients are added up.
    """

    blocks: str
    first: Sequence[str] = ()
    last: Sequence[str] = ()


Parts = Plan


def parts_of(model: nn.Module, plan: Plan | None) -> Parts:
    """The parts of a model; found by the order in which modules were registered if there is no plan.

    Raises:
        ValueError: the model has no list of blocks or several, parameters that are in no part, or the plan does not
            fit it.
    """
    if plan is None:
        name, _ = block_list(model)
        parts = _by_order(model, name)
    else:
        parts = Plan(plan.blocks, tuple(plan.first), tuple(plan.last))
        names = dict(model.named_modules())
        unknown = [name for name in (parts.blocks, *parts.first, *parts.last) if name not in names]
        if unknown:
            raise ValueError(
                f"pyshard.pp.pipeline: the plan names {', '.join(unknown)}; expected modules of "
                f"{type(model).__name__}. It has: {', '.join(key for key, _ in model.named_children())}."
            )
        if not isinstance(names[parts.blocks], nn.ModuleList):
            raise ValueError(
                f"pyshard.pp.pipeline: {parts.blocks} is a {type(names[parts.blocks]).__name__}; expected the "
                "nn.ModuleList of the model's blocks."
            )
    _check_complete(model, parts)
    return parts


def _by_order(model: nn.Module, blocks: str) -> Parts:
    """What a module registers before the child that leads to the blocks is used before them, the rest after."""
    first: list[str] = []
    last: list[str] = []
    module, path = model, ""
    for key in blocks.split("."):
        seen = False
        for name, child in module.named_children():
            seen = seen or name == key
            if name != key and any(True for _ in child.parameters()):
                (last if seen else first).append(f"{path}{name}")
        module, path = module.get_submodule(key), f"{path}{key}."
    return Plan(blocks, tuple(first), tuple(last))


def _check_complete(model: nn.Module, parts: Parts) -> None:
    """Every parameter is somewhere, or one stage would train a copy that no other knows of."""
    covered = tuple(f"{name}." for name in (parts.blocks, *parts.first, *parts.last))
    missing = [name for name, _ in model.named_parameters(remove_duplicate=False) if not name.startswith(covered)]
    if missing:
        raise ValueError(
            f"pyshard.pp.pipeline: {', '.join(missing[:3])} {'is' if len(missing) == 1 else 'are'} in no part of the "
            f"model (blocks {parts.blocks}, first {list(parts.first)}, last {list(parts.last)}); expected every "
            "parameter in a module before, in or after the blocks. Put it into a module, or name that in a plan."
        )
