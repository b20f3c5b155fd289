"""Storage formats over all bit patterns: fp32 to bf16 and fp16 and back, split and join, on each instruction set.

The exhaustive tests walk 2^32 patterns in chunks that stay in a core's cache, one Python thread per core (the
kernels release the interpreter lock), each chunk against a pattern made beforehand or against torch.
"""

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from reference import assert_same_bits

from pyshard import _C
from pyshard.kernels import formats
from pyshard.kernels import reference as plain

CHUNK = 1 << 18  # patterns: four upper halves of an fp32, each with all its lower halves
CHUNKS = (1 << 32) // CHUNK
LOWER = np.tile(np.arange(1 << 16, dtype=np.uint16), CHUNK >> 16)
UPPER = np.arange(CHUNK, dtype=np.uint32) >> 16
ROUNDED = (UPPER + (LOWER >= 0x8000)).astype(np.uint16)  # of the first chunk; later ones add a constant
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def over_all_patterns(make_check: Callable[[], Callable[[np.ndarray, int, bool], None]]) -> None:
    """Calls check(bits, chunk number, whether it holds inf and NaN) for all chunks; make_check per thread."""
    workers = len(os.sched_getaffinity(0))

    def work(part: int) -> None:
        torch.set_num_threads(1)  # of this thread alone
        check = make_check()
        first = np.arange(CHUNK, dtype=np.uint32)
        bits = np.empty_like(first)
        for chunk in range(part, CHUNKS, workers):
            np.add(first, np.uint32(chunk * CHUNK), out=bits)
            check(bits, chunk, int(bits[0]) & 0x7F800000 == 0x7F800000)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))


def require_equal(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    if not np.array_equal(actual, expected):
        at = int(np.flatnonzero(actual != expected)[0])
        raise AssertionError(f"{what}: element {at} is {int(actual[at]):#x}, expected {int(expected[at]):#x}")


# ---- split and join ----


def test_split_and_join_are_exact_for_all_patterns(isa: str) -> None:
    """join(split(x)) is x but for NaN; the upper half is x rounded half away from zero, the lower the rest."""

    def make_check() -> Callable[[np.ndarray, int, bool], None]:
        high, low = np.empty(CHUNK, np.uint16), np.empty(CHUNK, np.uint16)
        joined, rounded = np.empty(CHUNK, np.uint32), np.empty(CHUNK, np.uint16)

        def check(bits: np.ndarray, chunk: int, special: bool) -> None:
            what = f"chunk {chunk} from {chunk * CHUNK:#x}"
            _C.cpu_split(bits.ctypes.data, high.ctypes.data, low.ctypes.data, CHUNK, 1)
            _C.cpu_join(high.ctypes.data, low.ctypes.data, joined.ctypes.data, CHUNK, 1)
            np.add(ROUNDED, np.uint16(chunk * (CHUNK >> 16)), out=rounded)
            if not special:
                require_equal(high, rounded, f"high half, {what}")
                require_equal(low, LOWER, f"low half, {what}")
                require_equal(joined, bits, f"joined, {what}")
                return
            nan = np.isnan(bits.view(np.float32))
            half = reference.bf16_value(high)
            assert np.isnan(half[nan]).all(), f"a NaN became a number: high half, {what}"
            require_equal(high[nan] >> 15, (bits[nan] >> 31).astype(np.uint16), f"sign of NaN, {what}")
            assert not low[nan].any(), f"remainder of NaN, {what}"
            assert np.isnan(joined.view(np.float32)[nan]).all(), f"a NaN became a number: joined, {what}"
            require_equal(joined[nan] >> 31, bits[nan] >> 31, f"sign of joined NaN, {what}")
            # What is left is +-inf, its own upper half.
            require_equal(high[~nan], rounded[~nan], f"inf, {what}")
            require_equal(joined[~nan], bits[~nan], f"joined inf, {what}")

        return check

    over_all_patterns(make_check)


def structured_patterns() -> np.ndarray:
    """Every upper half with lower halves around zero, the ties and the ends; subnormals, inf and NaN too."""
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xF000, 0xFFFF], np.uint32)
    return ((np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] + lower).ravel()


def split_by_kernel(master: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    high, low = np.empty(master.size, np.uint16), np.empty(master.size, np.int16)
    _C.cpu_split(master.ctypes.data, high.ctypes.data, low.ctypes.data, master.size, 1)
    return high, low


def test_high_half_is_the_nearest_bf16_ties_away_from_zero(isa: str) -> None:
    """Said in values: no bf16 is nearer to x, and of two equally near it is the one of larger magnitude."""
    bits = structured_patterns()
    bits = bits[(bits & 0x7F800000) != 0x7F800000]
    x = bits.view(np.float32).astype(np.float64)
    high, _ = split_by_kernel(bits)

    def value(half: np.ndarray) -> np.ndarray:
        """As a double, with inf at 2^128, where the next bf16 would be."""
        sign = np.where(half >> 15 == 1, -1.0, 1.0)
        magnitude = reference.bf16_value(half & 0x7FFF).astype(np.float64)
        return sign * np.where(np.isinf(magnitude), 2.0**128, magnitude)

    error = np.abs(value(high) - x)
    smaller = np.where(high & 0x7FFF == 0, high, high - 1)  # towards zero
    larger = np.where(high & 0x7FFF == 0x7F80, high, high + 1)
    assert (error <= np.abs(value(smaller) - x)).all()
    assert ((error < np.abs(value(larger) - x)) | (high == larger)).all()  # a tie would have gone there


def test_join_of_halves_that_no_split_makes(isa: str) -> None:
    """A weight set to 0 or inf beside an old remainder is that weight; NaN is never made of numbers."""
    low = np.arange(-(1 << 15), 1 << 15).astype(np.int16)
    for upper in (0x0000, 0x8000, 0x7F80, 0xFF80, 0x7F7F, 0xFF7F, 0x7FC0, 0xFFFF, 0x0001, 0x3F80):
        high = np.full(low.size, upper, np.uint16)
        joined = np.empty(low.size, np.float32)
        _C.cpu_join(high.ctypes.data, low.ctypes.data, joined.ctypes.data, low.size, 1)
        expected = reference.join(high, low)
        assert_same_bits(torch.from_numpy(joined), torch.from_numpy(expected), f"join with {upper:#06x}")
        is_nan = upper & 0x7FFF > 0x7F80
        assert np.isnan(joined).all() if is_nan else not np.isnan(joined).any()


def test_reference_split_and_join() -> None:
    bits = structured_patterns()
    master = torch.from_numpy(bits.view(np.float32))
    high, low = reference.split(bits.view(np.float32))
    got_high, got_low = plain.split(master)
    assert_same_bits(got_high, torch.from_numpy(high).view(torch.bfloat16), "high half")
    assert_same_bits(got_low, torch.from_numpy(low), "low half")
    shuffled = torch.from_numpy(low).roll(12345)
    expected = reference.join(high, shuffled.numpy())
    assert_same_bits(plain.join(got_high, shuffled), torch.from_numpy(expected), "join of strangers")


# ---- casts ----


def test_narrowing_all_patterns_as_torch_does(isa: str) -> None:
    """fp32 to bf16 and fp16: torch's bits for every pattern; a NaN stays NaN and keeps its sign."""

    def make_check() -> Callable[[np.ndarray, int, bool], None]:
        narrow = np.empty(CHUNK, np.uint16)
        targets = {dtype: torch.empty(CHUNK, dtype=dtype) for dtype in (torch.bfloat16, torch.float16)}

        def check(bits: np.ndarray, chunk: int, special: bool) -> None:
            values = torch.from_numpy(bits).view(torch.float32)
            for dtype, expected in targets.items():
                what = f"{dtype}, chunk {chunk} from {chunk * CHUNK:#x}"
                _C.cpu_cast(bits.ctypes.data, 0, narrow.ctypes.data, CODES[dtype], CHUNK, 1)
                expected.copy_(values)
                if not special:
                    require_equal(narrow, expected.view(torch.uint16).numpy(), what)
                    continue
                assert_same_bits(torch.from_numpy(narrow).view(dtype), expected, what)
                require_equal(narrow >> 15, (bits >> 31).astype(np.uint16), f"sign, {what}")

        return check

    over_all_patterns(make_check)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_all_patterns_is_exact(isa: str, dtype: torch.dtype) -> None:
    half = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    wide = torch.empty(1 << 16)
    _C.cpu_cast(half.data_ptr(), CODES[dtype], wide.data_ptr(), 0, 1 << 16, 1)
    assert_same_bits(wide, half.float(), "against torch")
    value = reference.bf16_value if dtype == torch.bfloat16 else reference.fp16_value
    assert_same_bits(wide, torch.from_numpy(value(half.view(torch.uint16).numpy())), "against numpy")
    assert torch.equal(wide.view(torch.int32) < 0, half.view(torch.int16) < 0), "signs, NaN included"
    back = torch.empty_like(half)
    _C.cpu_cast(wide.data_ptr(), 0, back.data_ptr(), CODES[dtype], 1 << 16, 1)
    assert_same_bits(back, half, "there and back")


def test_numpy_rounding_of_the_tests_agrees_with_torch() -> None:
    """The formulas that other tests compare with are themselves held to torch's."""
    values = structured_patterns().view(np.float32)
    source = torch.from_numpy(values)
    for dtype, rounded in ((torch.bfloat16, reference.bf16_round), (torch.float16, reference.fp16_round)):
        assert_same_bits(torch.from_numpy(rounded(values)).view(dtype), source.to(dtype), str(dtype))


# ---- kinds ----


def test_kinds_are_numbered_as_in_the_kernels() -> None:
    text = (Path(__file__).parent.parent / "csrc" / "adam.h").read_text()
    body = re.search(r"enum Format[^{]*\{(.*?)\};", text, re.S)
    assert body is not None
    numbers = {name.upper(): int(value) for name, value in re.findall(r"k(\w+) = (\d)", body[1])}
    assert numbers.pop("FORMATS") == len(formats.Format)
    assert numbers == {member.name.replace("_", ""): member.value for member in formats.Format}


def test_kind_and_back() -> None:
    assert len(formats.VALID_KINDS) == 44  # 5 formats of 16 bits with 2 gradient dtypes, fp32 with 1; 4 switches each
    for kind in formats.VALID_KINDS:
        fmt, grad_dtype, coupled, amsgrad = formats.unpack_kind(kind)
        assert formats.kind_of(fmt, grad_dtype, coupled, amsgrad) == kind
        assert grad_dtype in (torch.float32, formats.param_dtype(fmt))


def test_format_of_a_dtype() -> None:
    expected = {
        (torch.float32, "auto"): formats.Format.F32,
        (torch.float32, "none"): formats.Format.F32,
        (torch.float64, "split"): None,
        (torch.bfloat16, "auto"): formats.Format.BF16_SPLIT,
        (torch.bfloat16, "fp32"): formats.Format.BF16_MASTER,
        (torch.bfloat16, "none"): formats.Format.BF16_NONE,
        (torch.float16, "auto"): formats.Format.FP16_MASTER,
        (torch.float16, "none"): formats.Format.FP16_NONE,
    }
    assert {key: formats.format_of(*key) for key in expected} == expected
    with pytest.raises(KeyError):
        formats.format_of(torch.float16, "split")
