"""What the interpreter must catch, and control flow and synchronization, on PTX written by hand."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from . import (
    InexactInstructionError,
    Memory,
    MemoryFaultError,
    Module,
    PtxError,
    RaceError,
    SynchronizationError,
    TrapError,
    UnknownInstructionError,
)

HEADER = ".version 8.6\n.target sm_80\n.address_size 64\n"
# Every kernel below: i is the thread, x and y are pointers, v = x[i], and the end stores v to y[i].
PROLOGUE = """
    .reg .b32 %i, %v, %r<8>; .reg .f32 %f<4>; .reg .f64 %d<4>; .reg .b64 %x, %y, %a<4>; .reg .pred %p<4>;
    .reg .b16 %h<4>;
    mov.u32 %i, %tid.x;
    ld.param.u64 %x, [k_x];
    ld.param.u64 %y, [k_y];
    mad.wide.u32 %x, %i, 4, %x;
    mad.wide.u32 %y, %i, 4, %y;
    ld.global.u32 %v, [%x];
"""
EPILOGUE = "\n    st.global.u32 [%y], %v;\n    ret;\n"


def kernel_text(body: str, before: str = "", prologue: str = PROLOGUE, epilogue: str = EPILOGUE) -> str:
    return f"{HEADER}{before}\n.visible .entry k(.param .u64 k_x, .param .u64 k_y)\n{{{prologue}{body}{epilogue}}}\n"


TEXTS: list[str] = []


def run(
    body: str,
    x: np.ndarray | None = None,
    *,
    threads: int = 64,
    before: str = "",
    strict: bool = True,
    shared_bytes: int = 0,
    epilogue: str = EPILOGUE,
    max_steps: int = 10_000,
) -> np.ndarray:
    """y after running the body on x (default 0, 1, 2, ...)."""
    text = kernel_text(body, before, epilogue=epilogue)
    x = np.arange(threads, dtype="u4") if x is None else x
    y = np.zeros(threads, "u4")
    memory = Memory()
    memory.add(x, name="x")
    memory.add(y, name="y", writable=True)
    kernel = Module.parse(text, strict=strict).kernel("k")
    kernel.program()
    TEXTS.append(text)
    kernel.launch(1, threads, [x, y], memory, shared_bytes=shared_bytes, max_steps=max_steps)
    return y


THREADS = np.arange(64, dtype="u4")


# Memory.


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.u32 %v, [%x+4];", r"PTX line 15: ld\.global\.u32 %v, \[%x\+4\], thread \(63, 0, 0\) .* no buffer"),
        ("ld.global.u32 %v, [%x+-4];", r"thread \(0, 0, 0\) of block \(0, 0, 0\): 4 bytes at 0x[0-9a-f]+ lie in no"),
        ("ld.global.u32 %v, [%x+2];", r"is not a multiple of 4 bytes"),
        ("ld.global.v2.u32 {%v, %r0}, [%x];", r"thread \(1, 0, 0\).*is not a multiple of 8 bytes"),
        ("st.global.u32 [%x], %v;", r"write to read-only memory: x \[0x"),
        ("st.global.u64 [%y], %x;", r"is not a multiple of 8 bytes"),
        ("setp.eq.u32 %p0, %i, 7; @%p0 ld.global.u32 %v, [%y+1024];", r"thread \(7, 0, 0\)"),
        ("mov.u64 %a0, 64; ld.global.u32 %v, [%a0];", r"4 bytes at 0x40 lie in no buffer"),
        ("ld.global.nc.u32 %v, [%y];", r"a non-coherent load reads y "),
        ("ld.const.u32 %v, [%x];", r"lies in \.global memory"),
        ("atom.global.add.u32 %v, [%x], 1;", r"write to read-only memory"),
        (
            ".shared .align 4 .b8 s[252]; mul.lo.u32 %r0, %i, 4; ld.shared.u32 %v, [%r0];",
            r"thread \(63.*252 bytes of shared",
        ),
        (
            ".local .align 4 .b8 l[8]; mul.wide.u32 %a0, %i, 4; ld.local.u32 %v, [%a0];",
            r"thread \(2,.*8 bytes of local",
        ),
    ],
)
def test_bad_accesses(body: str, message: str) -> None:
    with pytest.raises(MemoryFaultError, match=message):
        run(body)


def test_an_access_that_a_predicate_turns_off_is_no_access() -> None:
    y = run("setp.lt.u32 %p0, %i, 63; @%p0 ld.global.u32 %v, [%x+4]; @!%p0 mov.u32 %v, 99;")
    assert np.array_equal(y, [*range(1, 64), 99])


def test_parameters_are_read_within_bounds() -> None:
    with pytest.raises(UnknownInstructionError, match="a parameter of 8 bytes read at 4"):
        run("ld.param.u64 %a0, [k_x+4];")


def test_two_lanes_that_store_different_values_to_one_place() -> None:
    # Without the epilogue's store this is y[0] = v in all threads at once.
    with pytest.raises(RaceError, match="another lane stores a different value"):
        run("ld.param.u64 %y, [k_y];")
    assert run("ld.param.u64 %y, [k_y]; mov.u32 %v, 5;")[0] == 5


def test_generic_addresses_reach_all_spaces() -> None:
    body = """
    .shared .align 4 .b8 s[256]; .local .align 4 .b8 l[16];
    mul.wide.u32 %a0, %i, 4; mov.u64 %a1, s; cvta.shared.u64 %a1, %a1; add.u64 %a0, %a0, %a1;
    st.u32 [%a0], %v;
    mov.u64 %a2, l; cvta.local.u64 %a2, %a2; st.u32 [%a2+4], %v;
    and.b32 %r0, %i, 3; setp.eq.u32 %p0, %r0, 1; setp.eq.u32 %p1, %r0, 2;
    add.u64 %a2, %a2, 4; selp.b64 %a3, %a0, %x, %p0; selp.b64 %a3, %a2, %a3, %p1;
    ld.u32 %v, [%a3];"""
    assert np.array_equal(run(body, THREADS * 3), THREADS * 3)
    with pytest.raises(MemoryFaultError, match=r"ld\.u32 .*thread \(5, 0, 0\).*bytes of shared"):
        run(body.replace("ld.u32", "add.u64 %a0, %a0, 236; selp.b64 %a3, %a0, %a3, %p0; ld.u32"))


def test_registers_and_memory_start_with_garbage_not_zero() -> None:
    assert (run("mov.u32 %v, %r7;") == 0xA5A5A5A5).all()
    assert (run(".shared .align 4 .b8 s[4]; ld.shared.u32 %v, [s];") == 0xA5A5A5A5).all()


def test_buffers_placed_apart_catch_an_access_that_ends_in_a_neighbour() -> None:
    both = np.arange(128, dtype="u4")
    x, y = both[:64], both[64:]
    text = kernel_text("ld.global.u32 %v, [%x+4];")
    together, apart = Memory(), Memory(apart=True)
    for memory in (together, apart):
        memory.add(x, name="x")
        memory.add(y, name="y", writable=True)
    Module.parse(text).kernel("k").launch(1, 64, [x, y], together)
    assert np.array_equal(y, np.arange(1, 65))
    with pytest.raises(MemoryFaultError, match=r"thread \(63, 0, 0\).*lie in no buffer"):
        Module.parse(text).kernel("k").launch(1, 64, [x, y], apart)
    assert apart.address(y) - apart.address(x) > 2**32 and apart.address(y) % 256 == y.ctypes.data % 256


def test_memory_refuses_what_it_cannot_stand_for() -> None:
    memory, x = Memory(), np.zeros(8, "f4")
    memory.add(x[:4], name="left")
    memory.add(x[4:], name="right")
    with pytest.raises(ValueError, match=r"overlaps left \[0x"):
        memory.add(x, name="both")
    with pytest.raises(ValueError, match="'strided' is not contiguous"):
        memory.add(np.zeros(8)[::2], name="strided")
    with pytest.raises(ValueError, match="an address needs nbytes"):
        memory.add(4096)


# Instructions that are refused.


@pytest.mark.parametrize(
    "instruction",
    [
        "div.full.f32 %f0, %f1, %f2;",
        "div.approx.f32 %f0, %f1, %f2;",
        "sqrt.approx.f32 %f0, %f1;",
        "rsqrt.approx.f32 %f0, %f1;",
        "rcp.approx.ftz.f32 %f0, %f1;",
        "ex2.approx.f32 %f0, %f1;",
        "lg2.approx.f32 %f0, %f1;",
        "sin.approx.f32 %f0, %f1;",
        "tanh.approx.f32 %f0, %f1;",
        "add.rn.ftz.f32 %f0, %f1, %f2;",
        "max.ftz.f32 %f0, %f1, %f2;",
        "cvt.rn.ftz.f32.f64 %f0, %d0;",
        "setp.lt.ftz.f32 %p0, %f1, %f2;",
        "rsqrt.approx.f64 %d0, %d1;",
        "red.global.add.f32 [%y], %f0;",
        "atom.global.add.f64 %d0, [%y], %d1;",
        "add.f32 %f0, %f1, %f2;",
        "sub.f32 %f0, %f1, %f2;",
        "mul.f64 %d0, %d1, %d2;",
    ],
)
def test_inexact_instructions_are_refused_by_name(instruction: str) -> None:
    opcode = instruction.split()[0].replace(".", r"\.")
    # It stands behind the end: a kernel that holds one is refused, executed or not.
    with pytest.raises(InexactInstructionError, match=rf"PTX line 18: {opcode}.*: {opcode} "):
        run("", epilogue=EPILOGUE + instruction + "\n")
    kernel = Module.parse(kernel_text(instruction)).kernel("k")
    assert len(kernel.inexact()) == 1
    assert kernel.opcodes()[instruction.split()[0]] == 1


def test_operations_without_rounding_modifier_when_not_strict() -> None:
    x = np.full(64, 1.1, "f4")
    y = run("ld.global.f32 %f0, [%x]; mul.f32 %f0, %f0, %f0; mov.b32 %v, %f0;", x.view("u4"), strict=False)
    assert np.array_equal(y.view("f4"), x * x)


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("frobnicate.u32 %v, %v;", r"frobnicate\.u32 is not modelled"),
        ("add.sat.s32 %v, %v, %v;", r"add\.sat\.s32 is not modelled .*modifier \.sat"),
        ("add.rz.f32 %f0, %f0, %f0;", r"add\.rz\.f32 is not modelled .*modifier \.rz"),
        ("ld.global.b128 %v, [%x];", r"type \.b128"),
        ("ld.global.unheard.u32 %v, [%x];", r"modifier \.unheard"),
        ("mov.u32 %v, %clock;", r"%clock is no register"),
        ("mov.u32 %w, %v;", r"is not a register"),
        ("add.u32 %v, %v;", r"1 source operands, expected 2"),
        ("mov.u64 %a0, %v;", r"register %v read as uint64"),
        ("bar.arrive 1, 64;", r"bar\.arrive is not modelled"),
        ("call %a0, (%v);", r"indirect or predicated call"),
    ],
)
def test_unknown_instructions_are_named(instruction: str, message: str) -> None:
    with pytest.raises(UnknownInstructionError, match=r"PTX line 15: .*" + message):
        Module.parse(kernel_text(instruction)).kernel("k").program()


def test_text_that_is_not_ptx_is_named_with_its_line() -> None:
    with pytest.raises(UnknownInstructionError, match=r"PTX line 2: unknown directive 'hello'"):
        Module.parse(".version 8.0\nhello world;\n")
    with pytest.raises(UnknownInstructionError, match=r"PTX line 15: .*cannot read"):
        Module.parse(kernel_text("mov.u32 %v, ?;"))
    with pytest.raises(PtxError, match="no label nowhere"):
        run("bra nowhere;")


def test_launches_that_do_not_fit_the_kernel() -> None:
    kernel = Module.parse(kernel_text("")).kernel("k")
    with pytest.raises(PtxError, match="kernel k takes 2 arguments, got 1"):
        kernel.launch(1, 1, [0], Memory())
    with pytest.raises(PtxError, match="does not fit"):
        kernel.launch(1, 1, [1 << 64, 0], Memory())
    with pytest.raises(PtxError, match=r"block \(5, 0, 0\) is outside the grid"):
        kernel.launch(1, 1, [0, 0], Memory(), blocks=[5])
    fixed = Module.parse(kernel_text("").replace(")\n{", ")\n.reqntid 128\n{")).kernel("k")
    with pytest.raises(PtxError, match=r"requires blocks of \(128, 1, 1\) threads, got \(64, 1, 1\)"):
        fixed.launch(1, 64, [0, 0], Memory())
    with pytest.raises(KeyError, match="the module has k"):
        Module.parse(kernel_text("")).kernel("other")


# Control flow.


def test_jump_table() -> None:
    body = """
    and.b32 %r0, %i, 3;
    table: .branchtargets zero, one, two, one;
    brx.idx %r0, table;
zero: mov.u32 %v, 100; bra end;
one: add.u32 %v, %v, 1000; bra end;
two: mov.u32 %v, 300;
end:"""
    wanted = np.choose(THREADS & 3, [np.full(64, 100), THREADS + 1000, np.full(64, 300), THREADS + 1000])
    assert np.array_equal(run(body), wanted)
    with pytest.raises(PtxError, match=r"brx\.idx.*thread \(4, 0, 0\).*outside its 4 targets"):
        run(body.replace("and.b32 %r0, %i, 3", "and.b32 %r0, %i, 7"))


def test_inner_scopes_have_registers_of_their_own() -> None:
    assert np.array_equal(run("{ .reg .b32 %v; mov.u32 %v, 7; add.u32 %r1, %v, 1; } add.u32 %v, %v, %r1;"), THREADS + 8)


def test_calls_are_expanded_with_their_own_labels_and_early_returns() -> None:
    function = """.func (.param .b32 out) halve(.param .b32 in)
    {
    .reg .b32 %a; .reg .pred %p;
    ld.param.b32 %a, [in]; and.b32 %a, %a, 1; setp.eq.u32 %p, %a, 0; ld.param.b32 %a, [in];
    @%p bra even; st.param.b32 [out], %a; ret;
even: shr.u32 %a, %a, 1; st.param.b32 [out], %a; ret;
    }"""
    call = "{ .param .b32 q; st.param.b32 [q], %v; .param .b32 r; call.uni (r), halve, (q); ld.param.b32 %v, [r]; }\n"
    wanted = np.where(THREADS % 2, THREADS, THREADS // 2)
    wanted = np.where(wanted % 2, wanted, wanted // 2)
    assert np.array_equal(run(call * 2, before=function), wanted)


def test_a_call_of_an_external_function_is_a_trap() -> None:
    fail = ".extern .func give_up(.param .b32 code);"
    body = "setp.eq.u32 %p0, %i, 9; @!%p0 bra go; { .param .b32 q; st.param.b32 [q], %v; call.uni give_up, (q); } go:"
    with pytest.raises(TrapError, match=r"thread \(9, 0, 0\).*external function give_up"):
        run(body, before=fail)
    with pytest.raises(TrapError, match=r"@%p0 trap, thread \(3, 0, 0\).*executes trap"):
        run("setp.eq.u32 %p0, %i, 3; @%p0 trap;")


def test_a_loop_without_end_is_ended() -> None:
    with pytest.raises(SynchronizationError, match="has not ended after 10001 instructions"):
        run("again: bra again;")


def test_integer_division_by_zero_counts_only_where_it_happens() -> None:
    with pytest.raises(PtxError, match=r"thread \(0, 0, 0\).*division by zero"):
        run("div.u32 %v, 64, %i;")
    y = run("setp.ne.u32 %p0, %i, 0; @%p0 div.u32 %v, 640, %i;")
    assert np.array_equal(y[1:], 640 // THREADS[1:])


def test_only_some_blocks_of_a_grid() -> None:
    body = "mov.u32 %r0, %ctaid.x; mad.wide.u32 %y, %r0, 256, %y; mov.u32 %v, %r0;"
    x, y = THREADS.copy(), np.zeros((5, 64), "u4")
    memory = Memory()
    memory.add(x)
    memory.add(y, writable=True)
    Module.parse(kernel_text(body)).kernel("k").launch(5, 64, [x, y], memory, blocks=[3, (1, 0, 0)])
    assert np.array_equal(y, np.arange(5)[:, None] * np.isin(np.arange(5), [1, 3])[:, None] * np.ones(64))


def test_blocks_and_grids_of_three_dimensions() -> None:
    body = """
    mov.u32 %r0, %tid.y; mov.u32 %r1, %tid.z; mov.u32 %r2, %ctaid.z; mov.u32 %r3, %nctaid.y; mov.u32 %r4, %ntid.z;
    mad.lo.u32 %v, %r0, 10, %i; mad.lo.u32 %v, %r1, 100, %v; mad.lo.u32 %v, %r2, 1000, %v;
    mad.lo.u32 %v, %r3, 10000, %v; mad.lo.u32 %v, %r4, 100000, %v;
    ld.param.u64 %y, [k_y]; mad.lo.u32 %r5, %r1, 2, %r0; mad.lo.u32 %r5, %r5, 4, %i; mad.wide.u32 %y, %r5, 4, %y;"""
    x, y = THREADS.copy(), np.zeros((3, 2, 4), "u4")
    memory = Memory()
    memory.add(x)
    memory.add(y, writable=True)
    kernel = Module.parse(kernel_text(body)).kernel("k")
    kernel.launch((1, 6, 9), (4, 2, 3), [x, y], memory, blocks=[(0, 5, 8)])
    z, row, column = np.indices(y.shape)
    assert np.array_equal(y, 300000 + 60000 + 8000 + 100 * z + 10 * row + column)


# Synchronization.


def test_barriers_that_not_all_threads_reach() -> None:
    with pytest.raises(SynchronizationError, match=r"only a part of warp 0 reaches the barrier: thread \(0, 0, 0\)"):
        run("setp.eq.u32 %p0, %i, 0; @%p0 bra past; bar.sync 0; past:")
    with pytest.raises(SynchronizationError, match=r"of 64 live threads, 32 at barrier 0 .*32 at barrier 1"):
        run("setp.lt.u32 %p0, %i, 32; @%p0 bra other; bar.sync 0; bra past; other: bar.sync 1; past:")
    # Warps that have ended are not waited for, and different places of one barrier are one barrier.
    run("setp.lt.u32 %p0, %i, 32; @%p0 ret; bar.sync 0;")
    run("setp.lt.u32 %p0, %i, 32; @%p0 bra other; bar.sync 0; bra past; other: bar.sync 0; past:")
    run("setp.lt.u32 %p0, %i, 32; @%p0 bar.sync 1, 32;")


@pytest.mark.parametrize(("barrier", "races"), [("bar.sync 0;", False), ("bar.warp.sync -1;", True), ("", True)])
def test_shared_memory_between_warps_needs_a_barrier(barrier: str, races: bool) -> None:
    body = f""".shared .align 4 .b8 s[256];
    mul.lo.u32 %r0, %i, 4; st.shared.u32 [%r0], %v; {barrier}
    xor.b32 %r0, %r0, 128; ld.shared.u32 %v, [%r0];"""
    if races:
        with pytest.raises(
            RaceError, match=r"thread \(0, 0, 0\).*reads what (thread 32|another thread of warp 1) wrote"
        ):
            run(body)
    else:
        assert np.array_equal(run(body), THREADS ^ 32)


def test_shared_memory_within_a_warp_needs_a_warp_barrier() -> None:
    body = """.shared .align 4 .b8 s[256];
    mul.lo.u32 %r0, %i, 4; st.shared.u32 [%r0], %v; BARRIER
    xor.b32 %r0, %r0, 4; ld.shared.u32 %v, [%r0];"""
    assert np.array_equal(run(body.replace("BARRIER", "bar.warp.sync 0xffffffff;")), THREADS ^ 1)
    with pytest.raises(RaceError, match="reads what thread 1 wrote"):
        run(body.replace("BARRIER", ""))


def test_overwriting_what_others_may_still_read_is_a_race() -> None:
    body = """.shared .align 4 .b8 s[4];
    st.shared.u32 [s], 5; bar.sync 0; ld.shared.u32 %v, [s]; BARRIER st.shared.u32 [s], 6;"""
    assert (run(body.replace("BARRIER", "bar.sync 0;")) == 5).all()
    with pytest.raises(RaceError, match="overwrites what another thread read"):
        run(body.replace("BARRIER", ""))


def test_warp_operations_check_who_takes_part() -> None:
    shuffle = "shfl.sync.bfly.b32 %v, %v, 1, 31, MASK;"
    assert np.array_equal(run(shuffle.replace("MASK", "-1")), THREADS ^ 1)
    half = "setp.lt.u32 %p0, %i, 16; @%p0 " + shuffle
    y = run(half.replace("MASK", "0xffff"))
    assert np.array_equal(y, np.where(THREADS < 16, THREADS ^ 1, THREADS))
    with pytest.raises(SynchronizationError, match=r"thread \(16, 0, 0\).* does not take part"):
        run(half.replace("MASK", "-1"))
    with pytest.raises(SynchronizationError, match=r"thread \(8, 0, 0\).*is not in the member mask"):
        run(half.replace("MASK", "0xff"))
    with pytest.raises(SynchronizationError, match="reads from a thread that does not take part"):
        run("setp.lt.u32 %p0, %i, 16; @%p0 shfl.sync.idx.b32 %v, %v, 20, 31, 0xffff;")


def test_votes_and_reductions_of_a_warp() -> None:
    x = np.where(THREADS < 32, 0, THREADS).astype("u4")
    body = "setp.gt.u32 %p0, %v, 40; vote.sync.MODE.pred %p1, %p0, -1; selp.u32 %v, 1, 0, %p1;"
    for mode, wanted in (("any", (0, 1)), ("all", (0, 0)), ("uni", (1, 0))):
        assert np.array_equal(run(body.replace("MODE", mode), x), np.repeat(wanted, 32))
    x = np.random.default_rng(1).integers(0, 2**32, 64, dtype=np.uint32)
    rows = x.reshape(2, 32)
    for op, kind, wanted in (
        ("add", "u32", rows.sum(1, dtype="u4")),
        ("min", "s32", rows.view("i4").min(1).view("u4")),
        ("max", "u32", rows.max(1)),
        ("and", "b32", np.bitwise_and.reduce(rows, 1)),
        ("or", "b32", np.bitwise_or.reduce(rows, 1)),
        ("xor", "b32", np.bitwise_xor.reduce(rows, 1)),
    ):
        assert np.array_equal(run(f"redux.sync.{op}.{kind} %v, %v, -1;", x), np.repeat(wanted, 32)), op
    y = run("setp.ge.u32 %p0, %i, 40; @%p0 bra on; activemask.b32 %v; on:")
    assert np.array_equal(y[:40], np.repeat([0xFFFFFFFF, 0xFF], [32, 8]))


@pytest.mark.parametrize(("reduction", "wanted"), [("or.pred", 1), ("and.pred", 0), ("popc.u32", 10)])
def test_barriers_that_combine(reduction: str, wanted: int) -> None:
    target = "%v" if reduction.endswith("u32") else "%p1"
    body = f"setp.ge.u32 %p0, %i, 54; bar.red.{reduction} {target}, 0, %p0;"
    if target == "%p1":
        body += "selp.u32 %v, 1, 0, %p1;"
    assert (run(body) == wanted).all()


def test_atomics_go_thread_by_thread() -> None:
    x = np.random.default_rng(2).integers(0, 1000, 64, dtype=np.uint32)
    body = ".shared .align 4 .b8 s[4]; st.shared.u32 [s], 7; bar.sync 0; atom.shared.OP [s], OPERANDS;"
    before = np.concatenate([[7], 7 + np.cumsum(x)[:-1]])
    assert np.array_equal(run(body.replace("OP ", "add.u32 %v, ").replace("OPERANDS", "%v"), x), before)
    before = np.maximum.accumulate([7, *x[:-1]])
    assert np.array_equal(run(body.replace("OP ", "max.u32 %v, ").replace("OPERANDS", "%v"), x), before)
    y = run(body.replace("OP ", "cas.b32 %v, ").replace("OPERANDS", "7, %i"))
    assert np.array_equal(y, [7, *[0] * 63])


def test_predicate_pairs_and_packing() -> None:
    y = run("setp.lt.u32 %p0|%p1, %i, 10; selp.u32 %r0, 1, 2, %p1; mov.b32 {%h0, %h1}, %v; mov.b32 %v, {%h1, %h0}; "
            "mov.b32 {_, %h2}, %v; cvt.u32.u16 %r1, %h2; add.u32 %v, %r0, %r1;")  # fmt: skip
    assert np.array_equal(y, np.where(THREADS < 10, 2, 1) + THREADS)


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="needs ptxas, of the CUDA toolkit")
def test_the_texts_above_are_what_the_assembler_accepts(tmp_path: Path) -> None:
    """Runs last: the kernels that ran here are valid PTX."""
    if not TEXTS:
        pytest.skip("runs after the tests above, which collect the texts")
    joined = tmp_path / "all.ptx"
    bodies = [t.replace(HEADER, "") for t in TEXTS if ".func" not in t]
    renamed = [b.replace("entry k(", f"entry k{n}(").replace("k_", f"k{n}_") for n, b in enumerate(bodies)]
    joined.write_text(HEADER + "".join(renamed))
    command = ["ptxas", "-arch=sm_80", "-O0", str(joined), "-o", str(tmp_path / "all.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
