"""What tensor-parallel layers do, and why: for people who ask whether communication is overlapped."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from . import engine
from .choose import Choice, Shape
from .embedding import VocabParallelEmbedding
from .layers import ColumnParallelLinear, RowParallelLinear

_Layer = ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding


def explain(what: nn.Module | dist.ProcessGroup) -> str:
    """A text that says which transport each group uses and why, and for each layer what it exchanges when, whether that
    is overlapped, and the measurement that decided it. What parallelize() exchanges between layers is not in it: rows
    cut after the embedding and gathered after the last norm, and sums of the gradients of norms.

    Args:
        what: a model, whose layers are named, or a process group, of which all shapes so far are listed. What no call
            has needed yet is not decided yet.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(what, dist.ProcessGroup):
        choices = _chosen(what)
        return "\n".join([_group(what), *(f"  {_choice(shape, choice)}" for shape, choice in choices.items())])
    if not isinstance(what, nn.Module):
        raise TypeError(f"pyshard.tp.explain: got a {type(what).__name__}; expected a model or a process group")
    layers = {name: module for name, module in what.named_modules() if isinstance(module, _Layer)}
    if not layers:
        return "no tensor-parallel layers; pyshard.tp.parallelize makes them"
    lines = []
    for group in dict.fromkeys(layer.group for layer in layers.values()):
        lines.append(_group(group))
        alike: dict[tuple[str, ...], list[str]] = {}
        for name, layer in layers.items():
            if layer.group is group:
                alike.setdefault((_doing(layer), *_choices(layer)), []).append(name)
        for (doing, *shapes), names in alike.items():
            lines.append(f"  {', '.join(names)}: {doing}")
            lines += [f"    {line}" for line in shapes]
    return "\n".join(lines)


def _group(group: dist.ProcessGroup) -> str:
    spaces = engine.workspaces(group)
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) == 1:
        return f"ranks {ranks}: one rank, nothing to exchange"
    if not spaces:
        return f"ranks {ranks}: no call yet, so no transport"
    return "\n".join(
        f"ranks {ranks}, transport {space.name}: {space.why}; {space.nbytes / 2**20:.1f} MB of slots on this rank"
        for space in spaces
    )


def _chosen(group: dist.ProcessGroup) -> dict[Shape, Choice]:
    return {shape: choice for space in engine.workspaces(group) for shape, choice in space.choices.items()}


def _doing(layer: _Layer) -> str:
    if isinstance(layer, VocabParallelEmbedding):
        return "embedding cut along the vocabulary; the rows found are summed over ranks"
    if isinstance(layer, ColumnParallelLinear):
        shared = layer.shared
        with_others = (
            f", one exchange for {len(shared.layers)} layers that read the same input" if shared is not None else ""
        )
        if layer.gather_output:
            with_others += "; then every rank gathers all outputs, not overlapped"
        if layer.sequence_parallel:
            return f"column; forward gathers the rows, backward gathers and reduce-scatters them{with_others}"
        return f"column; backward all-reduces the gradient of the input{with_others}"
    if layer.sequence_parallel:
        return "row; forward reduce-scatters the rows, backward gathers them"
    return "row; forward all-reduces the output"


def _choices(layer: _Layer) -> list[str]:
    """Of the shapes that are this layer's, told by their numbers of columns."""
    if isinstance(layer, VocabParallelEmbedding):
        return []
    layers = layer.shared.layers if isinstance(layer, ColumnParallelLinear) and layer.shared is not None else [layer]
    if isinstance(layer, ColumnParallelLinear):
        way, columns, features = "column", layer.in_features, tuple(one.out_features for one in layers)
    else:
        way, columns, features = "row", layer.out_features, (layer.in_features,)
    kinds = ("gather", "scatter") if layer.sequence_parallel else ("total",)
    choices = _chosen(layer.group)
    return [
        _choice(shape, choice)
        for shape, choice in choices.items()
        if shape.kind in kinds and shape.way.startswith(way) and (shape.columns, shape.features) == (columns, features)
    ]


def _choice(shape: Shape, choice: Choice) -> str:
    what = {"gather": "all-gather", "scatter": "reduce-scatter", "total": "all-reduce"}[shape.kind]
    return f"{shape.way}, {what} and matmul, {shape}: {choice.how}, {choice.why}"
