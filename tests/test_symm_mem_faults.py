"""The symm_mem transport where it cannot be used, and where ranks fall silent, die or give up."""

import pytest
import ranks
import symm_faults

from pyshard.kernels import triton

pytestmark = [
    pytest.mark.skipif(triton.unavailable("cpu") is not None, reason=str(triton.unavailable("cpu"))),
    pytest.mark.timeout(250),
]


def test_why_it_cannot_be_used() -> None:
    outcomes = ranks.run(symm_faults.reasons, 2)
    meta = "on rank 1: it serves CUDA tensors, and the parameters are on meta"
    assert [outcome.value for outcome in outcomes] == [[None, meta, "its ranks are on 2 hosts"]] * 2


def test_too_little_memory_on_one_rank_is_an_error_on_all() -> None:
    ranks.run(symm_faults.too_large, 3)


@pytest.mark.parametrize(("world", "fused"), [(2, True), (3, False)], ids=["fused", "apart"])
def test_a_rank_that_never_comes(world: int, fused: bool, seed: int) -> None:
    ranks.run(symm_faults.silent, world, seed, fused)


def test_a_rank_that_is_killed() -> None:
    outcomes = ranks.run(symm_faults.killed, 3, 2, quiet=True)
    assert [outcome.error for outcome in outcomes[:2]] == [None, None], outcomes
    assert outcomes[2].exitcode == -9


def test_a_rank_that_gives_up() -> None:
    ranks.run(symm_faults.aborted, 3)


def test_use_after_close() -> None:
    ranks.run(symm_faults.closed, 2)
