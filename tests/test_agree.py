"""Small agreements: ranks in different calls all raise an error that names both, and nobody reads another's message.

And who is to blame is known in all groups of a mesh. Real gloo ranks; each case in groups of its own.
"""

import itertools
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import pyshard
from pyshard.comm import PeerError, agree, notes
from tests import pp_cases, ranks

LIMIT = 60.0  # seconds of a run
SHORT, LONG = 3.0, 40.0  # timeouts of groups: where ranks are to wait for them, and where not


def _contents(rank: int, world: int, seed: int) -> None:
    """Lengths around that of the frame, uneven and even; each rank's own bytes."""
    generator = torch.Generator().manual_seed(seed)
    room = agree._ROOM
    for lengths in (
        [0] * world,
        [room] * world,
        [room + 1] * world,
        [room + 1 - i for i in range(world)],
        [5000, 0, 1],
    ):
        lengths = (lengths * world)[:world]
        every = [torch.randint(256, (n,), generator=generator, dtype=torch.uint8).numpy().tobytes() for n in lengths]
        assert agree.exchange("test", None, "contents", every[rank]) == every
    assert agree.objects("test", None, "objects", {"rank": rank}) == [{"rank": r} for r in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_contents(world: int, seed: int) -> None:
    ranks.run(_contents, world, seed, seconds=LIMIT)


def _elsewhere(rank: int, world: int) -> Any:
    """Another operation of another size; details are not compared; the group stays usable."""
    group = dist.new_group(timeout=timedelta(seconds=LONG))
    with pytest.raises(PeerError) as caught:
        agree.exchange("test", group, "other" if rank == 1 else "this", b"x" * 1000 * rank, detail=f"of {rank}")
    assert agree.exchange("test", group, "this", bytes([rank]), detail=f"{rank}") == [bytes([r]) for r in range(world)]
    return str(caught.value), caught.value.rank, caught.value.operation


@pytest.mark.parametrize("world", [2, 3])
def test_another_operation(world: int) -> None:
    for rank, outcome in enumerate(ranks.run(_elsewhere, world, seconds=LIMIT)):
        text, blamed, operation = outcome.value
        first = "rank 0 in this (of 0)" if world == 2 else "ranks 0, 2 in this (of 0)"
        assert f"{first}; rank 1 in other (of 1); expected the same calls" in text
        assert blamed in (0, 1) if world == 2 else blamed == 1  # of two either may be wrong
        assert operation == ("other" if rank == 1 else "this")


# ---- calls of a training loop ----

CALLS: dict[str, Callable[[Any, Any, Any], object]] = {
    "Pipeline.step": lambda pipe, opt, batch: pipe.step(batch, target=batch),
    "Pipeline.evaluate": lambda pipe, opt, batch: pipe.evaluate(batch),
    "in step()": lambda pipe, opt, batch: opt.step(),
    "clip_grad_norm_": lambda pipe, opt, batch: pyshard.clip_grad_norm_(pipe.parameters(), 1.0),
    "comparison of settings": lambda pipe, opt, batch: opt._peers.compare(opt),
}
PAIRS = list(itertools.combinations(CALLS, 2))


def _pipeline(group: Any, **options: Any) -> tuple[Any, Any, torch.Tensor]:
    pipe = pyshard.pp.pipeline(pp_cases.build("gpt2", 1, **options), group, n_microbatches=4)  # type: ignore[attr-defined]
    return pipe, pyshard.AdamW(pipe.parameters(), max_grad_norm=1.0), pp_cases.batch(1, 8, 9)


def _pairs(rank: int, world: int) -> Any:
    found = []
    for pair in PAIRS:
        pipe, opt, batch = _pipeline(dist.new_group(timeout=timedelta(seconds=LONG)))
        pipe.step(batch, target=batch)
        opt.step()
        before = [(param.detach().clone(), param.grad.clone()) for param in pipe.parameters()]
        begin = time.monotonic()
        with pytest.raises((PeerError, ValueError)) as caught:
            CALLS[pair[rank]](pipe, opt, batch)
        for param, (value, grad) in zip(pipe.parameters(), before, strict=True):
            assert torch.equal(param, value) and torch.equal(param.grad, grad), pair
        found.append((str(caught.value), time.monotonic() - begin))
        dist.barrier()
    return found


def test_calls_of_a_training_loop_against_each_other() -> None:
    for outcome in ranks.run(_pairs, 2, seconds=LIMIT):
        for pair, (text, seconds) in zip(PAIRS, outcome.value, strict=True):
            assert all(name.removeprefix("Pipeline.") in text for name in pair), (pair, text)
            assert "rank 0" in text and "rank 1" in text, text
            assert seconds < LONG / 2, "they waited for the timeout"


def _one_more_group(rank: int, world: int) -> Any:
    """add_param_group() on the last stage alone, of an optimizer that says nothing in a step otherwise."""
    model = pp_cases.build("gpt2", 1, tie_word_embeddings=False)
    model.lm_head.requires_grad_(False)
    group = dist.new_group(timeout=timedelta(seconds=LONG))
    pipe = pyshard.pp.pipeline(model, group, n_microbatches=4)  # type: ignore[attr-defined]
    opt, batch = pyshard.AdamW([p for p in pipe.parameters() if p.requires_grad]), pp_cases.batch(1, 8, 9)
    pipe.step(batch, target=batch)
    opt.step()
    more = [param.requires_grad_() for param in pipe.parameters() if not param.requires_grad]
    if more:
        opt.add_param_group({"params": more})
    with pytest.raises(PeerError) as caught:
        for _ in range(2):
            pipe.step(batch, target=batch)
            opt.step()
    return str(caught.value)


def test_a_group_of_parameters_on_one_stage_only() -> None:
    for outcome in ranks.run(_one_more_group, 2, seconds=LIMIT):
        assert "rank 1 in agreement of the pipeline group in step() (comparing settings" in outcome.value
        assert "after add_param_group()" in outcome.value and "rank 0 in" in outcome.value


def _frozen(rank: int, world: int) -> Any:
    """The first stage has nothing to train: its optimizer cannot be made from what is trained."""
    group = dist.new_group(timeout=timedelta(seconds=SHORT))
    pipe, _, _ = _pipeline(group, tie_word_embeddings=False)
    trained = list(pipe.parameters()) if rank else []
    try:
        opt = pyshard.AdamW(trained, max_grad_norm=1.0)
        opt.step()
    except (ValueError, PeerError) as error:
        return str(error), getattr(error, "rank", None)


def test_a_stage_without_trained_parameters() -> None:
    first, other = (outcome.value for outcome in ranks.run(_frozen, 2, seconds=LIMIT))
    assert "pass all parameters of a pipeline stage" in first[0]
    assert other[1] == 0, other
    assert "rank 0 has failed by itself in the construction of pyshard.AdamW" in other[0]
    assert "pass all parameters of a pipeline stage" in other[0]


# ---- a mesh ----


def _fault(kind: str) -> None:
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ArithmeticError("the loss is NaN")


def _mesh(rank: int, world: int, other: str, fault: str) -> Any:
    """Two good steps of pp=2 with another dimension of 2, then a fault in the forward of the last rank."""
    notes.SECONDS = 2.5  # the machine may be busy
    mesh = pyshard.init_mesh(pp=2, **{other: 2})
    model = pp_cases.build("gpt2", 1)
    if other == "tp":
        pyshard.tp.parallelize(model, mesh)  # type: ignore[attr-defined]
    pipe = pyshard.pp.pipeline(model, mesh, n_microbatches=4)  # type: ignore[attr-defined]
    if other == "dp":
        pyshard.fully_shard(pipe, mesh, param_dtype=None)
    opt, batch = pyshard.AdamW(pipe.parameters(), max_grad_norm=1.0), pp_cases.batch(1, 8, 9)

    def step() -> None:
        pipe.step(batch, target=batch)
        opt.step()
        opt.zero_grad()

    step()
    step()
    dist.barrier()
    if rank == 3:
        block = next(iter(pipe.stages[0].blocks._modules.values()))
        block.register_forward_pre_hook(lambda *_: _fault(fault))
    begin = time.monotonic()
    try:
        step()
        step()
    except PeerError as error:
        return str(error), error.rank, time.monotonic() - begin
    return None


@pytest.mark.parametrize("fault", ["killed", "raises"])
@pytest.mark.parametrize("other", ["dp", "tp"])
def test_the_rank_to_blame_is_known_in_all_groups_of_a_mesh(other: str, fault: str) -> None:
    outcomes = ranks.run(_mesh, 4, other, fault, seconds=LIMIT, quiet=True)
    for outcome in outcomes[:3]:
        assert outcome.error is None, outcome.trace
        text, rank, seconds = outcome.value
        assert rank == 3, text
        assert "rank 3" in text
        assert seconds < LONG / 2, "it waited for the timeout"


def test_frames_of_one_size() -> None:
    assert agree._HEAD.size + agree._TEXT + agree._ROOM == agree.FRAME
