"""What the tensor-parallel matmul kernels consist of when compiled for sm_80, sm_90 and sm_100, which needs no GPU."""

import re
from collections.abc import Sequence
from dataclasses import asdict

import pytest
from ptx import Kernel, Module
from tp_triton_compile import Request, compile_all
from triton_compile import Compiled

from pyshard.kernels import triton_tp

pytest.importorskip("triton", reason="needs Triton, which compiles without a GPU")

GATHER, SCATTER = "gather_matmul.gather_matmul_kernel", "matmul_scatter.matmul_scatter_kernel"
BIG, ODD, FP32 = (asdict(t) for t in (triton_tp._TILES_16, triton_tp._TILES_16_ODD, triton_tp._TILES_32))
UNITS = {80: "mma", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@pytest.fixture(scope="module", params=[80, 90, 100], ids=lambda arch: f"sm_{arch}")
def code(request: pytest.FixtureRequest) -> dict[str, Compiled]:
    arch, requests = request.param, {}
    for name, kernel in (("gather", GATHER), ("scatter", SCATTER)):
        requests[f"{name} bf16"] = Request(kernel, arch, "bf16", 8, BIG)
        requests[f"{name} fp16 of 2, w.t()"] = Request(kernel, arch, "fp16", 2, BIG, bias=False, transposed=True)
        requests[f"{name} bf16, masked"] = Request(kernel, arch, "bf16", 8, BIG, even=False)
        requests[f"{name} bf16, masked w.t()"] = Request(kernel, arch, "bf16", 8, BIG, even=False, transposed=True)
        requests[f"{name} bf16, odd"] = Request(kernel, arch, "bf16", 8, ODD, even=False, aligned=False)
        requests[f"{name} fp32"] = Request(kernel, arch, "fp32", 3, FP32)
        requests[f"{name} fp32, odd"] = Request(kernel, arch, "fp32", 8, FP32, even=False, aligned=False)
    requests["tell"] = Request("gather_matmul.tell_kernel", arch, "bf16", 2, {**BIG, "warps": 1})
    requests["sum bf16"] = Request("matmul_scatter.sum_kernel", arch, "bf16", 8, BIG)
    requests["sum fp32"] = Request("matmul_scatter.sum_kernel", arch, "fp32", 3, BIG, bias=False)
    return compile_all(requests)


def kernel_of(made: Compiled) -> Kernel:
    return Module.parse(made.ptx).kernel(made.name)


def lines(made: Compiled, pattern: str) -> list[str]:
    return re.findall(rf"^\s*(?:@!?%p\d+ )?({pattern})", made.ptx, re.MULTILINE)


def test_nothing_is_spilled_and_no_memory_is_local(code: dict[str, Compiled]) -> None:
    for name, made in code.items():
        assert made.cubin_bytes > 0
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in made.ptxas, f"{name}: {made.ptxas}"
        assert ".local" not in made.ptx, name


def test_a_matmul_fits_on_a_multiprocessor(code: dict[str, Compiled]) -> None:
    for name, made in code.items():
        registers = re.search(r"Used (\d+) registers", made.ptxas)
        assert registers and int(registers[1]) * made.threads <= 65536, f"{name}: {made.ptxas}"
        # The least that a multiprocessor of sm_80 (of sm_8x: 99 KiB) and sm_90 gives to a program.
        assert made.shared_bytes <= (163 << 10 if "sm_80" in made.ptx else 227 << 10), name


def test_16_bit_operands_go_to_tensor_cores_and_are_summed_in_fp32(code: dict[str, Compiled]) -> None:
    for name, made in code.items():
        if name.startswith(("tell", "sum")):
            continue
        found = set(lines(made, r"(?:mma|wgmma\.mma_async|tcgen05\.mma)\.[\w.:]+"))
        if "fp32" in name:
            assert not found, name  # they would round the operands to fewer bits
            continue
        types = ".f32.bf16.bf16" if "bf16" in name else ".f32.f16.f16"
        if ".target sm_100a" in made.ptx:
            types = ".kind::f16"  # of both; a descriptor tells which
        unit = next(u for a, u in UNITS.items() if f".target sm_{a}" in made.ptx)
        assert found, name
        for opcode in found:
            assert opcode.startswith(unit) and types in opcode, f"{name}: {opcode}"


@pytest.mark.parametrize("name", ["gather bf16", "scatter bf16", "gather fp16 of 2, w.t()", "scatter fp16 of 2, w.t()"])
def test_operands_are_fetched_ahead_and_16_bytes_at_a_time(code: dict[str, Compiled], name: str) -> None:
    made = code[name]
    copies = lines(made, r"cp\.async\.c[ag]\.shared\.global [^;]*;")
    per_stage = (BIG["m"] + BIG["n"]) * BIG["k"] * 2 // 16 // made.threads
    assert copies and all(", 16, 16;" in copy or ", 0x10, 0x10;" in copy or ", 0x10" in copy for copy in copies)
    assert len(copies) % per_stage == 0 and len(copies) // per_stage >= 3  # two ahead of the loop, one in it
    # Nothing of x or w goes another way: a load of 16 bits may be of the bias only.
    assert len(lines(made, r"ld\.global\.(?:v\d\.)?b16")) <= 2
    wide = lines(made, r"st\.global\.v4\.b32")
    assert len(wide) == BIG["m"] * BIG["n"] * 2 // 16 // made.threads


def test_the_sum_reads_four_elements_at_a_time(code: dict[str, Compiled]) -> None:
    assert len(lines(code["sum bf16"], r"ld\.global\.v2\.b32")) == 9  # eight ranks and the bias
    assert len(lines(code["sum fp32"], r"ld\.global\.v4\.b32")) == 3
    for name in ("sum bf16", "sum fp32"):
        assert not lines(code[name], r"fma\.\S*f32") and not lines(code[name], r"\S*(?:approx|ftz)\S*")


def sequence(made: Compiled) -> list[str]:
    return [ins.opcode for ins in kernel_of(made).instructions()]


def position(opcodes: Sequence[str], *modifiers: str) -> list[int]:
    """Of the accesses to memory that have all these modifiers."""
    return [
        i
        for i, opcode in enumerate(opcodes)
        if opcode.split(".")[0] in ("ld", "st", "atom", "red") and set(modifiers) <= set(opcode.split("."))
    ]


def stored_since_barrier(opcodes: Sequence[str], index: int) -> bool:
    """Whether a plain store to global memory stands between an instruction and the barrier before it in the text."""
    for opcode in reversed(opcodes[:index]):
        if opcode.split(".")[0] in ("bar", "barrier"):
            return False
        if opcode.startswith("st.global"):
            return True
    raise AssertionError("no barrier before it")


def of(code: dict[str, Compiled], kind: str) -> list[tuple[str, Compiled]]:
    return [(name, made) for name, made in code.items() if name.startswith(kind)]


def test_waiting_is_an_acquire_of_the_system(code: dict[str, Compiled]) -> None:
    for name, made in of(code, "gather"):
        # Without waiting; the flag before and in the loop, and the word for failures.
        per_loop = 4
        found = position(sequence(made), "acquire", "sys")
        assert len(found) and len(found) % per_loop == 0, name
        assert "%globaltimer" in made.ptx, name


def test_products_are_counted_behind_a_barrier_and_the_flag_is_a_release(code: dict[str, Compiled]) -> None:
    for name, made in of(code, "scatter"):
        opcodes = sequence(made)
        counted = position(opcodes, "acq_rel", "sys", "add")
        raised = position(opcodes, "release", "sys", "exch")
        assert counted and len(counted) == len(raised), name
        assert not stored_since_barrier(opcodes, counted[0]), name


def test_a_chunk_is_told_by_a_release(code: dict[str, Compiled]) -> None:
    opcodes = sequence(code["tell"])
    (raised,) = position(opcodes, "release", "sys", "exch")
    assert not stored_since_barrier(opcodes, raised)


def test_peers_memory_is_read_coherently(code: dict[str, Compiled]) -> None:
    for name, made in code.items():
        assert not lines(made, r"ld\.global\.nc\S*"), name
