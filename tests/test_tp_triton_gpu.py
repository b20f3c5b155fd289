"""The symm_mem tensor-parallel matmuls on GPUs: values, slow ranks, faults."""

import numpy as np
import pytest
import ranks
import torch
import tp_triton_faults
import tp_triton_ranks
from reference import FLOATS
from tp_triton_ranks import Case

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.gpu
needs_peers = pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs with access to each other's memory, has {GPUS}")
WORLDS = [1, pytest.param(min(GPUS, 4), marks=needs_peers)]


def cases_of(world: int, dtype: torch.dtype, rng: np.random.Generator) -> list[Case]:
    """Full tiles, masked ones, and rows that cannot be read 16 bytes at a time."""
    shapes = ((512, 1024, (512, 256)), (384, 520, (1000,)), (200, 333, (77, 130)))
    return [
        Case(
            tuple(int(n) for n in rng.integers(0, 2 * rows, world)) if uneven else (rows,) * world,
            depth,
            widths,
            dtype,
            transposed=uneven,
            chunk_bytes=1 << 18,
        )
        for rows, depth, widths in shapes
        for uneven in (False, True)
    ]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("world", WORLDS)
def test_values(world: int, in_place: bool, dtype: torch.dtype, rng: np.random.Generator, seed: int) -> None:
    cases = cases_of(world, dtype, rng)
    ranks.run(tp_triton_ranks.matmuls, world, cases, cases, seed, in_place, "cuda", 0.05, seconds=280)


@pytest.mark.parametrize("world", WORLDS)
def test_integers_are_exact(world: int, seed: int) -> None:
    case = Case((300,) * world, 96, (256,), torch.bfloat16, integers=True)
    ranks.run(tp_triton_ranks.matmuls, world, [case] * 5, [case] * 5, seed, False, "cuda", seconds=280)


@needs_peers
@pytest.mark.parametrize("in_place", [False, True])
def test_a_rank_that_never_gives_a_chunk(in_place: bool) -> None:
    ranks.run(tp_triton_faults.silent, min(GPUS, 4), 1, in_place, "cuda", seconds=280)
