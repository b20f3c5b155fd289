"""The repeated blocks of a model, found by its structure: what full sharding takes as units and a pipeline cuts."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

# A list of blocks with less than this share of the largest one's parameters is a detail of the model, not a part of it.
_SMALL = 0.1


def find_blocks(model: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    """(name, blocks) of each list of blocks of a model, in the order of its modules; empty if there is none.

    A list of blocks is an nn.ModuleList, or an nn.Sequential of two or more, whose children are of one class, or of at
    most one class for two children (models that alternate), and are made of other modules, as a bare nn.Linear or a
    torch.nn activation is not. Lists inside of a block (experts, say) belong to it. An encoder and a decoder are two
    lists. Where a Transformers model names the classes of its blocks (`_no_split_modules`), lists of those come first:
    others are looked for only if it has none.
    """
    hints = set(getattr(model, "_no_split_modules", None) or ())
    found = list(_lists(model, "", hints)) if hints else []
    found = found or list(_lists(model, "", set()))
    sizes = {name: sum(p.numel() for block in blocks for p in block.parameters()) for name, blocks in found}
    least = _SMALL * max(sizes.values(), default=0)
    return [(name, blocks) for name, blocks in found if sizes[name] >= least and sizes[name] > 0]


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name of the model's only list of blocks, and the list.

    Raises:
        ValueError: it has none, several, or one that is no nn.ModuleList.
    """
    found = find_blocks(model)
    kind = type(model).__name__
    if len(found) != 1:
        got = ", ".join(f"{name or 'the model itself'} of {len(blocks)}" for name, blocks in found) or "none"
        raise ValueError(
            f"pyshard: {kind} has {'several lists' if found else 'no list'} of blocks ({got}); expected one "
            "nn.ModuleList whose modules are of one class. Name the list, or put the blocks into one."
        )
    name = found[0][0]
    blocks = model.get_submodule(name)
    if not isinstance(blocks, nn.ModuleList) or not name:
        raise ValueError(
            f"pyshard: the blocks of {kind}, {name or 'the model itself'}, are in a {type(blocks).__name__}; expected "
            "an nn.ModuleList inside of the model, whose forward calls them. Put the blocks into one."
        )
    return name, blocks


def _lists(module: nn.Module, name: str, hints: set[str]) -> Iterator[tuple[str, list[nn.Module]]]:
    """The outermost lists of blocks in a module; with hints, those of blocks of these classes."""
    # Not by iteration: a list may say something else there, as that of a pipeline stage does.
    children = list(module.named_children())
    blocks = [child for _, child in children]
    if isinstance(module, nn.ModuleList | nn.Sequential) and _repeated(module, blocks, hints):
        yield name, blocks
        return
    for key, child in children:
        yield from _lists(child, f"{name}.{key}" if name else key, hints)


def _repeated(module: nn.Module, blocks: list[nn.Module], hints: set[str]) -> bool:
    if len(blocks) < (1 if isinstance(module, nn.ModuleList) else 2):
        return False
    if hints:
        return any(_name(block) in hints for block in blocks)
    if len({type(block) for block in blocks}) > max(1, len(blocks) // 2):
        return False
    return all(_is_block(block) for block in blocks)


def _is_block(module: nn.Module) -> bool:
    """Made of other modules, or of a class of the model's own with parameters."""
    if any(True for _ in module.children()):
        return not isinstance(module, nn.ModuleList | nn.ModuleDict)
    ours = not type(module).__module__.startswith("torch.nn.")
    return ours and any(True for _ in module.parameters())


def _name(module: nn.Module) -> str:
    """Of a block's class; of a block in a wrapper, such as checkpointing or compilation, the block's."""
    name = type(module).__name__
    children = list(module.children())
    wrapped = name in ("CheckpointWrapper", "OptimizedModule") and len(children) == 1
    return type(children[0]).__name__ if wrapped else name
