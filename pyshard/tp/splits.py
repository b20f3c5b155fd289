"""How a dimension is cut over ranks."""


def split_sizes(length: int, world: int) -> list[int]:
    """What each of `world` ranks holds of `length` elements: all the same, or the first ones hold one more."""
    return [length // world + (rank < length % world) for rank in range(world)]


def bounds(sizes: list[int], rank: int) -> tuple[int, int]:
    """[begin, end) of a rank."""
    begin = sum(sizes[:rank])
    return begin, begin + sizes[rank]
