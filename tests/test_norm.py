"""The global norm: one order of summation, so the same bits from every instruction set, thread count and backend."""

import math

import numpy as np
import pytest
import torch
from reference import Guarded, assert_same_bits, square_sum

from pyshard import _C
from pyshard.kernels import grad_norm
from pyshard.kernels import reference as plain

pytestmark = pytest.mark.usefixtures("one_torch_thread")

BLOCK = 4096  # elements that are summed before blocks are combined
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Around the lanes (128), the block, the serial limit (16384), and more than a block of blocks (4096 * 4096).
SIZES = (0, 1, 127, 128, 129, 4095, 4096, 4097, 8191, 16384, 16385, 100003)
THREADS = (1, 2, 3, 5, 7)
# The bound of all comparisons with an exact sum: an element passes through 32 additions in its lane, 7 of the lanes,
# and the same again for each level of blocks: fewer than 128 roundings of 2^-53 of a sum of positive numbers.
BOUND = 128 * 2.0**-53


def kernel_sum(tensors: list[torch.Tensor], threads: int) -> float:
    return _C.cpu_square_sum([(t.data_ptr(), t.numel(), CODES[t.dtype]) for t in tensors], threads)


def some(rng: np.random.Generator, n: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers over 20 binary orders of magnitude, so that the order of additions shows in the last bits."""
    return torch.from_numpy((rng.standard_normal(n) * 2.0 ** rng.integers(-10, 10, n)).astype(np.float32)).to(dtype)


@pytest.mark.parametrize("dtype", CODES)
def test_bits_do_not_depend_on_instruction_set_threads_or_backend(dtype: torch.dtype, rng: np.random.Generator) -> None:
    tensors = [Guarded(some(rng, n, dtype), offset=int(rng.integers(0, 17))).tensor for n in SIZES]
    for chosen in (tensors, *([t] for t in tensors)):
        expected = float(plain.square_sum(chosen))
        assert abs(expected - (exact := square_sum(chosen))) <= BOUND * exact
        before = _C.cpu_isa()
        try:
            for isa in _C.cpu_isas():
                _C.set_cpu_isa(isa)
                sums = {threads: kernel_sum(chosen, threads) for threads in THREADS}
                assert set(sums.values()) == {expected}, f"{isa}: {sums}, reference {expected!r}"
        finally:
            _C.set_cpu_isa(before)


def test_order_of_summation(isa: str, rng: np.random.Generator) -> None:
    """The order that is promised, spelled out in Python: lanes, halving tree, then the same over the blocks."""

    def reduced(values: list[float]) -> float:
        lanes = [0.0] * 128
        for i, value in enumerate(values):
            lanes[i % 128] += value
        for width in (64, 32, 16, 8, 4, 2, 1):
            lanes = [lanes[i] + lanes[i + width] for i in range(width)]
        return lanes[0]

    tensors = [some(rng, n, torch.float32) for n in (3 * BLOCK + 77, 5, 0, BLOCK)]
    blocks = [
        reduced([x * x for x in block.double().tolist()]) for t in tensors for block in t.split(BLOCK) if len(block)
    ]
    assert kernel_sum(tensors, 2) == reduced(blocks)


def test_more_blocks_than_a_block(isa: str, rng: np.random.Generator) -> None:
    """4,099 one-element tensors are as many block sums: they take a second level and a third."""
    values = some(rng, BLOCK + 3, torch.float32)
    tensors = [values[i : i + 1] for i in range(len(values))]
    expected = float(plain.square_sum(tensors))
    assert {kernel_sum(tensors, threads) for threads in THREADS} == {expected}
    assert abs(expected - (exact := square_sum(tensors))) <= BOUND * exact


def test_cuts_at_whole_blocks_keep_the_bits(isa: str, rng: np.random.Generator) -> None:
    """Blocks are anchored to a tensor's first element: a tensor cut at multiples of 4096 has the same blocks in the
    same order, and any other cut has other ones, whose sum may differ in its last bits and no more.
    """
    whole = some(rng, 10 * BLOCK + 123, torch.float32)
    expected = kernel_sum([whole], 1)
    for _ in range(10):
        cuts = np.sort(rng.integers(0, 11, 3)) * BLOCK
        pieces = list(torch.tensor_split(whole, cuts.tolist()))
        assert {kernel_sum(pieces, threads) for threads in THREADS} == {expected}, f"cut at {cuts}"
    anywhere = torch.tensor_split(whole, np.sort(rng.integers(1, len(whole), 3)).tolist())
    assert abs(kernel_sum(list(anywhere), 1) - expected) <= 2 * BOUND * expected


# ---- grad_norm ----


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_norm_is_the_root_of_the_sum(backend: str, rng: np.random.Generator) -> None:
    tensors = [some(rng, n, dtype) for n in (5, 0, 5000) for dtype in CODES]
    norm, nonfinite = grad_norm(tensors, backend=backend)
    exact = math.sqrt(square_sum(tensors))
    # The root halves a relative error and adds one rounding.
    assert norm.dtype == torch.float64 and norm.shape == () and abs(float(norm) - exact) <= BOUND * exact
    assert nonfinite.dtype == torch.bool and nonfinite.shape == () and not nonfinite
    assert_same_bits(norm, grad_norm(tensors)[0], "auto against a named backend")


SERVED = [*((backend, dtype) for backend in ("cpu", "reference") for dtype in CODES), ("reference", torch.float64)]


@pytest.mark.parametrize(("backend", "dtype"), SERVED)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_bad_element_sets_the_flag(backend: str, dtype: torch.dtype, bad: float) -> None:
    """Wherever it is: first, last, in the tail of a block; alone or beside good tensors."""
    for at in (0, 1, 4095, 4096, 8999):
        tensors = [torch.ones(100, dtype=dtype), torch.ones(9000, dtype=dtype)]
        tensors[1][at] = bad
        norm, nonfinite = grad_norm(tensors, backend=backend)
        assert nonfinite
        assert norm.isnan() if math.isnan(bad) else norm == math.inf


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("value", [1e30, 3.4028234e38, 1e-30, 1e-45])
def test_nothing_overflows_or_vanishes(backend: str, value: float) -> None:
    """Squares of 1e30 and of 1e-30 do not fit fp32; the norm is a plain number all the same."""
    x = torch.full((10_000,), value)
    norm, nonfinite = grad_norm([x], backend=backend)
    assert not nonfinite
    assert float(norm) == pytest.approx(100 * float(x[0]), rel=BOUND, abs=0)


def test_empty() -> None:
    for tensors in ([], [torch.zeros(0)], [torch.zeros(3, 0), torch.zeros(0, dtype=torch.bfloat16)]):
        norm, nonfinite = grad_norm(tensors)
        assert_same_bits(norm, torch.zeros((), dtype=torch.float64))
        assert not nonfinite


def test_fp64(rng: np.random.Generator) -> None:
    """By the reference path, alone or beside other dtypes; squares may be rounded, once each."""
    tensors = [torch.from_numpy(rng.standard_normal(5000)), some(rng, 300, torch.float32)]
    norm, nonfinite = grad_norm(tensors)
    exact = math.sqrt(square_sum(tensors))
    assert abs(float(norm) - exact) <= BOUND * exact and not nonfinite
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot serve torch.float64 .* it serves float32, bfloat16"):
        grad_norm(tensors, backend="cpu")


def test_fp64_that_overflows_is_not_called_nonfinite() -> None:
    norm, nonfinite = grad_norm([torch.tensor([1e200], dtype=torch.float64)])
    assert norm == math.inf and not nonfinite


LAYOUTS = {
    "transposed": lambda x: x.view(50, 200).t(),
    "every second": lambda x: x[::2],
    "columns": lambda x: x.view(50, 200)[:, 10:150],
    "columns with gaps": lambda x: x.view(100, 100)[:, ::2],
    "channels last": lambda x: x.view(2, 50, 50, 2).permute(0, 3, 1, 2),
    "expanded": lambda x: x[:1].expand(500),
    "expanded rows": lambda x: x[:200].view(200, 1).expand(200, 30),
    "scalar": lambda x: x[3],
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, layout: str, rng: np.random.Generator) -> None:
    """Every element once, whatever the strides, and none from between them."""
    for dtype in CODES:
        base = some(rng, 10_000, dtype)
        view = LAYOUTS[layout](base)
        norm, _ = grad_norm([view], backend=backend)
        exact = math.sqrt(square_sum([view.contiguous()]))
        assert abs(float(norm) - exact) <= BOUND * exact
        assert_same_bits(norm, grad_norm([view])[0], "auto against a named backend")


def test_dense_layouts_are_read_in_the_order_of_memory(rng: np.random.Generator) -> None:
    """A transposed weight has the norm of the weight, bit for bit, as a step sees both."""
    x = some(rng, 10_000, torch.float32).view(50, 200)
    assert_same_bits(grad_norm([x.t()])[0], grad_norm([x])[0])


def test_parameters_are_read_as_numbers() -> None:
    param = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    norm, _ = grad_norm([param])
    assert norm == 5.0 and not norm.requires_grad


@pytest.mark.parametrize(
    ("tensors", "error", "says"),
    [
        ([torch.ones(2), torch.ones(2, dtype=torch.int32)], TypeError, "tensor 1 is torch.int32"),
        ([torch.ones(2, dtype=torch.complex64)], TypeError, "tensor 0 is torch.complex64"),
        ([torch.eye(2).to_sparse()], TypeError, "tensor 0 is torch.float32, torch.sparse_coo"),
        ([None], TypeError, "tensor 0 is NoneType"),
        ([torch.ones(2), torch.ones(2, device="meta")], ValueError, "tensor 1 is on meta and tensor 0 on cpu"),
    ],
)
def test_what_has_no_norm(tensors: list, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"pyshard.grad_norm: {says}.*expected"):
        grad_norm(tensors)


def test_one_tensor_instead_of_a_list() -> None:
    with pytest.raises(TypeError, match=r"pyshard.grad_norm: got a Tensor; expected a list"):
        grad_norm(torch.ones(2, 3))
    norm, _ = grad_norm(iter([torch.ones(4), torch.ones(5)]))
    assert norm == 3.0


def test_unknown_backend_even_without_tensors() -> None:
    with pytest.raises(ValueError, match=r"pyshard: unknown backend 'gpu'; expected one of auto, cpu"):
        grad_norm([], backend="gpu")
