"""Shared memory of one block, with a race detector.

The interpreter runs all threads of a block in step, which would hide a forgotten barrier. So for each granule
of shared memory it keeps which thread wrote it and which read it since the last barrier; a second thread that
touches the granule with no barrier in between, at least one of them writing, is an error.
"""

import numpy as np

from .errors import RaceError
from .floats import Array
from .memory import GARBAGE, UINT, Fault, check_aligned, check_stored

WARP = 32
# A mark is the index of a thread (which no other thread is ordered with), or one of these.
NOBODY = -1
SEVERAL = -2  # readers of different warps
WARP_MANY = 1 << 16  # + w: several readers, all of warp w
WARP_SYNCED = 1 << 17  # + w: threads of warp w, which has met since


def _warp_of(marks: Array) -> Array:
    """The warp of marks that have one."""
    single = marks < WARP_MANY
    return np.where(single, marks // WARP, marks & (WARP_MANY - 1))


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
                continue
            whole_warp = np.logical_and.reduceat(participants, np.arange(0, participants.size, WARP))
            meets = np.where(marks < WARP_MANY, participants[np.clip(marks, 0, participants.size - 1)], True)
            meets &= whole_warp[np.clip(_warp_of(marks), 0, whole_warp.size - 1)] | (marks < WARP_MANY)
            marks[meets & (marks >= 0)] = NOBODY

    def warp_barrier(self, warp: int) -> None:
        """The threads of a warp have met: ordered among themselves, but not with other warps."""
        for marks in (self.writer, self.reader):
            marks[(marks >= 0) & (_warp_of(marks) == warp)] = WARP_SYNCED + warp

    def _index(self, offsets: Array, size: int, count: int) -> Array:
        check_aligned(offsets, size * count)
        outside = offsets + np.uint64(size * count) > np.uint64(self.nbytes)
        if outside.any():
            lane = int(np.flatnonzero(outside)[0])
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
        self._refuse(self.writer[granules], lanes, "reads what", "wrote")
        before = self.reader[granules]
        self.reader[granules] = np.where(_foreign(before, lanes), before, lanes)
        # Lanes that do not find their own mark share the granule with another reader.
        seen = self.reader[granules]
        shared = seen != lanes
        if shared.any():
            which, mine, other = granules[shared], lanes[shared], seen[shared]
            same_warp = (other != SEVERAL) & (_warp_of(other) == mine // WARP)
            self.reader[which] = np.where(same_warp, WARP_MANY + mine // WARP, SEVERAL)
            self.reader[which[~same_warp]] = SEVERAL  # wins over a duplicate that saw its own warp only

    def _note_write(self, granules: Array, lanes: Array) -> None:
        self._refuse(self.writer[granules], lanes, "overwrites what", "wrote")
        self._refuse(self.reader[granules], lanes, "overwrites what", "read")
        self.writer[granules] = lanes

    def _refuse(self, marks: Array, lanes: Array, does: str, did: str) -> None:
        conflict = _foreign(marks, lanes)
        if conflict.any():
            lane = int(np.flatnonzero(conflict)[0])
            mark = int(marks[lane])
            warp = f" of warp {mark & (WARP_MANY - 1)}" if mark >= WARP_MANY else ""
            who = f"thread {mark}" if 0 <= mark < WARP_MANY else f"another thread{warp}"
            raise Fault(lane, f"it {does} {who} {did} in shared memory, with no barrier between", RaceError)


def _foreign(marks: Array, lanes: Array) -> Array:
    """Where a mark stands for a thread that the lane is not ordered with."""
    return (marks != NOBODY) & (marks != lanes) & (marks != WARP_SYNCED + lanes // WARP)
