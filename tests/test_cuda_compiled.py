"""What nvcc makes of the CUDA kernels: machine code inspected, and PTX executed, without a GPU.

The PTX runs in the interpreter of tests/ptx, which checks every access to memory against the buffers that it was
given, and knows only instructions whose result is fixed to the last bit. So equal bits here mean equal bits on a GPU.
"""

import math
import re
import struct
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_tables import (
    ADAM_BLOCK,
    ARRAYS,
    CASTS,
    CODES,
    CONVERT_BLOCK,
    HUGE,
    HYPERS,
    NORM_BLOCK,
    SIZES,
    Row,
    Table,
    control_of,
    first_block,
    floats,
    kind_name,
    mixed_rows,
    same,
    scalars_of,
    values_of,
)
from ptx import Kernel, Memory, MemoryFaultError, Module
from ptx.toolchain import compile_cuda, nvcc
from reference import Guarded, assert_same_bits
from torch import Tensor

from pyshard import _C
from pyshard.kernels.formats import VALID_KINDS, Format, param_dtype, unpack_kind

pytestmark = pytest.mark.skipif(nvcc() is None, reason="needs nvcc (the CUDA toolkit) to compile the kernels")

SOURCE = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "launch.cu"
FLAGS = ("-O3", "--fmad=false")  # as in setup.py
ARCHITECTURES = (80, 90, 100)
KERNELS = ("adam", "square_sum", "sum", "prepare", "cast", "split", "join")
THREADS = {"square_sum": 32, "sum": 32}  # others: 128
SCALE = 0.37

# The most registers per thread with which a multiprocessor still holds 1,024 threads of 128-thread blocks.
MAX_REGISTERS = 64


Kernels = dict[str, Kernel]


@pytest.fixture(scope="module")
def kernels() -> dict[int, Kernels]:
    """The kernels of each architecture's PTX. A kernel object is decoded once, at its first launch."""
    modules = {arch: Module.parse(compile_cuda(SOURCE, arch=arch, flags=FLAGS)) for arch in ARCHITECTURES}
    return {arch: {k: module.kernel(f"pyshard_{k}") for k in KERNELS} for arch, module in modules.items()}


# ---- inspection ----


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_machine_code_has_no_spills_and_no_stack(arch: int, tmp_path: Path) -> None:
    command = ["nvcc", "-cubin", "-std=c++17", *FLAGS, f"-arch=sm_{arch}", "-Xptxas", "-v", str(SOURCE)]
    done = subprocess.run([*command, "-o", str(tmp_path / "out.cubin")], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"Function properties for (\w+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\n.*?Used (\d+) registers",
        done.stderr,
    )
    print(f"sm_{arch} registers: {', '.join(f'{name} {registers}' for name, *_, registers in found)}")
    assert sorted(name for name, *_ in found) == sorted(f"pyshard_{k}" for k in KERNELS)
    for name, stack, stores, loads, registers in found:
        assert (stack, stores, loads) == ("0", "0", "0"), f"{name}: local memory"
        assert int(registers) <= MAX_REGISTERS, f"{name}: {registers} registers"


@pytest.mark.parametrize("name", KERNELS)
def test_every_operation_is_exact_and_none_is_fused(kernels: dict[int, Kernels], name: str) -> None:
    for arch in ARCHITECTURES:
        kernel = kernels[arch][name]
        assert kernel.inexact() == [], f"compute_{arch}"
        fused = [opcode for opcode in kernel.opcodes() if re.match(r"(fma|mad)\..*f(16|32|64)", opcode)]
        assert fused == [], f"compute_{arch}"


def test_adam_reads_and_writes_whole_quads(kernels: dict[int, Kernels]) -> None:
    """Each array of each kind has its vector access: 16 bytes where it is fp32, 8 bytes where it has 16 bits."""
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for kind in VALID_KINDS:
        fmt, grad_dtype, _, amsgrad = unpack_kind(kind)
        arrays = {"param": 4 * param_dtype(fmt).itemsize, "exp_avg": 16, "exp_avg_sq": 16}
        if fmt == Format.BF16_SPLIT:
            arrays["low"] = 8
        if fmt in (Format.BF16_MASTER, Format.FP16_MASTER):
            arrays["low"] = 16
        if amsgrad:
            arrays["max_exp_avg_sq"] = 16
        stores.update(arrays.values())
        loads.update([*arrays.values(), 4 * grad_dtype.itemsize])
    assert loads[16] == 154 and stores[16] == 130
    for arch in ARCHITECTURES:
        accesses = kernels[arch]["adam"].accesses()
        assert accesses["ld", "global", 16] == loads[16], f"compute_{arch}"
        assert accesses["st", "global", 16] == stores[16], f"compute_{arch}"
        assert accesses["ld", "global", 8] >= loads[8], f"compute_{arch}"
        assert accesses["st", "global", 8] == stores[8], f"compute_{arch}"
        spaces = {space for _, space, _ in accesses}
        assert spaces <= {"global", "param", "const"}, f"compute_{arch}: {spaces}"


def test_square_sum_has_eight_loads_in_flight(kernels: dict[int, Kernels]) -> None:
    for arch in ARCHITECTURES:
        accesses = kernels[arch]["square_sum"].accesses()
        assert accesses["ld", "global", 16] == 8  # fp32
        assert accesses["ld", "global", 8] >= 16  # bf16, fp16


# ---- execution ----


def launch(
    kernels: Kernels,
    name: str,
    arguments: bytes,
    memory: Memory,
    grid: int,
    blocks: list[int] | None = None,
) -> None:
    kernels[name].launch(grid, THREADS.get(name, 128), [arguments], memory, blocks=blocks)


def memory_of(table: Table, arrays: tuple[str, ...] = ARRAYS, writable: bool = True) -> Memory:
    """Exactly the elements of the tensors; gradients can only be read."""
    memory = Memory()
    for i, row in enumerate(table.arrays):
        for name, array in row.items():
            if name in arrays:
                memory.add(array.tensor, writable=writable and name != "grad", name=f"{i} {name}")
    return memory


def run_adam(kernels: Kernels, table: Table, memory: Memory | None = None) -> Memory:
    rows, blocks = table.packed(), table.first_block(ADAM_BLOCK)
    scalars, control = scalars_of(HYPERS, SCALE), control_of()
    memory = memory_of(table) if memory is None else memory
    for name, tensor in (("rows", rows), ("first_block", blocks), ("scalars", scalars), ("control", control)):
        memory.add(tensor, name=name)
    pointers = (rows.data_ptr(), blocks.data_ptr(), len(table.rows), int(blocks[-1]))
    arguments = struct.pack("<6q", *pointers, scalars.data_ptr(), control.data_ptr())
    launch(kernels, "adam", arguments, memory, int(blocks[-1]))
    return memory


@pytest.mark.parametrize("kind", VALID_KINDS, ids=kind_name)
def test_adam_executes_to_the_bits_of_the_cpu(kernels: dict[int, Kernels], kind: int, rng: np.random.Generator) -> None:
    sizes = [(1, 0), (7, 0), (1024, 0), (1029, 0), (1025, 1)]
    table = Table.random([Row(kind, n, offset, n % len(HYPERS)) for n, offset in sizes], rng)
    expected = table.copy()
    expected.cpu_adam(HYPERS, SCALE)
    run_adam(kernels[80], table)
    table.assert_equals(expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_adam_of_mixed_rows(kernels: dict[int, Kernels], arch: int, rng: np.random.Generator) -> None:
    table = Table.random(mixed_rows(rng, VALID_KINDS, 60, 1500), rng)
    expected = table.copy()
    expected.cpu_adam(HYPERS, SCALE)
    run_adam(kernels[arch], table)
    table.assert_equals(expected)


def test_adam_moves_each_byte_once(kernels: dict[int, Kernels], rng: np.random.Generator) -> None:
    """The traffic that the roofline is counted with."""
    table = Table.random([Row(kind, 2048) for kind in VALID_KINDS], rng)
    traffic = run_adam(kernels[80], table).traffic()
    for i, arrays in enumerate(table.arrays):
        for name, array in arrays.items():
            size = array.tensor.nbytes
            assert traffic[f"{i} {name}"] == (size, 0 if name == "grad" else size), f"{table.rows[i]} {name}"


def test_adam_touches_nothing_when_the_step_is_skipped(kernels: dict[int, Kernels]) -> None:
    """With no memory to touch but the control tensor."""
    control = control_of(skip=1.0)
    memory = Memory()
    memory.add(control, name="control")
    launch(kernels[80], "adam", struct.pack("<6q", 8, 8, 1, 3, 8, control.data_ptr()), memory, 3)


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("side", ["first", "last"])
def test_the_check_of_accesses_bites(
    kernels: dict[int, Kernels], name: str, side: str, rng: np.random.Generator
) -> None:
    """One element less to touch at either end of an array is noticed."""
    kind = 4 * (2 * Format.BF16_MASTER) + 1
    table = Table.random([Row(kind, 1025)], rng)
    memory = memory_of(table, tuple(a for a in ARRAYS if a != name))
    whole = table.arrays[0][name].tensor
    memory.add(whole[1:] if side == "first" else whole[:-1], writable=True, name="cut")
    with pytest.raises(MemoryFaultError, match="lie in no buffer"):
        run_adam(kernels[80], table, memory)


@pytest.mark.parametrize("n", HUGE)
def test_adam_beyond_31_bits(kernels: dict[int, Kernels], n: int, rng: np.random.Generator) -> None:
    """Two rows of n elements, whose memory exists for their last two blocks only."""
    last = -(-n // ADAM_BLOCK) - 2
    kinds = rng.choice(VALID_KINDS, 2, replace=False)
    table = Table.random([Row(int(kind), n - last * ADAM_BLOCK) for kind in kinds], rng)
    expected = table.copy()
    expected.cpu_adam(HYPERS, SCALE)
    rows, blocks = table.packed(), first_block([n, n], ADAM_BLOCK)
    for i, arrays in enumerate(table.arrays):
        rows[i, 6] = n
        for name, array in arrays.items():
            rows[i, ARRAYS.index(name)] -= last * ADAM_BLOCK * array.tensor.element_size()
    scalars, control = scalars_of(HYPERS, SCALE), control_of()
    memory = memory_of(table)
    for tensor in (rows, blocks, scalars, control):
        memory.add(tensor)
    grid = int(blocks[-1])
    pointers = (rows.data_ptr(), blocks.data_ptr(), 2, grid, scalars.data_ptr(), control.data_ptr())
    chosen = [last, last + 1, grid - 2, grid - 1]
    launch(kernels[80], "adam", struct.pack("<6q", *pointers), memory, grid, chosen)
    table.assert_equals(expected)


def run_square_sum(kernels: Kernels, table: Table) -> float:
    """All launches of a norm."""
    rows, blocks = table.packed(), table.first_block(NORM_BLOCK)
    values = Guarded(torch.full((int(blocks[-1]),), math.nan, dtype=torch.float64))
    memory = memory_of(table, ("grad",), writable=False)
    memory.add(rows, name="rows")
    memory.add(blocks, name="first_block")
    memory.add(values.tensor, writable=True, name="partials")
    n = values.tensor.numel()
    pointers = (rows.data_ptr(), blocks.data_ptr(), len(table.rows), values.address, n)
    launch(kernels, "square_sum", struct.pack("<5q", *pointers), memory, n)
    return run_sum(kernels, values.tensor)


def run_sum(kernels: Kernels, values: Tensor) -> float:
    while values.numel() > 1:
        n = values.numel()
        out = torch.full((-(-n // NORM_BLOCK),), math.nan, dtype=torch.float64)
        memory = Memory()
        memory.add(values, name="values")
        memory.add(out, writable=True, name="out")
        launch(kernels, "sum", struct.pack("<3q", values.data_ptr(), n, out.data_ptr()), memory, out.numel())
        values = out
    return values.item()


@pytest.mark.parametrize("kind", [4, 8, 24], ids=kind_name)
@pytest.mark.parametrize("offset", [0, 1])
def test_square_sum_executes_to_the_bits_of_the_cpu(
    kernels: dict[int, Kernels], kind: int, offset: int, rng: np.random.Generator
) -> None:
    sizes = [n for n in SIZES if n]
    table = Table.random([Row(kind, n, offset) for n in sizes], rng)
    for finite in (False, True):
        for arrays in table.arrays if finite else []:
            grad = arrays["grad"].tensor
            grad.copy_(torch.from_numpy(rng.standard_normal(grad.numel())))
        want = _C.cpu_square_sum(table.grads(), 1)
        assert math.isfinite(want) == finite
        assert same(run_square_sum(kernels[80], table), want)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_square_sum_of_mixed_rows(kernels: dict[int, Kernels], arch: int, rng: np.random.Generator) -> None:
    table = Table.random(mixed_rows(rng, VALID_KINDS, 60, 6000), rng)
    for arrays in table.arrays:
        grad = arrays["grad"].tensor
        grad.copy_(torch.from_numpy(rng.standard_normal(grad.numel())))
    assert run_square_sum(kernels[arch], table) == _C.cpu_square_sum(table.grads(), 1)


@pytest.mark.parametrize("n", [2, 127, 128, 129, 4095, 4096, 4097, 9001])
def test_sum_executes_to_the_bits_of_the_cpu(kernels: dict[int, Kernels], n: int, rng: np.random.Generator) -> None:
    """The values of n one-element rows are their squares; the CPU sums them in the same way."""
    x = torch.from_numpy(rng.standard_normal(n).astype(np.float32))
    want = _C.cpu_square_sum([(x.data_ptr() + 4 * i, 1, 0) for i in range(n)], 1)
    assert run_sum(kernels[80], x.double().square()) == want


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize(
    "control",
    [
        control_of(grad_scale=SCALE, skipped=2.0),
        control_of(grad_scale=0.5, max_norm=1.0, square_sum=77.0, skip_nonfinite=1.0),
        control_of(max_norm=1.0, square_sum=math.nan),
        control_of(square_sum=math.inf, skip_nonfinite=1.0, skipped=1.0),
        control_of(found_inf=1.0),
    ],
    ids=["plain", "clips", "nan", "nonfinite", "found_inf"],
)
def test_prepare_executes_to_the_bits_of_the_host(kernels: dict[int, Kernels], control: Tensor, counted: bool) -> None:
    k = 131
    hypers = torch.tensor([[*HYPERS[i % 4][:5], 1.0 + i, *HYPERS[i % 4][6:]] for i in range(k)]).double()
    results = []
    for run in ("host", "ptx"):
        state = {
            "steps": Guarded(torch.arange(k, dtype=torch.float32) * 1000),
            "control": Guarded(control),
            "scalars": Guarded(torch.zeros(9 * k)),
        }
        addresses = state["steps"].address + 4 * torch.arange(k) if counted else torch.empty(0)
        pointers = [
            *(hypers.data_ptr(), addresses.data_ptr(), state["control"].address, state["scalars"].address),
            k,
        ]
        if run == "host":
            _C.host_prepare(*pointers, 0, 2)
        else:
            memory = Memory()
            memory.add(hypers, name="hypers")
            memory.add(addresses, name="addresses")
            for name, array in state.items():
                memory.add(array.tensor, writable=True, name=name)
            launch(kernels[80], "prepare", struct.pack("<5q", *pointers), memory, 2)
        results.append(state)
    for name, array in results[1].items():
        assert_same_bits(array.tensor, results[0][name].tensor, name)
        array.check(name)


@pytest.mark.parametrize(("src_dtype", "dst_dtype"), CASTS)
def test_casts_execute_to_the_bits_of_the_cpu(
    kernels: dict[int, Kernels], src_dtype: torch.dtype, dst_dtype: torch.dtype, rng: np.random.Generator
) -> None:
    for n, offsets in ((1, (0, 0)), (2048, (0, 0)), (4101, (0, 0)), (2051, (1, 0)), (2051, (0, 1))):
        src = Guarded(values_of(rng, n, src_dtype), offsets[0])
        got, want = (Guarded(torch.zeros(n, dtype=dst_dtype), offsets[1]) for _ in range(2))
        _C.cpu_cast(src.address, CODES[src_dtype], want.address, CODES[dst_dtype], n, 1)
        memory = Memory()
        memory.add(src.tensor, name="src")
        memory.add(got.tensor, writable=True, name="dst")
        codes = (CODES[src_dtype], CODES[dst_dtype])
        arguments = struct.pack("<2q2iq", src.address, got.address, *codes, n)
        launch(kernels[80], "cast", arguments, memory, -(-n // CONVERT_BLOCK))
        assert_same_bits(got.tensor, want.tensor, f"n={n}")


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("n", [1, 2048, 4101])
def test_split_and_join_execute_to_the_bits_of_the_cpu(
    kernels: dict[int, Kernels], n: int, offset: int, rng: np.random.Generator
) -> None:
    master, joined = Guarded(floats(rng, n), offset), Guarded(torch.zeros(n), offset)
    high, high_want = (Guarded(torch.zeros(n, dtype=torch.bfloat16), offset) for _ in range(2))
    low, low_want = (Guarded(torch.zeros(n, dtype=torch.int16), offset) for _ in range(2))
    _C.cpu_split(master.address, high_want.address, low_want.address, n, 1)
    memory = Memory()
    memory.add(master.tensor, name="master")
    for name, array in (("high", high), ("low", low), ("joined", joined)):
        memory.add(array.tensor, writable=True, name=name)
    grid = -(-n // CONVERT_BLOCK)
    launch(kernels[80], "split", struct.pack("<4q", master.address, high.address, low.address, n), memory, grid)
    assert_same_bits(high.tensor, high_want.tensor, "high")
    assert_same_bits(low.tensor, low_want.tensor, "low")
    launch(kernels[80], "join", struct.pack("<4q", high.address, low.address, joined.address, n), memory, grid)
    assert_same_bits(joined.tensor, master.tensor, "joined")
