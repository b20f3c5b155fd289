"""What a rank holds of a GPT-2 in training, in each layout of pyshard: predicted from shapes alone.

A layout says over how many ranks the batch (dp), the layers (tp) and the list of blocks (pp) are cut, and what the dp
ranks share. predict() knows the rules by which pyshard cuts and pads; it needs neither memory for the model (it may be
on the meta device) nor other ranks. layout_run.py measures the same kinds in real processes. docs/memory.md has the
formulas in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pyshard.blocks import find_blocks
from pyshard.comm.collective import ALIGNMENT
from pyshard.comm.shm import ShmTransport
from pyshard.optim.layout import Bucket, Spec, make_layout
from pyshard.pp import balance
from pyshard.pp.parts import parts_of
from pyshard.tp.layers import is_conv1d
from pyshard.tp.plans import make_plan

KINDS = ("weights", "gradients", "slots", "moments", "masters", "gathered")
SLOTS = 3  # of one bucket each, at stage 2
STEP_COUNT = 4  # bytes: each parameter's, in fp32

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A way to spread a model over dp * tp * pp ranks.

    Attributes:
        way: what the dp ranks do: "" each has all; "stage1", "stage2": ShardedAdamW; "full": fully_shard.
        replicas: of the cut weights, each over dp / replicas ranks (HSDP); with "full" alone.
        transport: of ShardedAdamW: "shm" on one host, "collective" between hosts.
        bucket_mb: of ShardedAdamW.
        compute: dtype in which "full" computes; "" that of the weights.
    """

    name: str
    dp: int = 1
    tp: int = 1
    pp: int = 1
    way: str = ""
    replicas: int = 1
    transport: str = "shm"
    bucket_mb: float = 25
    compute: str = ""

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp

    def place(self, rank: int) -> tuple[int, int, int]:
        """Coordinates in pp, dp and tp, as pyshard.init_mesh has them."""
        return rank // (self.dp * self.tp), rank // self.tp % self.dp, rank % self.tp


LAYOUTS = (
    Layout("one process"),
    Layout("ShardedAdamW stage 1, dp 2", dp=2, way="stage1"),
    Layout("ShardedAdamW stage 2, dp 2", dp=2, way="stage2"),
    Layout("fully_shard, dp 2", dp=2, way="full"),
    Layout("fully_shard, dp 2, computes in bf16", dp=2, way="full", compute="bfloat16"),
    Layout("HSDP, 2 x 2", dp=4, way="full", replicas=2),
    Layout("tp 2", tp=2),
    Layout("pp 2", pp=2),
    Layout("ShardedAdamW stage 2, dp 2, tp 2, pp 2", dp=2, tp=2, pp=2, way="stage2"),
    Layout("fully_shard, dp 2, tp 2, pp 2", dp=2, tp=2, pp=2, way="full"),
)


def predict(model: nn.Module, layout: Layout, rank: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that a rank holds after a step, by kind; of "gathered" the most that it holds during one.

    Args:
        model: the whole GPT-2 of transformers, on any device; its dtype does not count.
        dtype: of its weights and gradients: fp32, or bf16 with split masters.

    Kinds: weights; gradients that stay until the next zero_grad() or backward; slots, in which gradients travel between
    dp ranks; moments, with the step counts; masters, the lower halves of split weights; and gathered, the weights and
    gradients of units of full sharding that are whole for a while.
    """
    stage, data, tensor = layout.place(rank)
    shapes = held_shapes(model, layout, stage, tensor)
    size, count = dtype.itemsize, STEP_COUNT * len(shapes)
    rest = 0 if dtype == torch.float32 else 2  # bytes of a master beside its weight
    held = dict.fromkeys(KINDS, 0)
    if layout.way == "full":
        world = layout.dp // layout.replicas
        index = data % world
        padded = sum(_padded(shape, world) for shape in shapes.values())
        own = sum(_rows(shape, world, index) for shape in shapes.values())
        held["weights"] = held["gradients"] = padded * size
        compute = getattr(torch, layout.compute) if layout.compute else dtype
        held["gathered"] = _gathered(model, shapes, layout.pp > 1, world, compute)
    elif layout.way:
        buckets = _buckets(layout, shapes.values(), dtype)
        held["weights"] = size * _numel(shapes.values())
        runs = [bucket.run(place, data) for bucket in buckets for place in bucket.places]
        own = sum(end - begin for begin, end in runs)
        summed = 4 * sum(bucket.cuts[data + 1] - bucket.cuts[data] for bucket in buckets)
        if layout.way == "stage1" and layout.transport == "shm":  # ranks read each other's gradients where they are
            held["slots"] = sum(bucket.slot_bytes for bucket in buckets)
        else:
            held["gradients"] = summed + (held["weights"] if layout.way == "stage1" else 0)
            held["slots"] = SLOTS * max(bucket.slot_bytes for bucket in buckets)
        if layout.transport == "collective":
            held["slots"] += (layout.dp - 1) * _received(buckets, data)
    else:
        own = _numel(shapes.values())
        held["weights"] = held["gradients"] = own * size
    held["moments"], held["masters"] = 8 * own + count, rest * own
    return held


def total(held: dict[str, int]) -> int:
    return sum(held.values())


def held_shapes(model: nn.Module, layout: Layout, stage: int, tensor: int) -> dict[str, Shape]:
    """The parameters of a pipeline stage as a tensor-parallel rank has them, tied ones once, in their order."""
    local = _tensor_parallel(model, layout.tp, tensor)
    seen: set[int] = set()
    found: dict[str, Shape] = {}
    prefixes = _prefixes(model, layout.pp, stage)
    for name, param in model.named_parameters(remove_duplicate=False):
        if id(param) not in seen and name.startswith(prefixes):
            seen.add(id(param))
            found[name] = local.get(name, tuple(param.shape))
    return found


def _tensor_parallel(model: nn.Module, world: int, rank: int) -> dict[str, Shape]:
    """The shapes of what is cut: features out of column layers with their bias, features into row layers."""
    found: dict[str, Shape] = {}
    for cut in make_plan(model, "auto", world).cuts if world > 1 else ():
        module = model.get_submodule(cut.name)
        features = sum(end - begin for begin, end in cut.pieces[rank])
        shape = list(module.weight.shape)  # type: ignore[union-attr, arg-type]
        shape[1 - cut.dim if is_conv1d(module) else cut.dim] = features
        found[f"{cut.name}.weight"] = tuple(shape)
        if getattr(module, "bias", None) is not None and cut.dim == 0:
            found[f"{cut.name}.bias"] = (features,)
    return found


def _prefixes(model: nn.Module, stages: int, stage: int) -> tuple[str, ...]:
    """With what names of a stage's parameters begin. Stages have as few parameters as possible in the largest one."""
    if stages == 1:
        return ("",)
    parts = parts_of(model, None)
    begin, end = balance.split(balance.by_parameters(model, parts), stages)[stage]
    modules = [f"{parts.blocks}.{index}" for index in range(begin, end)]
    modules += [*parts.first] if stage == 0 else []
    modules += [*parts.last] if stage == stages - 1 else []
    return tuple(f"{name}." for name in modules)


# ---- a sharded optimizer ----


def _buckets(layout: Layout, shapes: Iterable[Shape], dtype: torch.dtype) -> list[Bucket]:
    """Where link and memory are fast. (Over a slow link, which is measured, buckets are of at most 2 MiB.)"""
    limit = int(layout.bucket_mb * 2**20)
    if layout.transport == "shm":
        limit = min(limit, ShmTransport.bucket_bytes)
    return make_layout([Spec(math.prod(shape), dtype, dtype) for shape in shapes], layout.dp, limit)


def _received(buckets: list[Bucket], data: int) -> int:
    """What comes from one other rank into the slots, after some steps: each is as large as the largest run that was in
    it. Buckets take the slots in turn, so where their number is no multiple of that of the slots, any gets into any."""
    spans = [bucket.grad_spans()[data] for bucket in buckets]
    runs = [-(-(end - begin) // ALIGNMENT) * ALIGNMENT for begin, end in spans]
    if len(runs) % SLOTS:
        return SLOTS * max(runs)
    return sum(max(runs[slot::SLOTS]) for slot in range(SLOTS))


# ---- full sharding: along dimension 0, all ranks with the memory of the first one, which has most ----


def _rows(shape: Shape, world: int, index: int) -> int:
    """Elements that one of the ranks has."""
    chunk = -(-shape[0] // world)
    return min(max(shape[0] - index * chunk, 0), chunk) * math.prod(shape[1:])


def _padded(shape: Shape, world: int) -> int:
    return _rows(shape, world, 0)


def _gathered(model: nn.Module, shapes: dict[str, Shape], pipeline: bool, world: int, dtype: torch.dtype) -> int:
    """Whole weights and gradients at the peak of a step that computes in a dtype.

    Of a model: the weights of what is outside of the blocks, all through the step; and either one block with its
    gradients, and those of what comes after the blocks, or at the end all gradients outside of the blocks.
    Of a pipeline: everything, from the first microbatch to the last, with gradients in the dtype in which they are
    summed, fp32; beside them, if they have another one, at most all those of the last microbatch.
    """

    def whole(names: Sequence[str]) -> int:
        return world * sum(_padded(shapes[name], world) for name in names) * dtype.itemsize

    def gradients(names: Sequence[str], size: int) -> int:
        return _numel(shapes[name] for name in names) * size

    names, size = list(shapes), dtype.itemsize
    if pipeline:
        return whole(names) + gradients(names, 4 if dtype == torch.float32 else 4 + size)
    ((blocks, modules),) = find_blocks(model)
    units = [[name for name in names if name.startswith(f"{blocks}.{index}.")] for index in range(len(modules))]
    root = [name for name in names if not name.startswith(f"{blocks}.")]
    # Backward has the gradient of a weight that is also used before the blocks when it has come there.
    after = [name for name in root if name.startswith(tuple(f"{name}." for name in parts_of(model, None).last))]
    one = max(whole(unit) + gradients(unit, size) for unit in units)
    return whole(root) + max(one + gradients(after, size), gradients(root, size))


def _numel(shapes: Iterable[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)
