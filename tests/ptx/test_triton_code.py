"""PTX that Triton emits, executed and compared with numpy bit for bit."""

from pathlib import Path

import numpy as np
import pytest

from . import InexactInstructionError, Kernel, Memory, MemoryFaultError, Module
from .toolchain import TritonKernel, TritonPtx, compile_triton

pytest.importorskip("triton", reason="needs Triton")

BLOCK = 1024
ROWS = {"rows": "*i64", "first_block": "*i64", "n_rows": "i32", "step_size": "fp32"}
ADAM = {**ROWS, "BLOCK": "constexpr", "WHOLE": "constexpr"}


@pytest.fixture(scope="module")
def compiled() -> dict[str, TritonPtx]:
    source = str(Path(__file__).with_name("toy_triton.py"))
    size = {"SIZE": "constexpr"}
    kernels = {
        "adam": TritonKernel(source, "split_adam", ADAM, {"BLOCK": BLOCK, "WHOLE": False}),
        "adam whole": TritonKernel(source, "split_adam", ADAM, {"BLOCK": BLOCK, "WHOLE": True}),
        "square_sum": TritonKernel(
            source, "square_sum", {"x": "*fp32", "out": "*fp64", "flag": "*i32", "n": "i64"}, divisible=["x"]
        ),
        "row_sum": TritonKernel(source, "row_sum", {"x": "*i32", "out": "*i32", **size}, {"SIZE": 1024}),
        "halves": TritonKernel(
            source,
            "halves",
            {"x": "*fp32", "out16": "*fp16", "out_bf16": "*bf16", **size},
            {"SIZE": 1024},
            divisible=["x", "out16", "out_bf16"],
        ),
        "quotients": TritonKernel(
            source, "quotients", {"a": "*fp32", "b": "*fp32", "out": "*fp32", **size}, {"SIZE": 256}
        ),
    }
    return dict(zip(kernels, compile_triton(list(kernels.values()))))


def kernel(ptx: TritonPtx) -> Kernel:
    return Module.parse(ptx.text).kernel(ptx.name)


def run(ptx: TritonPtx, grid: int, args: list[object], memory: Memory) -> int:
    return kernel(ptx).launch(grid, ptx.threads, [*args, 0, 0], memory, shared_bytes=ptx.shared_bytes)


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy at an address that is a multiple of 16."""
    room = np.zeros(array.nbytes + 16, np.uint8)
    skip = -room.ctypes.data % 16
    out = room[skip : skip + array.nbytes].view(array.dtype)
    out[:] = array
    return out


class Tensors:
    """Rows of split weights with their gradients and moments, and their update in numpy."""

    def __init__(self, sizes: list[int], kind: int, seed: int) -> None:
        print(f"seed {seed}")
        rng = np.random.default_rng(seed)
        self.kind = kind
        self.rows = []
        for n in sizes:
            bits = rng.standard_normal(n).astype("f4").view("u4")
            grad = (rng.standard_normal(n).astype("f4").view("u4") >> 16).astype("u2")
            moments = rng.standard_normal(n).astype("f4"), rng.random(n).astype("f4")
            high, low = ((bits + 0x8000) >> 16).astype("u2"), bits.astype("u2")
            self.rows.append([aligned(a) for a in (high, low, grad, *moments)])

    def expected(self, step_size: float) -> list[list[np.ndarray]]:
        f = np.float32
        out = []
        for high, low, grad, m, v in self.rows:
            p = ((high.astype("u4") << 16) + low.view("i2").astype("i4").view("u4")).view("f4")
            g = (grad.astype("u4") << 16).view("f4")
            m = m + f(0.1) * (g - m)
            v = f(0.999) * v + f(0.001) * (g * g)
            bits = (p - f(step_size) * (m / (np.sqrt(v) + f(1e-8)))).view("u4")
            if self.kind == 1:
                high, low = ((bits + 0x8000) >> 16).astype("u2"), bits.astype("u2")
            else:
                high = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("u2")
            out.append([high, low, grad, m, v])
        return out

    def table(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Rows, first blocks, number of blocks."""
        table = np.array([[*(a.ctypes.data for a in row), 0, row[0].size, self.kind] for row in self.rows], "i8")
        blocks = [-(-row[0].size // BLOCK) for row in self.rows]
        return table, np.cumsum([0, *blocks[:-1]]).astype("i8"), sum(blocks)

    def memory(self, *read_only: np.ndarray) -> Memory:
        memory = Memory()
        for i, row in enumerate(self.rows):
            for array, name in zip(row, ("param", "low", "grad", "m", "v")):
                memory.add(array, name=f"{name} {i}", writable=name != "grad")
        for array in read_only:
            memory.add(array)
        return memory


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(("which", "sizes"), [("adam", [1, 1023, 1025, 7, 3000]), ("adam whole", [1024, 2048, 1024])])
def test_adam_over_a_table_of_pointers(compiled: dict[str, TritonPtx], which: str, sizes: list[int], kind: int) -> None:
    tensors = Tensors(sizes, kind, seed=31 + kind)
    expected = tensors.expected(1e-3)
    table, first, blocks = tensors.table()
    memory = tensors.memory(table, first)
    run(compiled[which], blocks, [table, first, len(sizes), 1e-3], memory)
    for row, wanted in zip(tensors.rows, expected):
        for got, want in zip(row, wanted):
            assert np.array_equal(got.view("u1"), want.view("u1"))
    elements = sum(sizes)
    traffic = memory.traffic()
    moved = {name: sum(sum(t) for key, t in traffic.items() if key.split()[0] == name) for name in ("m", "grad")}
    assert moved == {"m": 8 * elements, "grad": 2 * elements}


def test_static_view_of_adam(compiled: dict[str, TritonPtx]) -> None:
    whole = kernel(compiled["adam whole"])
    opcodes, accesses = whole.opcodes(), whole.accesses()
    assert opcodes["ld.global.v4.b32"] >= 7 and opcodes["st.global.v4.b32"] >= 6
    assert accesses["ld", "global", 2] == 0
    assert not [op for op in opcodes if op.startswith(("fma", "mad.f", "ld.local", "st.local"))]
    assert whole.inexact() == []
    assert whole.threads == (128, 1, 1)


def test_adam_that_leaves_its_buffers_is_caught(compiled: dict[str, TritonPtx]) -> None:
    tensors = Tensors([1500], 1, seed=33)
    table, first, blocks = tensors.table()
    memory = tensors.memory(table, first)
    with pytest.raises(MemoryFaultError, match=r"PTX line \d+: .*ld\.global.* lie in no buffer"):
        run(compiled["adam whole"], blocks, [table, first, 1, 1e-3], memory)


@pytest.mark.parametrize("n", [1, 127, 4096, 4097, 10_000])
def test_square_sum_in_a_fixed_order(compiled: dict[str, TritonPtx], n: int) -> None:
    print("seed", n)
    rng = np.random.default_rng(n)
    x = aligned(rng.standard_normal(n).astype("f4"))
    blocks = -(-n // 4096)
    out, flag = np.full(blocks, np.nan), np.zeros(1, "i4")
    memory = Memory()
    memory.add(x, name="x")
    memory.add(out, name="out", writable=True)
    memory.add(flag, name="flag", writable=True)
    run(compiled["square_sum"], blocks, [x, out, flag, n], memory)
    padded = np.concatenate([x, np.zeros(blocks * 4096 - n, "f4")]).astype("f8").reshape(blocks, 32, 128)
    for block, value in zip(padded, out):
        acc = np.zeros(128)
        for row in block:
            acc = acc + row * row
        while acc.size > 1:
            acc = acc[: acc.size // 2] + acc[acc.size // 2 :]
        assert value == acc[0]
    assert flag[0] == 0
    x[n // 2] = np.inf
    run(compiled["square_sum"], blocks, [x, out, flag, n], memory)
    assert flag[0] == 1


def test_row_sum_by_shuffles(compiled: dict[str, TritonPtx]) -> None:
    x = np.random.default_rng(5).integers(-(2**31), 2**31, (3, 1024)).astype("i4")
    out = np.zeros(3, "i4")
    memory = Memory()
    memory.add(x)
    memory.add(out, writable=True)
    run(compiled["row_sum"], 3, [x, out], memory)
    assert np.array_equal(out, x.astype("i8").sum(1).astype("i4"))
    assert any(op.startswith(("shfl.sync", "redux.sync")) for op in kernel(compiled["row_sum"]).opcodes())


def test_conversions_to_halves(compiled: dict[str, TritonPtx]) -> None:
    seed = 6
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    x = aligned(rng.integers(0, 2**32, 1024, dtype=np.uint32).view("f4"))
    x[::2] = rng.standard_normal(512).astype("f4")
    x[1::8] = (x[1::8].view("u4") & 0xFFFF0000 | 0x8000).view("f4")  # ties of bf16
    x[np.isnan(x)] = 1.5
    half, bfloat = aligned(np.zeros(1024, "f2")), aligned(np.zeros(1024, "u2"))
    memory = Memory()
    memory.add(x)
    memory.add(half, writable=True)
    memory.add(bfloat, writable=True)
    run(compiled["halves"], 1, [x, half, bfloat], memory)
    bits = x.view("u4")
    with np.errstate(over="ignore"):
        assert np.array_equal(half.view("u2"), x.astype("f2").view("u2"))
    assert np.array_equal(bfloat, ((bits.astype("u8") + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("u2"))


def test_the_plain_division_of_triton_is_refused(compiled: dict[str, TritonPtx]) -> None:
    a, b, out = (np.ones(256, "f4") for _ in range(3))
    memory = Memory()
    memory.add(a)
    memory.add(b)
    memory.add(out, writable=True)
    with pytest.raises(InexactInstructionError, match=r"PTX line \d+: .*div\.full\.f32 is an approximation"):
        run(compiled["quotients"], 1, [a, b, out], memory)
    assert len(kernel(compiled["quotients"]).inexact()) == 2  # 256 elements by 128 threads
    assert (out == 1).all()
