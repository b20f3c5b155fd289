"""Shared memory of one block, with a race detector.

The interpreter runs all threads of a block in step, which would hide a forgotten barrier. So for each granule
of shared memory it keeps which thread wrote it and which read it since the last barrier; a second thread that
touches the granule with no barrier in between, at least one of them writing, is an error. A warp barrier
clears the marks of its own warp, also towards other warps: the detector may miss a race there, and invents
none.
"""

import numpy as np

from .errors import RaceError
from .floats import Array
from .memory import GARBAGE, UINT, Fault, check_aligned, check_stored

NOBODY = -1
SEVERAL = -2  # readers of different warps
WARP = 32
WARP_BASE = 1 << 16  # WARP_BASE + w: several readers, all of warp w


class Shared:
    """`nbytes` of shared memory; `granule` is the smallest access of the kernel."""

    def __init__(self, nbytes: int, granule: int, detect_races: bool) -> None:
        self.nbytes, self.granule, self.detect_races = nbytes, granule, detect_races
        self.data = np.full(-(-nbytes // 16) * 16, GARBAGE, np.uint8)
        self.writer = np.full(self.data.size // granule, NOBODY, np.int32)
        self.reader = self.writer.copy()

    def barrier(self, participants: Array | None = None) -> None:
        """The participants (None: the whole block) have met, which orders their accesses."""
        for marks in (self.writer, self.reader):
            if participants is None:
                marks.fill(NOBODY)
            else:
                single = (marks >= 0) & (marks < WARP_BASE)
                marks[single & participants[np.where(single, marks, 0)]] = NOBODY

    def warp_barrier(self, warp: int) -> None:
        for marks in (self.writer, self.reader):
            own = ((marks >= 0) & (marks < WARP_BASE) & (marks // WARP == warp)) | (marks == WARP_BASE + warp)
            marks[own] = NOBODY

    def _index(self, offsets: Array, size: int, count: int) -> Array:
        check_aligned(offsets, size * count)
        if int(offsets.max()) + size * count > self.nbytes:
            lane = int(offsets.argmax())
            raise Fault(
                lane,
                f"{size * count} bytes at offset {int(offsets[lane])} are outside the {self.nbytes} bytes of "
                "shared memory (launch(shared_bytes=...) sets the dynamic part)",
            )
        return (offsets // np.uint64(size)).astype(np.int64)

    def load(self, offsets: Array, lanes: Array, size: int, count: int) -> list[Array]:
        index = self._index(offsets, size, count)
        if self.detect_races and not self._note_broadcast(offsets, lanes, size * count):
            for granules in self._granules(offsets, size * count):
                self._note_read(granules, lanes)
        view = self.data.view(UINT[size])
        return [view[index + k] for k in range(count)]

    def store(self, offsets: Array, lanes: Array, size: int, values: list[Array]) -> None:
        index = self._index(offsets, size, len(values))
        if self.detect_races:
            for granules in self._granules(offsets, size * len(values)):
                self._note_write(granules, lanes)
        view = self.data.view(UINT[size])
        for k, value in enumerate(values):
            view[index + k] = value
            check_stored(view, index + k, value, int(offsets[0]) + k * size)

    def _granules(self, offsets: Array, nbytes: int) -> list[Array]:
        first = (offsets // np.uint64(self.granule)).astype(np.int64)
        return [first + k for k in range(nbytes // self.granule)]

    def _note_broadcast(self, offsets: Array, lanes: Array, nbytes: int) -> bool:
        """A shortcut for threads of several warps that read the same place, which nobody wrote."""
        if lanes[0] // WARP == lanes[-1] // WARP or bool((offsets != offsets[0]).any()):
            return False
        first = int(offsets[0]) // self.granule
        span = slice(first, first + nbytes // self.granule)
        if bool((self.writer[span] != NOBODY).any()):
            return False
        self.reader[span] = SEVERAL
        return True

    def _note_read(self, granules: Array, lanes: Array) -> None:
        writer = self.writer[granules]
        self._refuse((writer != NOBODY) & (writer != lanes), writer, lanes, "reads what", "wrote")
        before = self.reader[granules]
        fresh = (before == NOBODY) | (before == lanes)
        self.reader[granules] = np.where(fresh, lanes, before)
        # Lanes that do not find their own mark share the granule with another reader.
        seen = self.reader[granules]
        shared = seen != lanes
        if shared.any():
            which, mine, other = granules[shared], lanes[shared], seen[shared]
            warp = np.where(other >= WARP_BASE, other - WARP_BASE, other // WARP)
            same_warp = (other != SEVERAL) & (warp == mine // WARP)
            self.reader[which] = np.where(same_warp, WARP_BASE + mine // WARP, SEVERAL)
            self.reader[which[~same_warp]] = SEVERAL  # wins over a duplicate that saw its own warp only

    def _note_write(self, granules: Array, lanes: Array) -> None:
        writer, reader = self.writer[granules], self.reader[granules]
        self._refuse((writer != NOBODY) & (writer != lanes), writer, lanes, "overwrites what", "wrote")
        self._refuse((reader != NOBODY) & (reader != lanes), reader, lanes, "overwrites what", "read")
        self.writer[granules] = lanes

    def _refuse(self, conflict: Array, others: Array, lanes: Array, does: str, did: str) -> None:
        if conflict.any():
            lane = int(np.flatnonzero(conflict)[0])
            other = int(others[lane])
            who = f"thread {other}" if 0 <= other < WARP_BASE else "another thread"
            raise Fault(
                lane,
                f"it {does} {who} {did} in shared memory since the last barrier, with no barrier between",
                RaceError,
            )
