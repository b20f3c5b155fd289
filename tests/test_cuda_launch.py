"""Launches of the CUDA kernels: what they say without a GPU, and their bits where there is one."""

import numpy as np
import pytest
import torch
from cuda_tables import (
    ADAM_BLOCK,
    ARRAYS,
    CASTS,
    HYPERS,
    NORM_BLOCK,
    Table,
    control_of,
    floats,
    mixed_rows,
    same,
    values_of,
)
from reference import assert_same_bits

from pyshard import _C
from pyshard.kernels import cuda
from pyshard.kernels.formats import VALID_KINDS

SCALE = 0.37

needs_cuda_build = pytest.mark.skipif(not _C.cuda_built(), reason="this build has no CUDA part (no nvcc)")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which refuses nothing")

# With addresses that no kernel must ever see.
LAUNCHES = {
    "adam": (8, 8, 1, 1, 8, 8),
    "square_sum": (8, 8, 1, 8, 1),
    "sum": (8, 1, 8),
    "prepare": (8, 8, 8, 8, 1),
    "cast": (8, 0, 8, 1, 1),
    "split": (8, 8, 8, 1),
    "join": (8, 8, 8, 1),
}


@needs_cuda_build
@needs_no_gpu
@pytest.mark.parametrize("kernel", LAUNCHES)
def test_a_launch_without_a_driver_says_so(kernel: str) -> None:
    expected = (
        rf"^pyshard: cannot launch pyshard_{kernel}: there is no NVIDIA driver, or one too old for "
        r"CUDA \d+\.\d+ \(cudaErrorInsufficientDriver: .+\)\. Install or update the driver, or use CPU tensors\.$"
        rf"|^pyshard: cannot launch pyshard_{kernel}: no CUDA device is visible \(cudaErrorNoDevice: .+\)\. "
        r"Check nvidia-smi and CUDA_VISIBLE_DEVICES, or use CPU tensors\.$"
    )
    with pytest.raises(RuntimeError, match=expected):
        getattr(_C, f"cuda_{kernel}")(*LAUNCHES[kernel], 0, 0)


@needs_cuda_build
def test_a_launch_of_nothing_needs_no_device() -> None:
    _C.cuda_adam(8, 8, 0, 0, 8, 8, 0, 0)
    _C.cuda_cast(8, 0, 8, 1, 0, 0, 0)


@needs_cuda_build
def test_a_grid_has_at_most_31_bits_of_blocks() -> None:
    expected = r"pyshard_adam: got 2147483648 blocks, expected at most 2147483647\. Shard the tensors"
    with pytest.raises(ValueError, match=expected):
        _C.cuda_adam(8, 8, 1, 2**31, 8, 8, 0, 0)


@needs_no_gpu
def test_unavailable_says_why() -> None:
    reason = cuda.unavailable("cuda")
    assert reason is not None
    expected = "no CUDA part" if not _C.cuda_built() else "driver|no CUDA device|built without CUDA"
    assert any(part in reason for part in expected.split("|")), reason


# ---- on a GPU ----


@pytest.mark.gpu
def test_gpu_step_has_the_bits_of_the_cpu(rng: np.random.Generator) -> None:
    """Norm, scalars and update of rows of every kind, aligned or not, with tails."""
    rows = mixed_rows(rng, VALID_KINDS, 300, 5000)
    table = Table.random(rows, rng)
    packed, on_device = table.packed(), []
    for i, (row, arrays) in enumerate(zip(rows, table.arrays)):
        moved = {}
        for name, array in arrays.items():
            whole = torch.empty(row.n + row.offset, dtype=array.tensor.dtype, device="cuda")
            moved[name] = whole[row.offset :]
            moved[name].copy_(array.tensor)
            packed[i, ARRAYS.index(name)] = moved[name].data_ptr()
        on_device.append(moved)
    packed = packed.cuda()
    blocks, norm_blocks = table.first_block(ADAM_BLOCK), table.first_block(NORM_BLOCK)
    partials = torch.empty(int(norm_blocks[-1]), dtype=torch.float64, device="cuda")
    total = torch.empty(1, dtype=torch.float64, device="cuda")
    cuda.square_sum(packed, norm_blocks.cuda(), partials)
    cuda.sum(partials, total)
    assert same(total.item(), _C.cpu_square_sum(table.grads(), 1))
    control = control_of(grad_scale=SCALE).cuda()
    scalars = torch.empty(len(HYPERS), 9, device="cuda")
    cuda.prepare(torch.tensor(HYPERS, dtype=torch.float64, device="cuda"), None, control, scalars)
    cuda.adam(packed, blocks.cuda(), int(blocks[-1]), scalars, control)
    table.cpu_adam(HYPERS, SCALE)
    for i, arrays in enumerate(table.arrays):
        for name, array in arrays.items():
            assert_same_bits(on_device[i][name].cpu(), array.tensor, f"row {i} {name}")


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2047, 2048, 2049, 100_003])
def test_gpu_conversions_have_the_bits_of_the_cpu(n: int, rng: np.random.Generator) -> None:
    host = cuda.HostRun()
    for src_dtype, dst_dtype in CASTS:
        src = values_of(rng, n, src_dtype)
        want, got = torch.empty(n, dtype=dst_dtype), torch.empty(n, dtype=dst_dtype, device="cuda")
        host.cast(src, want)
        cuda.cast(src.cuda(), got)
        assert_same_bits(got.cpu(), want)
    master = floats(rng, n)
    halves = (torch.bfloat16, torch.int16)
    want_high, want_low = (torch.empty(n, dtype=dtype) for dtype in halves)
    got_high, got_low = (torch.empty(n, dtype=dtype, device="cuda") for dtype in halves)
    host.split(master, want_high, want_low)
    cuda.split(master.cuda(), got_high, got_low)
    assert_same_bits(got_high.cpu(), want_high)
    assert_same_bits(got_low.cpu(), want_low)
    joined = torch.empty(n, device="cuda")
    cuda.join(got_high, got_low, joined)
    assert_same_bits(joined.cpu(), master)
