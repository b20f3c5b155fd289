"""What the kernels over peers' memory consist of when compiled for sm_80, sm_90 and sm_100, which needs no GPU."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import pytest
from ptx import Kernel, Module
from symm_compile import adam_request, compile_all, norm_request, reduce_request, signal_requests
from triton_compile import Compiled

from pyshard.kernels.formats import Format, param_dtype, unpack_kind

pytest.importorskip("triton", reason="needs Triton, which compiles without a GPU")

ARCHS = (80, 90, 100)
# name: kinds (as in test_triton_compiled.py), ranks, with signals
STEPS = {
    "step of 2": ((4, 9, 18, 28, 42), 2, True),
    "split step of 8": ((8,), 8, True),
    "fp32 step of 8": ((4,), 8, True),
    "step of 3, apart": ((4, 9, 18, 28, 42), 3, False),
}
REDUCTIONS = {"fp32 of 2": ("fp32", 2, False), "bf16 of 8, added": ("bf16", 8, True), "fp16 of 3": ("fp16", 3, False)}
SIGNALS = ("signal", "wait", "barrier", "abort")


@pytest.fixture(scope="module", params=ARCHS, ids=lambda arch: f"sm_{arch}")
def code(request: pytest.FixtureRequest) -> dict[str, Compiled]:
    arch = request.param
    steps = {n: adam_request(kinds, arch, world, fused=fused) for n, (kinds, world, fused) in STEPS.items()}
    sums = {n: reduce_request(dtype, arch, world, added) for n, (dtype, world, added) in REDUCTIONS.items()}
    norms = {f"norm of {world}": norm_request(arch, world) for world in (2, 8)}
    return compile_all(steps | sums | norms | signal_requests(arch, "i32"))


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


def step_vectors(kinds: Iterable[int], world: int) -> Counter[tuple[str, int]]:
    """One access to 4 elements of each array of each kind, of the gradient and the written parameter one per rank."""
    wanted: Counter[tuple[str, int]] = Counter()
    for kind in kinds:
        fmt, grad_dtype, _, amsgrad = unpack_kind(kind)
        low = {Format.BF16_SPLIT: [8], Format.BF16_MASTER: [16], Format.FP16_MASTER: [16]}.get(fmt, [])
        param = 4 * param_dtype(fmt).itemsize
        for size in [param, *low, 16, 16, *[16] * amsgrad]:
            wanted["ld", size] += 1
            wanted["st", size] += 1
        wanted["ld", 4 * grad_dtype.itemsize] += world
        wanted["st", param] += world - 1
    return wanted


def sequence(kernel: Kernel) -> list[tuple[str, frozenset[str]]]:
    """Each instruction in the order of the text: its name and its modifiers."""
    parts = (ins.opcode.split(".") for ins in kernel.instructions())
    return [(base, frozenset(rest)) for base, *rest in parts]


def ordered(kernel: Kernel, *modifiers: str) -> list[int]:
    """Positions of the accesses to global memory that have all these modifiers."""
    return [
        i
        for i, (base, found) in enumerate(sequence(kernel))
        if base in ("ld", "st", "atom", "red") and found.issuperset(modifiers)
    ]


def stored_since_barrier(kernel: Kernel, position: int) -> Sequence[str]:
    """Plain stores to global memory between an instruction and the barrier before it in the text."""
    found = []
    for base, modifiers in reversed(sequence(kernel)[:position]):
        if base in ("bar", "barrier"):
            return found
        if base == "st" and "global" in modifiers:
            found.append(base)
    raise AssertionError("no barrier before it")


def test_every_operation_is_exact_and_rounded_on_its_own(code: dict[str, Compiled]) -> None:
    for name, made in code.items():
        kernel = kernel_of(made)
        assert kernel.inexact() == [] and not made.fused, name
        fused = {op for op in kernel.opcodes() if op.startswith(("fma", "mad")) and ".f" in op}
        assert fused <= ({"fma.rn.f64"} if name.startswith("norm") else set()), name  # of squares, which are exact
        for opcode in kernel.opcodes():
            assert not re.search(r"approx|full|ftz", opcode), f"{name}: {opcode}"
            if re.fullmatch(r"(add|sub|mul|div|sqrt|fma)\.(\w+\.)*f(32|64)", opcode):
                assert ".rn." in opcode, f"{name}: {opcode}"


def test_nothing_is_spilled(code: dict[str, Compiled]) -> None:
    for name, made in code.items():
        assert made.cubin_bytes > 0
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in made.ptxas, f"{name}: {made.ptxas}"
        spaces = {space for _, space, _ in kernel_of(made).accesses()}
        # Shared memory brings what one thread has read from a flag to all.
        assert spaces <= {"global", "param", "shared"} and made.shared_bytes <= 8, name
        waits = name in SIGNALS or STEPS.get(name, (0, 0, False))[2]
        assert waits or (made.shared_bytes == 0 and not any(b == "bar" for b, _ in sequence(kernel_of(made)))), name


def test_enough_threads_fit_on_a_multiprocessor(code: dict[str, Compiled]) -> None:
    """As for the step of one rank (test_triton_compiled.py), also with the gradients of 8 ranks under way."""
    for name, made in code.items():
        registers = re.search(r"Used (\d+) registers", made.ptxas)
        assert registers and int(registers[1]) <= (80 if made.threads == 256 else 128), f"{name}: {made.ptxas}"


@pytest.mark.parametrize("name", STEPS)
def test_a_step_reads_and_writes_four_elements_at_a_time(code: dict[str, Compiled], name: str) -> None:
    kinds, world, _ = STEPS[name]
    assert vectors(kernel_of(code[name])) == step_vectors(kinds, world)


def test_sums_read_four_elements_at_a_time(code: dict[str, Compiled]) -> None:
    assert vectors(kernel_of(code["fp32 of 2"])) == {("ld", 16): 2, ("st", 16): 1}
    assert vectors(kernel_of(code["bf16 of 8, added"])) == {("ld", 8): 8, ("ld", 16): 1, ("st", 16): 1}
    assert vectors(kernel_of(code["fp16 of 3"])) == {("ld", 8): 3, ("st", 16): 1}
    for world in (2, 8):  # 8 loads ahead of each of three dtypes
        assert vectors(kernel_of(code[f"norm of {world}"])) == {("ld", 16): 8, ("ld", 8): 16}


def test_peers_are_read_coherently(code: dict[str, Compiled]) -> None:
    for name, made in code.items():
        assert not ordered(kernel_of(made), "nc"), name


@pytest.mark.parametrize(
    ("name", "flags"), [("signal", 1), ("barrier", 1), ("abort", 1), ("step of 2", 2), ("split step of 8", 2)]
)
def test_flags_are_raised_by_a_release_behind_a_barrier(code: dict[str, Compiled], name: str, flags: int) -> None:
    kernel = kernel_of(code[name])
    releases = ordered(kernel, "release", "sys")
    assert len(releases) == flags and all(sequence(kernel)[i][0] == "atom" for i in releases)
    for position in releases:
        assert not stored_since_barrier(kernel, position), name


@pytest.mark.parametrize("name", ["wait", "barrier", "step of 2", "split step of 8"])
def test_waiting_is_an_acquire_of_the_system(code: dict[str, Compiled], name: str) -> None:
    kernel = kernel_of(code[name])
    # The flag, once before and once in the loop, and the word for failures.
    assert len(ordered(kernel, "acquire", "sys")) == 3
    assert "%globaltimer" in code[name].ptx


@pytest.mark.parametrize("name", ["step of 2", "split step of 8", "fp32 step of 8"])
def test_the_last_program_has_seen_what_all_have_stored(code: dict[str, Compiled], name: str) -> None:
    kernel = kernel_of(code[name])
    (counted,) = ordered(kernel, "acq_rel", "sys", "add")
    assert not stored_since_barrier(kernel, counted)
    # Nothing is stored to parameters or state after it was counted: what follows are words of the launch's own.
    later = [m for base, m in sequence(kernel)[counted:] if base == "st" and "global" in m]
    assert len(later) == 3 and all("b64" in m for m in later)
    # The verdict of the program that waits reaches the others.
    assert ordered(kernel, "release", "gpu") and ordered(kernel, "acquire", "gpu")


def test_a_step_without_signals_waits_for_nothing(code: dict[str, Compiled]) -> None:
    found = sequence(kernel_of(code["step of 3, apart"]))
    assert not any(base in ("atom", "red", "bar") or m & {"acquire", "release"} for base, m in found)
