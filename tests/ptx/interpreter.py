"""Executes on the CPU the PTX that nvcc and Triton emit, bit for bit, with every memory access checked.

    module = Module.parse(ptx_text)
    memory = Memory()
    x = memory.add(torch.ones(1000), name="x")                        # read-only
    y = memory.add(torch.empty(1000), name="y", writable=True)
    module.kernel("scale").launch(grid=4, block=256, args=[x, y, 1000, 2.0], memory=memory)

Opcodes whose result PTX does not fix to the last bit are refused by name, and so is everything that is not
modelled: nothing is approximated or skipped in silence. Blocks run one after the other and the threads of a block
in step; races are looked for in shared memory only, and memory order is that of a single processor.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from . import isa, transfer
from .decode import Decoder, Place, Program
from .errors import PtxError, UnknownInstructionError
from .floats import Array
from .machine import Block, Dim
from .memory import Buffer, Memory
from .shared import Shared
from .syntax import SIZES, Function, Instruction, Name, Source, Variable, parse

# A block of the kernels under test runs some thousand instructions; a loop that passes this never ends.
MAX_STEPS = 2_000_000


class Module:
    """A PTX module: its kernels, and its global and constant variables, which live as long as it does."""

    def __init__(self, source: Source, strict: bool) -> None:
        self.source, self.strict = source, strict
        self.buffers: list[Buffer] = []
        self.places: dict[str, Place] = {}
        self.shared_bytes = 0
        dynamic = [v for v in source.variables if v.nbytes is None]
        for variable in source.variables:
            if variable.nbytes is not None:
                self._place(variable, variable.nbytes)
        for variable in dynamic:  # behind all static shared variables; see Kernel
            self.places[variable.name] = Place("shared", -1)

    @classmethod
    def parse(cls, text: str, strict: bool = True) -> "Module":
        """Read PTX text. `strict=False` takes `add`, `sub` and `mul` without `.rn` as if they had it."""
        return cls(parse(text), strict)

    def _place(self, variable: Variable, nbytes: int) -> None:
        if variable.space == "shared":
            address = -(-self.shared_bytes // variable.align) * variable.align
            self.shared_bytes = address + nbytes
            self.places[variable.name] = Place("shared", address)
            return
        if variable.space not in ("global", "const"):
            raise UnknownInstructionError(f"module variable {variable.name} in .{variable.space}")
        store = np.zeros(nbytes + variable.align, np.uint8)
        skip = -store.ctypes.data % variable.align
        data = store[skip : skip + nbytes]
        data[: len(variable.initial)] = np.frombuffer(variable.initial, np.uint8)
        writable = variable.space == "global"
        buffer = Buffer(data.ctypes.data, data, writable, f"variable {variable.name}", variable.space)
        self.buffers.append(buffer)
        self.places[variable.name] = Place(variable.space, buffer.start, buffer)

    def kernels(self) -> list[str]:
        return [f.name for f in self.source.functions.values() if f.entry]

    def kernel(self, name: str) -> "Kernel":
        function = self.source.functions.get(name)
        if function is None or not function.entry:
            raise KeyError(f"no kernel {name!r}; the module has {', '.join(self.kernels())}")
        return Kernel(self, function)

    def variable(self, name: str) -> Array:
        """The bytes of a .global or .const variable, as a uint8 array that can be read and set."""
        buffer = self.places[name].buffer
        if buffer is None:
            raise KeyError(f"{name} is not a global or constant variable")
        return buffer.data


class Kernel:
    """One entry point of a module."""

    def __init__(self, module: Module, function: Function) -> None:
        self.module, self.function = module, function
        self._program: Program | None = None

    # Static view.

    def instructions(self) -> Iterator[Instruction]:
        """All instructions, those of called functions included once."""
        todo, seen = [self.function], {self.function.name}
        while todo:
            function = todo.pop()
            for statement in function.body or []:
                if not isinstance(statement, Instruction):
                    continue
                yield statement
                if statement.opcode.startswith("call"):
                    for operand in statement.operands:
                        callee = self.module.source.functions.get(getattr(operand, "text", ""))
                        if isinstance(operand, Name) and callee and callee.name not in seen:
                            seen.add(callee.name)
                            todo.append(callee)

    def opcodes(self) -> Counter[str]:
        """How often each opcode stands in the text, without caching hints: {"ld.global.v4.b32": 2, ...}."""
        return Counter(
            ".".join(p for p in ins.opcode.split(".") if not transfer.is_hint(p)) for ins in self.instructions()
        )

    def accesses(self) -> Counter[tuple[str, str, int]]:
        """How often each (ld or st or atom or red, space, bytes per thread) stands in the text."""
        out: Counter[tuple[str, str, int]] = Counter()
        for ins in self.instructions():
            base, *parts = ins.opcode.split(".")
            if base in ("ld", "ldu", "st", "atom", "red"):
                count = next((transfer.VECTORS[p] for p in parts if p in transfer.VECTORS), 1)
                out[base, transfer.space_of(parts), count * SIZES.get(parts[-1], 2)] += 1
        return out

    def inexact(self) -> list[str]:
        """The instructions whose result is not fixed to the last bit, each with its line and the reason."""
        found = ((ins, isa.inexact(ins.opcode, self.module.strict)) for ins in self.instructions())
        return [f"PTX line {ins.line}: {ins.text}: {ins.opcode} {reason}" for ins, reason in found if reason]

    @property
    def threads(self) -> Dim | None:
        """The block size that the kernel requires (.reqntid), if it does."""
        sizes = self.function.directives.get(".reqntid")
        return _dim(sizes) if sizes else None

    # Execution.

    def program(self) -> Program:
        """The decoded kernel. Raises InexactInstructionError or UnknownInstructionError."""
        if self._program is None:
            dynamic = -(-self.module.shared_bytes // 16) * 16
            places = {
                name: Place("shared", dynamic) if place.address == -1 else place
                for name, place in self.module.places.items()
            }
            module = self.module
            decoder = Decoder(module.source.functions, places, module.shared_bytes, module.strict)
            self._program = decoder.kernel(self.function)
        return self._program

    def launch(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        memory: Memory,
        *,
        shared_bytes: int = 0,
        blocks: Iterable[int | Sequence[int]] | None = None,
        detect_races: bool = True,
        max_steps: int = MAX_STEPS,
    ) -> int:
        """Run the kernel, block after block; returns how many instructions groups of threads executed.

        args: per parameter an int, a float, a tensor or array (its address), bytes or a ctypes structure.
        memory: the buffers that it may touch, changed in place.
        shared_bytes: dynamic shared memory. blocks: only these block indices of the grid, in this order.
        Raises PtxError or one of its kinds; memory then holds what was written before the error.
        """
        program = self.program()
        grid, block = _dim(grid), _dim(block)
        if self.threads not in (None, block):
            raise PtxError(f"kernel {self.function.name} requires blocks of {self.threads} threads, got {block}")
        self._set_arguments(program, args, memory)
        everything = Memory.of([*memory, *self.module.buffers, *(buffer for _, buffer in program.parameters)])
        steps, threads = 0, block[0] * block[1] * block[2]
        with np.errstate(all="ignore"):
            for index in _indices(grid, blocks):
                shared = Shared(program.static_shared + shared_bytes, program.granule, detect_races)
                state = Block(
                    program.code,
                    program.registers(threads),
                    grid,
                    block,
                    index,
                    everything,
                    shared,
                    program.local_bytes,
                    max_steps,
                )
                steps += state.run()
        return steps

    def _set_arguments(self, program: Program, args: Sequence[Any], memory: Memory) -> None:
        if len(args) != len(program.parameters):
            raise PtxError(f"kernel {self.function.name} takes {len(program.parameters)} arguments, got {len(args)}")
        for number, (argument, (variable, buffer)) in enumerate(zip(args, program.parameters)):
            if isinstance(argument, np.ndarray) or hasattr(argument, "data_ptr"):
                argument = memory.address(argument)
            value = _argument(argument, variable)
            if len(value) != buffer.data.size:
                raise PtxError(f"argument {number}: {len(value)} bytes for {buffer.data.size} of {variable.name}")
            buffer.data[:] = np.frombuffer(value, np.uint8)


def _argument(value: Any, variable: Variable) -> bytes:
    if isinstance(value, (int, np.integer)) and not variable.array and variable.kind[0] in "bus":
        size = SIZES[variable.kind]
        if not -(1 << 8 * size - 1) <= int(value) < 1 << 8 * size:
            raise PtxError(f"{int(value)} does not fit {variable.name}, a .{variable.kind}")
        return (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")
    if isinstance(value, (float, np.floating)) and not variable.array and variable.kind[0] in "bf":
        return np.array(value, f"f{SIZES[variable.kind]}").tobytes()
    return bytes(value)  # bytes, numpy structures, ctypes structures


def _dim(size: int | Sequence[int]) -> Dim:
    sizes = [size] if isinstance(size, int) else list(size)
    x, y, z = [*sizes, 1, 1][:3]
    return x, y, z


def _indices(grid: Dim, chosen: Iterable[int | Sequence[int]] | None) -> Iterator[Dim]:
    if chosen is None:
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    yield x, y, z
        return
    for index in chosen:
        x, *rest = [index] if isinstance(index, int) else index
        y, z = [*rest, 0, 0][:2]
        if not (0 <= x < grid[0] and 0 <= y < grid[1] and 0 <= z < grid[2]):
            raise PtxError(f"block {(x, y, z)} is outside the grid {grid}")
        yield x, y, z
