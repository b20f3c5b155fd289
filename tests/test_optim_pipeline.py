"""Optimizers of pipeline stages, which hold different parameters, against one process that holds the whole model."""

import math
import os
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from reference import assert_same_bits
from stage_parts import Stages, same_everywhere, shares
from torch import nn
from tp_parts import BF16, F32

import pyshard
from pyshard.comm import PeerError
from pyshard.placement import PipelineShare, set_pipeline_share

# Doubles that are summed in another order differ by parts of 2^-50; rounded to fp32, by its last bit, if at all.
NORM = {"rtol": 2**-23, "atol": 0}
# The factor on gradients may differ by half a step of fp32, and so an update of lr, by a few; bf16 by one step.
CLIPPED = {"rtol": 2**-7, "atol": 1e-6}
FORMS = [("plain", 0), ("dtensor", 0), ("plain", 1), ("plain", 2)]  # and the stage of ShardedAdamW


def forms(dp: int) -> list[tuple[str, int]]:
    return FORMS if dp > 1 else FORMS[:1]


def _training(rank: int, world: int, seed: int, sizes: dict[str, int]) -> None:
    mesh = pyshard.init_mesh(**sizes)
    for dtypes in ((F32,), (BF16, F32)):
        for form, sharded in forms(sizes.get("dp", 1)):
            stages = Stages(mesh, seed, form, dtypes)
            opt = stages.optimizer(sharded)
            stages.train(opt, 3)
            whole, _ = stages.expected(3)
            for name, have, want in stages.pairs(whole):
                assert_same_bits(have, want, f"{form} {sharded}: {name}")
            text = opt.explain()
            count = len(list(stages.model.parameters()))
            copies = ", 1 of them copies that count on an earlier one" if stages.last else ""
            group = dist.get_process_group_ranks(mesh.get_group("pp"))
            assert f"pipeline over ranks {group}: {count} parameters on this stage{copies}\n" in text
            assert "no message in a step" in text
            # Nothing is asked, so the stages need not wait for each other: only the first one takes a step.
            if stages.stage == 0:
                stages.train(opt, 1)
            dist.barrier()
            if sharded:
                opt.close()


@pytest.mark.parametrize("sizes", [{"pp": 2}, {"pp": 3}, {"pp": 2, "dp": 2}], ids=str)
def test_the_same_bits_as_one_process(sizes: dict[str, int], seed: int) -> None:
    ranks.run(_training, math.prod(sizes.values()), seed, sizes)


def _norm(rank: int, world: int, seed: int, sizes: dict[str, int]) -> None:
    mesh = pyshard.init_mesh(**sizes)
    options = {"max_grad_norm": 1.0}
    for dtypes in ((F32,), (BF16, F32)):
        found = []
        for form, sharded in forms(sizes.get("dp", 1)):
            stages = Stages(mesh, seed, form, dtypes)
            whole, norms = stages.expected(3, **options)
            opt = stages.optimizer(sharded, **options)
            found.append(stages.train(opt, 3))
            torch.testing.assert_close(torch.tensor(found[-1]), torch.tensor(norms), **NORM)
            assert same_everywhere(found[-1])
            for name, have, want in stages.pairs(whole):
                torch.testing.assert_close(have, want, msg=lambda m, n=name, f=form: f"{f} {n}: {m}", **CLIPPED)
            assert "squares of the gradients" in opt.explain() and "512 bytes" in opt.explain()
            if sharded:
                opt.close()
        # Not only each form's norm is that of all ranks: those that sum up in the same order have the same bits.
        assert all(norms == found[0] for form, norms in zip(forms(sizes.get("dp", 1)), found) if form[0] == "plain")
        # Kernels of a device, here in the interpreter.
        stages = Stages(mesh, seed, "plain", dtypes)
        assert stages.train(stages.optimizer(backend="triton", **options), 1) == found[0][:1]
    # The function, which reads the same attributes; with a mesh, too.
    for form in dict.fromkeys(form for form, _ in forms(sizes.get("dp", 1))):
        stages = Stages(mesh, seed, form)
        exact = torch.cat([g.flatten().double() for g in stages.whole_gradients(0)])
        for norm_type in (2.0, 1.0, math.inf):
            for given in (None, mesh):
                stages.set_gradients(0, summed=True)
                norm = pyshard.clip_grad_norm_(stages.model.parameters(), 1.0, given, norm_type)
                # fp32 sums of one parameter's absolute values, fewer than 200 additions for each vectorised
                bound = 2.0**-24 if norm_type != 1.0 else 200 * 2.0**-24
                want = torch.linalg.vector_norm(exact, norm_type)
                torch.testing.assert_close(norm.double(), want, rtol=bound, atol=0)
                assert same_everywhere(float(norm))


@pytest.mark.parametrize("sizes", [{"pp": 2}, {"pp": 4}, {"pp": 2, "dp": 2}], ids=str)
def test_the_norm_is_that_of_all_stages(sizes: dict[str, int], seed: int) -> None:
    ranks.run(_norm, math.prod(sizes.values()), seed, sizes)


def _spoil(stages: Stages, value: float) -> None:
    grad = stages.model["embedding"].grad
    local = grad.to_local() if stages.form == "dtensor" else grad
    local[0, 0] = value


def _nonfinite(rank: int, world: int, seed: int, sizes: dict[str, int]) -> None:
    mesh = pyshard.init_mesh(**sizes)
    for form, sharded in forms(sizes.get("dp", 1)):
        for nonfinite in ("skip", "raise"):
            stages = Stages(mesh, seed, form)
            opt = stages.optimizer(sharded, nonfinite=nonfinite)
            for count, bad in enumerate(range(0, world, max(world // 2, 1))):  # one rank of each stage
                before = stages.local()
                stages.set_gradients(0, summed=not sharded)
                if rank == bad or (not sharded and form == "plain" and rank // stages.dp == bad // stages.dp):
                    _spoil(stages, math.nan if nonfinite == "skip" else math.inf)
                if nonfinite == "skip":
                    opt.step()
                    assert opt.skipped_steps == count + 1
                else:
                    with pytest.raises(FloatingPointError, match="holds inf or NaN"):
                        opt.step()
                for name, value in stages.local().items():
                    assert torch.equal(value, before[name]), name
                opt.zero_grad()
                stages.set_gradients(0, summed=not sharded)
                opt.step()  # and it goes on
                assert not torch.equal(before["plain"], stages.local()["plain"])
                opt.zero_grad()
            if sharded:
                opt.close()


@pytest.mark.parametrize("sizes", [{"pp": 2}, {"pp": 2, "dp": 2}], ids=str)
def test_all_stages_skip_or_raise(sizes: dict[str, int], seed: int) -> None:
    ranks.run(_nonfinite, math.prod(sizes.values()), seed, sizes)


def _scaler(rank: int, world: int, seed: int, sizes: dict[str, int]) -> None:
    mesh = pyshard.init_mesh(**sizes)
    for form, sharded in forms(sizes.get("dp", 1)):
        for unscale in (False, True) if not sharded else (False,):
            stages = Stages(mesh, seed, form)
            opt = stages.optimizer(sharded)
            scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
            scales = []
            for step in range(5):
                before = stages.local()["row"]
                loss = sum((p * p).sum() for p in stages.model.parameters())
                if form == "dtensor":
                    loss = loss.full_tensor()
                # Of ordinary parameters DDP would have brought it to all data-parallel ranks.
                hit = rank == world - 1 if sharded or form == "dtensor" else stages.last
                if step == 1 and hit:
                    loss = loss * torch.inf
                scaler.scale(loss).backward()
                if unscale:
                    scaler.unscale_(opt)
                scaler.step(opt)
                scaler.update()
                opt.zero_grad()
                scales.append(scaler.get_scale())
                assert torch.equal(before, stages.local()["row"]) == (step == 1), (form, sharded, step)
            assert scales == [256.0, 128.0, 128.0, 256.0, 256.0]
            assert opt.skipped_steps == 1
            assert same_everywhere(scales)
            if sharded:
                opt.close()


@pytest.mark.parametrize("sizes", [{"pp": 2}, {"pp": 2, "dp": 2}], ids=str)
def test_grad_scaler_hears_of_all_stages(sizes: dict[str, int], seed: int) -> None:
    ranks.run(_scaler, math.prod(sizes.values()), seed, sizes)


def _errors(rank: int, world: int, seed: int) -> None:
    mesh = pyshard.init_mesh(pp=2, dp=2)
    group = mesh.get_group("pp")
    with pytest.raises(
        ValueError, match=r"empty parameter list.*all parameters of a pipeline stage. If it has none, use fewer stages"
    ):
        pyshard.AdamW([])
    with pytest.raises(ValueError, match=r"ranks \[.*\] of process_group hold different .* pipeline group"):
        pyshard.ShardedAdamW(Stages(mesh, seed).model.parameters())
    with pytest.raises(ValueError, match=r"lr of group 0 is 0\.0 on rank"):
        Stages(mesh, seed).optimizer(2, lr=0.1 * mesh.get_local_rank("pp"))
    with pytest.raises(ValueError, match=r"betas|on rank 3"):
        Stages(mesh, seed).optimizer(2, betas=(0.9, 2.0) if rank == 3 else (0.9, 0.99))

    def param(value: float) -> nn.Parameter:
        made = nn.Parameter(torch.full((3,), value))
        made.grad = torch.full((3,), value)
        set_pipeline_share(made, PipelineShare(group, "weight"))
        return made

    # At its first step the plain optimizer compares what stages have in common.
    stage = mesh.get_local_rank("pp")
    ours = [param(1.0 + i) for i in range(1 + stage)]
    for options, match in (
        ({"lr": 0.1 * (1 + stage)}, r"lr of group 0 is 0\.1 on rank"),
        ({"nonfinite": ("skip", "raise")[stage]}, r"argument options is "),
        ({"amsgrad": stage == 1}, "amsgrad of group 0 is False on rank"),
    ):
        opt = pyshard.AdamW(ours, **options)
        with pytest.raises(ValueError, match=match):
            opt.step()
        assert not opt.state
    groups = [{"params": ours}, *([{"params": [], "lr": 0.5}] if stage else [])]
    with pytest.raises(ValueError, match=r"the number of parameter groups is 1 on rank \d and 2 on rank"):
        pyshard.AdamW(groups).step()
    # Stages may have groups without parameters, other numbers of them, and none with a gradient.
    groups = [{"params": ours, "weight_decay": 0.0}, {"params": [param(5.0)] if stage else [], "lr": 0.5}]
    opt = pyshard.AdamW(groups, max_grad_norm=math.inf)
    opt.step()
    assert float(opt.grad_norm) == pytest.approx(math.sqrt(3 * (1 + 1 + 4 + 25)), rel=2**-23)
    if stage:
        opt.zero_grad()
    opt.step()
    assert float(opt.grad_norm) == pytest.approx(math.sqrt(3), rel=2**-23)
    # An error of one rank is one of all: no rank waits, and nothing is changed.
    for form, sharded in FORMS:
        stages = Stages(mesh, seed, form)
        opt = stages.optimizer(sharded, max_grad_norm=1.0)
        stages.train(opt, 1)
        before = stages.local()
        stages.set_gradients(1, summed=not sharded)
        if rank == 1:
            opt.param_groups[0]["lr"] = -1.0
        if form == "plain" and not sharded and rank in (0, 2):  # no peers of rank 1
            opt.step()
            continue
        with pytest.raises(ValueError if rank == 1 else PeerError, match=r"lr.*-1") as caught:
            opt.step()
        assert rank == 1 or caught.value.rank == 1
        for name, value in stages.local().items():
            assert torch.equal(value, before[name]), name
    # Different scales: on all, and training goes on.
    stages = Stages(mesh, seed)
    opt = stages.optimizer(max_grad_norm=1.0)
    stages.set_gradients(0, summed=True)
    opt.grad_scale, opt.found_inf = torch.tensor(2.0 + stage), torch.tensor(0.0)
    with pytest.raises(ValueError, match=r"GradScaler's scale is 2 on rank . and differs on others of the pipeline"):
        opt.step()
    stages.train(opt, 1)


def test_errors_are_those_of_all_ranks(seed: int) -> None:
    ranks.run(_errors, 4, seed)


def _lost(rank: int, world: int, seed: int, sizes: dict[str, int], form: str, sharded: int) -> Any:
    mesh = pyshard.init_mesh(**sizes)
    stages = Stages(mesh, seed, form)
    opt = stages.optimizer(sharded, max_grad_norm=1.0)
    stages.train(opt, 1)
    stages.set_gradients(1, summed=not sharded)
    dist.barrier()
    before = stages.local()["plain"]
    if rank == world - 1:
        os._exit(1)
    with pytest.raises(PeerError) as caught:
        opt.step()
    assert torch.equal(before, stages.local()["plain"])
    return str(caught.value), caught.value.operation


@pytest.mark.parametrize(
    "sizes, form, sharded",
    [
        ({"pp": 2}, "plain", 0),
        ({"pp": 3}, "plain", 0),
        ({"pp": 2, "dp": 2}, "dtensor", 0),
        ({"pp": 2, "dp": 2}, "plain", 2),
    ],
    ids=str,
)
def test_a_lost_rank_is_an_error_on_all(sizes: dict[str, int], form: str, sharded: int, seed: int) -> None:
    world = math.prod(sizes.values())
    outcomes = ranks.run(_lost, world, seed, sizes, form, sharded, quiet=True, seconds=60)
    for outcome in outcomes[:-1]:
        assert outcome.error is None, outcome.trace
    said = [outcome.value for outcome in outcomes[:-1]]
    # Its own pipeline group misses it; its data-parallel peers have heard of it before, and tell theirs.
    apart = world // sizes["pp"]
    text, operation = said[world - 1 - apart]
    assert "pipeline group" in text and str(world - 1) in text
    assert operation == "agreement of the pipeline group in step()"
    if form == "dtensor":
        assert "agreement of the shard group in step() failed on rank 2: rank 3 is lost" in said[2][0]
        assert "rank 2 left in agreement of the shard group in step(), because of rank 3" in said[0][0]


def _accumulating(rank: int, world: int, seed: int, transport: str) -> None:
    """A hook leaves the gradients of microbatches that others follow alone, as in no_sync()."""
    mesh = pyshard.init_mesh(pp=2, dp=2)
    for sharded in (1, 2):
        for to_none in (True, False) if sharded == 1 else (True,):
            weights = []
            for how in ("pipeline", "no_sync"):
                stages = Stages(mesh, seed)
                opt = stages.optimizer(sharded, transport=transport, max_grad_norm=1.0)
                params = list(stages.model.parameters())
                for step in range(3):
                    opt.zero_grad(set_to_none=to_none)
                    for micro in range(3):
                        values = stages.gradients(10 * step + micro, summed=False)
                        # The last microbatch does not reach the first parameter: step() sends what is there.
                        used = list(zip(params, values, strict=True))[micro == 2 :]
                        loss = sum((p * v).sum() for p, v in used)
                        more = micro < 2
                        if how == "pipeline":
                            for share in shares(stages.model):
                                share.accumulating = more
                            loss.backward()
                        elif more:
                            with opt.no_sync():
                                loss.backward()
                        else:
                            loss.backward()
                        if how == "pipeline" and more:
                            assert all(p.grad is not None for p in params)
                    opt.step()
                weights.append([p.detach().clone() for p in params])
                opt.close()
            for param, other in zip(*weights, strict=True):
                assert_same_bits(param, other, f"stage {sharded}, set_to_none={to_none}")
    # A GradScaler: the ranks hear each other once, at the end of the last microbatch.
    stages = Stages(mesh, seed)
    opt = stages.optimizer(2, transport=transport)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(4):
        before = stages.model["row"].detach().clone()
        for micro in range(2 + rank % 2):  # not that data-parallel ranks differ in a pipeline; nothing is sent
            last = micro == 1 + rank % 2
            for share in shares(stages.model):
                share.accumulating = not last
            loss = sum((p * p).sum() for p in stages.model.parameters())
            scaler.scale(loss * (torch.inf if step == 2 and rank == 3 and not last else 1.0)).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        assert torch.equal(before, stages.model["row"]) == (step == 2)
        assert scaler.get_scale() == (32.0 if step >= 2 else 64.0)
    opt.close()


@pytest.mark.parametrize("transport", ["shm", "collective"])
def test_microbatches_are_sent_once(transport: str, seed: int) -> None:
    ranks.run(_accumulating, 4, seed, transport)
