"""ShardedAdamW against pyshard.AdamW fed with the gradients of all ranks: the same bits, for any number of ranks, cut,
stage and transport."""

from dataclasses import replace

import pytest
import ranks
from sharded_cases import BF16, F16, F32, Case, assert_same_bits, expected, train

CASES = {
    "fp32": Case(0),
    "mixed dtypes": Case(0, dtypes=(F32, BF16, F16)),
    "bf16, clipped": Case(0, dtypes=(BF16,), options={"max_grad_norm": 1.0}),
    "bf16 with fp32 masters": Case(0, dtypes=(BF16,), options={"master_weights": "fp32", "amsgrad": True}),
    "no masters, norm alone": Case(0, dtypes=(F16, BF16), options={"master_weights": "none", "nonfinite": "skip"}),
    "some gradients on some ranks": Case(0, steps=4, absent="some", options={"max_grad_norm": 0.5}),
    "unused parameters": Case(0, dtypes=(F32, BF16), absent="everywhere", options={"max_grad_norm": 0.5}),
    "frozen": Case(0, absent="frozen"),
    "accumulated": Case(0, micro=3, dtypes=(F32, BF16)),
    "one bucket": Case(0, bucket_mb=25, dtypes=(F32, BF16)),
    "bf16 on the wire": Case(0, dtypes=(F32, BF16), reduce_dtype=BF16, options={"max_grad_norm": 1.0}),
    "coupled, maximized": Case(0, coupled=True, options={"maximize": True}),
}
TRANSPORTS = ("shm", "collective")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_same_bits_as_one_process(seed: int, name: str, stage: int, transport: str) -> None:
    """Worlds 2 and 3; every rank ends with the same parameters, state, norms and counts as one process."""
    case = replace(CASES[name], seed=seed % 10**6, stage=stage, transport=transport)
    for world in (2, 3):
        wanted = expected(case, world)
        for outcome in ranks.run(train, world, case):
            assert_same_bits(outcome.value, wanted)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("world", [1, 4])
def test_one_rank_and_many(seed: int, world: int, stage: int) -> None:
    case = replace(CASES["mixed dtypes"], seed=seed % 10**6, stage=stage, options={"max_grad_norm": 0.1})
    wanted = expected(case, world)
    for outcome in ranks.run(train, world, case):
        assert_same_bits(outcome.value, wanted)


@pytest.mark.parametrize(("transport", "backend"), [("shm", "reference"), ("shm", "triton"), ("symm_mem", "triton")])
def test_other_kernels(seed: int, transport: str, backend: str) -> None:
    """The reference copies to and fro; Triton's kernels, here in the interpreter, read and write all ranks' memory."""
    options = {"max_grad_norm": 1.0, "backend": backend}
    case = replace(CASES["mixed dtypes"], seed=seed % 10**6, steps=2, options=options, bucket_mb=1, transport=transport)
    wanted = expected(replace(case, options={"max_grad_norm": 1.0}), 2)
    for stage in (1, 2):
        for outcome in ranks.run(train, 2, replace(case, stage=stage)):
            assert_same_bits(outcome.value, wanted)


def test_without_torch_distributed(seed: int) -> None:
    case = replace(CASES["bf16, clipped"], seed=seed % 10**6)
    (outcome,) = ranks.run(train, 1, case, group=False)
    assert_same_bits(outcome.value, expected(case, 1))
