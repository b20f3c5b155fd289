"""The symm_mem transport on GPUs: values, faults, and torch's interface to symmetric memory."""

import inspect

import numpy as np
import pytest
import ranks
import symm_faults
import symm_ranks
import torch
from cuda_tables import HYPERS, Row

from pyshard.comm import symm_mem
from pyshard.kernels.formats import VALID_KINDS

GPUS = torch.cuda.device_count()
needs_peers = pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs with access to each other's memory, has {GPUS}")
gpu = pytest.mark.gpu


def rows_of(kinds: tuple[int, ...], rng: np.random.Generator, offset: int) -> list[Row]:
    sizes = rng.integers(1, 300_000, len(kinds))
    return [Row(k, int(n), offset and 1 + i % 3, i % len(HYPERS)) for i, (k, n) in enumerate(zip(kinds, sizes))]


@gpu
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("world", [1, pytest.param(min(GPUS, 4), marks=needs_peers)])
def test_steps(world: int, fused: bool, offset: int, rng: np.random.Generator, seed: int) -> None:
    ranks.run(symm_ranks.steps, world, rows_of(VALID_KINDS[::7], rng, offset), seed, 6, fused, "cuda", seconds=280)


@gpu
@needs_peers
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
def test_a_rank_that_never_comes(fused: bool, seed: int) -> None:
    ranks.run(symm_faults.silent, min(GPUS, 4), seed, fused, "cuda", seconds=280)


def test_torch_takes_what_is_asked_of_its_symmetric_memory() -> None:
    """The names and arguments that are used, which no CPU test calls: the binding tells its signatures."""
    from torch._C._distributed_c10d import _SymmetricMemory as torch_memory

    empty, rendezvous, buffer = (
        inspect.getdoc(f) or ""
        for f in (torch_memory.empty_strided_p2p, torch_memory.rendezvous, torch_memory.get_buffer)
    )
    order = [empty.index(name) for name in ("size:", "stride:", "dtype:", "device:", "group_name:")]
    assert order == sorted(order) and "group_name: str | None = None" in empty
    assert rendezvous.index("tensor:") < rendezvous.index("group_name:")
    order = [buffer.index(name) for name in ("rank:", "sizes:", "dtype:", "storage_offset:")]
    assert order == sorted(order) and "= 0)" in buffer


@pytest.mark.skipif(torch.version.cuda is not None, reason="about a torch without CUDA")
def test_without_cuda_the_reason_says_so() -> None:
    reason = symm_mem._unavailable(torch.device("cuda"))
    assert reason is not None and ("CUDA" in reason or "TRITON_INTERPRET" in reason)
