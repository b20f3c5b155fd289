"""Plain collectives of torch.distributed, nothing hidden behind anything: what the other transports are compared with.

Sums travel as the parts of all ranks and are added in rank order (sums.py), since the order inside a library's own
reduce-scatter depends on the backend and the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .splits import resized, split_sizes
from .sums import sum_in_order


def all_gather(x: Tensor, dim: int, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """The parts of all ranks in rank order, whole along dim.

    Args:
        x: this rank's part, sizes[rank] long in dimension dim.
        sizes: of all ranks' parts.
    """
    parts = _exchange([x] * len(sizes), [resized(x, dim, size) for size in sizes], group)
    return torch.cat(parts, dim)


def reduce_scatter(
    x: Tensor, dim: int, sizes: Sequence[int], group: dist.ProcessGroup, bias: Tensor | None = None
) -> Tensor:
    """This rank's part along dim of the sum of all ranks' x, and `bias` added to it.

    Args:
        x: whole along dim on every rank.
        sizes: of the parts of all ranks; their sum is x's size.
    """
    rank = dist.get_rank(group)
    pieces = list(x.split(list(sizes), dim))
    shape = resized(x, dim, sizes[rank])
    return sum_in_order(_exchange(pieces, [shape] * len(sizes), group), bias=bias)


def all_reduce(x: Tensor, group: dist.ProcessGroup, bias: Tensor | None = None) -> Tensor:
    """The sum of all ranks' x, and `bias` added to it."""
    world = dist.get_world_size(group)
    width = x.shape[-1] if x.dim() else 1
    rows = x.reshape(-1, width)
    sizes = split_sizes(rows.shape[0], world)
    return all_gather(reduce_scatter(rows, 0, sizes, group, bias), 0, sizes, group).reshape(x.shape)


def _exchange(sends: Sequence[Tensor], shapes: Sequence[list[int]], group: dist.ProcessGroup) -> list[Tensor]:
    """sends[r] to rank r, and what each rank has sent to this one, of the given shapes."""
    rank = dist.get_rank(group)
    own = sends[rank].contiguous()
    received = [own if r == rank else own.new_empty(shape) for r, shape in enumerate(shapes)]
    works = []
    ranks = dist.get_process_group_ranks(group)
    world = len(ranks)
    operations = []
    for step in range(1, world):
        source, target = (rank - step) % world, (rank + step) % world
        if received[source].numel():
            operations.append(dist.P2POp(dist.irecv, received[source], ranks[source], group))
        if sends[target].numel():
            operations.append(dist.P2POp(dist.isend, sends[target].contiguous(), ranks[target], group))
    if operations:
        works = dist.batch_isend_irecv(operations)
    for work in works:
        work.wait()
    return received
