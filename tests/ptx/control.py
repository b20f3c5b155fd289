"""Instructions that end a basic block: branches, jump tables, returns, barriers, traps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import PtxError, SynchronizationError, TrapError, UnknownInstructionError
from .floats import Array
from .machine import Block, Get, Jump, Put, Run, Waiting
from .memory import Fault
from .shared import WARP
from .syntax import Immediate, Instruction, Name

if TYPE_CHECKING:
    from .decode import Decoder

_AXES = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"]
SPECIAL_REGISTERS = frozenset(
    [*_AXES, "%laneid", "%warpid", *(f"%lanemask_{c}" for c in ("eq", "lt", "le", "ge", "gt"))]
)


def jump(decoder: Decoder, ins: Instruction, guard: Get | None) -> Jump | None:
    """The end of a basic block that an instruction makes, or None if it makes none."""
    parts = ins.opcode.split(".")
    match parts:
        case ["bra", *_]:
            return _branch(decoder, ins, guard)
        case ["brx", "idx", *_]:
            return _table(decoder, ins, guard)
        case ["ret" | "exit", *_]:
            return _return(decoder, ins, guard)
        case ["trap"]:
            return _trap(ins, guard)
        case ["bar" | "barrier", *_] if parts[1] != "warp":
            return _barrier(decoder, ins, guard)
    return None


def _chosen(block: Block, guard: Get | None) -> Array:
    return block.current if guard is None else block.current & guard(block)


def _go(block: Block, target: int, mask: Array) -> None:
    if mask.any():
        block.go(target, mask)


def _branch(decoder: Decoder, ins: Instruction, guard: Get | None) -> Jump:
    (target,) = ins.operands
    if not isinstance(target, Name):
        raise UnknownInstructionError(f"branch to {target}")

    def make(targets: list[int], following: int) -> Run:
        (goal,) = targets

        def run(block: Block) -> None:
            taken = _chosen(block, guard)
            _go(block, goal, taken)
            _go(block, following, block.current & ~taken)

        return run

    return Jump(make, [decoder.label(target.text)], ins)


def _table(decoder: Decoder, ins: Instruction, guard: Get | None) -> Jump:
    """brx.idx: a branch to one of several labels, by index."""
    index_operand, list_name = ins.operands
    index = decoder.get(index_operand, "u32")
    labels = decoder.frame.targets.get(list_name.text) if isinstance(list_name, Name) else None
    if labels is None:
        raise UnknownInstructionError(f"no .branchtargets {list_name}")

    def make(targets: list[int], following: int) -> Run:
        def run(block: Block) -> None:
            taken = _chosen(block, guard)
            which = block.spread(index(block))
            outside = taken & (which >= len(targets))
            if outside.any():
                lane = block.position(outside)
                raise Fault(lane, f"jump table index outside its {len(targets)} targets", PtxError)
            for value in np.unique(which[taken]):
                _go(block, targets[int(value)], taken & (which == value))
            _go(block, following, block.current & ~taken)

        return run

    return Jump(make, [decoder.label(label) for label in labels], ins)


def _return(decoder: Decoder, ins: Instruction, guard: Get | None) -> Jump:
    end = decoder.frame.return_label if ins.opcode.startswith("ret") else None

    def make(targets: list[int], following: int) -> Run:
        def run(block: Block) -> None:
            ends = _chosen(block, guard)
            if targets:
                _go(block, targets[0], ends)
            else:
                block.exit(ends)
            _go(block, following, block.current & ~ends)

        return run

    return Jump(make, [] if end is None else [end], ins)


def _trap(ins: Instruction, guard: Get | None) -> Jump:
    def make(targets: list[int], following: int) -> Run:
        def run(block: Block) -> None:
            hit = _chosen(block, guard)
            if hit.any():
                raise Fault(block.position(hit), "the kernel executes trap", TrapError)
            block.go(following, block.current)

        return run

    return Jump(make, [], ins)


def _barrier(decoder: Decoder, ins: Instruction, guard: Get | None) -> Jump:
    """bar.sync and barrier.sync, with an optional number of threads; bar.red combines a predicate."""
    base, *parts = ins.opcode.split(".")
    parts = [p for p in parts if p != "cta"]
    aligned = base == "bar" or "aligned" in parts
    kind = parts[0]
    operands = list(ins.operands)
    vote: Get | None = None
    deliver: Put | None = None
    combine = ""
    if kind == "red":
        combine, result = parts[-2], parts[-1]
        deliver = decoder.put(operands.pop(0), result)
        vote = decoder.get(operands.pop(), "pred")
    elif kind != "sync":
        raise UnknownInstructionError(f"{ins.opcode} is not modelled")
    ids = [o.value for o in operands if isinstance(o, Immediate)]
    if not ids or len(ids) != len(operands):
        raise UnknownInstructionError("a barrier whose number or thread count is not a literal")
    count = ids[1] if len(ids) > 1 else None

    def make(targets: list[int], following: int) -> Run:
        def run(block: Block) -> None:
            here = _chosen(block, guard)
            _go(block, following, block.current & ~here)
            if not here.any():
                return
            if aligned:
                _whole_warps(block, here)
            votes = None if vote is None else block.spread(vote(block))
            waiting = Waiting(here, following, ids[0], ins.line, votes, deliver, combine)
            block.wait(waiting, count)

        return run

    return Jump(make, [], ins)


def _whole_warps(block: Block, here: Array) -> None:
    for first in range(0, block.threads, WARP):
        warp = slice(first, first + WARP)
        absent = block.live[warp] & ~here[warp]
        if here[warp].any() and absent.any():
            who = block.thread(first + int(np.flatnonzero(absent)[0]))
            raise SynchronizationError(f"only a part of warp {first // WARP} reaches the barrier: {who} does not")
