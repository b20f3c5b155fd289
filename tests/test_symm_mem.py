"""The symm_mem transport and its kernels, in Triton's interpreter across real processes: values, order, flags."""

import numpy as np
import pytest
import ranks
import symm_ranks
import torch
from cuda_tables import HYPERS, Row

from pyshard.kernels import triton
from pyshard.kernels.formats import VALID_KINDS

pytestmark = [
    pytest.mark.skipif(triton.unavailable("cpu") is not None, reason=str(triton.unavailable("cpu"))),
    pytest.mark.timeout(250),
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


def test_steps_of_unaligned_rows(rng: np.random.Generator, seed: int) -> None:
    ranks.run(symm_ranks.steps, 2, rows_of(VALID_KINDS[3::7], rng, 1), seed, 3, True)


@pytest.mark.parametrize("world", [2, 3])
def test_steps_on_sums(world: int, rng: np.random.Generator, seed: int) -> None:
    rows = rows_of((4, 7, 12, 21, 28, 38), rng, 0)  # of fp32 gradients
    ranks.run(symm_ranks.steps_of_sums, world, rows, seed, 3)


@pytest.mark.parametrize(
    ("world", "dtype"), [(1, torch.float32), (2, torch.bfloat16), (3, torch.float32), (4, torch.float16)]
)
def test_messages_through_a_ring_of_slots(world: int, dtype: torch.dtype, seed: int) -> None:
    ranks.run(symm_ranks.ring, world, seed, dtype, 12)


@pytest.mark.parametrize("world", [2, 3])
def test_many_rounds_on_the_same_flags(world: int) -> None:
    ranks.run(symm_ranks.epochs, world, 60)


@pytest.mark.parametrize("offset", [0, 1])
def test_square_sums_of_summed_gradients(offset: int, seed: int) -> None:
    ranks.run(symm_ranks.square_sums, 3, seed, offset)


def test_looking_does_not_wait() -> None:
    ranks.run(symm_ranks.looking, 2)


def test_a_subgroup_speaks_of_global_ranks() -> None:
    outcomes = ranks.run(symm_ranks.subgroup, 4, [1, 3])
    assert [outcome.value for outcome in outcomes] == [[], [1, 3], [], [1, 3]]


@pytest.mark.parametrize(
    ("world", "stage", "backend", "clip"),
    [(2, 1, "cpu", None), (2, 2, "triton", 0.1), (3, 1, "triton", 0.1), (3, 2, "cpu", 0.1)],
)
def test_sharded_adamw_has_the_bits_of_the_collective_transport(
    world: int, stage: int, backend: str, clip: float | None
) -> None:
    want, got = (ranks.run(symm_ranks.train, world, t, stage, backend, clip) for t in ("collective", "symm_mem"))
    for rank in range(world):
        assert got[rank].value == want[0].value, f"rank {rank}"
