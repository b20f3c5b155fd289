"""pyshard.pp.pipeline: cuts a model into stages and keeps those of this rank."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..comm.agree import objects
from ..kernels.launch import local_tensor
from ..placement import PipelineShare, set_pipeline_share
from . import balance as balancing
from .inputs import input_names
from .parts import Plan, parts_of
from .pipeline import Pipeline
from .runtime import Settings
from .schedules import check, kind_of, ranks_of_stages
from .stage import Absent, Stage, StageBlocks
from .ties import Tie

_WHO = "pyshard.pp.pipeline"


def pipeline(
    model: nn.Module,
    mesh: DeviceMesh | dist.ProcessGroup,
    schedule: str = "1f1b",
    n_microbatches: int | None = None,
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    balance: str | Sequence[int] = "parameters",
    stages_per_rank: int | None = None,
    plan: Plan | None = None,
    example: dict[str, Any] | None = None,
    loss_reduction: str = "mean",
) -> Pipeline:
    """Cuts a model into stages by its blocks, keeps those of this rank, and returns what runs all of them in step.

    Called on all ranks with the same model, which is taken apart: what belongs to other ranks is dropped from it. It
    may be cut by pyshard.tp.parallelize before, and sharded by pyshard.fully_shard after this; it may be on the meta
    device and get its memory afterwards. Every stage runs the model's own forward on the same inputs, with stand-ins
    for what other stages hold, so models of transformers (GPT-2, Llama and others whose forward is one loop over a list
    of blocks) work as they are. Hidden states go between ranks through torch.distributed.pipelining.

    Args:
        model: with one nn.ModuleList of blocks, each of which takes hidden states first and returns them.
        mesh: from init_mesh, with a dimension "pp"; one with a single dimension; or a process group.
        schedule: "gpipe", "1f1b", "looped_bfs", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble" or
            "dual_pipe_v"; those after the second give each rank several stages.
        n_microbatches: into how many parts a batch is cut. None: twice the number of stages.
        loss_fn: (output of the last stage, target) -> 0-d loss of a microbatch. None: that of a causal language model
            of transformers, whose target is the token ids; of other models, that there are no losses.
        balance: "parameters": the stage with most of them has as few as possible; "time": the same by measured seconds
            of forward and backward (needs `example`); or the number of blocks of each stage.
        stages_per_rank: None: 2 for the schedules with several stages, else 1.
        plan: which modules are used before and after the blocks. None: by the order in which they are registered.
        example: inputs of the model by name, of a microbatch's size, for balance="time"; also the target, if it is
            not the first of them.
        loss_reduction: "mean": the loss is the mean over microbatches; "sum": it is their sum, for a loss_fn that sums
            and divides by a count of its own. (A mean over unequal numbers of tokens is not that of the whole batch.)

    Raises:
        ValueError, TypeError: on all ranks, before the model is changed.

    Source: Huang et al. 2019 (gpipe); Narayanan et al. 2019, 2021 (1f1b, interleaved); Lamy-Poirier 2022 (looped_bfs);
    Qi et al. 2023 (zero bubble, zbv); DeepSeek-AI 2024 (dual pipe).
    """
    group = pipeline_group(mesh)
    problem: Exception | None = None
    try:
        made = _prepare(model, group, schedule, n_microbatches, stages_per_rank, plan, balance, example, loss_reduction)
        kind, microbatches, stages, parts = made
    except (ValueError, TypeError) as error:
        problem = error
    options = repr((schedule, n_microbatches, balance, stages_per_rank, plan, loss_reduction, loss_fn is None))
    _agree(model, options, problem, group)
    if loss_fn is None:
        loss_fn = causal_lm_loss(model)
    device = _device(model, mesh)
    bounds = _bounds(model, parts, stages, balance, example, loss_fn, mesh, group, device)
    rank, ranks = dist.get_rank(group), ranks_of_stages(kind, group.size(), stages)
    settings = Settings(
        kind, microbatches, loss_fn, loss_reduction == "mean", tuple(ranks), tuple(bounds), input_names(model)
    )
    holders = _holders(model, parts, bounds)
    _check_tied(model, holders, group)
    mine = [Stage(model, parts, i, stages, *bounds[i]) for i in range(stages) if ranks[i] == rank]
    ties = _share(model, mine, holders, ranks, group)
    _take_apart(model, parts)
    return Pipeline(mine, settings, ties, group, device)


def pipeline_group(mesh: DeviceMesh | dist.ProcessGroup) -> dist.ProcessGroup:
    """The ranks of this process's pipeline."""
    if isinstance(mesh, DeviceMesh):
        names = mesh.mesh_dim_names or ()
        if "pp" in names:
            return mesh.get_group("pp")
        if mesh.ndim == 1:
            return mesh.get_group()
        raise ValueError(
            f"{_WHO}: got a mesh with dimensions {names or mesh.ndim}; expected one named 'pp', or a single one. Build "
            "it with pyshard.init_mesh(pp=..., dp=..., tp=...)."
        )
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    raise TypeError(
        f"{_WHO}: got mesh of type {type(mesh).__name__}; expected a DeviceMesh with a dimension 'pp', or a process "
        "group of this process."
    )


def causal_lm_loss(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The loss of a causal language model of transformers: logits [batch, time, vocabulary], ids [batch, time]."""
    config, name = getattr(model, "config", None), type(model).__name__
    if not name.endswith(("ForCausalLM", "LMHeadModel")) or not hasattr(model, "loss_function"):
        return None
    function: Any = model.loss_function
    size = config.vocab_size  # type: ignore[union-attr]

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return function(logits=logits, labels=labels, vocab_size=size)

    return loss


def _prepare(
    model: nn.Module,
    group: dist.ProcessGroup,
    schedule: str,
    n_microbatches: int | None,
    stages_per_rank: int | None,
    plan: Plan | None,
    balance: str | Sequence[int],
    example: dict[str, Any] | None,
    loss_reduction: str,
) -> tuple[Any, int, int, Plan]:
    """Everything that can be wrong on one rank."""
    kind = kind_of(schedule)
    per_rank = (2 if kind.several else 1) if stages_per_rank is None else stages_per_rank
    parts = parts_of(model, plan)
    blocks = len(list(model.get_submodule(parts.blocks).children()))
    stages = group.size() * per_rank if isinstance(per_rank, int) else 0
    microbatches = 2 * stages if n_microbatches is None else n_microbatches
    check(kind, group.size(), per_rank, microbatches, blocks)
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(f"{_WHO}: loss_reduction={loss_reduction!r}; expected 'mean' or 'sum'.")
    if isinstance(balance, str):
        if balance not in ("parameters", "time"):
            raise ValueError(f"{_WHO}: balance={balance!r}; expected 'parameters', 'time' or a list of block counts.")
        if balance == "time" and not example:
            raise ValueError(f"{_WHO}: balance='time' without example; expected inputs of a microbatch's size by name.")
        if balance == "time" and any(param.is_meta for param in model.parameters()):
            raise ValueError(f"{_WHO}: balance='time' and a model on the meta device; expected one that can run.")
    elif len(balance) != stages or sum(balance) != blocks or any(int(n) < 1 for n in balance):
        raise ValueError(
            f"{_WHO}: balance={list(balance)}; expected {stages} block counts of 1 or more that make {blocks}."
        )
    return kind, microbatches, stages, parts


def _device(model: nn.Module, mesh: DeviceMesh | dist.ProcessGroup) -> torch.device:
    """Where stages compute."""
    device = next((p.device for p in model.parameters() if not p.is_meta), None)
    if device is not None:
        return device
    kind = mesh.device_type if isinstance(mesh, DeviceMesh) else "cpu"
    return torch.device(kind, torch.accelerator.current_device_index()) if kind != "cpu" else torch.device("cpu")


def _bounds(
    model: nn.Module,
    parts: Plan,
    stages: int,
    balance: str | Sequence[int],
    example: dict[str, Any] | None,
    loss_fn: Any,
    mesh: DeviceMesh | dist.ProcessGroup,
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[tuple[int, int]]:
    """[begin, end) of the blocks of each stage, the same on all ranks."""
    if not isinstance(balance, str):
        ends = [sum(balance[: i + 1]) for i in range(stages)]
        return [(end - size, end) for end, size in zip(ends, balance, strict=True)]
    if balance == "parameters":
        return balancing.split(balancing.by_parameters(model, parts), stages)

    inputs = dict(example or {})
    target = inputs.pop("target", next((value for value in inputs.values() if isinstance(value, Tensor)), None))

    def loss(output: Tensor) -> Tensor:
        return output.float().sum() if loss_fn is None else loss_fn(output, target)

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    problem: Exception | None = None
    values: list[Any] = [[]]
    try:
        values = [balancing.by_time(model, parts, inputs, loss, wait).values()]
    except Exception as error:
        problem = error
    # One rank's times count, or the ranks of a stage would not hold the same blocks.
    for each in mesh.get_all_groups() if isinstance(mesh, DeviceMesh) else [group]:
        _raise_together(problem, each)
        values = objects(_WHO, each, "times of the blocks", values)[0]
    return balancing.split(balancing.Costs.of(values[0]), stages)


def _raise_together(problem: Exception | None, group: dist.ProcessGroup) -> None:
    """Raises on all ranks of a group what one of them has met while it measured."""
    mine = None if problem is None else f"{type(problem).__name__}: {problem}"
    every = objects(_WHO, group, "measurement of the blocks", mine)
    if problem is not None:
        raise problem
    for rank, text in zip(dist.get_process_group_ranks(group), every, strict=True):
        if text is not None:
            raise ValueError(f"{_WHO}: balance='time' failed on rank {rank}: {text}")


# ---- tied weights ----

# (canonical name, all names, stages that hold it) of each parameter, by its id
_Holders = dict[int, tuple[str, list[str], list[int]]]


def _holders(model: nn.Module, parts: Plan, bounds: list[tuple[int, int]]) -> _Holders:
    found: _Holders = {}
    stages = len(bounds)
    for name, param in model.named_parameters(remove_duplicate=False):
        _, names, where = found.setdefault(id(param), (name, [], []))
        names.append(name)
        if name.startswith(f"{parts.blocks}."):
            block = int(name[len(parts.blocks) + 1 :].partition(".")[0])
            places = [next(s for s, (begin, end) in enumerate(bounds) if begin <= block < end)]
        else:
            places = [0] * any(name.startswith(f"{n}.") for n in parts.first)
            places += [stages - 1] * any(name.startswith(f"{n}.") for n in parts.last)
        where += [place for place in places if place not in where]
    return found


def _share(
    model: nn.Module, mine: list[Stage], holders: _Holders, ranks: list[int], group: dist.ProcessGroup
) -> list[Tie]:
    """Tells each parameter what it is to the whole model; finds what several ranks hold."""
    me, ties = dist.get_rank(group), []
    here: dict[int, str] = {}
    for stage in mine:
        for name, param in stage.model.named_parameters(remove_duplicate=False):
            here.setdefault(id(param), name)
    for param in {id(p): p for p in model.parameters()}.values():
        name, _, stages = holders[id(param)]
        owners = list(dict.fromkeys(ranks[stage] for stage in sorted(stages)))
        if len(owners) > 1:
            ties.append(Tie(name, here.get(id(param)), owners))
        if id(param) in here:
            share = PipelineShare(group, name, counted=owners[0] == me, tied=len(owners) > 1)
            set_pipeline_share(param, share)
    return ties


def _take_apart(model: nn.Module, parts: Plan) -> None:
    """Drops from the model what the stages of this rank do not hold, so that nothing else keeps it in memory."""
    for name in (parts.blocks, *parts.first, *parts.last):
        parent, _, key = name.rpartition(".")
        old = model.get_submodule(name)
        gone = StageBlocks(list(old.children()), 0, 0, False) if name == parts.blocks else Absent(name)
        model.get_submodule(parent)._modules[key] = gone


# ---- agreement ----


def _agree(model: nn.Module, options: str, problem: Exception | None, group: dist.ProcessGroup) -> None:
    """Raises on all ranks if one of them has a problem, other options or a model of other shapes."""
    shapes = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
    mine = (None if problem is None else str(problem), options, shapes)
    every = objects(_WHO, group, "making of a pipeline", mine)
    if problem is not None:
        raise problem
    ranks = dist.get_process_group_ranks(group)
    for rank, (text, its_options, its_shapes) in zip(ranks, every, strict=True):
        if text is not None:
            raise ValueError(f"{_WHO}: on rank {rank}: {text}")
        if its_options != options:
            raise ValueError(
                f"{_WHO}: rank {rank} was called with (schedule, n_microbatches, balance, stages_per_rank, plan, "
                f"loss_reduction, loss_fn is None) = {its_options}, this one with {options}; expected the same."
            )
        if its_shapes != shapes:
            name = next((a[0] for a, b in zip(shapes, its_shapes, strict=False) if a != b), "the number of parameters")
            raise ValueError(
                f"{_WHO}: {name} is not the same on rank {rank} and this one; expected the same model on all ranks."
            )


def _check_tied(model: nn.Module, holders: _Holders, group: dist.ProcessGroup) -> None:
    """Raises on all ranks if copies of a tied weight would begin with different values."""
    digests = {}
    for param in model.parameters():
        name, _, stages = holders[id(param)]
        if len(stages) > 1 and not param.is_meta:
            value = local_tensor(param.detach()).contiguous().cpu()
            digests[name] = hashlib.sha1(value.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    every = objects(_WHO, group, "comparison of tied weights", digests)
    ranks = dist.get_process_group_ranks(group)
    for rank, theirs in zip(ranks, every, strict=True):
        differing = next((name for name in digests if theirs.get(name) != digests[name]), None)
        if differing is not None or theirs.keys() != digests.keys():
            raise ValueError(
                f"{_WHO}: {differing} has other values on rank {rank} than on this one; expected the same, since "
                "several stages hold it. Seed all ranks alike, or load the same weights, before this call."
            )
