"""The memory that interpreted PTX can touch: host buffers and thread-private memory. Every access is checked.

Host buffers (`Memory`) stand for global memory and, in the interpreter, for constants and kernel parameters.
Addresses are host addresses, unless a buffer is placed somewhere else with `at=`.
"""

import ctypes
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from .errors import MemoryFaultError, RaceError
from .floats import Array

# Where shared and thread-private memory lie in the generic address space: far above any host address.
SHARED_WINDOW = 1 << 60
LOCAL_WINDOW = 2 << 60
WINDOW_MASK = np.uint64(0xF << 60)
# What memory and registers hold before anything is written: a value that no test expects.
GARBAGE = 0xA5

UINT = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


# Buffers placed apart: above any host address, a gap of 2**34 fp32 elements, aligned as the real ones up to a page.
APART_BASE = 1 << 50
APART_GAP = 1 << 36
APART_ALIGN = 4096


def real_address(target: Any) -> int:
    """The host address of a tensor or array, or the integer itself."""
    if isinstance(target, (int, np.integer)):
        return int(target)
    return int(target.data_ptr() if hasattr(target, "data_ptr") else target.ctypes.data)


class Fault(Exception):
    """A bad access: the lane (index into the addresses given) and what is wrong with it."""

    def __init__(self, lane: int, problem: str, kind: type[Exception] = MemoryFaultError) -> None:
        super().__init__(problem)
        self.lane, self.kind = lane, kind


def check_aligned(addresses: Array, nbytes: int) -> None:
    wrong = (addresses & addresses.dtype.type(nbytes - 1)) != 0
    if wrong.any():
        lane = int(np.flatnonzero(wrong)[0])
        raise Fault(lane, f"address {int(addresses[lane]):#x} is not a multiple of {nbytes} bytes")


def check_stored(view: Array, index: Array, values: Array, address: int) -> None:
    """After a store, each lane must find its own value: else two lanes wrote different ones to one place."""
    lost = view[index] != values
    if lost.any():
        lane = int(np.flatnonzero(lost)[0])
        raise Fault(lane, f"another lane stores a different value to the same address {address:#x}", RaceError)


class Buffer:
    """One range of host memory. `bytes_read` and `bytes_written` count what kernels moved, lane by lane."""

    def __init__(self, start: int, data: Array, writable: bool, name: str, space: str = "global") -> None:
        self.start, self.data, self.writable, self.name, self.space = start, data, writable, name, space
        self.end = start + data.size
        self.bytes_read = self.bytes_written = 0
        self._views: dict[int, tuple[Array, np.uint64]] = {}

    def view(self, size: int) -> tuple[Array, np.uint64]:
        """The buffer as unsigned integers of `size` bytes, and the address of the first one."""
        if size not in self._views:
            skip = -self.start % size
            count = max(self.data.size - skip, 0) // size
            view = self.data[skip : skip + count * size].view(UINT[size])
            self._views[size] = view, np.uint64(self.start + skip)
        return self._views[size]

    def __str__(self) -> str:
        mark = "read-write" if self.writable else "read-only"
        return f"{self.name} [{self.start:#x}, {self.end:#x}) {mark}"


class Memory:
    """The buffers that a kernel may touch.

    `apart=True` gives each buffer an address of its own, far from all others and aligned like the real one, so that
    an access past its end cannot land in a neighbour. Pointers are then what `add` and `address` return.
    """

    def __init__(self, *, apart: bool = False) -> None:
        self._buffers: list[Buffer] = []
        self._keep: list[object] = []  # tensors stay alive as long as their addresses are known here
        self._placed: list[tuple[int, int, int]] = []  # real address, bytes, address for the kernel
        self._apart = apart

    @classmethod
    def of(cls, buffers: Iterable[Buffer]) -> "Memory":
        memory = cls()
        for buffer in buffers:
            memory._insert(buffer)
        return memory

    def add(
        self,
        target: Any,
        nbytes: int | None = None,
        *,
        writable: bool = False,
        name: str = "",
        at: int | None = None,
    ) -> int:
        """Allow access to a CPU tensor, a numpy array or `nbytes` bytes from an address; returns the address.

        `at` places the buffer at another address than its own, for example far beyond 2**31 elements.
        Raises ValueError for a buffer that is not contiguous or overlaps another.
        """
        real = real_address(target)
        if isinstance(target, (int, np.integer)):
            if nbytes is None:
                raise ValueError("Memory.add: an address needs nbytes")
        elif not (target.is_contiguous() if hasattr(target, "data_ptr") else target.flags.c_contiguous):
            raise ValueError(f"Memory.add: {name!r} is not contiguous; call .contiguous() or .copy()")
        elif nbytes is None:
            nbytes = int(target.nbytes)
        self._keep.append(target)
        data = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(real)) if nbytes else np.empty(0, "u1")
        if at is None:
            at = APART_BASE + len(self._keep) * APART_GAP + real % APART_ALIGN if self._apart else real
        self._placed.append((real, nbytes, at))
        self._insert(Buffer(at, data, writable, name or f"buffer {len(self._buffers)}"))
        return at

    def address(self, target: Any) -> int:
        """The address that a kernel must be given for a tensor, an array or a real address, also inside a buffer."""
        real = real_address(target)
        return next((real - begin + at for begin, nbytes, at in self._placed if 0 <= real - begin < nbytes), real)

    def _insert(self, buffer: Buffer) -> None:
        if buffer.start == buffer.end:
            return
        for other in self._buffers:
            if buffer.start < other.end and other.start < buffer.end:
                raise ValueError(f"Memory.add: {buffer} overlaps {other}")
        self._buffers.append(buffer)
        self._buffers.sort(key=lambda b: b.start)

    def __iter__(self) -> Iterator[Buffer]:
        return iter(self._buffers)

    def traffic(self) -> dict[str, tuple[int, int]]:
        """Bytes read and written so far, by buffer name."""
        return {b.name: (b.bytes_read, b.bytes_written) for b in self._buffers}

    def _owner(self, address: int, nbytes: int, lane: int, spaces: tuple[str, ...]) -> Buffer:
        """The buffer that holds all bytes of an access."""
        for buffer in self._buffers:
            if buffer.start <= address and address + nbytes <= buffer.end:
                if buffer.space not in spaces:
                    raise Fault(lane, f"address {address:#x} lies in .{buffer.space} memory ({buffer})")
                return buffer
        known = "; ".join(str(b) for b in self._buffers if b.space in spaces and b.space != "param") or "none"
        raise Fault(lane, f"{nbytes} bytes at {address:#x} lie in no buffer; allowed: {known}")

    def _split(self, addresses: Array, nbytes: int, spaces: tuple[str, ...]) -> list[tuple[Buffer, Array | None]]:
        """Which buffer serves which lanes (None: one buffer serves all)."""
        check_aligned(addresses, nbytes)
        low, high = int(addresses.min()), int(addresses.max())
        first = self._owner(int(addresses[0]), nbytes, 0, spaces)
        if first.start <= low and high + nbytes <= first.end:
            return [(first, None)]
        left = np.ones(addresses.shape, np.bool_)
        parts: list[tuple[Buffer, Array | None]] = []
        while left.any():
            lane = int(np.flatnonzero(left)[0])
            buffer = self._owner(int(addresses[lane]), nbytes, lane, spaces)
            inside = (addresses >= buffer.start) & (addresses <= buffer.end - nbytes)
            parts.append((buffer, np.flatnonzero(inside)))
            left &= ~inside
        return parts

    def load(self, addresses: Array, size: int, count: int, spaces: tuple[str, ...], constant: bool) -> list[Array]:
        """`count` integers of `size` bytes from each address on. `constant`: by a non-coherent load."""
        out = [np.empty(addresses.shape, UINT[size]) for _ in range(count)]
        for buffer, lanes in self._split(addresses, size * count, spaces):
            if constant and buffer.writable:
                raise Fault(0 if lanes is None else int(lanes[0]), f"a non-coherent load reads {buffer}")
            view, start = buffer.view(size)
            which = addresses if lanes is None else addresses[lanes]
            index = ((which - start) // np.uint64(size)).view(np.int64)
            for k in range(count):
                values = view[index + k if k else index]
                if lanes is None:
                    out[k] = values
                else:
                    out[k][lanes] = values
            buffer.bytes_read += which.size * size * count
        return out

    def store(self, addresses: Array, size: int, values: list[Array], spaces: tuple[str, ...]) -> None:
        for buffer, lanes in self._split(addresses, size * len(values), spaces):
            if not buffer.writable:
                raise Fault(0 if lanes is None else int(lanes[0]), f"write to read-only memory: {buffer}")
            view, start = buffer.view(size)
            which = addresses if lanes is None else addresses[lanes]
            index = ((which - start) // np.uint64(size)).view(np.int64)
            for k, value in enumerate(values):
                part = value if lanes is None else value[lanes]
                view[index + k] = part
                check_stored(view, index + k, part, int(which[0]) + k * size)
            buffer.bytes_written += which.size * size * len(values)


class Private:
    """Thread-private memory: `nbytes` for each of `threads`."""

    def __init__(self, nbytes: int, threads: int) -> None:
        self.nbytes = nbytes
        self.stride = -(-nbytes // 16) * 16
        self.data = np.full(self.stride * threads, GARBAGE, np.uint8)

    def _index(self, offsets: Array, lanes: Array, size: int, count: int) -> Array:
        check_aligned(offsets, size * count)
        out = offsets > np.uint64(max(self.nbytes - size * count, -1) & (2**64 - 1))
        if self.nbytes < size * count or out.any():
            lane = int(np.flatnonzero(out)[0]) if out.any() else 0
            raise Fault(lane, f"offset {int(offsets[lane])} is outside the {self.nbytes} bytes of local memory")
        return (offsets.astype(np.int64) + lanes * self.stride) // size

    def load(self, offsets: Array, lanes: Array, size: int, count: int) -> list[Array]:
        index = self._index(offsets, lanes, size, count)
        view = self.data.view(UINT[size])
        return [view[index + k] for k in range(count)]

    def store(self, offsets: Array, lanes: Array, size: int, values: list[Array]) -> None:
        index = self._index(offsets, lanes, size, len(values))
        view = self.data.view(UINT[size])
        for k, value in enumerate(values):
            view[index + k] = value
