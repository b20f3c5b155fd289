"""Ranks that are killed, late, fail or call something else: every other rank's error names the operation, and the rank
where that can be known, and nothing hangs. Over torch's own collectives, full sharding and pipelines.

Sharded optimizers and tensor parallelism: test_sharded_faults.py, test_tp_faults.py. What notes tell: test_notes.py.
"""

import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import pyshard
from pyshard.comm import PeerError, notes
from pyshard.comm.notes import Notes, abort
from tests import pp_cases, ranks

LIMIT = 90.0  # seconds of a run
SHORT, LONG = 1.5, 40.0  # timeouts of groups: where a rank is late, and where none is to be waited for
BEHIND = 0.3  # seconds in which the others come to wait for the rank that fails
LATE = SHORT + 2.0  # beyond the time for which the others look for its note

# ---- torch's own collectives ----

Call = Callable[[Any, int], object]

COLLECTIVES: dict[str, Call] = {
    "all-reduce": lambda group, world: dist.all_reduce(torch.ones(64), group=group),
    "all-gather": lambda group, world: dist.all_gather(list(torch.empty(world, 64)), torch.ones(64), group=group),
    "reduce-scatter": lambda group, world: dist.reduce_scatter(
        torch.empty(64), list(torch.ones(world, 64)), group=group
    ),
    "all-to-all": lambda group, world: dist.all_to_all_single(
        torch.empty(4 * world), torch.ones(4 * world), group=group
    ),
    "broadcast from rank 1": lambda group, world: dist.broadcast(torch.ones(64), group=group, group_src=1),
    "barrier": lambda group, world: dist.barrier(group),
    "gather of objects": lambda group, world: dist.all_gather_object([None] * world, "text", group=group),
}


def _told(ours: Notes, operation: str, call: Callable[[], object]) -> PeerError:
    with pytest.raises(RuntimeError) as raised:
        call()
    return ours.error(operation, raised.value)


def _patience(seconds: float) -> None:
    """For notes of others: the machine may be busy."""
    notes.SECONDS = 1.5 if seconds == LONG else 1.0


def _group(seconds: float) -> Any:
    _patience(seconds)
    group = dist.new_group(timeout=timedelta(seconds=seconds))
    dist.all_reduce(torch.ones(8), group=group)
    return group


def _killed_in(rank: int, world: int, name: str) -> Any:
    group = _group(LONG)
    if rank == 1:
        time.sleep(BEHIND)
        os.kill(os.getpid(), signal.SIGKILL)
    error = _told(Notes("test", group), name, lambda: COLLECTIVES[name](group, world))
    return str(error), error.rank


@pytest.mark.parametrize("name", COLLECTIVES)
def test_killed_in_a_collective_of_torch(name: str) -> None:
    outcomes = ranks.run(_killed_in, 3, name, seconds=LIMIT, quiet=True)
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.error is None, outcome.trace
        text, rank = outcome.value
        assert rank == 1, text
        assert text.startswith(f"test: {name} failed on rank"), text
        assert "rank 1 is lost" in text, text


def _fails_before(rank: int, world: int) -> Any:
    """One group after the other: rank 1 fails by itself where it should have called a collective."""
    found = []
    for name, call in COLLECTIVES.items():
        group = _group(LONG)
        ours = Notes("test", group)
        if rank == 1:
            time.sleep(BEHIND)
            ours.leave(f"what comes before the {name}", ArithmeticError("the loss is NaN"))
            abort(group)
        else:
            error = _told(ours, name, lambda call=call, group=group: call(group, world))  # type: ignore[misc]
            found.append((name, str(error), error.rank))
        dist.barrier()
    return found


def test_a_rank_that_raises_is_told_in_every_collective_of_torch() -> None:
    outcomes = ranks.run(_fails_before, 3, seconds=LIMIT)
    for outcome in (outcomes[0], outcomes[2]):
        assert [name for name, *_ in outcome.value] == list(COLLECTIVES)
        for name, text, rank in outcome.value:
            assert rank == 1, text
            assert f"rank 1 has failed by itself in what comes before the {name}: ArithmeticError" in text, text


PAIRS = [("all-reduce", "all-gather"), ("broadcast from rank 1", "all-reduce"), ("all-gather", "barrier")]


def _mismatched(rank: int, world: int) -> Any:
    found = []
    for pair in PAIRS:
        group = _group(SHORT)
        name = pair[rank == 1]
        error = _told(Notes("test", group), name, lambda name=name, group=group: COLLECTIVES[name](group, world))  # type: ignore[misc]
        found.append((str(error), error.rank))
        dist.barrier()
    return found


def test_mismatched_collectives_of_torch() -> None:
    for outcome in ranks.run(_mismatched, 3, seconds=LIMIT):
        for (text, rank), (most, one) in zip(outcome.value, PAIRS, strict=True):
            assert rank == 1, text
            assert "ranks are in different operations" in text, text
            assert f"ranks 0, 2 in {most}" in text, text
            assert f"rank 1 in {one}" in text, text


# ---- training ----


def _hit(fault: str) -> None:
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "late":
        time.sleep(LATE)
    if fault == "raises":
        raise ArithmeticError("the loss is NaN")


class _Hit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: str) -> Tensor:
        ctx.fault = fault
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _hit(ctx.fault)
        return grads[0], None


def _arm(block: nn.Module, opt: Any, moment: str, fault: str) -> None:
    """The fault in the next forward or backward of a block, or in the next step."""
    if moment == "forward":
        block.register_forward_pre_hook(lambda *_: _hit(fault))
    elif moment == "backward":
        block.register_forward_hook(lambda module, inputs, output: _Hit.apply(output, fault))
    else:
        inner = opt.step

        def step() -> Any:
            _hit(fault)
            return inner()

        opt.step = step


def _mesh(world: int, name: str, fault: str) -> DeviceMesh:
    """Over a group of its own: messages between two ranks over gloo keep the timeout with which it was made."""
    seconds = SHORT if fault == "late" else LONG
    _patience(seconds)
    group = dist.new_group(timeout=timedelta(seconds=seconds))
    return DeviceMesh.from_group(group, "cpu", mesh_dim_names=(name,))


def _sharded(rank: int, world: int, moment: str, fault: str) -> Any:
    model = pp_cases.custom(seed=1)
    mesh = _mesh(world, "dp", fault)
    pyshard.fully_shard(model, mesh, param_dtype=None)
    opt = pyshard.AdamW(model.parameters(), max_grad_norm=1.0)
    ids = torch.randint(pp_cases.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(rank))

    def step() -> None:
        model(ids).square().mean().backward()
        opt.step()
        opt.zero_grad()

    return _faulty(step, rank, model.blocks[3], opt, moment, fault)


def _pipelined(rank: int, world: int, moment: str, fault: str) -> Any:
    mesh = _mesh(world, "pp", fault)
    plan = pyshard.pp.Plan("blocks", first=["embedding", "scale_in"], last=["norm", "embedding"])  # type: ignore[attr-defined]
    pipe = pyshard.pp.pipeline(  # type: ignore[attr-defined]
        pp_cases.custom(seed=1), mesh, n_microbatches=4, loss_fn=nn.functional.mse_loss, plan=plan
    )
    opt = pyshard.AdamW(pipe.parameters(), max_grad_norm=1.0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(pp_cases.VOCABULARY, (4, 6), generator=generator)
    target = torch.randn(4, 6, pp_cases.VOCABULARY, generator=generator)

    def step() -> None:
        pipe.step(ids, target=target)
        opt.step()
        opt.zero_grad()

    block = next(module for module in pipe.modules() if isinstance(module, pp_cases.CustomBlock))
    return _faulty(step, rank, block, opt, moment, fault)


def _faulty(step: Callable[[], None], rank: int, block: nn.Module, opt: Any, moment: str, fault: str) -> Any:
    """Two good steps, then the fault on rank 1; what this rank raises."""
    step()
    step()
    dist.barrier()
    if rank == 1:
        _arm(block, opt, moment, fault)
    begin = time.monotonic()
    try:
        for _ in range(2):
            step()
    except PeerError as error:
        return {"text": str(error), "rank": error.rank, "operation": error.operation, "s": time.monotonic() - begin}
    return None


CASES = [(moment, fault) for moment in ("forward", "backward", "step") for fault in ("killed", "raises")]
CASES += [("forward", "late"), ("backward", "late")]
SHARDED = {
    "forward": r"all-gather of the parameters of",
    "backward": r"(all-gather of the parameters|reduce-scatter of the gradients) of",
    "step": r"agreement of|all-gather of the parameters of|norm",
}
PIPELINED = {"forward": r"stage|microbatch|loss", "backward": r"stage|microbatch|loss", "step": r"agreement of|norm"}


def _check(run: Any, moment: str, fault: str, operation: str) -> None:
    outcomes = ranks.run(run, 3, moment, fault, seconds=LIMIT, quiet=True)
    if fault == "killed":
        assert outcomes[1].exitcode == -signal.SIGKILL
    if fault == "raises":
        assert outcomes[1].error == "ArithmeticError: the loss is NaN", outcomes[1].trace
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.error is None, outcome.trace
        got = outcome.value
        assert got is not None, "it has not noticed"
        print(got)
        assert got["rank"] == 1, got
        assert re.search(operation, got["operation"]), got
        assert got["operation"] in got["text"]
        assert "rank 1" in got["text"]
        assert got["s"] < LONG / 2, "it waited for the timeout"


@pytest.mark.parametrize(("moment", "fault"), CASES)
def test_full_sharding(moment: str, fault: str) -> None:
    _check(_sharded, moment, fault, SHARDED[moment])


@pytest.mark.parametrize(("moment", "fault"), CASES)
def test_pipeline(moment: str, fault: str) -> None:
    _check(_pipelined, moment, fault, PIPELINED[moment])
