"""Running one block of threads: registers, control flow, barriers and warp operations.

All threads of a block execute as one vector. Where they diverge, the group with the lowest program counter
runs first and groups that reach the same place merge, so that loops and branches reconverge.
Register arrays are never changed in place: an instruction makes a new array and puts it into its slot.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from .errors import PtxError, SynchronizationError
from .floats import Array
from .memory import LOCAL_WINDOW, SHARED_WINDOW, WINDOW_MASK, Fault, Memory, Private
from .shared import WARP, Shared
from .syntax import Instruction

Dim = tuple[int, int, int]
Run = Callable[["Block"], None]
Get = Callable[["Block"], Array]
Put = Callable[["Block", Array], None]
ALL_MEMBERS = 0xFFFFFFFF
HOST_SPACES = ("global", "const", "param")


@dataclass
class BasicBlock:
    """Straight-line instructions and how they end; falls through to the next one without an `end`."""

    index: int
    steps: list[tuple[Run, Instruction]] = field(default_factory=list)
    end: tuple[Run, Instruction] | None = None


@dataclass
class Jump:
    """An unresolved end of a basic block: make(blocks of the labels, the following block) resolves it."""

    make: Callable[[list[int], int], Run]
    labels: list[str]
    instruction: Instruction


@dataclass
class Waiting:
    """Threads that wait at a barrier, where they go on, and what the barrier combines for them."""

    mask: Array
    next_block: int
    ids: int
    line: int
    votes: Array | None = None
    deliver: Put | None = None
    combine: str = ""


@lru_cache(maxsize=16)
def _lane_registers(block: Dim) -> dict[str, Array]:
    """The special registers that depend on the thread alone."""
    lanes = np.arange(block[0] * block[1] * block[2], dtype=np.uint32)
    bx, by = np.uint32(block[0]), np.uint32(block[1])
    lane, one = lanes % np.uint32(WARP), np.uint32(1)
    bit = one << lane
    out = {"%tid.x": lanes % bx, "%tid.y": lanes // bx % by, "%tid.z": lanes // (bx * by)}
    out |= {"%laneid": lane, "%warpid": lanes // np.uint32(WARP), "%lanemask_eq": bit}
    out |= {"%lanemask_lt": bit - one, "%lanemask_le": (bit - one) | bit}
    out |= {"%lanemask_ge": ~(bit - one), "%lanemask_gt": ~((bit - one) | bit)}
    return out


class Block:
    """The state of one block (CTA) while it runs."""

    def __init__(
        self,
        code: list[BasicBlock],
        registers: list[Array],
        grid: Dim,
        block: Dim,
        index: Dim,
        memory: Memory,
        shared: Shared,
        local_bytes: int,
        max_steps: int,
    ) -> None:
        self.code, self.grid, self.block, self.index = code, grid, block, index
        self.threads = block[0] * block[1] * block[2]
        self.memory, self.shared = memory, shared
        self.local = Private(local_bytes, self.threads)
        self.registers = registers
        self.lanes = np.arange(self.threads)
        self.everyone = np.ones(self.threads, bool)
        self.live = self.everyone
        self.current = self.everyone  # the threads that execute now, as a mask
        self.mask: Array | None = None  # the same, or None when it is all threads
        self.ready: dict[int, Array] = {}
        self.waiting: list[Waiting] = []
        self.steps = 0
        self.max_steps = max_steps
        self.specials = self._special_registers()

    def _special_registers(self) -> dict[str, Array]:
        out = dict(_lane_registers(self.block))
        for name, dims in (("ntid", self.block), ("ctaid", self.index), ("nctaid", self.grid)):
            out |= {f"%{name}.{axis}": np.full(1, d, np.uint32) for axis, d in zip("xyz", dims)}
        return out

    # Registers.

    def active(self) -> Array:
        """Indices of the executing threads."""
        return self.lanes if self.mask is None else np.flatnonzero(self.mask)

    def spread(self, value: Array) -> Array:
        """A value for each thread: uniform values are held as arrays of one."""
        return value if value.shape[0] == self.threads else value.repeat(self.threads)

    def put(self, slot: int, value: Array) -> None:
        if self.mask is None:
            self.registers[slot] = self.spread(value)
        else:
            self.registers[slot] = np.where(self.mask, value, self.registers[slot])

    def put_lanes(self, slot: int, lanes: Array, value: Array) -> None:
        """Give the executing threads `lanes` the values, one each."""
        if self.mask is None:
            self.registers[slot] = value
        else:
            new = self.registers[slot].copy()
            new[lanes] = value
            self.registers[slot] = new

    def thread(self, lane: int) -> str:
        bx, by, _ = self.block
        return f"thread ({lane % bx}, {lane // bx % by}, {lane // (bx * by)}) of block {self.index}"

    # Memory.

    def load(self, space: str, at: Array, lanes: Array, size: int, count: int, constant: bool = False) -> list[Array]:
        if space == "shared":
            return self.shared.load(at, lanes, size, count)
        if space == "local":
            return self.local.load(at, lanes, size, count)
        spaces = HOST_SPACES if space == "generic" else (space,)
        windows = at & WINDOW_MASK
        if space not in ("generic", "param") or not windows.any():
            return self.memory.load(at, size, count, spaces, constant)
        out = [np.empty(at.shape, f"u{size}") for _ in range(count)]
        for window in np.unique(windows):
            part = np.flatnonzero(windows == window)
            inner = _WINDOWS.get(int(window), space)
            with _Relabel(part):
                values = self.load(inner, at[part] & ~WINDOW_MASK, lanes[part], size, count, constant)
            for whole, piece in zip(out, values):
                whole[part] = piece
        return out

    def store(self, space: str, at: Array, lanes: Array, size: int, values: list[Array]) -> None:
        if space == "shared":
            return self.shared.store(at, lanes, size, values)
        if space == "local":
            return self.local.store(at, lanes, size, values)
        spaces = HOST_SPACES if space == "generic" else (space,)
        windows = at & WINDOW_MASK
        if space not in ("generic", "param") or not windows.any():
            return self.memory.store(at, size, values, spaces)
        for window in np.unique(windows):
            part = np.flatnonzero(windows == window)
            inner = _WINDOWS.get(int(window), space)
            with _Relabel(part):
                self.store(inner, at[part] & ~WINDOW_MASK, lanes[part], size, [v[part] for v in values])

    # Control.

    def go(self, target: int, mask: Array) -> None:
        """Let the threads of `mask` go on at a basic block."""
        other = self.ready.get(target)
        self.ready[target] = mask if other is None else other | mask

    def exit(self, mask: Array) -> None:
        self.live = self.live & ~mask

    def wait(self, waiting: Waiting, count: int | None) -> None:
        self.waiting.append(waiting)
        if count is not None:
            here = self._arrived(waiting.ids)
            if int(here.sum()) == count:
                self._release(waiting.ids, here)

    def _arrived(self, ids: int) -> Array:
        return np.logical_or.reduce([w.mask for w in self.waiting if w.ids == ids])

    def _release(self, ids: int, here: Array) -> None:
        group = [w for w in self.waiting if w.ids == ids]
        self.waiting = [w for w in self.waiting if w.ids != ids]
        self.shared.barrier(None if bool((here == self.live).all()) else here)
        for w in group:
            if w.deliver is not None:
                votes = np.concatenate([g.votes[g.mask] for g in group if g.votes is not None])
                result = {"or": votes.any(), "and": votes.all(), "popc": votes.sum(dtype=np.uint32)}[w.combine]
                self.current = self.mask = w.mask
                w.deliver(self, np.atleast_1d(result))
            self.go(w.next_block, w.mask)

    def _meet(self) -> bool:
        """Nobody can run: release a barrier that all live threads have reached. False when all have ended."""
        if not self.live.any():
            return False
        for ids in {w.ids for w in self.waiting}:
            here = self._arrived(ids)
            if bool((here == self.live).all()):
                self._release(ids, here)
                return True
        places = ", ".join(f"{int(w.mask.sum())} at barrier {w.ids} (PTX line {w.line})" for w in self.waiting)
        raise SynchronizationError(
            f"block {self.index} is stuck: of {int(self.live.sum())} live threads, {places} wait for the rest"
        )

    def run(self) -> int:
        """Execute until all threads have ended; returns the number of instructions executed."""
        self.go(0, self.everyone)
        while self.ready or self._meet():
            if self.ready:
                self._run_next()
        return self.steps

    def _run_next(self) -> None:
        here = self.code[min(self.ready)]
        self.current = self.ready.pop(here.index)
        self.mask = None if self.current.all() else self.current
        self.steps += len(here.steps) + 1
        instruction: Instruction | None = None
        try:
            for step, executed in here.steps:
                instruction = executed
                step(self)
            if here.end is None:
                self.go(here.index + 1, self.current)
            else:
                end, instruction = here.end
                end(self)
            if self.steps > self.max_steps:
                raise SynchronizationError(f"block {self.index} has not ended after {self.steps} instructions")
        except Fault as fault:
            lanes = self.active()
            lane = int(lanes[min(fault.lane, lanes.size - 1)])
            raise fault.kind(f"{where(instruction)}, {self.thread(lane)}: {fault}") from None
        except PtxError as error:
            raise type(error)(f"{where(instruction)}: {error}") from None

    # Warp operations.

    def check_members(self, members: Array) -> None:
        """All live threads that a member mask names must execute, and each executing thread must be named."""
        if self.mask is None and (members == ALL_MEMBERS).all():
            return
        members = self.spread(members)
        lane = (self.lanes % WARP).astype(np.uint32)
        named = (members >> lane) & np.uint32(1) == 1
        missing = self.current & ~named
        if missing.any():
            raise Fault(
                self.position(missing), "it is not in the member mask of its warp operation", SynchronizationError
            )
        for first in range(0, self.threads, WARP):
            warp = slice(first, first + WARP)
            if not self.current[warp].any():
                continue
            masks = np.unique(members[warp][self.current[warp]])
            if masks.size > 1:
                raise Fault(
                    self.position(self.current),
                    f"the threads of warp {first // WARP} give different masks",
                    SynchronizationError,
                )
            wanted = (masks[0] >> lane[warp]) & np.uint32(1) == 1
            absent = wanted & self.live[warp] & ~self.current[warp]
            if absent.any():
                who = first + int(np.flatnonzero(absent)[0])
                raise SynchronizationError(f"{self.thread(who)} is in the member mask but does not take part")

    def position(self, mask: Array) -> int:
        """Where the first thread of `mask` stands among the executing ones."""
        return int(np.flatnonzero(np.isin(self.active(), np.flatnonzero(mask)))[0])

    def shuffle(self, mode: str, a: Array, b: Array, c: Array, members: Array) -> tuple[Array, Array]:
        """Values and in-range predicates of shfl.sync."""
        self.check_members(members)
        a = self.spread(a)
        lane = self.lanes % WARP
        b, c = (b & np.uint32(31)).astype(np.int64), c.astype(np.int64)
        segment, clamp = (c >> 8) & 31, c & 31
        low = lane & segment
        limit = low | (clamp & ~segment)
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": low | (b & ~segment)}[mode]
        valid = source >= limit if mode == "up" else source <= limit
        source = self.lanes - lane + np.where(valid, source, lane)
        unknown = (source >= self.threads) | ~self.current[np.minimum(source, self.threads - 1)]
        if (unknown & self.current).any():
            raise Fault(
                self.position(unknown & self.current),
                "it reads from a thread that does not take part",
                SynchronizationError,
            )
        return a[np.minimum(source, self.threads - 1)], self.spread(valid)

    def by_warp(self, value: Array, fill: int) -> Array:
        """Values of the executing threads as rows of 32, `fill` elsewhere."""
        rows = -(-self.threads // WARP)
        out = np.full(rows * WARP, fill, value.dtype)
        out[: self.threads] = np.where(self.current, value, value.dtype.type(fill))
        return out.reshape(rows, WARP)

    def to_threads(self, per_warp: Array) -> Array:
        return per_warp.repeat(WARP)[: self.threads]


_WINDOWS = {SHARED_WINDOW: "shared", LOCAL_WINDOW: "local"}


class _Relabel:
    """Turns the lane of a fault within a part back into the lane of the whole."""

    def __init__(self, part: Array) -> None:
        self.part = part

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Fault):
            error.lane = int(self.part[error.lane])


def where(instruction: Instruction | None) -> str:
    return f"PTX line {instruction.line}: {instruction.text}" if instruction else "PTX"
