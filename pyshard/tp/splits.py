"""How a dimension is cut over ranks."""

from torch import Tensor


def split_sizes(length: int, world: int) -> list[int]:
    """What each of `world` ranks holds of `length` elements: all the same, or the first ones hold one more."""
    return [length // world + (rank < length % world) for rank in range(world)]


def bounds(sizes: list[int], rank: int) -> tuple[int, int]:
    """[begin, end) of a rank."""
    begin = sum(sizes[:rank])
    return begin, begin + sizes[rank]


def resized(x: Tensor, dim: int, size: int) -> list[int]:
    """The shape of x with another size in one dimension."""
    shape = list(x.shape)
    shape[dim] = size
    return shape
