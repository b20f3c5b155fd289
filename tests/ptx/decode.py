"""Statements of a kernel -> basic blocks of bound numpy operations, decoded once and run for every block.

Calls are expanded in place, so there is one list of instructions in the order of the text; registers become
slots and variables become addresses. What is not modelled is an error before anything runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import control, isa, transfer
from .errors import InexactInstructionError, PtxError, TrapError, UnknownInstructionError
from .floats import Array
from .isa import DTYPES
from .machine import BasicBlock, Block, Get, Jump, Put, Run, where
from .memory import GARBAGE, LOCAL_WINDOW, Buffer, Fault
from .syntax import (
    Address,
    Function,
    Group,
    Immediate,
    Instruction,
    Label,
    Name,
    Operand,
    Registers,
    Scope,
    Statement,
    Targets,
    Variable,
)

DYNAMIC_ALIGN = 16
CALL_DEPTH = 8
U64 = np.dtype(np.uint64)
# Hints and fences: they change no value, and threads here see each other's writes at once.
NO_EFFECT = ("prefetch", "prefetchu", "fence", "membar", "nanosleep", "applypriority", "pragma")


@dataclass(frozen=True)
class Slot:
    """A register."""

    index: int
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Place:
    """A variable: its space, its address there, and the buffer behind it if it has one."""

    space: str
    address: int
    buffer: Buffer | None = None


@dataclass
class Program:
    code: list[BasicBlock]
    slots: list[np.dtype[Any]]
    parameters: list[tuple[Variable, Buffer]]
    local_bytes: int
    static_shared: int
    granule: int
    _fresh: dict[int, list[Array]] = field(default_factory=dict)

    def registers(self, threads: int) -> list[Array]:
        """The registers of a block before it starts, full of garbage; the arrays are shared, never changed."""
        if threads not in self._fresh:
            room = np.full(threads * 8, GARBAGE, np.uint8)
            garbage = {size: room[: threads * size].view(f"u{size}") for size in (1, 2, 4, 8)}
            false = np.zeros(threads, np.bool_)
            self._fresh[threads] = [false if d == np.bool_ else garbage[d.itemsize] for d in self.slots]
        return self._fresh[threads].copy()


@dataclass
class Frame:
    """One expansion of a function: its scopes, and where `ret` goes (None: the kernel ends)."""

    key: int
    depth: int
    scopes: list[dict[str, Slot | Place]]
    return_label: str | None
    targets: dict[str, tuple[str, ...]] = field(default_factory=dict)


class Decoder:
    """Decodes one kernel. `variables` are those of the module, already placed."""

    def __init__(self, functions: dict[str, Function], variables: dict[str, Place], shared_bytes: int, strict: bool):
        self.functions, self.strict = functions, strict
        self.module_scope: dict[str, Slot | Place] = dict(variables)
        self.slots: list[np.dtype[Any]] = []
        self.items: list[tuple[Run, Instruction] | Jump | str] = []  # steps, jumps, label keys
        self.shared_bytes, self.local_bytes = shared_bytes, 0
        self.granule = 16
        self.frames = 0
        self.frame = Frame(0, 0, [], None)

    def kernel(self, function: Function) -> Program:
        parameters: list[tuple[Variable, Buffer]] = []
        scope: dict[str, Slot | Place] = {}
        for variable in function.parameters:
            nbytes = variable.nbytes or 0
            store = np.zeros(nbytes + 256, np.uint8)  # constant bank entries are at least as aligned as asked
            skip = -store.ctypes.data % 256
            data = store[skip : skip + nbytes]
            buffer = Buffer(data.ctypes.data, data, False, f"parameter {variable.name}", "param")
            parameters.append((variable, buffer))
            scope[variable.name] = Place("param", buffer.start, buffer)
        self.expand(function, scope, None)
        return Program(self.blocks(), self.slots, parameters, self.local_bytes, self.shared_bytes, min(self.granule, 8))

    # Statements.

    def expand(self, function: Function, scope: dict[str, Slot | Place], return_label: str | None) -> None:
        self.frames += 1
        outer = self.frame
        self.frame = Frame(self.frames, outer.depth + 1, [self.module_scope, scope], return_label)
        for statement in function.body or []:
            if isinstance(statement, Targets):
                self.frame.targets[statement.name] = statement.labels
        for statement in function.body or []:
            self.statement(statement)
        self.frame = outer

    def statement(self, statement: Statement) -> None:
        scopes = self.frame.scopes
        match statement:
            case Instruction():
                try:
                    self.instruction(statement)
                except (UnknownInstructionError, InexactInstructionError) as error:
                    raise type(error)(f"{where(statement)}: {error}") from None
            case Label():
                self.items.append(self.label(statement.name))
            case Registers():
                dtype = DTYPES.get(statement.kind)
                if dtype is None:
                    raise UnknownInstructionError(f"registers of type .{statement.kind} are not modelled")
                storage = dtype if dtype == np.bool_ else np.dtype(f"u{dtype.itemsize}")
                for name in statement.names:
                    scopes[-1][name] = Slot(len(self.slots), storage)
                    self.slots.append(storage)
            case Variable():
                scopes[-1][statement.name] = self.place(statement)
            case Scope():
                if statement.opens:
                    scopes.append({})
                else:
                    scopes.pop()

    def place(self, variable: Variable) -> Place:
        if variable.space == "shared":
            if variable.nbytes is None:
                self.shared_bytes = -(-self.shared_bytes // DYNAMIC_ALIGN) * DYNAMIC_ALIGN
                return Place("shared", self.shared_bytes)
            address = -(-self.shared_bytes // variable.align) * variable.align
            self.shared_bytes = address + variable.nbytes
            return Place("shared", address)
        if variable.space in ("local", "param") and variable.nbytes is not None:
            address = -(-self.local_bytes // variable.align) * variable.align
            self.local_bytes = address + variable.nbytes
            return Place(variable.space, address + (LOCAL_WINDOW if variable.space == "param" else 0))
        raise UnknownInstructionError(f"variable {variable.name} in .{variable.space} inside a function")

    def label(self, name: str) -> str:
        return f"{self.frame.key}:{name}"

    def find(self, name: str) -> Slot | Place | None:
        for scope in reversed(self.frame.scopes):
            if name in scope:
                return scope[name]
        return None

    # Operands.

    def get(self, operand: Operand, kind: str) -> Get:
        """A function that reads an operand as a value of the type: one per thread, or one for all."""
        dtype = DTYPES[kind]
        if isinstance(operand, Immediate):
            return self.constant(self.literal(operand, dtype))
        if not isinstance(operand, Name):
            raise UnknownInstructionError(f"operand {operand} where a value is expected")
        found = self.find(operand.text)
        if isinstance(found, Slot):
            return _reader(found, dtype, operand)
        if isinstance(found, Place):
            if found.address >> 8 * dtype.itemsize:
                raise UnknownInstructionError(f"the address of {operand.text} does not fit {dtype.itemsize} bytes")
            return self.constant(np.array([found.address], U64).astype(f"u{dtype.itemsize}").view(dtype))
        if operand.text == "WARP_SZ":
            return self.constant(np.array([32], dtype))
        return _special(operand.text, dtype)

    @staticmethod
    def constant(value: Array) -> Get:
        return lambda block: value

    @staticmethod
    def literal(operand: Immediate, dtype: np.dtype[Any]) -> Array:
        if dtype == np.bool_:
            return np.array([operand.value != 0])
        if operand.kind and int(operand.kind[1:]) // 8 != dtype.itemsize:
            raise UnknownInstructionError(f"a literal of type {operand.kind} for a value of {dtype.itemsize} bytes")
        if not operand.kind and dtype.kind == "f":
            raise UnknownInstructionError("an integer literal for a floating-point value")
        bits = operand.value & (1 << 8 * dtype.itemsize) - 1
        return np.array([bits], f"u{dtype.itemsize}").view(dtype)

    def slot(self, operand: Operand) -> Slot:
        found = self.find(operand.text) if isinstance(operand, Name) else None
        if not isinstance(found, Slot):
            raise UnknownInstructionError(f"{operand} is not a register")
        return found

    def put(self, operand: Operand, kind: str) -> Put:
        """A function that writes a value of the type into a register, extended to its width; `_` drops it."""
        if isinstance(operand, Name) and operand.text == "_":
            return lambda block, value: None
        slot = self.slot(operand)
        index, fit = slot.index, fitting(DTYPES[kind], slot)
        if fit is None:
            return lambda block, value: block.put(index, value)
        return lambda block, value: block.put(index, fit(value))

    def put_lanes(self, operand: Operand, kind: str) -> Callable[[Block, Array, Array], None]:
        """The same for values of the executing threads only, one each."""
        if isinstance(operand, Name) and operand.text == "_":
            return lambda block, lanes, value: None
        slot = self.slot(operand)
        index, fit = slot.index, fitting(DTYPES[kind], slot)
        if fit is None:
            return lambda block, lanes, value: block.put_lanes(index, lanes, value)
        return lambda block, lanes, value: block.put_lanes(index, lanes, fit(value))

    def parameter(self, operand: Operand, size: int, count: int) -> list[Array] | None:
        """Where a kernel parameter at a literal address is read: `count` arrays of one element; else None."""
        found = self.find(operand.base or "") if isinstance(operand, Address) else None
        if not (isinstance(operand, Address) and isinstance(found, Place) and found.space == "param"):
            return None
        if found.buffer is None:
            return None
        end = operand.offset + size * count
        if operand.offset < 0 or end > found.buffer.data.size or operand.offset % (size * count):
            raise UnknownInstructionError(f"a parameter of {found.buffer.data.size} bytes read at {operand.offset}")
        cells = found.buffer.data[operand.offset : end].view(f"u{size}")
        return [cells[k : k + 1] for k in range(count)]

    def address(self, operand: Operand) -> Get:
        """A function that computes a memory operand's address, as uint64."""
        if not isinstance(operand, Address):
            raise UnknownInstructionError(f"{operand} is not a memory operand")
        offset = np.array([operand.offset & 2**64 - 1], U64)
        found = self.find(operand.base) if operand.base else None
        if isinstance(found, Place):
            return self.constant(offset + np.uint64(found.address))
        if operand.base is None:
            return self.constant(offset)
        if not isinstance(found, Slot):
            raise UnknownInstructionError(f"[{operand.base}]: no such variable")
        index = found.index
        if found.dtype == U64 and operand.offset == 0:
            return lambda block: block.registers[index]
        return lambda block: block.registers[index].astype(U64) + offset

    # Instructions.

    def instruction(self, ins: Instruction) -> None:
        reason = isa.inexact(ins.opcode, self.strict)
        if reason:
            raise InexactInstructionError(f"{ins.opcode} {reason}")
        base = ins.opcode.split(".")[0]
        if base in NO_EFFECT:
            return
        if base == "call":
            return self.call(ins)
        guard = self.get(ins.guard, "pred") if ins.guard else None
        jump = control.jump(self, ins, guard)
        if jump is not None:
            self.items.append(jump)
            return
        run = transfer.build(self, ins) or self.alu(ins)
        if run is None:
            raise UnknownInstructionError(f"{ins.opcode} is not modelled")
        self.items.append((guarded(run, guard) if guard else run, ins))

    def alu(self, ins: Instruction) -> Run | None:
        alu = isa.lookup(ins.opcode)
        if alu is None:
            return None
        target, *operands = ins.operands
        if len(operands) != len(alu.operands):
            raise UnknownInstructionError(f"{len(operands)} source operands, expected {len(alu.operands)}")
        gets = [self.get(operand, kind) for operand, kind in zip(operands, alu.operands)]
        fn = alu.fn
        if isinstance(target, Group) and target.form == "pair" and alu.result == "pred":
            return self.pair(fn, gets, target)
        put = self.put(target, alu.result)
        if alu.divisor:
            gets[1] = _nonzero(gets[1])
        if len(gets) == 1:
            (a,) = gets
            return lambda block: put(block, fn(a(block)))
        if len(gets) == 2:
            a, b = gets
            return lambda block: put(block, fn(a(block), b(block)))
        if len(gets) == 3:
            a, b, c = gets
            return lambda block: put(block, fn(a(block), b(block), c(block)))
        return lambda block: put(block, fn(*(get(block) for get in gets)))

    def pair(self, fn: Callable[..., Array], gets: list[Get], target: Group) -> Run:
        """setp p|q: the second predicate is the negation of the comparison."""
        if len(gets) != 2:
            raise UnknownInstructionError("a predicate pair with a combining operation")
        first, second = (self.put(item, "pred") for item in target.items)

        def run(block: Block) -> None:
            value = fn(*(get(block) for get in gets))
            first(block, value)
            second(block, ~value)

        return run

    def call(self, ins: Instruction) -> None:
        groups = [o for o in ins.operands if isinstance(o, Group)]
        name = next((o.text for o in ins.operands if isinstance(o, Name)), "")
        function = self.functions.get(name)
        if function is None or ins.guard is not None:
            raise UnknownInstructionError(f"indirect or predicated call of {name}")
        if function.body is None:
            self.items.append((_trap(f"the kernel calls the external function {name}"), ins))
            return
        if self.frame.depth > CALL_DEPTH:
            raise UnknownInstructionError(f"call of {name}: calls nest more than {CALL_DEPTH} deep")
        results = groups.pop(0).items if function.results else ()
        arguments = groups.pop(0).items if groups else ()
        scope: dict[str, Slot | Place] = {}
        pairs = [*zip(function.results, results), *zip(function.parameters, arguments)]
        for variable, operand in pairs:
            found = self.find(operand.text) if isinstance(operand, Name) else None
            if not isinstance(found, Place):
                raise UnknownInstructionError(f"call of {name}: argument {operand} is not a .param variable")
            scope[variable.name] = found
        end = f"end of call {len(self.items)}"
        self.expand(function, scope, end)
        self.items.append(end)

    # Basic blocks.

    def blocks(self) -> list[BasicBlock]:
        """Cut the list of items at labels and jumps, then resolve the labels."""
        blocks = [BasicBlock(0)]
        where_is: dict[str, int] = {}
        jumps: list[tuple[BasicBlock, Jump]] = []
        for item in self.items:
            if isinstance(item, str):
                if blocks[-1].steps:
                    blocks.append(BasicBlock(len(blocks)))
                where_is[item] = len(blocks) - 1
            elif isinstance(item, Jump):
                jumps.append((blocks[-1], item))
                blocks.append(BasicBlock(len(blocks)))
            else:
                blocks[-1].steps.append(item)
        for block, jump in jumps:
            missing = [label for label in jump.labels if label not in where_is]
            if missing:
                raise PtxError(f"{where(jump.instruction)}: no label {missing[0].split(':')[-1]}")
            targets = [where_is[label] for label in jump.labels]
            block.end = jump.make(targets, block.index + 1), jump.instruction
        if blocks[-1].end is None:  # running off the end of a kernel is a return
            last = Instruction("ret", (), 0, "end of the kernel")
            blocks[-1].end = (lambda block: block.exit(block.current)), last
        return blocks


def fitting(dtype: np.dtype[Any], slot: Slot) -> Callable[[Array], Array] | None:
    """How a value of a type is put into a register: as its bits, sign- or zero-extended to its width."""
    storage = slot.dtype
    if dtype == storage:
        return None
    if (dtype == np.bool_) != (storage == np.bool_) or dtype.itemsize > storage.itemsize:
        raise UnknownInstructionError(f"a value of {dtype} for a register of {storage}")
    if dtype.itemsize == storage.itemsize:
        return lambda value: value.view(storage)
    if dtype.kind == "i":
        return lambda value: value.view(dtype).astype(storage)
    bits = np.dtype(f"u{dtype.itemsize}")
    return lambda value: value.view(bits).astype(storage)


def guarded(run: Run, guard: Get) -> Run:
    """Execute for the threads whose guard predicate is true."""

    def step(block: Block) -> None:
        mask, current = block.mask, block.current
        chosen = current & guard(block)
        if not chosen.any():
            return
        block.mask = None if chosen.all() else chosen
        block.current = chosen
        run(block)
        # Not restored after an exception: the error names a thread among the chosen ones.
        block.mask, block.current = mask, current

    return step


def _reader(slot: Slot, dtype: np.dtype[Any], operand: Name) -> Get:
    index, storage = slot.index, slot.dtype
    if (storage == np.bool_) != (dtype == np.bool_) or storage.itemsize < dtype.itemsize:
        raise UnknownInstructionError(f"register {operand.text} read as {dtype}")
    if operand.negated:
        return lambda block: ~block.registers[index]
    if storage == dtype:
        return lambda block: block.registers[index]
    if storage.itemsize == dtype.itemsize:
        return lambda block: block.registers[index].view(dtype)
    bits = np.dtype(f"u{dtype.itemsize}")
    return lambda block: block.registers[index].astype(bits).view(dtype)


def _special(name: str, dtype: np.dtype[Any]) -> Get:
    if name not in control.SPECIAL_REGISTERS:
        raise UnknownInstructionError(f"{name} is no register, variable or modelled special register")
    if dtype == np.uint32:
        return lambda block: block.specials[name]
    bits = np.dtype(f"u{dtype.itemsize}")
    return lambda block: block.specials[name].astype(bits).view(dtype)


def _nonzero(get: Get) -> Get:
    """PTX does not say what a division by zero gives, so it must not happen in an executing thread."""

    def run(block: Block) -> Array:
        value = get(block)
        zero = block.current & (value == 0)
        if zero.any():
            raise Fault(block.position(zero), "integer division by zero", PtxError)
        return value

    return run


def _trap(message: str) -> Run:
    def run(block: Block) -> None:
        raise Fault(0, message, TrapError)

    return run
