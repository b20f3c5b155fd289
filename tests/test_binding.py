"""Random arguments, more than 10,000 sets, for the public functions and the compiled module.

Each call either gives the values of an independent computation or raises an error of pyshard's own, and then nothing
has changed; what may be refused is decided here anew. All memory lies between sentinels. The same file runs under
the address and undefined-behaviour sanitizers: `make sanitize`.
"""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import reference
import torch
from fuzz import examples, outcome, place, random_values, seeds, shapes
from hypothesis import given
from hypothesis import strategies as st
from reference import FLOATS, Guarded, Row, assert_same_bits

from pyshard import _C
from pyshard.kernels import cast, grad_norm, join, split

DTYPES = (*FLOATS, *FLOATS, torch.float64, torch.int16, torch.int32, torch.bool, torch.complex64)
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(["plain", "plain", "shifted", "reversed", "gaps", "expanded", "sparse"])
threads = st.sampled_from([-3, 0, 1, 2, 3, 7])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For torch's own operations; the compiled module is called with numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- casts and the norm ----

backends = st.sampled_from(["auto", "auto", "cpu", "reference", "cuda", "none"])


@examples(2500)
@given(dtypes, shapes, layouts, dtypes, backends, seeds)
def test_cast(
    dtype: torch.dtype, shape: tuple[int, ...], layout: str, target: torch.dtype, backend: str, number: int
) -> None:
    x = place(dtype, shape, layout, np.random.default_rng(number))
    y, error = outcome(lambda: cast(x.tensor, target, backend=backend))
    x.check()
    pair = {dtype, target}
    fits = x.dense and pair <= set(FLOATS) and len(pair) == 2 and torch.float32 in pair
    assert (error is None) == (fits and backend in ("auto", "cpu", "reference")), error
    if error is None:
        assert_same_bits(y, x.tensor.to(target))


@examples(2500)
@given(
    st.sampled_from([torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float64]),
    *(shapes, layouts, backends, seeds),
)
def test_split(dtype: torch.dtype, shape: tuple[int, ...], layout: str, backend: str, number: int) -> None:
    x = place(dtype, shape, layout, np.random.default_rng(number))
    halves, error = outcome(lambda: split(x.tensor, backend=backend))
    x.check()
    assert (error is None) == (dtype == torch.float32 and x.dense and backend in ("auto", "cpu", "reference")), error
    if error is None:
        high, low = reference.split(x.tensor.contiguous().numpy())
        assert_same_bits(halves[0], torch.from_numpy(high).view(torch.bfloat16), "high")
        assert_same_bits(halves[1], torch.from_numpy(low), "low")
        assert_same_bits(join(*halves), x.tensor.contiguous(), "joined")


@examples(2000)
@given(
    st.sampled_from([torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float16, torch.int16]),
    st.sampled_from([torch.int16, torch.int16, torch.int16, torch.int32, torch.float32]),
    *(shapes, st.none() | shapes, layouts, layouts, backends, seeds),
)
def test_join(
    high_dtype: torch.dtype,
    low_dtype: torch.dtype,
    shape: tuple[int, ...],
    other_shape: tuple[int, ...] | None,
    high_layout: str,
    low_layout: str,
    backend: str,
    number: int,
) -> None:
    rng = np.random.default_rng(number)
    low_shape = shape if other_shape is None else other_shape
    high, low = place(high_dtype, shape, high_layout, rng), place(low_dtype, low_shape, low_layout, rng)
    if low_dtype == torch.int16:
        low.memory.tensor.random_(-(1 << 15), 1 << 15)
        low.before.copy_(low.memory.tensor)
    x, error = outcome(lambda: join(high.tensor, low.tensor, backend=backend))
    high.check()
    low.check()
    fits = high_dtype == torch.bfloat16 and low_dtype == torch.int16 and shape == low_shape and high.dense and low.dense
    assert (error is None) == (fits and backend in ("auto", "cpu", "reference")), error
    if error is None:
        bits = high.tensor.contiguous().view(torch.uint16).numpy()
        assert_same_bits(x, torch.from_numpy(reference.join(bits, low.tensor.contiguous().numpy())))


@examples(1500)
@given(st.lists(st.tuples(dtypes, shapes, layouts), max_size=4), backends, seeds)
def test_grad_norm(parts: list[tuple[torch.dtype, tuple[int, ...], str]], backend: str, number: int) -> None:
    rng = np.random.default_rng(number)
    placed = [place(*part, rng, special=number % 3 == 0) for part in parts]
    answer, error = outcome(lambda: grad_norm([x.tensor for x in placed], backend=backend))
    for x in placed:
        x.check()
    served = (*FLOATS, torch.float64) if backend in ("auto", "reference") else FLOATS
    known = backend in ("auto", "cpu", "reference") or (backend == "cuda" and not placed)
    assert (error is None) == (known and all(x.dense and x.tensor.dtype in served for x in placed)), error
    if error is None:
        norm, nonfinite = answer
        values = torch.cat([x.tensor.double().flatten() for x in placed] or [torch.zeros(0).double()])
        assert bool(nonfinite) == (not values.isfinite().all())
        if not nonfinite:
            exact = math.sqrt(math.fsum(v * v for v in values.tolist()))
            assert abs(float(norm) - exact) <= 2.0**-46 * exact  # 128 roundings: see test_norm.py


# ---- the compiled module: valid addresses, and codes, kinds and indices that may be wrong ----

codes = st.sampled_from([0, 0, 1, 1, 2, 2, -1, 3, 2**31 - 1])
lengths = st.sampled_from([0, 1, 15, 16, 17, 127, 1025, 17000])
DTYPE_OF = {code: dtype for dtype, code in CODES.items()}


@examples(1500)
@given(codes, codes, lengths, st.booleans(), st.booleans(), st.integers(0, 20), threads, seeds)
def test_compiled_conversions(
    source: int, target: int, n: int, negative: bool, halves: bool, offset: int, workers: int, number: int
) -> None:
    rng = np.random.default_rng(number)
    size = -n - 1 if negative and number % 4 == 0 else n
    src = Guarded(random_values(n, DTYPE_OF.get(source, torch.float32), rng), offset)
    dst = Guarded(torch.zeros(n, dtype=DTYPE_OF.get(target, torch.float32)), offset // 2)
    low = Guarded(torch.zeros(n, dtype=torch.int16), offset // 3)
    if halves:
        src = Guarded(random_values(n, torch.float32, rng), offset)
        dst = Guarded(torch.zeros(n, dtype=torch.bfloat16), offset // 2)
        _, error = outcome(lambda: _C.cpu_split(src.address, dst.address, low.address, size, workers))
        assert (error is None) == (size >= 0)
    else:
        _, error = outcome(lambda: _C.cpu_cast(src.address, source, dst.address, target, size, workers))
        fits = source in DTYPE_OF and target in DTYPE_OF and (source == 0) != (target == 0)
        assert (error is None) == (fits and size >= 0), error
    if error is not None:
        assert not dst.tensor.any() and not low.tensor.any()
    elif halves:
        high, rest = reference.split(src.tensor.numpy())
        assert_same_bits(dst.tensor, torch.from_numpy(high).view(torch.bfloat16), "high")
        assert_same_bits(low.tensor, torch.from_numpy(rest), "low")
        again = Guarded(torch.zeros(n), offset)
        _C.cpu_join(dst.address, low.address, again.address, n, workers)
        assert_same_bits(again.tensor, src.tensor, "joined")
        again.check()
    else:
        assert_same_bits(dst.tensor, src.tensor.to(dst.tensor.dtype))
    for array in (src, dst, low):
        array.check()


HYPER = [1e-3, 0.9, 0.999, 1e-8, 0.1, 3.0, 1.0, 1.0]
wrongs = st.sampled_from([None] * 6 + ["kind", "hyper", "size", "row", "address", "numbers"])


@examples(1500)
@given(
    st.lists(st.tuples(st.integers(4, 47), lengths, st.integers(0, 9)), min_size=1, max_size=3),
    *(st.booleans(), wrongs, st.sampled_from([0.5, 1.0, 0.0, math.inf, math.nan]), threads, seeds),
)
def test_compiled_adam(
    parts: list[tuple[int, int, int]], special: bool, wrong: str | None, scale: float, workers: int, number: int
) -> None:
    rng = np.random.default_rng(number)
    rows = [Row(kind, n, rng, offset, special) for kind, n, offset in parts]
    before = [{name: tensor.clone() for name, tensor in row.tensors().items()} for row in rows]
    hypers = [HYPER, [3e-2, 0.5, 0.9, 1e-3, 0.0, 1.0, -1.0, 0.0]]
    table = [row.addresses(i % 2) for i, row in enumerate(rows)]
    last = table[-1]
    if wrong == "kind":
        last[7] = int(rng.choice([-1, 0, 3, 48, 2**31, 2**32 + 9, -(2**63)]))
    elif wrong == "hyper":
        last[8] = int(rng.choice([-1, 2, 2**32, 2**62]))
    elif wrong == "size":
        last[6] = -1 - int(rng.integers(0, 2**40))
    elif wrong == "row":
        del last[int(rng.integers(0, 9)) :]
    elif wrong == "address":
        last[2] = 0
    elif wrong == "numbers":
        hypers = [hypers[0], hypers[1][:7]]
    expected = before
    if wrong is None:
        expected = [row.expected(_C.adam_scalars(hypers[i % 2], scale)) for i, row in enumerate(rows)]
    _, error = outcome(lambda: _C.cpu_adam(table, hypers, scale, workers))
    refused = wrong is not None and not (wrong == "address" and rows[-1].n == 0)
    assert (error is not None) == refused, error
    if wrong is None or refused:
        for row, after in zip(rows, expected):
            row.check(after)
