"""Each family of instructions against Python integers and rationals, on random and extreme bit patterns."""

import itertools
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from . import Memory, Module
from .cases import CASES, Case, bits_of
from .exact import FORMATS, WIDTH, decode, encode

LANES = 512
BLOCK = 128


def register(kind: str) -> str:
    return f"b{bits_of(kind)}"


def entry(number: int, case: Case) -> str:
    """A kernel that applies an instruction to arrays of bit patterns, element by element."""
    kinds = [k.rstrip("!#") for k in case.operands]
    literal = dict(case.fixed)
    lines, names = [], []
    for i, kind in enumerate(kinds):
        if i in literal:
            names.append(str(literal[i]))
            continue
        size = bits_of(kind) // 8
        lines.append(f".reg .{register(kind)} %x{i};")
        lines.append(f"ld.param.u64 %at, [k{number}_{i}];")
        lines.append(f"mad.wide.u32 %at, %i, {size}, %at;")
        lines.append(f"ld.global.{register(kind)} %x{i}, [%at];")
        names.append(f"%x{i}")
        if kind == "pred":
            lines += [f".reg .pred %q{i};", f"and.b32 %x{i}, %x{i}, 1;", f"setp.ne.u32 %q{i}, %x{i}, 0;"]
            names[-1] = f"%q{i}"
    result = case.result
    if result == "pred":
        lines += [".reg .pred %p;", f"{case.opcode} %p, {', '.join(names)};", "selp.b32 %y, 1, 0, %p;"]
    else:
        lines.append(f"{case.opcode} %y, {', '.join(names)};")
    parameters = ", ".join(f".param .u64 k{number}_{i}" for i in [*range(len(kinds)), "y"])
    body = "\n    ".join(lines)
    return f"""
.visible .entry k{number}({parameters})
{{
    .reg .b32 %t<3>; .reg .b32 %i; .reg .b64 %at; .reg .{register(result)} %y;
    mov.u32 %t0, %ctaid.x; mov.u32 %t1, %ntid.x; mov.u32 %t2, %tid.x;
    mad.lo.s32 %i, %t0, %t1, %t2;
    {body}
    ld.param.u64 %at, [k{number}_y];
    mad.wide.u32 %at, %i, {bits_of(result) // 8}, %at;
    st.global.{register(result)} [%at], %y;
    ret;
}}"""


HEADER = ".version 8.6\n.target sm_90\n.address_size 64\n"
TEXT = HEADER + "".join(entry(number, case) for number, case in enumerate(CASES))


# Low bits that a narrower format drops when they are a tie: f32 to bf16 and f16; f64 to f32 and f16.
DROPPED = {"f32": (16, 13), "f64": (29, 42)}


def extremes(kind: str) -> list[int]:
    """Zeros, the largest and smallest numbers of either sign, infinities and a NaN."""
    bits = bits_of(kind)
    out = [0, 1, 2, (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1, (1 << bits - 1) + 1]
    if kind in FORMATS:
        fraction = FORMATS[kind][0] - 1
        infinity, sign = (1 << bits - 1) - (1 << fraction), 1 << bits - 1
        out += [
            infinity,
            infinity | sign,
            infinity - 1,
            (infinity - 1) | sign,
            1 << fraction,
            (1 << fraction) - 1,
        ]
    return out


def patterns(kind: str, rng: np.random.Generator) -> list[int]:
    """Random bit patterns, extreme ones, and for floats values of similar size and ties of a rounding."""
    bare = kind.rstrip("!#")
    bits = bits_of(bare)
    if kind.endswith("#"):  # amounts of shifts and positions in a word
        return [int(v) for v in rng.integers(0, 80, LANES)]
    values = [int(v) >> 64 - bits for v in rng.integers(0, 1 << 64, LANES, dtype=np.uint64)]
    if bare in FORMATS:
        near = rng.choice([0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 1e-3, 100.0], LANES // 2) * rng.choice([1, -1], LANES // 2)
        jitter = rng.integers(0, 64, LANES // 2)
        values[: LANES // 2] = [encode(float(v), bare) + int(j) for v, j in zip(near, jitter)]
        for lane in range(0, LANES, 4):
            for drop in DROPPED.get(bare, ())[lane // 4 % 2 :][:1]:
                values[lane] = values[lane] >> drop << drop | (1 << drop - 1) + int(rng.integers(-1, 2))
    special = extremes(bare)
    values[: len(special)] = special
    rng.shuffle(values)
    return [v or 1 for v in values] if kind.endswith("!") else values


def related(inputs: list[list[int]], case: Case, rng: np.random.Generator) -> None:
    """Make some pairs of operands equal, opposite or both extreme, and let some fma end near a tie."""
    kinds = [k.rstrip("!#") for k in case.operands]
    sign = 1 << bits_of(kinds[0]) - 1
    if len(kinds) > 1 and case.operands[0] == case.operands[1]:
        for lane in range(0, LANES, 8):
            inputs[1][lane] = inputs[0][lane] ^ (sign if kinds[0] in FORMATS and lane % 16 else 0)
        special = extremes(kinds[0])
        for lane, pair in enumerate(itertools.product(special, special)):
            inputs[0][2 * lane + 1], inputs[1][2 * lane + 1] = pair
    if case.opcode.startswith("fma"):
        for lane in range(2, LANES, 4):
            for operand, value in zip(inputs, near_tie(kinds[0], lane % 8 == 2, rng)):
                operand[lane] = encode(value, kinds[0]) ^ (sign if rng.integers(2) else 0)


def near_tie(kind: str, addend_is_longer: bool, rng: np.random.Generator) -> tuple[float, float, float]:
    """a, b, c with a * b + c so close to a tie that bits beyond those of float64 may decide."""
    precision = FORMATS[kind][0]
    place = 2.0 ** (1 - precision)
    if addend_is_longer:  # c in [1, 2); the product is half its last place, less a square of last places
        c = 1 + int(rng.integers(1 << precision - 1)) * place
        off = int(rng.integers(0, 1024 if kind == "f32" else 4)) * place
        return 1 + off, (1 - off) * place / 2, c
    size = precision // 2 + 1  # the product has one or two bits more than fit, and c is tiny
    a, b = (float(int(rng.integers(1 << size - 2, 1 << size - 1)) * 2 + 1) for _ in range(2))
    return a, b, float(rng.choice([1, -1, 0])) * place


@pytest.fixture(scope="module")
def module() -> Module:
    return Module.parse(TEXT)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{n}-{c.opcode}" for n, c in enumerate(CASES)])
def test_instruction(module: Module, number: int) -> None:
    case = CASES[number]
    seed = 1000 + number
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    inputs = [patterns(kind, rng) for kind in case.operands]
    related(inputs, case, rng)
    memory = Memory()
    arrays = [np.array(v, f"u{bits_of(k.rstrip('!#')) // 8}") for k, v in zip(case.operands, inputs)]
    for i, array in enumerate(arrays):
        memory.add(array, name=f"operand {i}")
    out = np.zeros(LANES, f"u{bits_of(case.result) // 8}")
    memory.add(out, writable=True, name="result")
    module.kernel(f"k{number}").launch(LANES // BLOCK, BLOCK, [*arrays, out], memory)
    width = bits_of(case.result) // 4
    for lane, operands in enumerate(zip(*inputs)):
        expected, got = case.meaning(*operands), int(out[lane])
        if case.result in WIDTH and case.opcode[:3] not in ("abs", "neg") and _both_nan(expected, got, case.result):
            continue
        shown = ", ".join(f"{v:#x}" for v in operands)
        assert got == expected, f"{case.opcode} {shown}: got {got:#0{width + 2}x}, expected {expected:#0{width + 2}x}"


def _both_nan(a: int, b: int, kind: str) -> bool:
    """PTX does not fix the payload of float64 NaN; the others must be canonical."""
    return kind == "f64" and math.isnan(decode(a, kind)) and math.isnan(decode(b, kind))


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="needs ptxas, of the CUDA toolkit")
def test_the_instructions_above_are_what_the_assembler_accepts(tmp_path: Path) -> None:
    path = tmp_path / "cases.ptx"
    path.write_text(TEXT)
    done = subprocess.run(
        ["ptxas", "-arch=sm_90", "-O0", str(path), "-o", str(tmp_path / "cases.cubin")],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
