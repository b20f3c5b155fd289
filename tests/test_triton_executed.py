"""The Triton kernels as compiled for sm_80, executed by the PTX interpreter (tests/ptx): the CPU kernels' bits.

The interpreter checks every memory access against the tensors and refuses instructions that are not exact.
"""

import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from cuda_tables import (
    ADAM_BLOCK,
    ARRAYS,
    HYPERS,
    NORM_BLOCK,
    Row,
    Table,
    control_of,
    floats,
    halves,
    kind_name,
    mixed_rows,
    scalars_of,
)
from ptx import Memory, MemoryFaultError, Module
from reference import Guarded, assert_same_bits
from triton_compile import CASTS, Compiled, adam_request, cast_request, compile_all, other_requests

from pyshard import _C
from pyshard.kernels.formats import DTYPE_CODES, VALID_KINDS, Format, unpack_kind

pytest.importorskip("triton", reason="needs Triton, which compiles without a GPU")

SCALE = 0.37
SIZES = (0, 1, 1020, 1023, 1024, 1025, 2053)
MIXED = (4, 9, 18, 28, 42)  # every format but one, every switch
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def code() -> dict[str, Compiled]:
    """The step for all kinds of one format at a time, and without alignment; everything else."""
    requests = {"step unaligned": adam_request(MIXED, 80, aligned=False)}
    for fmt in Format:
        requests[f"step {fmt.name}"] = adam_request((k for k in VALID_KINDS if unpack_kind(k)[0] == fmt), 80)
    requests |= {f"cast {s} {d} unaligned": cast_request(s, d, 80, aligned=False) for s, d in CASTS}
    return compile_all(requests | other_requests(80))


def launch(
    made: Compiled, grid: int, arguments: list[object], memory: Memory, blocks: Iterable[int] | None = None
) -> None:
    kernel = Module.parse(made.ptx).kernel(made.name)
    scratch = len(kernel.program().parameters) - len(arguments)  # pointers of Triton's runtime
    arguments = [*arguments, *[0] * scratch]
    kernel.launch(grid, made.threads, arguments, memory, shared_bytes=made.shared_bytes, blocks=blocks)


class Step:
    """A table in checked memory, and what a launch for it reads besides."""

    def __init__(self, table: Table, control: torch.Tensor | None = None):
        self.table, self.rows, self.blocks = table, table.packed(), table.first_block(ADAM_BLOCK)
        self.scalars, self.control = scalars_of(HYPERS, SCALE), control_of() if control is None else control

    def run(self, made: Compiled, shift: dict[str, int] | None = None) -> Memory:
        """`shift`: bytes by which the addresses of row 0's arrays in the table lie below the arrays."""
        memory = Memory()
        for name, tensor in (("rows", self.rows), ("blocks", self.blocks), ("scalars", self.scalars)):
            memory.add(tensor, name=name)
        memory.add(self.control, name="control")
        for i, arrays in enumerate(self.table.arrays):
            for name, array in arrays.items():
                memory.add(array.tensor, writable=name != "grad", name=f"{i} {name}")
                if i == 0 and shift:
                    self.rows[0, ARRAYS.index(name)] -= shift[name]
        arguments = [self.rows, self.blocks, len(self.table.rows), self.scalars, self.control]
        launch(made, int(self.blocks[-1]), arguments, memory)
        return memory


def check_step(table: Table, made: Compiled) -> None:
    """The CPU kernel's bits; each array is read once and, but for the gradient, written once."""
    expected = table.copy()
    expected.cpu_adam(HYPERS, SCALE)
    traffic = Step(table).run(made).traffic()
    table.assert_equals(expected)
    for i, arrays in enumerate(table.arrays):
        for name, array in arrays.items():
            size = array.tensor.nbytes
            assert not size or traffic[f"{i} {name}"] == (size, 0 if name == "grad" else size), name


@pytest.mark.parametrize("kind", VALID_KINDS, ids=kind_name)
def test_step_of_every_kind(code: dict[str, Compiled], kind: int, rng: np.random.Generator) -> None:
    rows = [Row(kind, n, 0, i % len(HYPERS)) for i, n in enumerate(SIZES)]
    check_step(Table.random(rows, rng), code[f"step {unpack_kind(kind)[0].name}"])


def test_step_of_unaligned_rows_of_several_kinds(code: dict[str, Compiled], rng: np.random.Generator) -> None:
    check_step(Table.random(mixed_rows(rng, MIXED, 40, 3000), rng), code["step unaligned"])


def test_a_skipped_step_touches_nothing(code: dict[str, Compiled], rng: np.random.Generator) -> None:
    table = Table.random([Row(4, 1500)], rng)
    before = table.copy()
    traffic = Step(table, control_of(skip=1.0)).run(code["step F32"]).traffic()
    table.assert_equals(before)
    touched = {name for name, moved in traffic.items() if moved != (0, 0)}
    assert touched == {"control"}


@pytest.mark.parametrize("n", [2**31 - 1, 2**31 + 1025, 3 * 2**33 + 7])
@pytest.mark.parametrize("kind", [5, 9, 24], ids=kind_name)
def test_step_beyond_31_bits(code: dict[str, Compiled], kind: int, n: int, rng: np.random.Generator) -> None:
    """The last blocks of a tensor of n elements, whose block numbers begin far below 0, and a small row behind it."""
    last = -(-n // ADAM_BLOCK) - 3  # first of the blocks that are run
    table = Table.random([Row(kind, n - last * ADAM_BLOCK), Row(kind, 77)], rng)
    expected = table.copy()
    expected.cpu_adam(HYPERS, SCALE)
    step = Step(table)
    step.rows[0, 6], step.blocks = n, torch.tensor([-last, 3, 4])
    shift = {name: last * ADAM_BLOCK * a.tensor.element_size() for name, a in table.arrays[0].items()}
    step.run(code[f"step {unpack_kind(kind)[0].name}"], shift)
    table.assert_equals(expected)


def test_an_access_outside_a_tensor_is_caught(code: dict[str, Compiled], rng: np.random.Generator) -> None:
    """The proof above is one only if this fails: a row that claims an element too many."""
    step = Step(Table.random([Row(4, 1023)], rng))
    step.rows[0, 6] += 1
    with pytest.raises(MemoryFaultError, match="lie in no buffer"):
        step.run(code["step F32"])


def finite_grads(table: Table) -> Table:
    for arrays in table.arrays:
        grad = arrays["grad"].tensor
        grad[~grad.isfinite()] = 1.0
    return table


def test_square_sum_of_rows_of_every_kind(code: dict[str, Compiled], rng: np.random.Generator) -> None:
    sizes = (1, 127, 4095, 4096, 4097, 8192)
    rows = [Row(kind, n, offset) for kind in (4, 8, 12, 24, 40) for n in sizes for offset in (0, 1)]
    table = finite_grads(Table.random([*rows, *mixed_rows(rng, VALID_KINDS, 30, 5000)], rng))
    rows_, blocks = table.packed(), table.first_block(NORM_BLOCK)
    partials, total = torch.full((int(blocks[-1]),), math.nan).double(), torch.full((1,), math.nan).double()
    memory = Memory()
    for name, tensor in (("rows", rows_), ("blocks", blocks)):
        memory.add(tensor, name=name)
    for i, arrays in enumerate(table.arrays):
        memory.add(arrays["grad"].tensor, name=f"{i}")
    memory.add(partials, writable=True, name="partials")
    memory.add(total, writable=True, name="total")
    launch(code["square_sum"], partials.numel(), [rows_, blocks, len(table.rows), partials], memory)
    launch(code["sum"], 1, [partials, total, partials.numel()], memory)
    assert total.item() == _C.cpu_square_sum(table.grads(), 1)
    traffic = memory.traffic()
    for i, arrays in enumerate(table.arrays):
        size = arrays["grad"].tensor.nbytes
        assert not size or traffic[f"{i}"] == (size, 0)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_square_sum_is_not_finite_if_an_element_is_not(
    code: dict[str, Compiled], bad: float, rng: np.random.Generator
) -> None:
    table = finite_grads(Table.random([Row(kind, 5003) for kind in (4, 8, 24)], rng))
    for at, arrays in zip((5002, 0, 4096), table.arrays):
        grad = arrays["grad"].tensor
        grad[:] = torch.finfo(grad.dtype).max
        grad[at] = bad
    rows, blocks, partials = table.packed(), table.first_block(NORM_BLOCK), torch.zeros(6, dtype=torch.float64)
    memory = Memory()
    for tensor in (rows, blocks, *(arrays["grad"].tensor for arrays in table.arrays)):
        memory.add(tensor)
    memory.add(partials, writable=True)
    launch(code["square_sum"], 6, [rows, blocks, 3, partials], memory)
    assert partials.isfinite().tolist() == [True, False, False, True, True, False]


@pytest.mark.parametrize("n", [1, 129, 4096, 10007])
def test_sum_of_values(code: dict[str, Compiled], n: int, rng: np.random.Generator) -> None:
    values = torch.from_numpy(rng.standard_normal(n) * 10.0 ** rng.uniform(-9, 9, n))
    out = torch.full((-(-n // NORM_BLOCK),), math.nan, dtype=torch.float64)
    memory = Memory()
    memory.add(values)
    memory.add(out, writable=True)
    launch(code["sum"], out.numel(), [values, out, n], memory)
    padded = np.zeros(out.numel() * NORM_BLOCK)
    padded[:n] = values.numpy()
    for block, got in zip(padded.reshape(-1, 32, 128), out.tolist()):
        lanes = np.zeros(128)
        for row in block:
            lanes = lanes + row
        while lanes.size > 1:
            lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
        assert got == lanes[0]


@pytest.mark.parametrize(
    ("grad_scale", "max_norm", "square_sum", "found_inf"),
    [
        (1.0, math.inf, 0.0, 0.0),
        (0.125, 0.3, 1234.5, 0.0),
        (1.0, 1.0, 1e-300, 0.0),
        (1.0, 1.0, 4.0, 1.0),
        (1.0, 1.0, math.inf, 0.0),
        (1.0, 1.0, math.nan, 0.0),
    ],
)
@pytest.mark.parametrize("counting", [False, True])
def test_prepare(
    code: dict[str, Compiled],
    counting: bool,
    grad_scale: float,
    max_norm: float,
    square_sum: float,
    found_inf: float,
    rng: np.random.Generator,
) -> None:
    k = 20
    columns = [
        *(10.0 ** rng.uniform(-6, 0, k), *rng.uniform(0, 1, (2, k)), 10.0 ** rng.uniform(-15, -3, k)),
        *(rng.uniform(0, 1, k), rng.integers(1, 2**24 - 1, k).astype(float)),
        *(rng.choice([-1.0, 1.0], k), rng.choice([0.0, 1.0], k)),
    ]
    hypers, scalars = torch.from_numpy(np.column_stack(columns)), torch.full((k, 9), math.nan)
    counts = hypers[:, 5].float()
    addresses = counts.data_ptr() + 4 * torch.arange(k)
    control = control_of(
        grad_scale=grad_scale, max_norm=max_norm, square_sum=square_sum, found_inf=found_inf, skip_nonfinite=1.0
    )
    memory = Memory()
    memory.add(hypers)
    memory.add(addresses)
    for tensor in (counts, control, scalars):
        memory.add(tensor, writable=True)
    name, steps = ("prepare, counting", [addresses]) if counting else ("prepare", [])
    launch(code[name], k, [hypers, *steps, control, scalars, k], memory)
    skip = found_inf != 0 or not math.isfinite(square_sum)
    norm = math.sqrt(square_sum) * grad_scale
    scale = grad_scale if max_norm == math.inf else grad_scale * _C.clip_coefficient(norm, max_norm)
    if counting and not skip:
        hypers[:, 5] += 1
    assert counts.tolist() == (hypers[:, 5].tolist() if counting else counts.tolist())
    want = torch.tensor([_C.adam_scalars(h, scale) for h in hypers.tolist()])
    assert_same_bits(scalars, want, "scalars")
    assert_same_bits(control[5:], torch.tensor([skip, norm, skip], dtype=torch.float64), "control")


def convert(made: Compiled, arrays: list[Guarded], written: int) -> None:
    """Runs a cast, split or join; the last `written` arrays are its results."""
    memory, n = Memory(), arrays[0].tensor.numel()
    for i, array in enumerate(arrays):
        memory.add(array.tensor, writable=i >= len(arrays) - written)
    launch(made, -(-n // 1024), [*(a.tensor for a in arrays), n], memory)


def values_of(rng: np.random.Generator, n: int, dtype: torch.dtype) -> torch.Tensor:
    return floats(rng, n) if dtype == torch.float32 else halves(rng, n, dtype)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(("src", "dst"), CASTS)
def test_casts(code: dict[str, Compiled], src: str, dst: str, aligned: bool, rng: np.random.Generator) -> None:
    from_, to = DTYPES[src], DTYPES[dst]
    sources = [values_of(rng, n, from_) for n in SIZES]
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16)  # all 16-bit ones, or what lies between them
    if from_ == torch.float32:
        tie = 0x8000 if to == torch.bfloat16 else 0x1000
        sources.append((numbers.view(to).float().view(torch.int32) + tie).view(from_))
    else:
        sources.append(numbers.view(from_))
    for source in sources:
        n, offset = source.numel(), 0 if aligned else 1
        given, got = Guarded(source, offset), Guarded(torch.zeros(n, dtype=to), offset)
        convert(code[f"cast {src} {dst}{'' if aligned else ' unaligned'}"], [given, got], written=1)
        want = torch.empty(n, dtype=to)
        _C.cpu_cast(source.data_ptr(), DTYPE_CODES[from_], want.data_ptr(), DTYPE_CODES[to], n, 1)
        assert_same_bits(got.tensor, want, f"n {n}")


def test_split_and_join(code: dict[str, Compiled], rng: np.random.Generator) -> None:
    for n in SIZES:
        master = Guarded(floats(rng, n))
        high, low, back = (Guarded(torch.zeros(n, dtype=d)) for d in (torch.bfloat16, torch.int16, torch.float32))
        convert(code["split"], [master, high, low], written=2)
        convert(code["join"], [high, low, back], written=1)
        want = torch.empty(n, dtype=torch.bfloat16), torch.empty(n, dtype=torch.int16)
        _C.cpu_split(master.address, want[0].data_ptr(), want[1].data_ptr(), n, 1)
        for got, expected in ((high, want[0]), (low, want[1]), (back, master.tensor)):
            assert_same_bits(got.tensor, expected, f"n {n}")


def test_join_of_halves_that_no_split_makes(code: dict[str, Compiled]) -> None:
    highs = torch.tensor([0, 1, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, -1, -0x80, -0x8000], dtype=torch.int16)
    lows = torch.tensor([-(2**15), -1, 0, 1, 2**15 - 1], dtype=torch.int16)
    pairs = torch.cartesian_prod(highs, lows)
    n = len(pairs)
    high, low = Guarded(pairs[:, 0].contiguous().view(torch.bfloat16)), Guarded(pairs[:, 1].contiguous())
    got, want = Guarded(torch.zeros(n)), torch.empty(n)
    convert(code["join"], [high, low, got], written=1)
    _C.cpu_join(high.address, low.address, want.data_ptr(), n, 1)
    assert_same_bits(got.tensor, want)


@pytest.mark.parametrize("n", [2**31 + 5, 3 * 2**33 + 7])
def test_conversions_and_sums_beyond_31_bits(code: dict[str, Compiled], n: int, rng: np.random.Generator) -> None:
    """Their last two blocks, in buffers that stand at addresses as far up."""
    source = torch.from_numpy(rng.standard_normal(1024 + n % 1024).astype(np.float32))
    got, first, last = torch.zeros(source.numel(), dtype=torch.bfloat16), n - source.numel(), -(-n // 1024)
    memory, src, dst = Memory(), 1 << 44, 1 << 45
    memory.add(source, at=src + 4 * first)
    memory.add(got, at=dst + 2 * first, writable=True)
    blocks = [last - 2, last - 1]
    launch(code["cast fp32 bf16"], last, [src, dst, n], memory, blocks)
    assert_same_bits(got, source.bfloat16())

    values = source[: n % NORM_BLOCK].double()
    total = torch.zeros(1, dtype=torch.float64)
    memory.add(values, at=(1 << 46) + 8 * (n - values.numel()))
    block = n // NORM_BLOCK
    memory.add(total, at=(1 << 47) + 8 * block, writable=True)
    launch(code["sum"], block + 1, [1 << 46, 1 << 47, n], memory, [block])
    assert total.item() == sum(values.tolist())  # exact in any order: a few fp32 numbers
