"""Whether to overlap a matmul with its communication, and in how many chunks.

The first call of a shape is timed without overlap and in one chunk, and so is its matmul alone. More chunks are
predicted by a model of the pipeline. Ranks compare notes and take the slowest of each, so they choose alike, and the
choice stays. Results do not depend on it: sums are in rank order in any case.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

# What one more matmul and message cost beside their work: calls, threads that wake up. Measured on two ranks of one
# thread over gloo.
_PER_CHUNK = 60e-6  # seconds


@dataclass(frozen=True)
class Shape:
    """What a choice is made for. The same on all ranks, whatever their parts are, or they would not choose together."""

    kind: str  # gather | scatter | total
    way: str  # column | row, forward | backward
    outer: int
    sizes: tuple[int, ...]  # rows of each rank
    columns: int  # of what is exchanged
    features: tuple[int, ...]  # on all ranks together, of each weight, along what is cut; 0: nobody has said
    dtype: str

    def __str__(self) -> str:
        cut = "+".join(str(count or "?") for count in self.features)
        return f"{self.outer * sum(self.sizes)} rows x {self.columns} x {cut} / {len(self.sizes)}, {self.dtype}"


@dataclass(frozen=True)
class Times:
    """Seconds of the matmul alone, and of the call without overlap and in one chunk."""

    matmul: float
    apart: float
    overlapped: float

    def pack(self) -> bytes:
        """For the other ranks."""
        return struct.pack("<ddd", self.matmul, self.apart, self.overlapped)


@dataclass(frozen=True)
class Choice:
    """Chunks; 0: no overlap."""

    chunks: int
    times: Times | None = None  # None: it was set, not measured
    predicted: tuple[tuple[int, float], ...] = ()  # chunks and seconds

    @property
    def why(self) -> str:
        """In words, with the numbers that it came from."""
        if self.times is None:
            return "as set by chunks="
        times = self.times
        text = (
            f"measured {1e3 * times.matmul:.2f} ms for the matmul, {1e3 * times.apart:.2f} with the communication "
            f"after or before it, {1e3 * times.overlapped:.2f} in 1 chunk"
        )
        more = ", ".join(f"{1e3 * time:.2f} in {chunks}" for chunks, time in self.predicted)
        return f"{text}; predicted {more}" if more else text


def choose(kind: str, world: int, most: int, measured: list[bytes]) -> Choice:
    """The fastest number of chunks up to `most`, by what all ranks have measured (Times.pack)."""
    times = Times(*(max(column) for column in zip(*(struct.unpack("<ddd", told) for told in measured), strict=True)))
    transfer = max(times.apart - times.matmul, 0.0)

    def predict(chunks: int) -> float:
        return _pipeline(kind, chunks, times.matmul, transfer, world)

    # What the model says of more chunks, from where the measurement of one is.
    more = tuple(
        (chunks, max(times.overlapped + predict(chunks) - predict(1), times.matmul))
        for chunks in (2, 4, 8, 16)
        if chunks <= most
    )
    all_of_them = [(0, times.apart), (1, times.overlapped), *more]
    return Choice(min(all_of_them, key=lambda one: one[1])[0], times, more)


def _pipeline(kind: str, chunks: int, matmul: float, transfer: float, world: int) -> float:
    """Seconds of a call in chunks, given those of its whole matmul and its whole communication."""
    own, others = matmul / world, matmul * (world - 1) / world
    if kind == "gather":
        # This rank's rows first; then chunk after chunk as they arrive.
        end = own
        for chunk in range(1, chunks + 1):
            end = max(end, transfer * chunk / chunks) + others / chunks + _PER_CHUNK
        return end
    if kind == "total":  # all rows leave
        own, others = 0.0, matmul
    # The others' rows leave chunk after chunk; this rank's own rows hide the last ones.
    sent = computed = 0.0
    for _ in range(chunks):
        computed += others / chunks + _PER_CHUNK
        sent = max(sent, computed) + transfer / chunks
    return max(computed + own, sent)
