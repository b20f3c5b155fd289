"""The values of the Triton kernels against the CPU kernels: the same bits.

Without a GPU they run in Triton's interpreter on the guarded tensors themselves; with one, compiled, on copies of
those tensors and of the sentinels around them (and then carry the marker gpu).
"""

import math
import subprocess
import sys

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
from reference import Guarded, assert_same_bits
from torch import Tensor

from pyshard import _C
from pyshard.kernels import triton as kernels
from pyshard.kernels.formats import DTYPE_CODES, VALID_KINDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_interpreter = pytest.mark.skipif(DEVICE == "cuda", reason="about Triton's interpreter, which needs no GPU")
pytestmark = [
    pytest.mark.skipif(kernels.unavailable(DEVICE) is not None, reason=str(kernels.unavailable(DEVICE))),
    # numpy's, about NaN and inf, in the interpreter
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

SCALE = 0.37
SIZES = (0, 1, 1023, 1024, 1025, 2053, 4097)
SOME_KINDS = VALID_KINDS[::5]  # every format and switch; a GPU compiles them in one go
HUGE = (2**31 - 1, 2**31 + 1025, 3 * 2**33 + 7)


class Mirror:
    """A guarded tensor on the device, at an address as (un)aligned as its own; on the CPU, that tensor itself."""

    def __init__(self, guarded: Guarded):
        self.guarded, self.tensor = guarded, guarded.tensor
        if DEVICE == "cuda":
            memory = guarded._memory
            room = torch.empty(memory.numel() + 64, dtype=torch.uint8, device=DEVICE)
            skip = (memory.data_ptr() - room.data_ptr()) % 64
            self._copy = room[skip : skip + memory.numel()].copy_(memory)
            self.tensor = self._copy[guarded._span].view(guarded.tensor.dtype)

    def fetch(self) -> None:
        """Brings what the device wrote back into the guarded tensor and its sentinels."""
        if DEVICE == "cuda":
            self.guarded._memory.copy_(self._copy)


class Launched:
    """A table on the device. Leaving the block brings everything back."""

    def __init__(self, table: Table):
        self.table = table
        self.mirrors = [{name: Mirror(a) for name, a in arrays.items()} for arrays in table.arrays]
        self.rows = table.packed()
        for i, mirrors in enumerate(self.mirrors):
            for name, mirror in mirrors.items():
                self.rows[i, ARRAYS.index(name)] = mirror.tensor.data_ptr()
        self.kinds = tuple(sorted({row.kind for row in table.rows}))
        self.aligned = not (self.rows[:, :6] % 16).any()

    def adam(self, scalars: Tensor, control: Tensor, blocks: Tensor | None = None) -> None:
        blocks = self.table.first_block(ADAM_BLOCK) if blocks is None else blocks
        rows, scalars, control = (t.to(DEVICE) for t in (self.rows, scalars, control))
        kernels.adam(rows, blocks.to(DEVICE), int(blocks[-1]), scalars, control, self.kinds, self.aligned)

    def square_sum(self) -> float:
        blocks = self.table.first_block(NORM_BLOCK)
        values = torch.full((int(blocks[-1]),), math.nan, dtype=torch.float64, device=DEVICE)
        kernels.square_sum(self.rows.to(DEVICE), blocks.to(DEVICE), values)
        while values.numel() > 1:
            sums = torch.full((-(-values.numel() // NORM_BLOCK),), math.nan, dtype=torch.float64, device=DEVICE)
            kernels.sum(values, sums)
            values = sums
        return float(values[0])

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *exception: object) -> None:
        for mirrors in self.mirrors:
            for mirror in mirrors.values():
                mirror.fetch()


def check_adam(table: Table, aligned: bool) -> None:
    expected = table.copy()
    expected.cpu_adam(HYPERS, SCALE)
    with Launched(table) as launched:
        assert launched.aligned == aligned
        launched.adam(scalars_of(HYPERS, SCALE), control_of())
    table.assert_equals(expected)


# ---- Adam ----


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("kind", VALID_KINDS, ids=kind_name)
def test_adam_every_kind_at_boundary_sizes(kind: int, aligned: bool, rng: np.random.Generator) -> None:
    rows = [Row(kind, n, 0 if aligned else 1 + i % 3, i % len(HYPERS)) for i, n in enumerate(SIZES)]
    check_adam(Table.random(rows, rng), aligned)


def test_adam_mixes_kinds_in_one_launch(rng: np.random.Generator) -> None:
    kinds = SOME_KINDS if DEVICE == "cuda" else VALID_KINDS
    rows = mixed_rows(rng, kinds, 120, 2500)
    check_adam(Table.random([*rows, Row(kinds[0], 5, 1)], rng), aligned=False)
    check_adam(Table.random([Row(row.kind, row.n, 0, row.hyper) for row in rows], rng), aligned=True)


@pytest.mark.parametrize("unaligned", ARRAYS)
def test_adam_where_one_array_is_unaligned(unaligned: str, rng: np.random.Generator) -> None:
    table = Table.random([Row(kind, 1027) for kind in SOME_KINDS], rng)
    for arrays in table.arrays:
        if unaligned in arrays:
            arrays[unaligned] = Guarded(arrays[unaligned].tensor, 1)
    check_adam(table, aligned=False)


@pytest.mark.parametrize("n", [4, 8, 60, 1020, 1028, 2044])
def test_adam_of_whole_quads_at_the_end(n: int, rng: np.random.Generator) -> None:
    """Sizes whose last block is served by wide accesses under a mask."""
    check_adam(Table.random([Row(kind, n) for kind in SOME_KINDS], rng), aligned=True)


def test_adam_of_no_rows_or_no_elements(rng: np.random.Generator) -> None:
    for table in (Table([]), Table.random([Row(4, 0), Row(9, 0)], rng)):
        check_adam(table, aligned=True)


def test_adam_leaves_everything_alone_when_the_step_is_skipped(rng: np.random.Generator) -> None:
    table = Table.random([Row(kind, 1500) for kind in SOME_KINDS], rng)
    before = table.copy()
    with Launched(table) as launched:
        launched.adam(scalars_of(HYPERS, SCALE), control_of(skip=1.0))
    table.assert_equals(before)


@pytest.mark.parametrize("n", HUGE)
@pytest.mark.parametrize("kind", [5, 9, 24], ids=kind_name)
def test_adam_beyond_31_bits(kind: int, n: int, rng: np.random.Generator) -> None:
    """The last blocks of a tensor of n elements, whose block numbers begin far below 0, and a small row behind it."""
    last = -(-n // ADAM_BLOCK) - 3  # first of the blocks that are run
    table = Table.random([Row(kind, n - last * ADAM_BLOCK), Row(kind, 77)], rng)
    expected = table.copy()
    expected.cpu_adam(HYPERS, SCALE)
    with Launched(table) as launched:
        for name, mirror in launched.mirrors[0].items():
            launched.rows[0, ARRAYS.index(name)] -= last * ADAM_BLOCK * mirror.tensor.element_size()
        launched.rows[0, 6] = n
        launched.adam(scalars_of(HYPERS, SCALE), control_of(), torch.tensor([-last, 3, 4]))
    table.assert_equals(expected)


def test_several_steps_with_counts_on_the_device(rng: np.random.Generator) -> None:
    """prepare and adam, step after step, as a step with capturable launches them."""
    table = Table.random([Row(kind, 500, hyper=i) for i, kind in enumerate(SOME_KINDS)], rng)
    expected = table.copy()
    k = len(table.rows)
    hypers = torch.tensor([HYPERS[i % len(HYPERS)] for i in range(k)], dtype=torch.float64, device=DEVICE)
    counts = torch.zeros(k, dtype=torch.float32, device=DEVICE)
    addresses = counts.data_ptr() + 4 * torch.arange(k, device=DEVICE)
    control, scalars = control_of(grad_scale=SCALE).to(DEVICE), torch.empty(k, 9, device=DEVICE)
    with Launched(table) as launched:
        for step in range(1, 4):
            kernels.prepare(hypers, addresses, control, scalars)
            launched.adam(scalars, control)
            assert counts.tolist() == [step] * k
            expected.cpu_adam([[*h[:5], float(step), *h[6:]] for h in hypers.tolist()], SCALE)
    table.assert_equals(expected)


# ---- sums ----


def finite_grads(table: Table) -> Table:
    for arrays in table.arrays:
        grad = arrays["grad"].tensor
        grad[~grad.isfinite()] = 1.0
    return table


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def check_square_sum(table: Table) -> float:
    before = table.copy()
    want = _C.cpu_square_sum(table.grads(), 1)
    with Launched(table) as launched:
        got = launched.square_sum()
    assert same(got, want), (got.hex(), want.hex())
    table.assert_equals(before)
    return got


@pytest.mark.parametrize("kind", [4, 8, 12, 24, 28, 40], ids=kind_name)
def test_square_sum_at_boundary_sizes(kind: int, rng: np.random.Generator) -> None:
    for n in (1, 127, 129, 4095, 4096, 4097, 8192):
        for offset in (0, 1):
            check_square_sum(finite_grads(Table.random([Row(kind, n, offset)], rng)))


def test_square_sum_over_rows_of_every_kind(rng: np.random.Generator) -> None:
    check_square_sum(finite_grads(Table.random(mixed_rows(rng, VALID_KINDS, 40, 6000), rng)))


@pytest.mark.parametrize("kind", [4, 8, 24], ids=kind_name)
def test_square_sum_is_nonfinite_exactly_if_an_element_is(kind: int, rng: np.random.Generator) -> None:
    table = Table.random([Row(kind, 10), Row(kind, 5003)], rng)
    finite_grads(table)
    grad = table.arrays[1]["grad"].tensor
    grad[:] = torch.finfo(grad.dtype).max
    assert math.isfinite(check_square_sum(table))
    for at, bad in ((0, math.inf), (4095, -math.inf), (4096, math.nan), (5002, math.inf)):
        grad[at] = bad
        assert not math.isfinite(check_square_sum(table))
        grad[at] = 1.0


@pytest.mark.parametrize("n", HUGE)
@pytest.mark.parametrize("kind", [4, 8], ids=kind_name)
def test_square_sum_beyond_31_bits(kind: int, n: int, rng: np.random.Generator) -> None:
    last = -(-n // NORM_BLOCK) - 2
    table = finite_grads(Table.random([Row(kind, n - last * NORM_BLOCK)], rng))
    address, real, code = table.grads()[0]
    grad = table.arrays[0]["grad"].tensor
    with Launched(table) as launched:
        launched.rows[0, 2] -= last * NORM_BLOCK * grad.element_size()
        launched.rows[0, 6] = n
        values = torch.full((2,), math.nan, dtype=torch.float64, device=DEVICE)
        kernels.square_sum(launched.rows.to(DEVICE), torch.tensor([-last, 2], device=DEVICE), values)
    assert values.tolist() == [
        _C.cpu_square_sum([(address, NORM_BLOCK, code)], 1),
        _C.cpu_square_sum([(address + NORM_BLOCK * grad.element_size(), real - NORM_BLOCK, code)], 1),
    ]


@pytest.mark.parametrize("n", [1, 127, 128, 129, 4095, 4096, 4097, 10007])
def test_sum_of_values(n: int, rng: np.random.Generator) -> None:
    """In the order of the lanes, written here once more in Python."""
    values = Mirror(Guarded(torch.from_numpy(rng.standard_normal(n) * 10.0 ** rng.uniform(-9, 9, n)), n % 2))
    out = Mirror(Guarded(torch.full((-(-n // NORM_BLOCK),), math.nan, dtype=torch.float64)))
    kernels.sum(values.tensor, out.tensor)
    out.fetch()
    out.guarded.check("out")
    for block, got in enumerate(out.guarded.tensor.tolist()):
        lanes = [0.0] * 128
        for i, value in enumerate(values.tensor[block * NORM_BLOCK : (block + 1) * NORM_BLOCK].tolist()):
            lanes[i % 128] += value
        for width in (64, 32, 16, 8, 4, 2, 1):
            for lane in range(width):
                lanes[lane] += lanes[lane + width]
        assert got == lanes[0]


# ---- prepare ----


@pytest.mark.parametrize("k", [0, 1, 60])
def test_prepare_makes_the_scalars_of_the_host(k: int, rng: np.random.Generator) -> None:
    columns = [
        *(10.0 ** rng.uniform(-6, 0, k), *rng.uniform(0, 1, (2, k)), 10.0 ** rng.uniform(-15, -3, k)),
        *(rng.uniform(0, 1, k), rng.integers(1, 2**24, k).astype(float)),
        *(rng.choice([-1.0, 1.0], k), rng.choice([0.0, 1.0], k)),
    ]
    hypers = torch.from_numpy(np.column_stack(columns)).view(k, 8)
    scalars = Mirror(Guarded(torch.full((9 * k,), math.nan)))
    control = control_of(grad_scale=SCALE, skipped=5.0).to(DEVICE)
    kernels.prepare(hypers.to(DEVICE), None, control, scalars.tensor.view(k, 9))
    scalars.fetch()
    scalars.guarded.check("scalars")
    for got, hyper in zip(scalars.guarded.tensor.view(k, 9).tolist(), hypers.tolist()):
        assert got == _C.adam_scalars(hyper, SCALE)
    assert control.tolist() == [SCALE, math.inf, 0.0, 0.0, 0.0, 0.0, 0.0, 5.0]


@pytest.mark.parametrize(
    ("grad_scale", "max_norm", "square_sum"),
    [
        (0.125, 0.3, 1234.5),
        (1.0, 0.0, 9.0),
        (1.0, 1.0, math.inf),
        (1.0, 1.0, math.nan),
        (2.0, math.inf, math.nan),
    ],
)
def test_prepare_clips_as_the_host_does(grad_scale: float, max_norm: float, square_sum: float) -> None:
    control = control_of(grad_scale=grad_scale, max_norm=max_norm, square_sum=square_sum).to(DEVICE)
    scalars = torch.empty(1, 9, device=DEVICE)
    kernels.prepare(torch.tensor([HYPERS[1]], dtype=torch.float64, device=DEVICE), None, control, scalars)
    norm = math.sqrt(square_sum) * grad_scale
    scale = grad_scale if max_norm == math.inf else grad_scale * _C.clip_coefficient(norm, max_norm)
    assert same(control[6].item(), norm)
    want = _C.adam_scalars(list(HYPERS[1]), scale)
    assert all(same(a, b) for a, b in zip(scalars[0].tolist(), want))
    assert control[5] == 0.0


@pytest.mark.parametrize(
    ("found_inf", "skip_nonfinite", "square_sum", "skip"),
    [
        (0.0, 0.0, 1.0, False),
        (1.0, 0.0, 1.0, True),
        (0.0, 1.0, 1.0, False),
        (0.0, 1.0, math.inf, True),
        (0.0, 1.0, math.nan, True),
        (0.0, 0.0, math.inf, False),
    ],
)
def test_prepare_decides_and_counts(found_inf: float, skip_nonfinite: float, square_sum: float, skip: bool) -> None:
    k = 20
    hypers = torch.tensor([HYPERS[i % 2] for i in range(k)], dtype=torch.float64, device=DEVICE)
    counts = Mirror(Guarded(torch.arange(1, k + 1, dtype=torch.float32)))
    addresses = counts.tensor.data_ptr() + 4 * torch.arange(k, device=DEVICE)
    control = control_of(
        found_inf=found_inf, skip_nonfinite=skip_nonfinite, square_sum=square_sum, skip=0.5, skipped=3.0
    ).to(DEVICE)
    scalars = torch.empty(k, 9, device=DEVICE)
    kernels.prepare(hypers, addresses, control, scalars)
    counts.fetch()
    counts.guarded.check("steps")
    steps = [i + (0 if skip else 1) for i in range(1, k + 1)]
    assert counts.guarded.tensor.tolist() == steps
    assert control[5:].tolist()[0::2] == [float(skip), 3.0 + skip]
    assert same(control[6].item(), math.sqrt(square_sum))
    for got, hyper, step in zip(scalars.tolist(), hypers.tolist(), steps):
        assert got == _C.adam_scalars([*hyper[:5], float(step), *hyper[6:]], 1.0)


# ---- casts, split and join ----


def values_of(rng: np.random.Generator, n: int, dtype: torch.dtype) -> Tensor:
    return floats(rng, n) if dtype == torch.float32 else halves(rng, n, dtype)


def check_cast(source: Tensor, to: torch.dtype, offset: int) -> None:
    src, dst = (Mirror(Guarded(t, offset)) for t in (source, torch.zeros(source.numel(), dtype=to)))
    kernels.cast(src.tensor, dst.tensor)
    dst.fetch()
    want = torch.empty(source.numel(), dtype=to)
    codes = DTYPE_CODES[source.dtype], DTYPE_CODES[to]
    _C.cpu_cast(source.data_ptr(), codes[0], want.data_ptr(), codes[1], source.numel(), 1)
    assert_same_bits(dst.guarded.tensor, want, f"{source.dtype} to {to}, n {source.numel()}, offset {offset}")
    assert_same_bits(src.guarded.tensor, source, "source")
    src.guarded.check("source")
    dst.guarded.check("destination")


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_casts_at_boundary_sizes(half: torch.dtype, rng: np.random.Generator) -> None:
    for n in SIZES:
        for offset in (0, 1):
            check_cast(values_of(rng, n, torch.float32), half, offset)
            check_cast(values_of(rng, n, half), torch.float32, offset)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_casts_of_all_16_bit_numbers(half: torch.dtype) -> None:
    """All of them to fp32; back from each, the tie between it and the next, and the tie's neighbours."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(half)
    check_cast(numbers, torch.float32, 0)
    bits = numbers.float().view(torch.int32)
    tie = 0x8000 if half == torch.bfloat16 else 0x1000
    for nudge in (0, tie, tie - 1, tie + 1):
        check_cast((bits + nudge).view(torch.float32), half, 0)


def test_split_and_join_at_boundary_sizes(rng: np.random.Generator) -> None:
    for n in SIZES:
        for offset in (0, 1):
            master = floats(rng, n)
            empty = torch.zeros(n, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.int16), torch.zeros(n)
            src, high, low, back = (Mirror(Guarded(t, offset)) for t in (master, *empty))
            kernels.split(src.tensor, high.tensor, low.tensor)
            kernels.join(high.tensor, low.tensor, back.tensor)
            want = [torch.empty_like(t) for t in empty]
            _C.cpu_split(master.data_ptr(), want[0].data_ptr(), want[1].data_ptr(), n, 1)
            for mirror, tensor in ((src, master), (high, want[0]), (low, want[1]), (back, master)):
                mirror.fetch()
                assert_same_bits(mirror.guarded.tensor, tensor, f"n {n}, offset {offset}")
                mirror.guarded.check()


def test_join_of_any_halves(rng: np.random.Generator) -> None:
    """Also of those that no split makes."""
    n = 50_000
    high = torch.from_numpy(rng.integers(-(2**15), 2**15, n, dtype=np.int16))
    high[::3] = torch.tensor([0, 0x7F80, -0x80, 0x7FC0, -0x8000], dtype=torch.int16).repeat(n)[: len(high[::3])]
    low = torch.from_numpy(rng.integers(-(2**15), 2**15, n, dtype=np.int16))
    got, want = torch.empty(n, device=DEVICE), torch.empty(n)
    kernels.join(high.view(torch.bfloat16).to(DEVICE), low.to(DEVICE), got)
    _C.cpu_join(high.data_ptr(), low.data_ptr(), want.data_ptr(), n, 1)
    assert_same_bits(got.cpu(), want)


# ---- where they are available ----


@needs_interpreter
def test_a_gpu_is_refused_while_interpreting() -> None:
    assert kernels.unavailable("cpu") is None
    assert "TRITON_INTERPRET is set" in str(kernels.unavailable("cuda"))


def test_missing_or_old_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert kernels.unavailable(DEVICE) == "triton 3.5.1 is too old. Install it with: pip install 'triton>=3.6'"
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = str(kernels.unavailable(DEVICE))
    assert reason.startswith("triton cannot be imported") and "pip install" in reason


def test_pyshard_does_not_import_triton_and_cpu_tensors_need_the_interpreter() -> None:
    code = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
import torch
before = "triton" in sys.modules
import pyshard, pyshard.kernels.triton
assert before or "triton" not in sys.modules
print(pyshard.kernels.triton.unavailable("cpu"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "Set TRITON_INTERPRET=1 before triton is first imported" in done.stdout
