"""Whether to overlap a matmul with its communication, and in how many chunks.

The first call of a shape is timed without overlap and in one chunk, and so is its matmul alone. More chunks are
predicted by a model of the pipeline. Ranks compare notes and take the slowest of each, so they choose alike, and the
choice stays. Sums over ranks have the same bits in any case; products may not, where a library multiplies few rows in
another order than many.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

# What one more message costs beside its bytes: calls, threads that wake up. Measured on two ranks of one thread over
# gloo.
_MESSAGE = 60e-6  # seconds
# The measured small matmul is over this part of a rank's rows.
SMALL = 1 / 8
_NUMBERS = (1, 2, 3, 4, 5, 8)

# Ends of the chunks, as parts of a rank's rows: (0.5, 1.0) are two halves.
Ends = tuple[float, ...]


def even(chunks: int) -> Ends:
    """Chunks of one size."""
    return tuple((chunk + 1) / chunks for chunk in range(chunks))


def growing(chunks: int) -> Ends:
    """Each chunk as large as all before it: the first leaves early, and there are few."""
    return tuple(0.5 ** (chunks - 1 - chunk) for chunk in range(chunks))


def shrinking(chunks: int) -> Ends:
    """The other way round: little is left to do when the last one arrives."""
    return (*(1 - end for end in reversed(growing(chunks)[:-1])), 1.0)


@dataclass(frozen=True)
class Shape:
    """What a choice is made for. The same on all ranks, whatever their parts are, or they would not choose together."""

    kind: str  # gather | scatter | total
    way: str  # column | row, forward | backward
    rows: int  # of all ranks, rounded up to a power of two: lengths that vary must not all be measured
    batched: bool  # rows of several outer indices
    world: int
    columns: int  # of what is exchanged
    features: tuple[int, ...]  # on all ranks together, of each weight, along what is cut; 0: nobody has said
    dtype: torch.dtype

    def __str__(self) -> str:
        cut = "+".join(str(count or "?") for count in self.features)
        return f"up to {self.rows} rows x {self.columns} x {cut} / {self.world}, {self.dtype}"


@dataclass(frozen=True)
class Times:
    """Seconds of the matmul alone, of a small part of it, and of the call without overlap and in one chunk."""

    matmul: float
    small: float
    apart: float
    overlapped: float

    def pack(self) -> bytes:
        """For the other ranks."""
        return struct.pack("<dddd", self.matmul, self.small, self.apart, self.overlapped)


@dataclass(frozen=True)
class Choice:
    """How a shape is served.

    Attributes:
        ends: of the chunks; none: no overlap.
        times: what was measured; None: the choice was set.
        predicted: for other ends, seconds.
        limited: more chunks were asked for than the transport has slots for.
    """

    ends: Ends
    times: Times | None = None
    predicted: tuple[tuple[Ends, float], ...] = ()
    limited: bool = False

    @property
    def how(self) -> str:
        """In words."""
        return f"overlapped in {_words(self.ends)}" if self.ends else "not overlapped"

    @property
    def why(self) -> str:
        """In words, with the numbers that it came from."""
        if self.times is None:
            return "as set by chunks=" + (", of which the transport takes no more" if self.limited else "")
        times = self.times
        text = (
            f"measured {1e3 * times.matmul:.2f} ms for the matmul, {1e3 * times.apart:.2f} with the communication "
            f"after or before it, {1e3 * times.overlapped:.2f} in 1 chunk"
        )
        if not self.predicted:
            return text
        ends, best = min(self.predicted, key=lambda one: one[1])
        return f"{text}; predicted {1e3 * best:.2f} in {_words(ends)}, the best of {len(self.predicted)} other ways"


def choose(kind: str, world: int, most: int, measured: list[bytes]) -> Choice:
    """The fastest way in up to `most` chunks, by what all ranks have measured (Times.pack)."""
    times = Times(*(max(column) for column in zip(*(struct.unpack("<dddd", told) for told in measured), strict=True)))
    transfer = max(times.apart - times.matmul, 0.0)
    each = max(times.small - times.matmul / world * SMALL, 0.0) + _MESSAGE

    def predict(ends: Ends) -> float:
        return _pipeline(kind, ends, times.matmul, transfer, each, world)

    # What the model says of more chunks, from where the measurement of one is.
    shapes = even, shrinking if kind == "gather" else growing
    predicted = tuple(
        (ends, max(times.overlapped + predict(ends) - predict((1.0,)), times.matmul))
        for ends in dict.fromkeys(shape(chunks) for chunks in _NUMBERS[1:] if chunks <= most for shape in shapes)
    )
    ways: list[tuple[Ends, float]] = [((), times.apart), ((1.0,), times.overlapped), *predicted]
    return Choice(min(ways, key=lambda one: one[1])[0], times, predicted)


def _pipeline(kind: str, ends: Ends, matmul: float, transfer: float, each: float, world: int) -> float:
    """Seconds of a call in chunks, given those of its whole matmul and its whole communication, and what each chunk
    adds to the matmul."""
    own, others = matmul / world, matmul * (world - 1) / world
    if kind == "total":  # all rows leave
        own, others = 0.0, matmul
    begins = (0.0, *ends[:-1])
    if kind == "gather":
        # This rank's rows first; then chunk after chunk as they arrive.
        time = own
        for begin, end in zip(begins, ends, strict=True):
            time = max(time, transfer * end) + others * (end - begin) + each
        return time
    # The others' rows leave chunk after chunk; this rank's own rows hide the last ones.
    sent = computed = 0.0
    for begin, end in zip(begins, ends, strict=True):
        computed += others * (end - begin) + each
        sent = max(sent, computed) + transfer * (end - begin)
    return max(computed + own, sent)


def _words(ends: Ends) -> str:
    count = len(ends)
    if count == 1:
        return "1 chunk"
    return f"{count} {'equal' if ends == even(count) else 'growing' if ends == growing(count) else 'shrinking'} chunks"
