"""Small Triton kernels for the tests of the interpreter."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def split_adam(
    rows,  # [n_rows, 8] int64: addresses of param (bf16), low (int16), grad (bf16), m, v (fp32); 0; n; kind
    first_block,  # [n_rows] int64: the first block of each row, ascending
    n_rows,
    step_size,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # all rows are multiples of BLOCK: no mask, 16-byte accesses
):
    block = tl.program_id(0).to(tl.int64)
    low_row = tl.zeros((), tl.int64)
    high_row = n_rows.to(tl.int64)
    while low_row < high_row:  # the first row that starts after this block
        middle = (low_row + high_row) // 2
        if tl.load(first_block + middle) <= block:
            low_row = middle + 1
        else:
            high_row = middle
    row = rows + (low_row - 1) * 8
    p_ptr = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.bfloat16)), 16)
    low_ptr = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.int16)), 16)
    g_ptr = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.bfloat16)), 16)
    m_ptr = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.float32)), 16)
    v_ptr = tl.multiple_of(tl.load(row + 4).to(tl.pointer_type(tl.float32)), 16)
    n = tl.load(row + 6)
    kind = tl.load(row + 7).to(tl.int32)
    at = (block - tl.load(first_block + low_row - 1)) * BLOCK + tl.arange(0, BLOCK)
    mask = (at >= 0) if WHOLE else (at < n)
    high = tl.load(p_ptr + at, mask=mask, other=0).to(tl.int16, bitcast=True).to(tl.int32) << 16
    p = (high + tl.load(low_ptr + at, mask=mask, other=0).to(tl.int32)).to(tl.float32, bitcast=True)
    g = tl.load(g_ptr + at, mask=mask, other=0).to(tl.float32)
    m = tl.load(m_ptr + at, mask=mask, other=0)
    v = tl.load(v_ptr + at, mask=mask, other=0)
    m = m + 0.1 * (g - m)
    v = 0.999 * v + 0.001 * (g * g)
    p = p - step_size * tl.div_rn(m, tl.sqrt_rn(v) + 1e-8)
    tl.store(m_ptr + at, m, mask=mask)
    tl.store(v_ptr + at, v, mask=mask)
    if kind == 1:
        bits = p.to(tl.uint32, bitcast=True)
        tl.store(low_ptr + at, bits.to(tl.int16), mask=mask)
        tl.store(p_ptr + at, ((bits + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(p_ptr + at, p.to(tl.bfloat16), mask=mask)


@triton.jit
def _halve(x, SIZE: tl.constexpr):
    left, right = tl.split(tl.permute(tl.reshape(x, (2, SIZE // 2)), (1, 0)))
    return left + right


@triton.jit
def square_sum(x, out, flag, n):
    """A sum of squares in double per 4096 elements: 128 lanes, then a halving tree. flag: not all are finite."""
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 128)
    acc = tl.zeros((128,), tl.float64)
    bad = tl.zeros((128,), tl.int32)
    for i in range(32):
        at = block * 4096 + i * 128 + lane
        value = tl.load(x + at, mask=at < n, other=0.0)
        bad = bad | ((value.to(tl.uint32, bitcast=True) & 0x7F800000) == 0x7F800000).to(tl.int32)
        wide = value.to(tl.float64)
        acc += wide * wide
    acc = _halve(_halve(_halve(_halve(_halve(_halve(acc, 128), 64), 32), 16), 8), 4)
    left, right = tl.split(acc)
    tl.store(out + block, left + right)
    if tl.max(bad, 0) != 0:
        tl.atomic_max(flag, 1)


@triton.jit
def row_sum(x, out, SIZE: tl.constexpr):
    """Integer sums along rows: a reduction by shuffles and shared memory."""
    row = tl.program_id(0)
    tl.store(out + row, tl.sum(tl.load(x + row * SIZE + tl.arange(0, SIZE)), 0))


@triton.jit
def halves(x, out16, out_bf16, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = tl.load(x + at)
    tl.store(out16 + at, value.to(tl.float16))
    tl.store(out_bf16 + at, value.to(tl.bfloat16))


@triton.jit
def quotients(a, b, out, SIZE: tl.constexpr):
    """The plain division of Triton, which is not exact."""
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(a + at) / tl.load(b + at))
