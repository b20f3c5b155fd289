"""The bodies of the CUDA kernels, run on the host over the real grid, against the CPU kernels: the same bits.

Where a tensor has more than 2^31 elements only its last blocks are run, on memory that holds only those: the
addresses handed in lie far below it.
"""

import math

import numpy as np
import pytest
import torch
from cuda_tables import (
    ADAM_BLOCK,
    ARRAYS,
    HUGE,
    HYPERS,
    NORM_BLOCK,
    SIZES,
    Row,
    Table,
    control_of,
    first_block,
    kind_name,
    mixed_rows,
    same,
    scalars_of,
)
from reference import Guarded, assert_same_bits
from torch import Tensor

from pyshard import _C
from pyshard.kernels import cuda
from pyshard.kernels.formats import VALID_KINDS

HOST = cuda.HostRun()
SCALE = 0.37


def host_adam(table: Table, scalars: Tensor, control: Tensor) -> None:
    blocks = table.first_block(ADAM_BLOCK)
    HOST.adam(table.packed(), blocks, int(blocks[-1]), scalars, control)


def check_adam(table: Table) -> None:
    expected = table.copy()
    expected.cpu_adam(HYPERS, SCALE)
    host_adam(table, scalars_of(HYPERS, SCALE), control_of())
    table.assert_equals(expected)


# ---- Adam ----


@pytest.mark.parametrize("kind", VALID_KINDS, ids=kind_name)
def test_adam_every_kind_at_boundary_sizes(kind: int, rng: np.random.Generator) -> None:
    rows = [Row(kind, n, offset, n % len(HYPERS)) for n in SIZES for offset in (0, 1)]
    check_adam(Table.random(rows, rng))


def test_adam_mixes_kinds_in_one_launch(rng: np.random.Generator) -> None:
    check_adam(Table.random(mixed_rows(rng, VALID_KINDS, 300, 3000), rng))


@pytest.mark.parametrize("unaligned", ARRAYS)
def test_adam_where_one_array_is_unaligned(unaligned: str, rng: np.random.Generator) -> None:
    """A vector access to it would be a fault on a GPU, and is one in a build with sanitizers."""
    table = Table.random([Row(kind, 2051) for kind in VALID_KINDS], rng)
    for arrays in table.arrays:
        if unaligned in arrays:
            arrays[unaligned] = Guarded(arrays[unaligned].tensor, 1)
    expected = table.copy()
    expected.cpu_adam(HYPERS, SCALE)
    host_adam(table, scalars_of(HYPERS, SCALE), control_of())
    table.assert_equals(expected)


def test_adam_of_no_rows() -> None:
    host_adam(Table([]), scalars_of(HYPERS, SCALE), control_of())


def test_adam_leaves_everything_alone_when_the_step_is_skipped(rng: np.random.Generator) -> None:
    table = Table.random([Row(kind, 1500) for kind in VALID_KINDS], rng)
    before = table.copy()
    host_adam(table, scalars_of(HYPERS, SCALE), control_of(skip=1.0))
    table.assert_equals(before)


def test_adam_blocks_are_independent(rng: np.random.Generator) -> None:
    """Blocks in any order, alone or together, give the same; a block touches its own 1,024 elements."""
    table = Table.random(mixed_rows(rng, VALID_KINDS, 40, 5000), rng)
    expected = table.copy()
    expected.cpu_adam(HYPERS, SCALE)
    rows, blocks, scalars = table.packed(), table.first_block(ADAM_BLOCK), scalars_of(HYPERS, SCALE)
    control, total = control_of(), int(blocks[-1])
    pointers = (
        rows.data_ptr(),
        blocks.data_ptr(),
        len(table.rows),
        total,
        scalars.data_ptr(),
        control.data_ptr(),
    )
    for block in rng.permutation(total):
        r = int(torch.searchsorted(blocks, int(block), right=True)) - 1
        start = (int(block) - int(blocks[r])) * ADAM_BLOCK
        before = table.copy()
        _C.host_adam(*pointers, int(block), int(block) + 1)
        for i, arrays in enumerate(table.arrays):
            for name, array in arrays.items():
                want = before.arrays[i][name].tensor
                if i == r:
                    span = slice(start, start + ADAM_BLOCK)
                    want[span] = expected.arrays[i][name].tensor[span]
                assert_same_bits(array.tensor, want, f"after block {block}: row {i} {name}")
    table.assert_equals(expected)


@pytest.mark.parametrize("n", HUGE)
def test_adam_beyond_31_bits(n: int, rng: np.random.Generator) -> None:
    """The last blocks of tensors of n elements, every kind, with a small row behind each."""
    last = -(-n // ADAM_BLOCK) - 3  # first of the blocks that are run
    real = n - last * ADAM_BLOCK
    for kind in VALID_KINDS:
        table = Table.random([Row(kind, real), Row(kind, 77)], rng)
        expected = table.copy()
        expected.cpu_adam(HYPERS, SCALE)
        rows = table.packed()
        for i, name in enumerate(ARRAYS):
            if name in table.arrays[0]:
                rows[0, i] -= last * ADAM_BLOCK * table.arrays[0][name].tensor.element_size()
        rows[0, 6] = n
        blocks = first_block([n, 77], ADAM_BLOCK)
        total, scalars, control = int(blocks[-1]), scalars_of(HYPERS, SCALE), control_of()
        pointers = (rows.data_ptr(), blocks.data_ptr(), 2, total, scalars.data_ptr(), control.data_ptr())
        _C.host_adam(*pointers, last, total)
        table.assert_equals(expected)


def test_flushing_subnormals_on_the_host_changes_nothing(rng: np.random.Generator) -> None:
    """A GPU keeps them; the host run must too, whatever the thread is set to."""
    torch.set_flush_denormal(True)
    try:
        check_adam(Table.random([Row(kind, 300) for kind in VALID_KINDS], rng))
    finally:
        torch.set_flush_denormal(False)


def test_several_steps_with_counts_on_the_device(rng: np.random.Generator) -> None:
    """prepare and adam, step after step, as device.py launches them with capturable."""
    table = Table.random([Row(kind, 700, hyper=i) for i, kind in enumerate(VALID_KINDS)], rng)
    expected = table.copy()
    k = len(table.rows)
    hypers = torch.tensor([HYPERS[i % len(HYPERS)] for i in range(k)], dtype=torch.float64)
    counts = torch.zeros(k, dtype=torch.float32)
    addresses = torch.tensor([counts[i].data_ptr() for i in range(k)])
    control, scalars = control_of(grad_scale=SCALE), torch.empty(k, 9)
    for step in range(1, 4):
        HOST.prepare(hypers, addresses, control, scalars)
        host_adam(table, scalars, control)
        assert counts.tolist() == [step] * k
        expected.cpu_adam([[*h[:5], float(step), *h[6:]] for h in hypers.tolist()], SCALE)
        table.assert_equals(expected)


# ---- sums ----


def host_square_sum(table: Table) -> float:
    blocks = table.first_block(NORM_BLOCK)
    values = torch.full((int(blocks[-1]),), math.nan, dtype=torch.float64)
    HOST.square_sum(table.packed(), blocks, values)
    while values.numel() > 1:
        sums = torch.full((-(-values.numel() // NORM_BLOCK),), math.nan, dtype=torch.float64)
        HOST.sum(values, sums)
        values = sums
    return float(values[0])


def ordinary_grads(table: Table, rng: np.random.Generator) -> Table:
    """Gradients of like magnitudes, so that each rounding of their sum shows."""
    for arrays in table.arrays:
        grad = arrays["grad"].tensor
        grad.copy_(torch.from_numpy(rng.standard_normal(grad.numel())))
    return table


@pytest.mark.parametrize("kind", [4, 8, 12, 24, 28, 40], ids=kind_name)
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_square_sum_at_boundary_sizes(kind: int, offset: int, rng: np.random.Generator) -> None:
    for n in SIZES[1:]:
        table = ordinary_grads(Table.random([Row(kind, n, offset)], rng), rng)
        want = _C.cpu_square_sum(table.grads(), 1)
        assert host_square_sum(table) == want, n
        table.assert_equals(table.copy())


def test_square_sum_over_rows_of_every_kind(rng: np.random.Generator) -> None:
    table = ordinary_grads(Table.random(mixed_rows(rng, VALID_KINDS, 300, 9000), rng), rng)
    before = table.copy()
    assert host_square_sum(table) == _C.cpu_square_sum(table.grads(), 2)
    table.assert_equals(before)


@pytest.mark.parametrize("rows", [4096, 4097, 8500])
def test_square_sum_of_more_blocks_than_a_block_of_values(rows: int, rng: np.random.Generator) -> None:
    """Two levels of sums over the blocks' values."""
    memory = torch.from_numpy(rng.standard_normal(3 * rows).astype(np.float32))
    sizes = rng.integers(1, 4, rows)
    packed = torch.zeros(rows, 8, dtype=torch.int64)
    packed[:, 2] = memory.data_ptr() + 12 * torch.arange(rows)
    packed[:, 6] = torch.from_numpy(sizes)
    packed[:, 7] = 4
    blocks = first_block(sizes.tolist(), NORM_BLOCK)
    values = torch.empty(rows, dtype=torch.float64)
    HOST.square_sum(packed, blocks, values)
    first = torch.empty(-(-rows // NORM_BLOCK), dtype=torch.float64)
    HOST.sum(values, first)
    total = first
    if len(first) > 1:
        total = torch.empty(1, dtype=torch.float64)
        HOST.sum(first, total)
    tensors = [(int(a), int(n), 0) for a, n in zip(packed[:, 2], sizes)]
    assert total.item() == _C.cpu_square_sum(tensors, 1)


@pytest.mark.parametrize("n", [1, 31, 32, 127, 128, 129, 4095, 4096, 4097, 10007])
def test_sum_of_values(n: int, rng: np.random.Generator) -> None:
    """In the order of the lanes, written here once more in Python."""
    values = Guarded(torch.from_numpy(rng.standard_normal(n) * 10.0 ** rng.uniform(-9, 9, n)), 1)
    out = Guarded(torch.full((-(-n // NORM_BLOCK),), math.nan, dtype=torch.float64))
    HOST.sum(values.tensor, out.tensor)
    out.check("out")
    for block, got in enumerate(out.tensor.tolist()):
        lanes = [0.0] * 128
        for i, value in enumerate(values.tensor[block * NORM_BLOCK : (block + 1) * NORM_BLOCK].tolist()):
            lanes[i % 128] += value
        for width in (64, 32, 16, 8, 4, 2, 1):
            for lane in range(width):
                lanes[lane] += lanes[lane + width]
        assert got == lanes[0]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("at", [0, 4095, 4096, 5002])
@pytest.mark.parametrize("kind", [4, 8, 24], ids=kind_name)
def test_square_sum_is_nonfinite_exactly_if_an_element_is(
    kind: int, at: int, bad: float, rng: np.random.Generator
) -> None:
    table = ordinary_grads(Table.random([Row(kind, 10), Row(kind, 5003)], rng), rng)
    largest = torch.finfo(table.arrays[1]["grad"].tensor.dtype).max
    table.arrays[1]["grad"].tensor[:] = largest
    assert math.isfinite(host_square_sum(table))
    table.arrays[1]["grad"].tensor[at] = bad
    assert not math.isfinite(host_square_sum(table))
    assert same(host_square_sum(table), _C.cpu_square_sum(table.grads(), 1))


@pytest.mark.parametrize("n", HUGE)
@pytest.mark.parametrize("kind", [4, 8, 24], ids=kind_name)
def test_square_sum_beyond_31_bits(n: int, kind: int, rng: np.random.Generator) -> None:
    last = -(-n // NORM_BLOCK) - 2
    table = ordinary_grads(Table.random([Row(kind, n - last * NORM_BLOCK)], rng), rng)
    (address, real, code) = table.grads()[0]
    rows = table.packed()
    size = table.arrays[0]["grad"].tensor.element_size()
    rows[0, 2] -= last * NORM_BLOCK * size
    rows[0, 6] = n
    values = Guarded(torch.full((2,), math.nan, dtype=torch.float64))
    blocks = first_block([n], NORM_BLOCK)
    pointers = (rows.data_ptr(), blocks.data_ptr(), 1, values.address - 8 * last, last + 2)
    _C.host_square_sum(*pointers, last, last + 2)
    values.check()
    want = [
        _C.cpu_square_sum([(address, NORM_BLOCK, code)], 1),
        _C.cpu_square_sum([(address + NORM_BLOCK * size, real - NORM_BLOCK, code)], 1),
    ]
    assert values.tensor.tolist() == want


# ---- prepare ----


@pytest.mark.parametrize("k", [0, 1, 127, 128, 129, 300])
def test_prepare_makes_the_scalars_of_the_host(k: int, rng: np.random.Generator) -> None:
    hypers = torch.from_numpy(
        np.column_stack(
            [
                10.0 ** rng.uniform(-6, 0, k),
                *(rng.uniform(0, 1, (2, k))),
                10.0 ** rng.uniform(-15, -3, k),
                rng.uniform(0, 1, k),
                rng.integers(1, 100_000, k).astype(float),
                rng.choice([-1.0, 1.0], k),
                rng.choice([0.0, 1.0], k),
            ]
        )
    ).view(k, 8)
    scalars = Guarded(torch.full((9 * k,), math.nan))
    control = control_of(grad_scale=SCALE, skipped=5.0)
    HOST.prepare(hypers, None, control, scalars.tensor.view(k, 9))
    scalars.check("scalars")
    for got, hyper in zip(scalars.tensor.view(k, 9).tolist(), hypers.tolist()):
        assert got == _C.adam_scalars(hyper, SCALE)
    assert control.tolist() == [SCALE, math.inf, 0.0, 0.0, 0.0, 0.0, 0.0, 5.0]


CLIPS = [
    (1.0, math.inf, 4.0),
    (0.25, 1.0, 4.0),
    (1.0, 1.0, 4.0),
    (0.125, 0.3, 1234.5),
    (1.0, 0.0, 9.0),
    (1.0, 1.0, 0.0),
    (1.0, 1.0, math.inf),
    (1.0, 1.0, math.nan),
    (2.0, math.inf, math.nan),
]


@pytest.mark.parametrize(("grad_scale", "max_norm", "square_sum"), CLIPS)
def test_prepare_clips_as_the_host_does(grad_scale: float, max_norm: float, square_sum: float) -> None:
    hypers = torch.tensor([HYPERS[1]], dtype=torch.float64)
    control = control_of(grad_scale=grad_scale, max_norm=max_norm, square_sum=square_sum)
    scalars = torch.empty(1, 9)
    HOST.prepare(hypers, None, control, scalars)
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
        (1.0, 1.0, math.nan, True),
    ],
)
def test_prepare_decides_and_counts(found_inf: float, skip_nonfinite: float, square_sum: float, skip: bool) -> None:
    k = 200  # more than a block: all threads must decide alike, in whatever order blocks run
    hypers = torch.tensor([HYPERS[i % 2] for i in range(k)], dtype=torch.float64)
    addresses_of = Guarded(torch.arange(1, k + 1, dtype=torch.float32))
    addresses = addresses_of.address + 4 * torch.arange(k)
    control = control_of(
        found_inf=found_inf, skip_nonfinite=skip_nonfinite, square_sum=square_sum, skip=0.5, skipped=3.0
    )
    scalars = torch.empty(k, 9)
    pointers = [t.data_ptr() for t in (hypers, addresses, control, scalars)]
    for block in (1, 0):
        _C.host_prepare(*pointers, k, block, block + 1)
    addresses_of.check("steps")
    steps = [i + (0 if skip else 1) for i in range(1, k + 1)]
    assert addresses_of.tensor.tolist() == steps
    assert control[5:].tolist()[0::2] == [float(skip), 3.0 + skip]
    assert same(control[6].item(), math.sqrt(square_sum))
    for got, hyper, step in zip(scalars.tolist(), hypers.tolist(), steps):
        assert got == _C.adam_scalars([*hyper[:5], float(step), *hyper[6:]], 1.0)
