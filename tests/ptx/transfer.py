"""Instructions that move data between threads and memory, or between the threads of a warp."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .errors import UnknownInstructionError
from .floats import Array
from .isa import DTYPES
from .machine import Block, Run
from .memory import LOCAL_WINDOW, SHARED_WINDOW
from .shared import WARP
from .syntax import SPACES, Group, Instruction, Operand

if TYPE_CHECKING:
    from .decode import Decoder

# Caching hints and memory-order words: here each access reaches memory at once, so they change nothing.
HINTS = frozenset("ca cg cs lu cv wb wt weak relaxed acquire release acq_rel volatile cta gpu sys cluster".split())
VECTORS = {"v2": 2, "v4": 4, "v8": 8}


def is_hint(part: str) -> bool:
    return part in HINTS or part.startswith(("L1::", "L2::"))


def build(decoder: Decoder, ins: Instruction) -> Run | None:
    """The effect of an instruction of this file; None for other instructions."""
    base, *parts = ins.opcode.split(".")
    maker = _MAKERS.get(base)
    if maker is None:
        return None
    return maker(decoder, ins, parts)


def space_of(parts: list[str]) -> str:
    spaces = [p.split("::")[0] for p in parts if p.split("::")[0] in SPACES]
    return spaces[0] if spaces else "generic"


def _access(decoder: Decoder, parts: list[str], known: tuple[str, ...]) -> tuple[str, int, str]:
    """Space, number of elements and element type; anything else must be a hint or in `known`."""
    kind = parts[-1]
    count = next((VECTORS[p] for p in parts if p in VECTORS), 1)
    for part in parts[:-1]:
        if not (is_hint(part) or part in VECTORS or part in known or part.split("::")[0] in SPACES):
            raise UnknownInstructionError(f"modifier .{part}")
    if kind not in DTYPES or kind in ("pred", "f16x2", "bf16x2"):
        raise UnknownInstructionError(f"type .{kind}")
    space = space_of(parts)
    if space in ("shared", "generic"):
        decoder.granule = min(decoder.granule, DTYPES[kind].itemsize)
    return space, count, kind


def _only_two(ins: Instruction) -> None:
    """A third operand of a load or store is the handle of a caching policy."""
    if len(ins.operands) != 2 and "L2::cache_hint" not in ins.opcode:
        raise UnknownInstructionError(f"{len(ins.operands)} operands, expected 2")


def _items(operand: Operand, count: int) -> tuple[Operand, ...]:
    items = operand.items if isinstance(operand, Group) else (operand,)
    if len(items) != count:
        raise UnknownInstructionError(f"{len(items)} registers for {count} elements")
    return items


def _load(decoder: Decoder, ins: Instruction, parts: list[str]) -> Run:
    space, count, kind = _access(decoder, parts, ("nc",))
    constant = "nc" in parts
    _only_two(ins)
    size = DTYPES[kind].itemsize
    unsigned = f"u{size * 8}" if not kind.startswith("s") else kind
    items = _items(ins.operands[0], count)
    cells = decoder.parameter(ins.operands[1], size, count) if space == "param" else None
    if cells is not None:
        pairs = list(zip([decoder.put(item, unsigned) for item in items], cells))

        def read_parameter(block: Block) -> None:
            for put, cell in pairs:
                put(block, cell)

        return read_parameter
    puts = [decoder.put_lanes(item, unsigned) for item in items]
    address = decoder.address(ins.operands[1])

    def run(block: Block) -> None:
        lanes = block.active()
        at = address(block)
        at = at.repeat(lanes.size) if at.shape[0] == 1 else at if block.mask is None else at[lanes]
        for put, value in zip(puts, block.load(space, at, lanes, size, count, constant)):
            put(block, lanes, value)

    return run


def _store(decoder: Decoder, ins: Instruction, parts: list[str]) -> Run:
    space, count, kind = _access(decoder, parts, ())
    _only_two(ins)
    size = DTYPES[kind].itemsize
    gets = [decoder.get(item, f"b{size * 8}") for item in _items(ins.operands[1], count)]
    address = decoder.address(ins.operands[0])

    def run(block: Block) -> None:
        lanes = block.active()
        full = block.mask is None
        at = address(block)
        at = at.repeat(lanes.size) if at.shape[0] == 1 else at if full else at[lanes]
        values = [block.spread(get(block)) for get in gets]
        block.store(space, at, lanes, size, values if full else [v[lanes] for v in values])

    return run


def _move(decoder: Decoder, ins: Instruction, parts: list[str]) -> Run | None:
    """mov between a register and several narrower ones; other moves are lane-wise instructions."""
    target, source = ins.operands
    packs, unpacks = isinstance(source, Group), isinstance(target, Group)
    if not packs and not unpacks:
        return None
    whole = DTYPES[parts[-1]]
    items = source.items if isinstance(source, Group) else target.items if isinstance(target, Group) else ()
    bits = whole.itemsize * 8 // len(items)
    part, full = np.dtype(f"u{bits // 8}"), np.dtype(f"u{whole.itemsize}")
    if packs:
        gets = [decoder.get(item, f"b{bits}") for item in items]
        put = decoder.put(target, f"b{whole.itemsize * 8}")

        def pack(block: Block) -> None:
            out = gets[0](block).astype(full)
            for k, get in enumerate(gets[1:], 1):
                out = out | (get(block).astype(full) << full.type(k * bits))
            put(block, out)

        return pack
    puts = [decoder.put(item, f"b{bits}") for item in items]
    get = decoder.get(source, f"b{whole.itemsize * 8}")

    def unpack(block: Block) -> None:
        value = get(block)
        for k, put in enumerate(puts):
            put(block, (value >> full.type(k * bits)).astype(part))

    return unpack


def _convert_address(decoder: Decoder, ins: Instruction, parts: list[str]) -> Run | None:
    """cvta of shared and local addresses; those of other spaces are generic addresses already."""
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space_of(parts), 0)
    if window == 0:
        return None
    window = -window if parts[0] == "to" else window
    shift = np.uint64(window & 2**64 - 1)
    get, put = decoder.get(ins.operands[1], "u64"), decoder.put(ins.operands[0], "u64")
    return lambda block: put(block, get(block) + shift)


def _policy(decoder: Decoder, ins: Instruction, parts: list[str]) -> Run:
    """createpolicy: a handle that only caching hints take."""
    put = decoder.put(ins.operands[0], "u64")
    return lambda block: put(block, np.zeros(1, np.uint64))


# Atomic operations: one thread after the other, in thread order.

_ATOMIC: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
}


def _atomic(decoder: Decoder, ins: Instruction, parts: list[str]) -> Run:
    operation = next((p for p in parts if p in _ATOMIC or p == "cas"), "")
    if not operation:
        raise UnknownInstructionError(f"{ins.opcode} is not modelled")
    space, count, kind = _access(decoder, parts, (operation,))
    operands = list(ins.operands)
    returns = ins.opcode.startswith("atom")
    put = decoder.put_lanes(operands.pop(0), kind) if returns else None
    address = decoder.address(operands[0])
    gets = [decoder.get(_items(o, 1)[0], kind) for o in operands[1:3]]
    if kind[0] not in "bus" or count != 1 or len(gets) < (2 if operation == "cas" else 1):
        raise UnknownInstructionError(f"{ins.opcode} is not modelled in this form")
    dtype, size = DTYPES[kind], DTYPES[kind].itemsize

    def run(block: Block) -> None:
        lanes = block.active()
        at = block.spread(address(block))
        operands = [block.spread(get(block)) for get in gets]
        old = np.empty(lanes.size, dtype)
        detect = block.shared.detect_races
        block.shared.detect_races = False  # atomics do not race with each other
        for i, lane in enumerate(lanes):
            one, who = at[lane : lane + 1], lanes[i : i + 1]
            (raw,) = block.load(space, one, who, size, 1)
            before = raw.view(dtype)
            old[i] = before[0]
            if operation == "cas":
                after = np.where(before == operands[0][lane], operands[1][lane], before)
            else:
                after = _ATOMIC[operation](before, operands[0][lane : lane + 1])
            block.store(space, one, who, size, [after.view(raw.dtype)])
        block.shared.detect_races = detect
        if put is not None:
            put(block, lanes, old)

    return run


# Warp operations.


def _shuffle(decoder: Decoder, ins: Instruction, parts: list[str]) -> Run:
    if parts[:1] != ["sync"] or len(parts) != 3 or parts[2] != "b32":
        raise UnknownInstructionError(f"{ins.opcode} is not modelled")
    target = ins.operands[0]
    value_to, valid_to = target.items if isinstance(target, Group) else (target, None)
    put = decoder.put(value_to, "b32")
    put_valid = decoder.put(valid_to, "pred") if valid_to is not None else None
    a, b, c, members = (decoder.get(o, "u32") for o in ins.operands[1:])

    def run(block: Block) -> None:
        value, valid = block.shuffle(parts[1], a(block), b(block), c(block), members(block))
        put(block, value)
        if put_valid is not None:
            put_valid(block, valid)

    return run


def _vote(decoder: Decoder, ins: Instruction, parts: list[str]) -> Run:
    if parts[:1] != ["sync"]:
        raise UnknownInstructionError(f"{ins.opcode} is not modelled")
    mode = parts[1]
    put = decoder.put(ins.operands[0], parts[2])
    vote, members = decoder.get(ins.operands[1], "pred"), decoder.get(ins.operands[2], "u32")

    def run(block: Block) -> None:
        block.check_members(members(block))
        votes = block.spread(vote(block))
        if mode == "ballot":
            put(block, block.to_threads(_ballot(block, votes)))
            return
        some = np.asarray(block.by_warp(votes, 0).any(1))
        every = np.asarray(block.by_warp(votes, 1).all(1))
        put(block, block.to_threads({"any": some, "all": every, "uni": every | ~some}[mode]))

    return run


def _ballot(block: Block, votes: Array) -> Array:
    return np.packbits(block.by_warp(votes, 0), axis=1, bitorder="little").view(np.uint32)[:, 0]


def _activemask(decoder: Decoder, ins: Instruction, parts: list[str]) -> Run:
    put = decoder.put(ins.operands[0], "b32")
    return lambda block: put(block, block.to_threads(_ballot(block, block.everyone)))


def _reduce(decoder: Decoder, ins: Instruction, parts: list[str]) -> Run:
    """redux.sync of integers. Threads that take part without others have a member mask of their own warp."""
    if len(parts) != 3 or parts[2] not in ("u32", "s32", "b32"):
        raise UnknownInstructionError(f"{ins.opcode} is not modelled")
    info = np.iinfo(DTYPES[parts[2]])
    neutral = {"add": 0, "or": 0, "xor": 0, "and": -1 & info.max, "min": info.max, "max": info.min}
    fns = {"add": np.add, "min": np.minimum, "max": np.maximum}
    ufunc = fns.get(parts[1]) or {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[parts[1]]
    put = decoder.put(ins.operands[0], parts[2])
    get, members = decoder.get(ins.operands[1], parts[2]), decoder.get(ins.operands[2], "u32")

    def run(block: Block) -> None:
        block.check_members(members(block))
        rows = block.by_warp(block.spread(get(block)), neutral[parts[1]])
        put(block, block.to_threads(ufunc.reduce(rows, axis=1, dtype=rows.dtype)))

    return run


def _warp_barrier(decoder: Decoder, ins: Instruction, parts: list[str]) -> Run | None:
    """bar.warp.sync; barriers of the block end a basic block and are in control.py."""
    members = decoder.get(ins.operands[0], "u32")

    def run(block: Block) -> None:
        block.check_members(members(block))
        for warp in np.unique(block.active() // WARP):
            block.shared.warp_barrier(int(warp))

    return run


_MAKERS: dict[str, Callable[[Decoder, Instruction, list[str]], Run | None]] = {
    "ld": _load,
    "ldu": _load,
    "st": _store,
    "mov": _move,
    "cvta": _convert_address,
    "createpolicy": _policy,
    "atom": _atomic,
    "red": _atomic,
    "shfl": _shuffle,
    "vote": _vote,
    "activemask": _activemask,
    "redux": _reduce,
    "bar": _warp_barrier,
    "barrier": _warp_barrier,
}
