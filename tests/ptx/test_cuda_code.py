"""PTX that nvcc emits, executed and compared with numpy bit for bit."""

import ctypes
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from . import Memory, MemoryFaultError, Module, RaceError
from .exact import encode
from .toolchain import compile_cuda, nvcc

pytestmark = pytest.mark.skipif(nvcc() is None, reason="needs nvcc, of the CUDA toolkit")

SOURCE = Path(__file__).with_name("toy_cuda.cu")


@pytest.fixture(scope="module")
def text() -> str:
    return compile_cuda(SOURCE)


@pytest.fixture
def module(text: str) -> Module:
    return Module.parse(text)


def random(seed: int) -> np.random.Generator:
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def aligned(array: np.ndarray, offset: int = 0) -> np.ndarray:
    """A copy at an address that is a multiple of 16, plus an offset."""
    room = np.zeros(array.nbytes + 32, np.uint8)
    skip = -room.ctypes.data % 16 + offset
    out = room[skip : skip + array.nbytes].view(array.dtype)
    out[:] = array
    return out


def memory_of(read: list[np.ndarray], written: list[np.ndarray]) -> Memory:
    memory = Memory()
    for i, array in enumerate(read):
        memory.add(array, name=f"in {i}")
    for i, array in enumerate(written):
        memory.add(array, name=f"out {i}", writable=True)
    return memory


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 1023, 1024, 1025, 5000])
def test_vectors_and_tails(module: Module, n: int) -> None:
    rng = random(n)
    x, y = (aligned(rng.standard_normal(n).astype("f4")) for _ in range(2))
    expected = y + np.float32(1.7) * x
    memory = memory_of([x], [y])
    module.kernel("scale_add").launch(2, 128, [x, y, n, 1.7], memory)
    assert np.array_equal(y.view("u4"), expected.view("u4"))
    if n:
        assert memory.traffic() == {"in 0": (4 * n, 0), "out 0": (4 * n, 4 * n)}


def test_static_view_of_vectors(module: Module) -> None:
    kernel = module.kernel("scale_add")
    assert kernel.accesses()["ld", "global", 16] >= 2 and kernel.accesses()["st", "global", 16] >= 1
    assert kernel.opcodes()["ld.global.nc.v4.f32"] >= 1
    assert not [op for op in kernel.opcodes() if op.startswith("fma")]
    fused = Module.parse(compile_cuda(SOURCE, flags=())).kernel("scale_add")
    assert fused.opcodes()["fma.rn.f32"] >= 4


def test_a_misaligned_vector_access_is_caught(module: Module) -> None:
    x, y = aligned(np.ones(64, "f4"), offset=4), aligned(np.ones(64, "f4"))
    with pytest.raises(MemoryFaultError, match=r"ld\.global\.nc\.v4\.f32.*is not a multiple of 16 bytes"):
        module.kernel("scale_add").launch(1, 32, [x, y, 64, 1.0], memory_of([x], [y]))


def test_loops_of_different_length(module: Module) -> None:
    start = random(3).integers(1, 2**20, 512, dtype=np.uint32)
    steps = np.zeros(512, "u4")
    module.kernel("collatz").launch(2, 256, [start, steps], memory_of([start], [steps]))
    for first, got in zip(start, steps):
        n, count = int(first), 0
        while n != 1 and count < 150:
            n = 3 * n + 1 if n % 2 else n // 2
            count += 1
        assert got == count


def test_tree_in_shared_memory(module: Module) -> None:
    x = random(4).standard_normal((3, 256)).astype("f4")
    out, bad = np.zeros(3), np.zeros(1, "i4")
    module.kernel("block_tree").launch(3, 256, [x, out, bad], memory_of([x], [out, bad]))
    acc = x.astype("f8") * x.astype("f8")
    while acc.shape[1] > 1:
        acc = acc[:, : acc.shape[1] // 2] + acc[:, acc.shape[1] // 2 :]
    assert np.array_equal(out, acc[:, 0])
    assert bad[0] == 0
    x[1, 200] = np.nan
    module.kernel("block_tree").launch(3, 256, [x, out, bad], memory_of([x], [out, bad]))
    assert bad[0] == 1 and np.isnan(out[1]) and not np.isnan(out[[0, 2]]).any()


def test_a_missing_barrier_is_caught(module: Module) -> None:
    x, out, bad = np.ones(256, "f4"), np.zeros(1), np.zeros(1, "i4")
    kernel, memory = module.kernel("racing_tree"), memory_of([x], [out, bad])
    with pytest.raises(RaceError, match=r"PTX line \d+: ld\.shared\.f64 .*thread .* reads what thread \d+ wrote"):
        kernel.launch(1, 256, [x, out, bad], memory)
    # Run in step, the race does not show in the values: that is why it needs a detector.
    kernel.launch(1, 256, [x, out, bad], memory, detect_races=False)
    assert out[0] == 256


def test_exchange_within_warps(module: Module) -> None:
    x = random(5).standard_normal(192)
    sums, ballots, rotated = np.zeros(6), np.zeros(6, "u4"), np.zeros(192, "i4")
    args = [x, sums, ballots, rotated]
    module.kernel("warp_exchange").launch(2, 96, args, memory_of([x], args[1:]))
    acc, lane = x.reshape(6, 32), np.arange(32)
    for s in (16, 8, 4, 2, 1):
        acc = acc + acc[:, lane ^ s]
    assert np.array_equal(sums, acc[:, 0])
    assert np.array_equal(ballots, ((x.reshape(6, 32) > 0) * (1 << lane)).sum(1))
    down = np.where(lane % 16 + 5 < 16, lane + 5, lane)
    wanted = (lane + 7) % 32 + 100 * np.where(lane >= 3, lane - 3, lane) + 10000 * down
    assert np.array_equal(rotated, np.tile(wanted, 6))


class Sets(ctypes.Structure):
    _fields_ = [("scale", ctypes.c_float * 5 * 3), ("offset", ctypes.c_double)]


def test_rows_pointers_kinds_and_parameters_by_value(module: Module) -> None:
    rng = random(6)
    f = np.float32
    sizes = [1, 64, 65, 200, 64, 3, 130, 77, 10]
    xs = [rng.standard_normal(n).astype("f4") for n in sizes]
    ys = [np.zeros(n, "f4") for n in sizes]
    sets = Sets(offset=1.25)
    scales = rng.random((3, 5)).astype("f4")
    for k in range(3):
        sets.scale[k][:] = scales[k].tolist()
    rows = np.zeros((len(sizes), 8), "i8")
    for kind, (x, y) in enumerate(zip(xs, ys)):
        rows[kind] = [x.ctypes.data, y.ctypes.data, 0, 0, 0, 0, x.size, kind | (kind % 3) << 32]
    blocks = [-(-n // 64) for n in sizes]
    first = np.cumsum([0, *blocks[:-1]]).astype("i8")
    memory = memory_of([rows, first, *xs], ys)
    module.kernel("by_table").launch(sum(blocks), 64, [rows, first, len(sizes), bytes(sets)], memory)

    def fused(a: float, b: float) -> int:
        return encode(Fraction(a) * Fraction(b) + Fraction(5, 4), "f32")

    primes = np.array([2, 3, 5, 7], "f4")
    for kind, (x, y) in enumerate(zip(xs, ys)):
        i = np.arange(x.size)
        s = scales[kind % 3][i % 5]
        wide, offset = x.astype("f8"), 1.25
        wanted = [
            x * s,
            x / s,
            np.sqrt(abs(x)) + s,
            np.array([fused(*ab) for ab in zip(x.tolist(), s.tolist())], "u4").view("f4"),
            x * primes[i & 3],
            np.maximum(x, s),
            (wide / offset).astype("f4"),
            np.sqrt(abs(wide) * offset).astype("f4"),
            np.zeros_like(x),
        ][kind]
        assert np.array_equal(y.view("u4"), wanted.astype(f).view("u4")), f"kind {kind}"
    assert module.variable("blocks_done").view("u4")[0] == sum(blocks)


@pytest.mark.parametrize("start", [2**31 - 64, 2**31 + 5, 3 * 2**32 + 7])
def test_indices_beyond_two_to_the_31(module: Module, start: int) -> None:
    x = random(7).standard_normal(256).astype("f4")
    y = np.zeros(256, "f4")
    memory = memory_of([], [y])
    base = 1 << 40
    memory.add(x, name="x", at=base + 4 * start)  # the buffer itself stands elsewhere
    module.kernel("far_index").launch(2, 128, [base, y.ctypes.data - 4 * start, start], memory)
    assert np.array_equal(y, 2 * x)
    with pytest.raises(MemoryFaultError, match=r"4 bytes at 0x1[0-9a-f]+ lie in no buffer"):
        module.kernel("far_index").launch(3, 128, [base, y.ctypes.data - 4 * start, start], memory, blocks=[2])


def test_sixteen_bit_formats(module: Module) -> None:
    x = random(8).integers(0, 2**32, 1024, dtype=np.uint32)
    x[:512] = random(9).standard_normal(512).astype("f4").view("u4")
    x[:512:4] = x[:512:4] & 0xFFFF0000 | 0x8000
    fp16, bf16, split, back = (np.zeros(1024 * k, t) for k, t in ((1, "u2"), (1, "u2"), (2, "u2"), (1, "f4")))
    args = [x, fp16, bf16, split, back]
    module.kernel("halves").launch(4, 256, args, memory_of([x], args[1:]))
    values = x.view("f4")
    nan = np.isnan(values)
    with np.errstate(over="ignore"):
        half = np.where(nan, 0x7FFF, values.astype("f2").view("u2"))
    assert np.array_equal(fp16, half)
    assert np.array_equal(bf16, np.where(nan, 0x7FFF, (x.astype("u8") + 0x7FFF + (x >> 16 & 1)) >> 16))
    assert np.array_equal(split[::2], ((x.astype("u8") + 0x8000) >> 16).astype("u2"))
    assert np.array_equal(split[1::2], x.astype("u2"))
    finite = np.isfinite(half.astype("u2").view("f2")) & (values != 0)
    assert np.array_equal(back[finite].view("u4"), x[finite])
    assert (back[nan].view("u4") == 0x7FFFFFFF).all()  # the one NaN that single-precision arithmetic makes


def test_local_memory_and_calls(module: Module) -> None:
    x = random(10).integers(-100, 100, 16).astype("i4")
    out = np.zeros(64)
    n = 9
    module.kernel("local_and_call").launch(1, 64, [x, out, n], memory_of([x], [out]))
    for thread, got in enumerate(out):
        slots = [int(v) * n for v in x]
        for i in range(n):
            slots[slots[i & 15] & 15] += thread
        total = 0.0
        for i in range(thread % 5):
            total = total * slots[thread & 15] + i
        assert got == total
    assert any(op.startswith("ld.local") for op in module.kernel("local_and_call").opcodes())
