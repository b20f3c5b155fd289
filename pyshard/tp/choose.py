"""Whether to overlap a matmul with its communication, and in how many chunks.

The first call of a shape runs without overlap and times both parts; that is the one measurement. From it a model of the
pipeline predicts the time of every candidate, "no overlap" among them. Ranks compare notes and take the slowest of
each, so they choose alike, and the choice stays. Results do not depend on it: sums are in rank order in any case.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

# What one more matmul and message cost beside their work: calls, threads that wake up. Measured on two ranks of one
# thread: 25 us over shm, 60 us over gloo.
_PER_CHUNK = {"shm": 25e-6, "ring": 60e-6}
_OTHER = 15e-6  # symm_mem: a launch and a signal


@dataclass(frozen=True)
class Shape:
    """What a choice is made for."""

    kind: str  # gather | scatter | total
    outer: int
    sizes: tuple[int, ...]  # rows of each rank
    inputs: int  # columns of what is multiplied
    outputs: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        rows = self.outer * sum(self.sizes)
        return f"{rows} x {self.inputs} x {'+'.join(map(str, self.outputs))} {self.dtype}"


@dataclass(frozen=True)
class Choice:
    """chunks 0: no overlap."""

    chunks: int
    matmul: float  # seconds, as measured
    transfer: float
    predicted: dict[int, float]  # seconds of each candidate

    @property
    def why(self) -> str:
        """In words, with the numbers that it came from."""
        if not self.predicted:
            return "as set"
        found = f"matmul {1e3 * self.matmul:.2f} ms, communication {1e3 * self.transfer:.2f} ms"
        ways = ", ".join(
            f"{1e3 * time:.2f} {f'in {chunks}' if chunks else 'without'}" for chunks, time in self.predicted.items()
        )
        return f"{found}; predicted (ms): {ways}"


def candidates(most: int) -> list[int]:
    """Numbers of chunks to choose from; 0 is no overlap."""
    return [0] + [chunks for chunks in (1, 2, 4, 8, 16) if chunks <= most]


def predict(kind: str, chunks: int, matmul: float, transfer: float, world: int, each: float) -> float:
    """Seconds of a call, given those of its whole matmul and its whole communication."""
    if chunks == 0:
        return matmul + transfer
    own, others = matmul / world, matmul * (world - 1) / world
    if kind == "gather":
        # This rank's rows first; then chunk after chunk as they arrive.
        end = own
        for chunk in range(1, chunks + 1):
            end = max(end, transfer * chunk / chunks) + others / chunks + each
        return end
    if kind == "scatter":
        # The others' rows leave chunk after chunk; this rank's own rows hide the last ones.
        sent = computed = 0.0
        for _ in range(chunks):
            computed += others / chunks + each
            sent = max(sent, computed) + transfer / chunks
        return max(computed + own, sent)
    sent = computed = 0.0  # total: all rows leave
    for _ in range(chunks):
        computed += matmul / chunks + each
        sent = max(sent, computed) + transfer / chunks
    return sent


def choose(kind: str, transport: str, world: int, most: int, measured: list[bytes]) -> Choice:
    """The fastest candidate by what all ranks have measured (pack_times)."""
    times = [struct.unpack("<dd", told) for told in measured]
    matmul, transfer = max(time[0] for time in times), max(time[1] for time in times)
    each = _PER_CHUNK.get(transport, _OTHER)
    predicted = {
        chunks: predict(kind, chunks, matmul, transfer, world, each if chunks else 0.0) for chunks in candidates(most)
    }
    return Choice(min(predicted, key=lambda chunks: predicted[chunks]), matmul, transfer, predicted)


def pack_times(matmul: float, transfer: float) -> bytes:
    """What ranks tell each other."""
    return struct.pack("<dd", matmul, transfer)
