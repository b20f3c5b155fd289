"""Which rank owns which elements: parameters into buckets, buckets into one run per rank.

Pure arithmetic over sizes: no memory, no communication, the same answer on every rank.

A bucket is a flat array of parameters of one dtype, in the order in which backward makes their gradients (the reverse
of registration), elements in the order of each parameter's memory. It is cut into one run per rank. Cuts lie at starts
of parameters or at whole blocks of the norm inside one, so that no block is shared and the bits of the norm do not
depend on the number of ranks. Each cut is put where the sum over all buckets so far is best balanced, so the ranks
differ by about one block in total, not by one per bucket.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..kernels.reference import NORM_BLOCK

ALIGNMENT = 32  # elements: a parameter starts on a cache line, whatever its dtype
# The first bucket of a backward is this small and each next one four times as large, up to bucket_mb: the link gets
# work as soon as the first gradients are there, and few messages carry the rest.
FIRST_BUCKET_BYTES = 1 << 20
GROWTH = 4


@dataclass(frozen=True)
class Spec:
    """What of a parameter decides about the layout."""

    numel: int
    dtype: torch.dtype
    wire: torch.dtype  # dtype in which its gradient travels


@dataclass(frozen=True)
class Place:
    """A parameter in its bucket."""

    index: int  # in the list that the layout was made from
    offset: int  # elements
    numel: int

    @property
    def blocks(self) -> int:
        """Blocks of the norm."""
        return -(-self.numel // NORM_BLOCK)


@dataclass
class Bucket:
    """Parameters that travel together, and the elements of them that each rank owns."""

    dtype: torch.dtype
    wire: torch.dtype
    places: list[Place] = field(default_factory=list)
    numel: int = 0  # with what aligns the parameters
    begin: int = 0  # byte in the array of all parameters
    cuts: list[int] = field(default_factory=list)  # elements; rank r owns [cuts[r], cuts[r + 1])

    @property
    def end(self) -> int:
        return self.begin + self.numel * self.dtype.itemsize

    @property
    def slot_bytes(self) -> int:
        """What its gradients take."""
        return self.numel * self.wire.itemsize

    def run(self, place: Place, rank: int) -> tuple[int, int]:
        """Elements [a, b) of a parameter that a rank owns; a == b if none."""
        a = min(max(self.cuts[rank] - place.offset, 0), place.numel)
        return a, min(max(self.cuts[rank + 1] - place.offset, a), place.numel)

    def param_spans(self) -> list[tuple[int, int]]:
        """Bytes of each rank's run in the array of all parameters."""
        size = self.dtype.itemsize
        return [(self.begin + a * size, self.begin + b * size) for a, b in zip(self.cuts, self.cuts[1:], strict=False)]

    def grad_spans(self) -> list[tuple[int, int]]:
        """Bytes of each rank's run in a slot."""
        size = self.wire.itemsize
        return [(a * size, b * size) for a, b in zip(self.cuts, self.cuts[1:], strict=False)]


def make_layout(specs: Sequence[Spec], world: int, bucket_bytes: int) -> list[Bucket]:
    """The buckets of parameters of the given sizes, in the order in which backward fills them.

    A bucket holds at most bucket_bytes of gradients, or one parameter that is larger.
    """
    buckets: list[Bucket] = []
    still_open: dict[tuple[torch.dtype, torch.dtype], Bucket] = {}
    limit = min(FIRST_BUCKET_BYTES, bucket_bytes)
    for index in reversed(range(len(specs))):
        spec = specs[index]
        kind = spec.dtype, spec.wire
        bucket = still_open.get(kind)
        if bucket is None or (bucket.numel and bucket.slot_bytes + spec.numel * spec.wire.itemsize > limit):
            limit = limit if bucket is None else min(limit * GROWTH, bucket_bytes)
            bucket = still_open[kind] = Bucket(*kind)
            buckets.append(bucket)
        bucket.places.append(Place(index, bucket.numel, spec.numel))
        bucket.numel += -(-spec.numel // ALIGNMENT) * ALIGNMENT
    begin = 0
    balance: dict[torch.dtype, torch.Tensor] = {}  # per dtype: how far each cut lies before its ideal place, in total
    for bucket in buckets:
        bucket.begin, begin = begin, begin + bucket.numel * bucket.dtype.itemsize
        behind = balance.setdefault(bucket.dtype, torch.zeros(world - 1, dtype=torch.float64))
        wanted = torch.arange(1, world, dtype=torch.float64) * (bucket.numel / world) + behind
        cuts = _snap(bucket, wanted)
        behind.copy_(wanted - cuts)
        bucket.cuts = [0, *cuts.tolist(), bucket.numel]
    return buckets


def _snap(bucket: Bucket, wanted: torch.Tensor) -> torch.Tensor:
    """The allowed cut nearest to each wanted position (in ascending order), int64."""
    starts = torch.tensor([place.offset for place in bucket.places] + [bucket.numel])
    wanted = wanted.clamp(0, bucket.numel)
    at = (torch.searchsorted(starts, wanted.to(torch.int64), right=True) - 1).clamp(max=len(bucket.places) - 1)
    start, after = starts[at], starts[at + 1]
    low = torch.minimum(start + (wanted.to(torch.int64) - start) // NORM_BLOCK * NORM_BLOCK, after)
    high = torch.minimum(low + NORM_BLOCK, after)
    # What lies behind the last element of a parameter and aligns the next is no place for a cut.
    ends = torch.tensor([place.offset + place.numel for place in bucket.places])[at]
    low, high = (torch.where(cut >= ends, after, cut) for cut in (low, high))
    return torch.where(wanted - low <= high - wanted, low, high).cummax(0).values
