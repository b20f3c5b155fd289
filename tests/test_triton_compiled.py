"""What the Triton kernels consist of when compiled for sm_80, sm_90 and sm_100, which needs no GPU."""

import re
from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from ptx import Kernel, Module
from triton_compile import CASTS, Compiled, adam_request, compile_all, other_requests

from pyshard.kernels import triton as kernels
from pyshard.kernels.formats import Format, param_dtype, unpack_kind

pytest.importorskip("triton", reason="needs Triton, which compiles without a GPU")

ARCHS = (80, 90, 100)
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
# fp32; split, amsgrad; bf16 + master, coupled; fp16 + master, fp32 gradient; fp16, coupled
STEP_KINDS = {"fp32": (4,), "bf16 split": (8,), "fp16 + master": (24,), "mixed": (4, 9, 18, 28, 42)}


@pytest.fixture(scope="module", params=ARCHS, ids=lambda arch: f"sm_{arch}")
def code(request: pytest.FixtureRequest) -> dict[str, Compiled]:
    """All kernels for one GPU, the step for representative kinds."""
    steps = {f"step {name}": adam_request(kinds, request.param) for name, kinds in STEP_KINDS.items()}
    return compile_all(steps | other_requests(request.param))


def kernel_of(made: Compiled) -> Kernel:
    return Module.parse(made.ptx).kernel(made.name)


def vectors(kernel: Kernel) -> Counter[tuple[str, int]]:
    """How many loads and stores of several elements, by bytes per thread."""
    found: Counter[tuple[str, int]] = Counter()
    for opcode, count in kernel.opcodes().items():
        wide = re.fullmatch(r"(ld|st)\.global\.v(\d)\.[bfu](\d+)", opcode)
        if wide:
            found[wide[1], int(wide[2]) * int(wide[3]) // 8] += count
    return found


def step_vectors(kinds: Iterable[int]) -> Counter[tuple[str, int]]:
    """One access to 4 elements of each array of each kind: 16 bytes of fp32, 8 of 16-bit elements."""
    wanted: Counter[tuple[str, int]] = Counter()
    for kind in kinds:
        fmt, grad_dtype, _, amsgrad = unpack_kind(kind)
        low = {Format.BF16_SPLIT: [8], Format.BF16_MASTER: [16], Format.FP16_MASTER: [16]}.get(fmt, [])
        both = [4 * param_dtype(fmt).itemsize, *low, 16, 16, *[16] * amsgrad]
        for size in both:
            wanted["ld", size] += 1
            wanted["st", size] += 1
        wanted["ld", 4 * grad_dtype.itemsize] += 1
    return wanted


def test_every_operation_is_exact_and_rounded_on_its_own(code: dict[str, Compiled]) -> None:
    for name, made in code.items():
        kernel = kernel_of(made)
        assert kernel.inexact() == [], name
        assert not made.fused, name
        fused = {op for op in kernel.opcodes() if op.startswith(("fma", "mad")) and ".f" in op}
        assert fused <= ({"fma.rn.f64"} if name == "square_sum" else set()), name  # of squares, which are exact
        for opcode in kernel.opcodes():
            assert not re.search(r"approx|full|ftz", opcode), f"{name}: {opcode}"
            if re.fullmatch(r"(add|sub|mul|div|sqrt|fma)\.(\w+\.)*f(32|64)", opcode):
                assert ".rn." in opcode, f"{name}: {opcode}"


def test_nothing_is_spilled_or_shared(code: dict[str, Compiled]) -> None:
    for name, made in code.items():
        assert made.cubin_bytes > 0 and made.shared_bytes == 0, name
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in made.ptxas, made.ptxas
        spaces = {space for _, space, _ in kernel_of(made).accesses()}
        assert spaces <= {"global", "param"}, name
        assert not any(op.startswith(("bar", "call")) for op in kernel_of(made).opcodes()), name


def test_enough_threads_fit_on_a_multiprocessor(code: dict[str, Compiled]) -> None:
    """Of 65,536 registers: 768 threads of a step with 4 reads of 16 bytes each under way are 48 KB, and bandwidth times
    latency is 20 KB on H100, 43 KB on B200; a thread of the norm reads 8 times ahead."""
    for name, made in code.items():
        registers = re.search(r"Used (\d+) registers", made.ptxas)
        assert registers and int(registers[1]) <= (80 if made.threads == 256 else 128), f"{name}: {made.ptxas}"


@pytest.mark.parametrize("name", STEP_KINDS)
def test_a_step_reads_and_writes_four_elements_at_a_time(code: dict[str, Compiled], name: str) -> None:
    assert vectors(kernel_of(code[f"step {name}"])) == step_vectors(STEP_KINDS[name])


def test_casts_and_norm_access_four_elements_at_a_time(code: dict[str, Compiled]) -> None:
    wanted = {f"cast {s} {d}": {("ld", 4 * SIZES[s]): 1, ("st", 4 * SIZES[d]): 1} for s, d in CASTS}
    wanted["split"] = {("ld", 16): 1, ("st", 8): 2}
    wanted["join"] = {("ld", 8): 2, ("st", 16): 1}
    wanted["square_sum"] = {("ld", 16): 8, ("ld", 8): 16}  # 8 rows ahead, of fp32, bf16 and fp16
    for name, accesses in wanted.items():
        assert vectors(kernel_of(code[name])) == accesses, name


def test_launches_forbid_fusion() -> None:
    """The launcher asks for the options that the code above was compiled with."""
    seen: list[dict[str, object]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> "Recorder":
            return self

        def __call__(self, *arguments: object, **options: object) -> None:
            seen.append(options)

    kernels._launch(Recorder(), 1, torch.device("cpu"), num_warps=8)
    assert seen == [{"num_warps": 8, "enable_fp_fusion": False}]
