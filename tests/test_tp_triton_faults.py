"""The symm_mem tensor-parallel matmuls where ranks fall silent, die, give up, or pass what does not fit."""

import pytest
import ranks
import tp_triton_faults

from pyshard.kernels import triton

pytestmark = [
    pytest.mark.skipif(triton.unavailable("cpu") is not None, reason=str(triton.unavailable("cpu"))),
    pytest.mark.timeout(250),
]


@pytest.mark.parametrize(("world", "chunk", "in_place"), [(2, 0, False), (3, 1, False), (3, 2, True)])
def test_a_rank_that_never_gives_a_chunk(world: int, chunk: int, in_place: bool) -> None:
    ranks.run(tp_triton_faults.silent, world, chunk, in_place)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_rank_that_never_stores_its_product(in_place: bool) -> None:
    ranks.run(tp_triton_faults.silent_sum, 2, in_place)


def test_a_rank_that_has_not_read_is_not_overtaken() -> None:
    ranks.run(tp_triton_faults.late, 2)


def test_a_rank_that_is_killed() -> None:
    outcomes = ranks.run(tp_triton_faults.killed, 3, quiet=True)
    assert [outcome.error for outcome in outcomes[:2]] == [None, None], outcomes
    assert outcomes[2].exitcode == -9


def test_a_rank_that_gives_up() -> None:
    ranks.run(tp_triton_faults.told, 3)


def test_what_does_not_fit_is_an_error_and_changes_nothing() -> None:
    ranks.run(tp_triton_faults.wrong, 2)
