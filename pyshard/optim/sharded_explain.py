"""The text of explain() of a sharded optimizer: the transport and why, each bucket, and bytes per rank."""

from typing import TYPE_CHECKING

from torch import Tensor

from ..kernels.registry import requested

if TYPE_CHECKING:
    from .sharded import ShardedAdam


def held_bytes(optimizer: "ShardedAdam") -> dict[str, int]:
    """Bytes that this rank holds, by kind. Parameters and gradients outside of the optimizer are not counted."""
    kinds = {"parameters": 0, "gradients": 0, "gradients on their way": 0, "state": 0}
    for generation in optimizer._generations:
        kinds["parameters"] += sum(param.nbytes for param in generation.params)
        arenas = {shard.arena for shard in generation.shards}
        kinds["gradients on their way"] += sum(arena.traffic_bytes for arena in arenas)
        in_slots = {view.data_ptr() for shard in generation.shards for view in shard.slot_views()}
        kinds["gradients"] += sum(s.reduced.nbytes for s in generation.shards if s.reduced is not None)
        for param in generation.params:
            if param.grad is not None and param.grad.data_ptr() not in in_slots:
                kinds["gradients"] += param.grad.nbytes
    for items in optimizer.state.values():
        kinds["state"] += sum(v.nbytes for v in items.values() if isinstance(v, Tensor))
    return kinds


def explain(optimizer: "ShardedAdam") -> str:
    """One line for the transport, one for each bucket, one for each kind of memory."""
    options = optimizer.options
    lines = [
        f"pyshard.{type(optimizer).__name__}, stage {optimizer.stage}, rank {optimizer.rank} of {optimizer.world}, "
        f"backend={requested(options.backend)!r}, master_weights={options.master_weights!r}"
    ]
    transport = optimizer._transport
    if transport is None:
        return "\n".join(lines)
    lines.append(f"  transport {transport.name}: {transport.why}")
    for generation in optimizer._generations:
        for index, bucket in enumerate(generation.layout):
            own = bucket.cuts[optimizer.rank + 1] - bucket.cuts[optimizer.rank]
            dtype, wire = (str(d).removeprefix("torch.") for d in (bucket.dtype, bucket.wire))
            shard = generation.shards[index] if generation.shards else None
            backend = "" if shard is None or shard.launch is None else f", updated by {shard.launch.backend}"
            lines.append(
                f"  bucket {index}: {len(bucket.places)} parameters of {dtype}, {bucket.numel:,} elements, {own:,} of "
                f"them owned here; gradients travel in {wire} and are summed in float32{backend}"
            )
    if optimizer.stage == 1 and transport.in_place:
        path = "sum over ranks, update and publication in one pass over memory, inside step()"
    elif optimizer.stage == 1:
        path = "gradients are sent and summed inside step()"
    else:
        path = "gradients are sent and summed while backward runs"
    publish = (
        "written to all ranks by the update itself" if transport.in_place else "sent to all ranks after the update"
    )
    if optimizer._gathering is not None and not transport.in_place:
        publish += ", while the next forward runs"
    lines.append(f"  each step: {path}; new parameters are {publish}")
    lines.append(
        f"  max_grad_norm={options.max_grad_norm}, nonfinite={options.nonfinite!r}"
        + ("; one more pass over the summed gradients for their norm" if options.needs_norm() else "")
    )
    if optimizer._peers is not None:
        lines += optimizer._peers.explain(optimizer)
    held = ", ".join(f"{kind} {size:,}" for kind, size in held_bytes(optimizer).items())
    lines.append(f"  bytes on this rank: {held}")
    return "\n".join(lines)
