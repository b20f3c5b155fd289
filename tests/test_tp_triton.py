"""The symm_mem tensor-parallel matmuls in Triton's interpreter across real processes: values, order, reuse."""

from dataclasses import replace

import numpy as np
import pytest
import ranks
import torch
import tp_triton_ranks
from reference import FLOATS
from tp_triton_ranks import Case

from pyshard.kernels import triton

pytestmark = [
    pytest.mark.skipif(triton.unavailable("cpu") is not None, reason=str(triton.unavailable("cpu"))),
    pytest.mark.timeout(250),
]

# Rows of each rank: as many as a tile has, none, fewer, parts of tiles.
SIZES = {
    1: ((16,), (1,), (37,), (0,)),
    2: ((16, 16), (0, 21), (17, 2), (33, 15), (0, 0)),
    3: ((16, 16, 16), (5, 0, 9), (1, 1, 1), (0, 0, 18), (31, 17, 3)),
    4: ((16, 16, 16, 16), (2, 0, 17, 1)),
}


def cases_of(world: int, dtype: torch.dtype, rng: np.random.Generator) -> list[Case]:
    """All sizes, with depths and widths of every kind in turn."""
    depths, widths = rng.permutation([16, 1, 40, 17, 0]), rng.permutation([16, 1, 33, 15, 24])
    chunks = (1 << 20, 128, 300)
    return [
        Case(
            sizes,
            int(depths[i % 5]),
            (int(widths[i % 5]), int(widths[(i + 1) % 5]))[: 1 + i % 2],
            dtype,
            bias=i % 3 != 1,
            transposed=i % 2 == 1,
            chunk_bytes=chunks[i % 3],
        )
        for i, sizes in enumerate(SIZES[world])
    ]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("world", "in_place"), [(1, False), (2, False), (2, True), (3, False), (3, True), (4, False)])
def test_values(world: int, in_place: bool, dtype: torch.dtype, rng: np.random.Generator, seed: int) -> None:
    gathers, scatters = cases_of(world, dtype, rng), cases_of(world, dtype, rng)
    ranks.run(tp_triton_ranks.matmuls, world, gathers, scatters, seed, in_place)


@pytest.mark.parametrize("dtype", FLOATS)
def test_integers_are_exact(dtype: torch.dtype, seed: int) -> None:
    cases = [replace(Case((19, 0, 30), 45, (20,), dtype), integers=True, bias=bias) for bias in (True, False)]
    ranks.run(tp_triton_ranks.matmuls, 3, cases, cases, seed, False)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_slow_ranks(world: int, in_place: bool, seed: int) -> None:
    """Ranks fall behind each other at random, and memory is used again and again."""
    case = Case((6, 3, 4)[:world], 8, (5,), torch.bfloat16, chunk_bytes=32)
    for more in range(3):
        ranks.run(tp_triton_ranks.matmuls, world, [case] * 8, [case] * 8, seed + more, in_place, "cpu", 0.05)


def test_two_over_one_transport(seed: int) -> None:
    ranks.run(tp_triton_ranks.shared, 2, seed)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_rank_that_needs_nothing_does_not_overtake(in_place: bool) -> None:
    ranks.run(tp_triton_ranks.ahead, 3, 8, in_place)
