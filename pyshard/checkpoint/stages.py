"""What the ranks have by name, compared and put together: the stages of a pipeline make one checkpoint.

All ranks of a stage have the same names; those of the whole model are the names of all stages, in their order. A weight
that two stages have (tied weights) is one parameter of the optimizer: the copy's state is not saved, and loaded.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from ..placement import pipeline_share
from . import naming

# A parameter's name in the model, and what the user calls it in the optimizer, if the user does.
Name = tuple[str, str | None]


class Held(NamedTuple):
    """What one rank has, or all together.

    Attributes:
        stage: place in the pipeline; `stages` of them.
        names: of the values of the model.
        groups: names in each of the optimizer's parameter groups; None without an optimizer.
        copies: names of parameters of which an earlier stage saves the state.
        settings: hyperparameters of each group, in words.
    """

    stage: int
    stages: int
    names: list[str]
    groups: list[list[Name]] | None
    copies: set[str]
    settings: list[dict[str, str]]


def held(model: nn.Module, optimizer: Optimizer | None) -> Held:
    """What this rank has."""
    naming.reshard(model)
    shares = [share for param in model.parameters() if (share := pipeline_share(param)) is not None]
    stage, stages = (shares[0].group.rank(), shares[0].group.size()) if shares else (0, 1)
    groups, settings = None, []
    if optimizer is not None:
        by_param = naming.names_of(model, optimizer)
        groups = []
        for group in optimizer.param_groups:
            given = group.get("param_names") or [None] * len(group["params"])
            groups.append([(by_param[param], name) for param, name in zip(group["params"], given, strict=True)])
            settings.append({key: word for key, value in group.items() if (word := _word(value)) is not None})
    copies = {naming.plain(share.name) for share in shares if not share.counted}
    return Held(stage, stages, list(naming.state_of(model)), groups, copies, settings)


def _word(value: Any) -> str | None:
    """A hyperparameter in a form that can be sent and compared; None if there is none."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {value.tolist()}"
    if isinstance(value, tuple) and all(isinstance(each, (int, float, Tensor)) for each in value):
        return repr(tuple(map(_word, value)))
    return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else None


def together(ranks: Sequence[int], every: Sequence[Held]) -> Held:
    """What all ranks have together.

    Raises:
        ValueError: ranks of one stage have different names, or stages what does not fit together.
    """
    first: dict[int, tuple[int, Held]] = {}  # of each stage the first rank, which is global, and what it has
    for rank, mine in zip(ranks, every, strict=True):
        other, known = first.setdefault(mine.stage, (rank, mine))
        if mine.stages != every[0].stages:
            raise ValueError(
                f"the model is cut into {every[0].stages} pipeline stages on rank {ranks[0]} and {mine.stages} on rank "
                f"{rank}; expected the same pipeline. Every stage needs a parameter with a pipeline_share."
            )
        _same_names(other, known.names, rank, mine.names, "the model")
        _same_groups(ranks[0], every[0], rank, mine)
        for index, (theirs, ours) in enumerate(zip(known.groups or (), mine.groups or (), strict=True)):
            what = f"group {index} of the optimizer"
            _same_names(other, [name for name, _ in theirs], rank, [name for name, _ in ours], what)
    if sorted(first) != list(range(every[0].stages)):
        raise ValueError(
            f"the ranks have stages {sorted(first)} of a pipeline of {every[0].stages}; expected all. Call this on all "
            "ranks of the pipeline, with the model that is cut."
        )
    stages = [first[stage][1] for stage in sorted(first)]
    names = dict.fromkeys(name for stage in stages for name in stage.names)
    groups = None if stages[0].groups is None else [_join(stages, i) for i in range(len(stages[0].groups))]
    return Held(0, 1, list(names), groups, set(), [])


def _same_names(a: int, names: Sequence[str], b: int, others: Sequence[str], what: str) -> None:
    for here, rank, there, other in ((names, a, set(others), b), (others, b, set(names), a)):
        odd = next((name for name in here if name not in there), None)
        if odd is not None:
            raise ValueError(
                f"{odd} is in {what} on rank {rank} and not on rank {other}; expected the same names on both. Build "
                "the same model on all ranks of a pipeline stage; without a pipeline, on all ranks."
            )


def _same_groups(a: int, one: Held, b: int, other: Held) -> None:
    counts = [None if each.groups is None else len(each.groups) for each in (one, other)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"the optimizer has {counts[0]} parameter groups on rank {a} and {counts[1]} on rank {b}; expected as many "
            "on all ranks. Give every pipeline stage all groups; some may be without parameters."
        )
    for index, (ours, theirs) in enumerate(zip(one.settings, other.settings, strict=True)):
        for key in sorted({*ours, *theirs}):
            if ours.get(key) != theirs.get(key):
                raise ValueError(
                    f"{key} of group {index} of the optimizer is {ours.get(key)} on rank {a} and {theirs.get(key)} on "
                    f"rank {b}; expected the same. Set it on all ranks."
                )


def _join(stages: Sequence[Held], index: int) -> list[Name]:
    """The parameters of a group on all stages, in their order."""
    found: dict[str, Name] = {}
    owner: dict[str, int] = {}
    for place, stage in enumerate(stages):
        for name, given in (stage.groups or [])[index]:
            if name in stage.copies:
                continue
            if name in owner:
                raise ValueError(
                    f"{name} is trained on stages {owner[name]} and {place} of the pipeline; expected one of them, and "
                    "copies whose pipeline_share says counted=False."
                )
            owner[name], found[name] = place, (name, given)
    for place, stage in enumerate(stages):
        for name, _ in (stage.groups or [])[index]:
            if name not in found:
                raise ValueError(
                    f"stage {place} of the pipeline trains a copy of {name}, and no stage has the parameter itself in "
                    f"group {index} of its optimizer; expected it there. Train both, in groups of the same place."
                )
    return list(found.values())


def name_groups(saved: dict[str, Any], whole: Held) -> None:
    """Gives the parameter groups that are saved the names of all stages."""
    for group, names in zip(saved.get("optimizer", {}).get("param_groups", ()), whole.groups or (), strict=True):
        group["params"] = [name for name, _ in names]
        if "param_names" in group:
            group["param_names"] = [given for _, given in names]
