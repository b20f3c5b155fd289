"""Casts, split and join of the CUDA kernels, run on the host, against the CPU kernels: the same bits."""

import numpy as np
import pytest
import torch
from cuda_tables import CASTS, CODES, CONVERT_BLOCK, HUGE, SIZES, floats, values_of
from reference import Guarded, assert_same_bits
from torch import Tensor

from pyshard import _C
from pyshard.kernels import cuda

HOST = cuda.HostRun()
BOUNDARIES = (*SIZES, 2047, 2048, 2049)


def all_halves(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize(("src_dtype", "dst_dtype"), CASTS)
@pytest.mark.parametrize("offsets", [(0, 0), (1, 0), (0, 1), (2, 3)])
def test_cast_at_boundary_sizes(
    src_dtype: torch.dtype, dst_dtype: torch.dtype, offsets: tuple[int, int], rng: np.random.Generator
) -> None:
    for n in BOUNDARIES:
        src = Guarded(values_of(rng, n, src_dtype), offsets[0])
        got, want = (Guarded(torch.zeros(n, dtype=dst_dtype), offsets[1]) for _ in range(2))
        HOST.cast(src.tensor, got.tensor)
        _C.cpu_cast(src.address, CODES[src_dtype], want.address, CODES[dst_dtype], n, 1)
        assert_same_bits(got.tensor, want.tensor, f"n={n}")
        got.check(f"n={n}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_of_all_16_bit_numbers(dtype: torch.dtype) -> None:
    src = all_halves(dtype)
    wide = torch.empty(src.numel())
    HOST.cast(src, wide)
    assert_same_bits(wide, src.float())
    back = torch.empty_like(src)
    HOST.cast(wide, back)
    assert_same_bits(back, src)


@pytest.mark.parametrize("offset", [0, 1])
def test_split_and_join_at_boundary_sizes(offset: int, rng: np.random.Generator) -> None:
    for n in BOUNDARIES:
        master = Guarded(floats(rng, n), offset)
        high, high_want = (Guarded(torch.zeros(n, dtype=torch.bfloat16), offset) for _ in range(2))
        low, low_want = (Guarded(torch.zeros(n, dtype=torch.int16), offset) for _ in range(2))
        HOST.split(master.tensor, high.tensor, low.tensor)
        _C.cpu_split(master.address, high_want.address, low_want.address, n, 1)
        assert_same_bits(high.tensor, high_want.tensor, f"high, n={n}")
        assert_same_bits(low.tensor, low_want.tensor, f"low, n={n}")
        joined = Guarded(torch.zeros(n), offset)
        HOST.join(high.tensor, low.tensor, joined.tensor)
        assert_same_bits(joined.tensor, master.tensor, f"joined, n={n}")
        for array in (high, low, joined):
            array.check(f"n={n}")


@pytest.mark.parametrize("n", HUGE)
def test_conversions_beyond_31_bits(n: int, rng: np.random.Generator) -> None:
    last = -(-n // CONVERT_BLOCK) - 2
    below, real = last * CONVERT_BLOCK, n - last * CONVERT_BLOCK

    def far(array: Guarded) -> int:
        return array.address - below * array.tensor.element_size()

    for src_dtype, dst_dtype in CASTS:
        src = Guarded(values_of(rng, real, src_dtype))
        got, want = (Guarded(torch.zeros(real, dtype=dst_dtype)) for _ in range(2))
        _C.host_cast(far(src), CODES[src_dtype], far(got), CODES[dst_dtype], n, last, last + 2)
        _C.cpu_cast(src.address, CODES[src_dtype], want.address, CODES[dst_dtype], real, 1)
        assert_same_bits(got.tensor, want.tensor)
        got.check()
    master, joined = Guarded(floats(rng, real)), Guarded(torch.zeros(real))
    high = Guarded(torch.zeros(real, dtype=torch.bfloat16))
    low = Guarded(torch.zeros(real, dtype=torch.int16))
    _C.host_split(far(master), far(high), far(low), n, last, last + 2)
    _C.host_join(far(high), far(low), far(joined), n, last, last + 2)
    assert_same_bits(joined.tensor, master.tensor)
    for array in (high, low, joined):
        array.check()


# ---- refusals ----


def test_host_run_refuses_blocks_outside_the_grid() -> None:
    src, dst = torch.zeros(10), torch.zeros(10, dtype=torch.bfloat16)
    arguments = (src.data_ptr(), 0, dst.data_ptr(), 1, 10)
    assert _C.grid_cast(*arguments) == 1
    for begin, end in ((-1, 1), (0, 2)):
        with pytest.raises(ValueError, match=r"blocks -?\d to \d of a grid of 1"):
            _C.host_cast(*arguments, begin, end)


@pytest.mark.parametrize(("src", "dst"), [(0, 0), (1, 2), (3, 0), (0, -1)])
def test_cast_refuses_other_pairs_of_dtypes(src: int, dst: int) -> None:
    with pytest.raises(ValueError, match=r"pyshard._C"):
        _C.host_cast(0, src, 0, dst, 10, 0, 1)
