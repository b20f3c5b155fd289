"""From a Shard to the launch of its kernels: the rows are the runs of parameters that this rank owns."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.formats import LOW_KEY, kind_of
from ..kernels.launch import Entry, HostLaunch, Launch
from . import plan
from . import state as states
from .shards import Shard

if TYPE_CHECKING:
    from .sharded import ShardedAdam


def launch_of(optimizer: "ShardedAdam", shard: Shard, flags: bytes, flat: Tensor, first: int) -> Launch:
    """The launch that updates the owned runs of the parameters of a bucket whose flag is set.

    Their gradients lie in `flat`, which begins with element `first` of the bucket. Made again only when something that
    it was made from has changed.
    """
    granted = flags, flat.data_ptr(), flat.dtype
    if shard.granted != granted:
        for piece, there, grad in zip(shard.pieces, flags, shard.owned_grads(flat, first), strict=True):
            piece.grad = None
            if there:
                piece.grad_dtype = grad.dtype
                piece.grad = grad
        shard.granted = granted
    groups = optimizer.param_groups
    made_from = [(len(group["params"]), plan.switches(group)) for group in groups]
    if shard.launch is not None and shard.made_from == made_from:
        kept = optimizer.state
        same = all(shard.states.get(q) is kept.get(p) for q, p in zip(shard.pieces, shard.params, strict=True))
        if same and shard.launch.table.refresh(shard.groups, shard.states):
            return shard.launch
    shard.launch = None
    shard.launch = _make(optimizer, shard)
    shard.made_from = made_from
    return shard.launch


def _make(optimizer: "ShardedAdam", shard: Shard) -> Launch:
    who = f"pyshard.{type(optimizer).__name__}"
    group_of = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    names = {param: name for _, name, param in plan.named_params(optimizer.param_groups)}
    shard.groups = [{"params": shard.pieces}]
    shard.states = {}
    by_backend: dict[Any, list[Entry]] = {}
    idle: list[Tensor] = []
    for piece, param in zip(shard.pieces, shard.params, strict=True):
        kept = optimizer.state.get(param)
        if piece.grad is None and not kept:
            idle.append(piece)
            continue
        group = optimizer.param_groups[group_of[param]]
        fmt, _ = plan.check(optimizer, who, names[param], piece, group)
        backend = shard.backend
        states.check(who, names[param], piece, kept or {}, fmt)
        items = shard.states[piece] = optimizer.state[param]
        coupled, amsgrad, _ = plan.switches(group)
        states.fill(piece, items, fmt, amsgrad, False)
        grad_dtype = torch.float32 if piece.grad is None else piece.grad.dtype
        entry = Entry(
            name=names[param],
            param=piece,
            states=shard.states,
            group=group_of[param],
            fmt=fmt,
            kind=-1 if fmt is None else kind_of(fmt, grad_dtype, coupled, amsgrad),
            grad_dtype=grad_dtype,
            low_key=None if fmt is None else LOW_KEY.get(fmt),
            amsgrad=amsgrad,
            coupled=coupled,
        )
        by_backend.setdefault((backend, piece.device), []).append(entry)
    if len(by_backend) > 1:
        raise RuntimeError(f"{who}: a bucket has parameters of several backends: {sorted(map(str, by_backend))}")
    launch: Launch
    if by_backend:
        (((backend, device), entries),) = by_backend.items()
        launch = plan.launch(optimizer, (backend, device, False, ()), entries, idle)
    else:
        launch = HostLaunch("cpu", shard.arena.params.device, [], idle)
    launch.table.seal(shard.groups, shard.states)
    return launch
