"""The symm_mem transport and its kernels, in Triton's interpreter across real processes: values, order, flags."""

import numpy as np
import pytest
import ranks
import symm_ranks
from cuda_tables import HYPERS, Row

from pyshard.kernels import triton
from pyshard.kernels.formats import VALID_KINDS

pytestmark = [
    pytest.mark.skipif(triton.unavailable("cpu") is not None, reason=str(triton.unavailable("cpu"))),
    pytest.mark.timeout(120),
]

SIZES = (1, 3, 1023, 1024, 1100, 2053)


def rows_of(kinds: tuple[int, ...], rng: np.random.Generator, offset: int) -> list[Row]:
    """A row of each kind, sizes and hyperparameters in turn, and an empty one."""
    sizes = rng.permutation(SIZES)
    rows = [Row(k, int(sizes[i % len(sizes)]), offset and 1 + i % 3, i % len(HYPERS)) for i, k in enumerate(kinds)]
    return [*rows, Row(kinds[0], 0)]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
def test_steps(world: int, fused: bool, rng: np.random.Generator, seed: int) -> None:
    kinds = VALID_KINDS[(world + fused) % 5 :: 5]
    ranks.run(symm_ranks.steps, world, rows_of(kinds, rng, 0), seed, 4, fused)
