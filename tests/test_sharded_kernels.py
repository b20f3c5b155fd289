"""The CPU kernels of sharded optimizers: gradients summed over the memory of several ranks, parameters written to it.

The ranks are flat arrays of one layout in this process; kernels see addresses, and cannot tell. The same bits as numpy
and as the reference backend, for every kind, instruction set, number of threads, cut and order of sources.
"""

import itertools

import numpy as np
import pytest
import torch
from fuzz import examples, outcome, random_values, seeds
from hypothesis import given
from hypothesis import strategies as st
from peers import HYPER, OTHER, SCALE, Peers, summed
from reference import FLOATS, SPECIAL, Guarded, Row, assert_same_bits

from pyshard import _C
from pyshard.kernels import formats
from pyshard.kernels import reference as plain

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# Around the blocks of a kernel (128), of cuts between threads (1024) and of the norm (4096); together more than what
# one thread does alone (16384).
SIZES = (0, 1, 127, 129, 1023, 1024, 1025, 4095, 4096, 4097, 8191)
THREADS = (1, 2, 3)
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BLOCK = 4096


# ---- sums over sources ----


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_reduce_gives_the_bits_of_numpy(
    isa: str, dtype: torch.dtype, accumulate: bool, rng: np.random.Generator
) -> None:
    """Every number of sources that the loops tell apart, and more; special numbers; unaligned; nothing outside."""
    for n, count in itertools.product((*SIZES, 20011), (1, 2, 3, 4, 5, 7, 8, 9)):
        offset = int(rng.integers(0, 17))
        sources = [Guarded(random_values(n, dtype, rng), offset + i % 3) for i in range(count)]
        tensors = [source.tensor for source in sources]
        start = random_values(n, torch.float32, rng)
        expected = summed(tensors)
        assert_same_bits(plain.reduce(tensors), expected, "the reference")
        if accumulate:
            expected = summed([start, expected])
        for threads in THREADS if n > 16384 else (1,):
            out = Guarded(start, offset)
            addresses = [source.address for source in sources]
            _C.cpu_reduce(addresses, CODES[dtype], out.address, n, accumulate, threads)
            assert_same_bits(out.tensor, expected, f"{n} elements, {count} sources, {threads} threads")
            for array in (out, *sources):
                array.check(f"{n} elements, {count} sources")


@pytest.mark.parametrize("dtype", FLOATS)
def test_reduce_of_a_thousand_sources(isa: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    arrays = [random_values(301, dtype, rng, special=False) for _ in range(1024)]
    out = torch.zeros(301)
    _C.cpu_reduce([x.data_ptr() for x in arrays], CODES[dtype], out.data_ptr(), 301, False, 2)
    assert_same_bits(out, summed(arrays))


def test_a_source_may_come_twice(isa: str) -> None:
    x, out = torch.tensor([1.0, -0.0, 3e38]), torch.zeros(3)
    _C.cpu_reduce([x.data_ptr()] * 3, 0, out.data_ptr(), 3, False, 1)
    assert_same_bits(out, torch.tensor([3.0, -0.0, torch.inf]))


@pytest.mark.parametrize("accumulate", [False, True])
def test_negative_zero_is_kept(isa: str, accumulate: bool) -> None:
    """Nothing starts from +0: a sum of -0 is -0, for one source and for many."""
    zeros = torch.full((100,), -0.0)
    for count in (1, 2, 5):
        out = torch.full((100,), -0.0 if accumulate else 1.0)
        _C.cpu_reduce([zeros.data_ptr()] * count, 0, out.data_ptr(), 100, accumulate, 1)
        assert_same_bits(out, zeros)


def test_the_order_of_the_list_is_the_order_of_the_sum(isa: str, rng: np.random.Generator) -> None:
    """1e8 + 1 - 1e8 is 0 in fp32, and 1e8 - 1e8 + 1 is 1: in all three kernels, wherever the row's own gradient is."""
    values = {0: 1.0, 1: 1e8, 2: -1e8}
    for order in itertools.permutations(range(3)):
        expected = 0.0 if order[1] == 0 or order[0] == 0 else 1.0
        peers = Peers([Row(4, 5000, rng)], 3, rng)
        for rank, value in values.items():
            peers.view(peers.grads[rank], 0, torch.zeros(5000)).fill_(value)
        out = torch.zeros(5000)
        addresses = [source.data_ptr() for source in peers.sources(0, order)]
        _C.cpu_reduce(addresses, 0, out.data_ptr(), 5000, False, 1)
        assert (out == expected).all()
        table, _ = peers.table([HYPER])
        assert _C.sum_blocks(table.block_sums(1, peers.deltas(order))) == 5000 * expected
        peers.rows[0].tensors()["exp_avg"].zero_()
        table.adam(1.0, 1, peers.deltas(order))
        one = torch.tensor(_C.adam_scalars(HYPER, 1.0)[3])
        assert (peers.rows[0].tensors()["exp_avg"] == one * expected).all()


# ---- Adam over several ranks ----


@pytest.mark.parametrize("kind", formats.VALID_KINDS)
def test_every_kind_gives_the_bits_of_numpy(isa: str, kind: int, rng: np.random.Generator) -> None:
    """All sizes in one table, two sets of hyperparameters, special numbers in every other run; the row's own gradient
    anywhere in the list, or not in it.
    """
    hypers = [HYPER, OTHER]
    runs = [(1, 1), (1, 0), (2, 1), (2, 0), (3, 2), (7, 3)]
    for run, (count, targets) in enumerate(runs):
        special = bool(run % 2)
        rows = [Row(kind, n, rng, int(rng.integers(0, 17)), special) for n in SIZES]
        peers = Peers(rows, max(count, targets) + 1, rng, special)
        order = rng.permutation(peers.ranks)[:count].tolist()
        expected = peers.expected(order, hypers)
        table, steps = peers.table(hypers)
        table.adam(SCALE, THREADS[run % 3], peers.deltas(order), peers.targets(targets))
        peers.check(expected, targets, f"sources {order}, {targets} targets, {THREADS[run % 3]} threads")
        assert [float(step) for step in steps] == [hypers[i % 2][5] for i in range(len(rows))]


@pytest.mark.parametrize("kind", [4, 9, 18, 28, 33, 40])  # each format once, each switch and gradient dtype among them
def test_the_reference_backend_gives_the_same_bits(kind: int, rng: np.random.Generator) -> None:
    fmt, _, coupled, _ = formats.unpack_kind(kind)
    peers = Peers([Row(kind, 4099, rng, special=True)], 4, rng, special=True)
    order = [2, 0, 3]
    expected = peers.expected(order, [HYPER])
    t = peers.rows[0].tensors()
    plain.adam_(
        *(fmt, t["param"], t.get("low"), plain.reduce(peers.sources(0, order))),
        *(t["exp_avg"], t["exp_avg_sq"], t.get("max_exp_avg_sq"), plain.adam_scalars(HYPER, SCALE), coupled),
    )
    peers.check(expected, 0, "by the reference backend")


@pytest.mark.parametrize("kind", [4, 9, 18, 28, 33, 40])
def test_defaults_are_the_row_alone(isa: str, kind: int, rng: np.random.Generator) -> None:
    """No lists, [0] and [] spelled out, and the same numbers at a distance: one result."""
    start = Row(kind, 20011, rng, special=True)
    for threads, lists in itertools.product(THREADS, ((), ([0],), ([0], []), "distant")):
        peers = Peers([start.clone()], 2, rng)
        if lists == "distant":
            peers.sources(0, [1])[0].copy_(peers.sources(0, [0])[0])
            peers.before[1].copy_(peers.grads[1].tensor)
            lists = (peers.deltas([1]),)
        expected = peers.expected([0], [HYPER])
        table, _ = peers.table([HYPER])
        table.adam(SCALE, threads, *lists)
        peers.check(expected, 0, f"with {threads} threads")


@pytest.mark.parametrize("kind", [4, 13, 18, 26, 33])
def test_bits_do_not_depend_on_the_cut_into_rows_and_tables(isa: str, kind: int, rng: np.random.Generator) -> None:
    """One row; the same in pieces, in one table; in pieces, a table each: as buckets of one step. Each piece is counted
    once.
    """
    n, order, hypers = 30011, [1, 0, 2], [HYPER]
    whole = Peers([Row(kind, n, rng, special=True)], 3, rng, special=True)
    expected = whole.expected(order, hypers)[0]
    cuts = [0, *np.sort(rng.integers(0, n, 6)).tolist(), n]
    pieces = []
    for begin, end in itertools.pairwise(cuts):
        piece = whole.start[0].clone()
        piece.n = end - begin
        piece.arrays = {k: Guarded(a.tensor[begin:end], int(rng.integers(0, 9))) for k, a in piece.arrays.items()}
        pieces.append(piece)
    for tables, threads in itertools.product(
        ([range(7)], [[i] for i in range(7)], [[4, 1], [0, 6, 2], [3, 5]]), THREADS
    ):
        peers = Peers([piece.clone() for piece in pieces], 3, rng)
        for i, (begin, end) in enumerate(itertools.pairwise(cuts)):
            for theirs, values in zip(peers.sources(i, range(3)), whole.sources(0, range(3))):
                theirs.copy_(values[begin:end])
        kept = []
        for rows in tables:
            table, steps = peers.table(hypers, rows)
            kept.append((table, steps, peers.keep))
        for table, _, _ in kept:
            table.adam(SCALE, threads, peers.deltas(order), peers.targets(2))
        for name, after in expected.items():
            if name != "grad":
                joined = torch.cat([row.tensors()[name] for row in peers.rows])
                assert_same_bits(joined, after, f"{name} in {len(tables)} tables with {threads} threads")
        assert all(float(step) == HYPER[5] for _, steps, _ in kept for step in steps)
    table, _ = whole.table(hypers)
    table.adam(SCALE, 2, whole.deltas(order), whole.targets(2))
    whole.check([expected], 2, "whole")


def test_flush_denormal_of_the_caller_changes_nothing(isa: str, rng: np.random.Generator) -> None:
    tiny = [random_values(20011, torch.float32, rng, special=False) * 1e-40 for _ in range(3)]
    expected, addresses = summed(tiny), [x.data_ptr() for x in tiny]
    peers = Peers([Row(4, 20011, rng)], 3, rng)
    for source, values in zip(peers.sources(0, range(3)), tiny):
        source.copy_(values)
    peers.rows[0].tensors()["exp_avg"].fill_(1e-41)
    peers.start[0].tensors()["exp_avg"].fill_(1e-41)
    peers.before = [array.tensor.clone() for array in peers.grads]
    after = peers.expected(range(3), [HYPER])
    table, _ = peers.table([HYPER])
    sums = plain.block_sums([plain.reduce(tiny)])
    assert sums.all()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        out = torch.zeros(20011)
        _C.cpu_reduce(addresses, 0, out.data_ptr(), 20011, False, 2)
        got = table.block_sums(2, peers.deltas(range(3)))
        total = _C.sum_blocks(got)
        table.adam(SCALE, 2, peers.deltas(range(3)), peers.targets(1))
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(out, expected)
    assert got == sums.numpy().tobytes() and total == float(plain.sum_blocks(sums))
    peers.check(after, 1, "flushing")


# ---- the norm in parts ----


@pytest.mark.parametrize("dtype", FLOATS)
def test_block_sums_are_the_parts_of_the_norm(isa: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    kind = {torch.float32: 4, torch.bfloat16: 8, torch.float16: 24}[dtype]
    for count in (1, 2, 3, 7):
        peers = Peers([Row(kind, n, rng) for n in SIZES], count + 1, rng)
        table, steps = peers.table([HYPER])
        order = rng.permutation(count + 1)[:count].tolist()
        grads = [plain.reduce(peers.sources(i, order)) for i in range(len(SIZES))]
        expected = plain.block_sums(grads)
        assert len(expected) == sum(-(-n // BLOCK) for n in SIZES) == table.blocks(BLOCK)
        for threads in THREADS:
            got = table.block_sums(threads, peers.deltas(order))
            assert got == expected.numpy().tobytes(), f"sources {order}, {threads} threads"
        total = float(plain.square_sum(grads))
        assert _C.sum_blocks(got) == total == _C.cpu_square_sum([(g.data_ptr(), len(g), 0) for g in grads], 2)
        own = table.block_sums(1)
        assert own == table.block_sums(threads=3, source_deltas=[0]) and _C.sum_blocks(own) == table.square_sum(2)
        assert all(float(step) == HYPER[5] - 1 for step in steps), "a norm is no step"


def test_the_norm_of_several_tables_is_that_of_one(isa: str, rng: np.random.Generator) -> None:
    """As ranks exchange them: the parts of runs that begin at multiples of a block, joined in order. A parameter
    without a gradient has no part.
    """
    whole = Peers([Row(4, 9 * BLOCK + 77, rng)], 2, rng)
    table, _ = whole.table([HYPER])
    expected = table.block_sums(1, whole.deltas([0, 1]))
    ranges = [(0, 3 * BLOCK), (3 * BLOCK, 8 * BLOCK), (8 * BLOCK, whole.rows[0].n)]
    runs = []
    for begin, end in ranges:
        run = Row(4, end - begin, rng)
        runs.append(run)
    peers = Peers([*runs, Row(4, 500, rng)], 2, rng)
    for i, (begin, end) in enumerate(ranges):
        for theirs, values in zip(peers.sources(i, range(2)), whole.sources(0, range(2))):
            theirs.copy_(values[begin:end])
    parts = []
    for rows in ([0], [1], [2, 3]):
        table, _ = peers.table([HYPER], rows)
        groups, state = peers.keep
        if 3 in rows:
            groups[0]["params"][1].grad = None
            assert table.refresh(groups, state)
        parts.append(table.block_sums(2, peers.deltas([0, 1])))
    assert b"".join(parts) == expected
    assert _C.sum_blocks(b"".join(parts)) == _C.sum_blocks(expected)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("kind", [4, 8, 24])
def test_one_bad_element_of_one_rank_shows_in_its_block(
    isa: str, kind: int, bad: float, rng: np.random.Generator
) -> None:
    for at in (0, 4095, 4096, 8999):
        peers = Peers([Row(kind, 100, rng), Row(kind, 9000, rng)], 3, rng)
        peers.sources(1, [2])[0][at] = bad
        table, _ = peers.table([HYPER])
        sums = np.frombuffer(table.block_sums(2, peers.deltas(range(3))))
        assert np.flatnonzero(~np.isfinite(sums)).tolist() == [1 + at // BLOCK]
        total = _C.sum_blocks(sums.tobytes())
        assert np.isnan(total) if np.isnan(bad) else total == np.inf


@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 4095, 4096, 4097, 20011])
def test_sum_of_blocks_at_every_count(isa: str, count: int, rng: np.random.Generator) -> None:
    values = rng.standard_normal(count) * 2.0 ** rng.integers(-10, 10, count)
    assert _C.sum_blocks(values.tobytes()) == float(plain.sum_blocks(torch.from_numpy(values)))


# ---- wrong arguments ----


@pytest.mark.parametrize(
    ("sources", "targets", "message"),
    [
        ([], [], r"AdamTable.adam: source_deltas is empty; expected at least one"),
        ([0, 6], [], r"source_deltas: got a distance of 6 bytes, expected multiples of an element's 4"),
        ([0], [64, 2], r"target_deltas: got a distance of 2 bytes, expected multiples of an element's 4"),
        ([0], [64, 0], r"target_deltas: got 0, which is the row's own param; leave it out"),
    ],
)
def test_a_refused_step_changes_and_counts_nothing(
    sources: list[int], targets: list[int], message: str, rng: np.random.Generator
) -> None:
    peers = Peers([Row(4, 100, rng), Row(8, 10, rng)], 2, rng)
    table, steps = peers.table([HYPER])
    before = [{k: x.clone() for k, x in row.tensors().items()} for row in peers.rows]
    with pytest.raises(ValueError, match=message):
        table.adam(SCALE, 1, sources, targets)
    if targets == []:
        with pytest.raises(ValueError, match=message.replace("adam", "block_sums")):
            table.block_sums(1, sources)
    peers.check(before, 0, "refused")
    assert [float(step) for step in steps] == [6.0, 6.0]


def test_wrong_arguments_say_what_they_should_be() -> None:
    x = torch.zeros(8)
    for arguments, message in (
        (([], 0, x.data_ptr(), 4, False, 1), r"cpu_reduce: no sources; expected the address of at least one"),
        (([x.data_ptr(), 0], 0, x.data_ptr(), 4, False, 1), r"cpu_reduce: address 1 of 2 sources is null"),
        (([x.data_ptr()], 0, 0, 4, False, 1), r"cpu_reduce: the address of out is null"),
        (([x.data_ptr()], 3, x.data_ptr(), 4, False, 1), r"dtype code must be 0 .*, got 3"),
        (([x.data_ptr()], 0, x.data_ptr(), -4, False, 1), r"a size must be at least 0, got -4"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.cpu_reduce(*arguments)
    _C.cpu_reduce([0, 0], 1, 0, 0, True, 3)  # of no elements: nothing is read
    with pytest.raises(ValueError, match=r"sum_blocks: got 12 bytes, expected a multiple of the 8 of a double"):
        _C.sum_blocks(bytes(12))
    with pytest.raises(TypeError, match="sum_blocks"):
        _C.sum_blocks("text")
    assert _C.sum_blocks(b"") == 0.0
    empty = _C.AdamTable()
    assert empty.block_sums(1) == b"" and empty.adam(1.0, 1, [0, 4], [4]) is None


@examples(1500)
@given(
    st.sampled_from([0, 0, 1, 1, 2, 2, -1, 3, 2**31 - 1]),
    st.sampled_from([0, 1, 15, 129, 1025, 17000]),
    st.integers(0, 6),
    st.booleans(),
    st.sampled_from([None] * 5 + ["size", "source", "out"]),
    st.sampled_from([-3, 0, 1, 2, 3, 7]),
    seeds,
)
def test_random_reductions(
    code: int, n: int, count: int, accumulate: bool, wrong: str | None, workers: int, number: int
) -> None:
    """Each gives the bits of numpy, or an error of pyshard's own and nothing has changed."""
    rng = np.random.default_rng(number)
    dtype = {v: k for k, v in CODES.items()}.get(code, torch.float32)
    sources = [Guarded(random_values(n, dtype, rng), int(rng.integers(0, 20))) for _ in range(count)]
    start = torch.from_numpy(rng.choice(SPECIAL, n))
    out = Guarded(start, int(rng.integers(0, 20)))
    addresses = [source.address for source in sources]
    if wrong == "source" and count:
        addresses[int(rng.integers(0, count))] = 0
    size = -1 - n if wrong == "size" else n
    at = 0 if wrong == "out" else out.address
    _, error = outcome(lambda: _C.cpu_reduce(addresses, code, at, size, accumulate, workers))
    null = n > 0 and (wrong == "out" or (wrong == "source" and count > 0))
    assert (error is not None) == (code not in CODES.values() or count == 0 or size < 0 or null), error
    expected = start
    if error is None:
        expected = summed([source.tensor for source in sources])
        expected = summed([start, expected]) if accumulate else expected
    assert_same_bits(out.tensor, expected)
    for array in (out, *sources):
        array.check()


@examples(300)
@given(
    st.lists(st.tuples(st.integers(4, 47), st.sampled_from([0, 1, 33, 1025, 9000])), min_size=1, max_size=3),
    st.lists(st.integers(0, 3), max_size=5),
    st.integers(0, 3),
    st.sampled_from([None] * 4 + ["source", "target", "own", "large"]),
    st.sampled_from([-3, 0, 1, 2, 3, 7]),
    seeds,
)
def test_random_steps(
    parts: list[tuple[int, int]], order: list[int], targets: int, wrong: str | None, workers: int, number: int
) -> None:
    rng = np.random.default_rng(number)
    peers = Peers([Row(kind, n, rng, special=True) for kind, n in parts], 4, rng, special=True)
    table, steps = peers.table([HYPER, OTHER])
    sources, others = peers.deltas(order), peers.targets(targets)
    if wrong == "source":
        sources.append(1)
    elif wrong == "target":
        others.append(-3)
    elif wrong == "own":
        others.append(0)
    elif wrong == "large":
        sources.append(2**63)
    before = [{k: x.clone() for k, x in row.tensors().items()} for row in peers.rows]
    expected = peers.expected(order, [HYPER, OTHER]) if order else before
    _, error = outcome(lambda: table.adam(SCALE, workers, sources, others))
    assert (error is not None) == (wrong is not None or not order), error
    peers.check(before if error else expected, 0 if error else targets, f"{error!r}")
    assert all(float(step) == [HYPER, OTHER][i % 2][5] - bool(error) for i, step in enumerate(steps))
