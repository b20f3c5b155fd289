"""Runs and parts of tensors as rectangles: arithmetic on shapes and strides, without memory.

A run is a number of consecutive elements in the order of a tensor's memory. A part is what a tensor-parallel rank holds
of a whole tensor.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.launch import is_dtensor
from ..placement import Piece, tensor_shard


class Rectangle(NamedTuple):
    """A part of a tensor: `sizes` elements from `offsets` on; `start` is the position of its first one in the run."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int


class Cut(NamedTuple):
    """How the tensor of which there is a run lies in a whole one. Without the group of ranks, so that it can travel."""

    dim: int
    pieces: tuple[Piece, ...]  # of the whole along dim, in the order in which the part holds them
    whole: tuple[int, ...]  # shape


def cut_of(param: Tensor) -> Cut | None:
    """How a parameter lies in a whole one; None: it is the whole."""
    shard = tensor_shard(param)
    if shard is None or shard.dim is None:
        return None
    pieces = shard.pieces[shard.rank]
    if len(shard.pieces) == 1 and list(pieces) == sorted(pieces):
        return None
    return Cut(shard.dim, pieces, shard.shape)


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """Elements [begin, end) of a tensor, row by row, that this rank holds: of a DTensor its rows, else all.

    Raises:
        ValueError: a DTensor that is not sharded along its first dimension only.
    """
    if not is_dtensor(tensor):
        return 0, tensor.numel()
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    placements = tensor.placements
    if any(type(placement) is not Replicate and placement != Shard(0) for placement in placements):
        raise ValueError(
            f"a part of a whole tensor, of shape {tuple(tensor.shape)}, is a DTensor with placements {placements}; "
            "expected Shard(0), and Replicate() along other mesh dimensions. Shard parameters that are cut over "
            "tensor-parallel ranks with pyshard.fully_shard, or torch's without a shard_placement_fn."
        )
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, placements)
    row = math.prod(tensor.shape[1:])
    # A rank without rows may be told any offset.
    begin = min(offset[0] * row, tensor.numel()) if math.prod(shape) else 0
    return begin, begin + math.prod(shape)


def dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a fresh tensor like this one."""
    if tensor.is_contiguous():
        return tensor.stride()
    meta = torch.empty_strided(tensor.shape, tensor.stride(), device="meta")
    return torch.empty_like(meta, memory_format=torch.preserve_format).stride()


def stride_in_order(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense tensor of a shape, whose dimensions lie in memory as those of other strides."""
    found, size = [0] * len(shape), 1
    for d in sorted(range(len(shape)), key=lambda d: (-stride[d], d))[::-1]:
        found[d] = size
        size *= max(shape[d], 1)
    return tuple(found)


def in_whole(one: Rectangle, cut: Cut, stride: Sequence[int]) -> list[Rectangle]:
    """A rectangle of a part as rectangles of the whole: one for each piece that it touches."""
    d, found, begin = cut.dim, [], 0  # begin: of the piece in the part
    for first, last in cut.pieces:
        low, high = max(one.offsets[d], begin), min(one.offsets[d] + one.sizes[d], begin + last - first)
        if low < high:
            offsets = (*one.offsets[:d], first + low - begin, *one.offsets[d + 1 :])
            sizes = (*one.sizes[:d], high - low, *one.sizes[d + 1 :])
            found.append(Rectangle(offsets, sizes, one.start + (low - one.offsets[d]) * stride[d]))
        begin += last - first
    return found


def memory_order(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """The dimensions from the slowest to the fastest in memory; those of size 1, which do not matter, first."""
    return sorted(range(len(shape)), key=lambda d: (shape[d] != 1, -stride[d]))


def cover(sizes: Sequence[int], begin: int, end: int) -> list[tuple[list[int], list[int], int]]:
    """Rectangles (offsets, sizes, position of the first element) that cover elements [begin, end) of a C-ordered array.

    A part of the first row, whole rows, a part of the last row; the parts are runs of one dimension less.
    """
    if begin == end:
        return []
    if not sizes:
        return [([], [], begin)]
    row = math.prod(sizes[1:])
    first, last = -(-begin // row), end // row  # whole rows

    def part(index: int, low: int, high: int) -> list[tuple[list[int], list[int], int]]:
        inner = cover(sizes[1:], low - index * row, high - index * row)
        return [([index, *offsets], [1, *extents], start + index * row) for offsets, extents, start in inner]

    if first > last:
        return part(last, begin, end)
    found = part(first - 1, begin, first * row)
    if first < last:
        found.append(([first, *(0 for _ in sizes[1:])], [last - first, *sizes[1:]], first * row))
    return found + part(last, last * row, end)
