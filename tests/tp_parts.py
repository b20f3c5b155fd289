"""A model whose parameters are cut over tensor-parallel ranks by hand, beside the whole one, for the tests.

Shapes are awkward: uneven cuts, a part without elements, fused pieces, both dimensions, a transposed weight; some
parameters are whole on all ranks, said so or not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyshard.placement import TensorShard, set_tensor_shard, tensor_shard

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# Name, shape of the whole, and how it is cut: along a dimension; "fused": three pieces a rank along dimension 0;
# "whole": said to be on all ranks; None: nothing is said.
SPECS: list[tuple[str, tuple[int, ...], Any]] = [
    ("embedding", (70, 130), 0),
    ("row", (33, 67), 1),
    ("fused", (3 * 22, 24), "fused"),
    ("norm", (13,), "whole"),
    ("plain", (4097,), None),
    ("fused_bias", (66,), "fused"),
    ("few", (3, 8), 0),
    ("transposed", (41, 24), 0),
    ("scalar", (), None),
    ("three", (5, 9, 7), 1),
]


@dataclass
class Mesh:
    """This process's groups among tp * dp ranks; tensor-parallel ranks are neighbours."""

    tp: dist.ProcessGroup
    dp: dist.ProcessGroup
    everyone: list[int]
    tp_rank: int
    dp_rank: int


def make_mesh(rank: int, world: int, tp: int, dp: int) -> Mesh | None:
    """The groups of the first tp * dp ranks, which all ranks make together; None on the others."""
    tps = [dist.new_group([d * tp + t for t in range(tp)]) for d in range(dp)]
    dps = [dist.new_group([d * tp + t for d in range(dp)]) for t in range(tp)]
    if rank >= tp * dp:
        return None
    return Mesh(tps[rank // tp], dps[rank % tp], list(range(tp * dp)), rank % tp, rank // tp)


def sizes_of(length: int, world: int) -> list[int]:
    return [length // world + (rank < length % world) for rank in range(world)]


def shard_of(spec: Any, shape: tuple[int, ...], group: dist.ProcessGroup) -> TensorShard:
    world = group.size()
    if spec == "whole":
        return TensorShard(group, shape)
    if spec == "fused":
        third = shape[0] // 3
        one = TensorShard.even(group, shape, 0, sizes_of(third, world)).pieces
        pieces = tuple(tuple((a + i * third, b + i * third) for i in range(3) for a, b in each) for each in one)
        return TensorShard(group, shape, 0, pieces)
    return TensorShard.even(group, shape, spec, sizes_of(shape[spec], world))


def wholes(seed: int, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator) for _, shape, _ in SPECS]
    return [value.to(dtypes[i % len(dtypes)]) for i, value in enumerate(values)]


def model_of(
    seed: int, group: dist.ProcessGroup | None = None, dtypes: Sequence[torch.dtype] = (F32,)
) -> nn.ParameterDict:
    """The model, or this rank's parts of it."""
    params = {}
    for (name, shape, spec), value in zip(SPECS, wholes(seed, dtypes), strict=True):
        shard = None if group is None or spec is None else shard_of(spec, shape, group)
        part = (value if shard is None else shard.cut(value)).clone(memory_format=torch.contiguous_format)
        if name == "transposed":
            part = part.t().contiguous().t()
        params[name] = nn.Parameter(part)
        if shard is not None:
            set_tensor_shard(params[name], shard)
    return nn.ParameterDict(list(params.items()))  # of a dict it would sort the names


def gradients(seed: int, dp_rank: int, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Of the whole parameters."""
    return wholes(seed * 1009 + dp_rank, dtypes)


def set_gradients(model: nn.Module, grads: Sequence[Tensor]) -> None:
    """Gives each parameter its part of a whole gradient."""
    for param, grad in zip(model.parameters(), grads, strict=True):
        shard = tensor_shard(param)
        value = grad if shard is None else shard.cut(grad)
        param.grad_dtype = value.dtype
        param.grad = torch.empty_like(param, dtype=value.dtype).copy_(value)


def summed(seed: int, dp: int, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The sum of the gradients of the data-parallel ranks, in rank order in fp32."""
    every = [gradients(seed, rank, dtypes) for rank in range(dp)]
    totals = [grad.float() for grad in every[0]]
    for grads in every[1:]:
        totals = [total + grad.float() for total, grad in zip(totals, grads, strict=True)]
    return totals


def part_of(param: Tensor, whole: Tensor) -> Tensor:
    """What a rank should hold of a whole value."""
    shard = tensor_shard(param)
    return whole if shard is None else shard.cut(whole)
