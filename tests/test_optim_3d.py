"""Optimizers over data, tensor and pipeline parallel ranks at once, against one process that holds the whole model."""

import math
import os
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from pp_cases import batch, build, one_process
from reference import assert_same_bits
from stage_parts import Stages, same_everywhere
from test_optim_pipeline import CLIPPED, NORM
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from tp_parts import BF16, F32

import pyshard
from pyshard.comm import PeerError
from pyshard.placement import TensorShard, carry_over, pipeline_share, set_tensor_shard
from pyshard.pp import causal_lm_loss, pipeline

FORMS = [("dtensor", 0), ("plain", 1), ("plain", 2)]


def _everything(rank: int, world: int, seed: int, sizes: dict[str, int]) -> None:
    mesh = pyshard.init_mesh(**sizes)
    # Without a norm: the bits of one process.
    for form, sharded in FORMS:
        stages = Stages(mesh, seed, form, (BF16, F32))
        opt = stages.optimizer(sharded)
        stages.train(opt, 2)
        whole, _ = stages.expected(2)
        for name, have, want in stages.pairs(whole):
            assert_same_bits(have, want, f"{form} {sharded}: {name}")
        text = opt.explain()
        for name, kind in (
            ("tp", "tensor parallel"),
            ("pp", "pipeline"),
            *([("dp", "DTensors")] if not sharded else []),
        ):
            if mesh[name].size() > 1:
                assert f"{kind} over ranks {dist.get_process_group_ranks(mesh.get_group(name))}" in text, text
        if sharded:
            opt.close()
    # With one: that of one process, the same bits everywhere.
    found = []
    for form, sharded in FORMS:
        stages = Stages(mesh, seed, form)
        whole, norms = stages.expected(2, max_grad_norm=1.0)
        opt = stages.optimizer(sharded, max_grad_norm=1.0)
        found.append(stages.train(opt, 2))
        torch.testing.assert_close(torch.tensor(found[-1]), torch.tensor(norms), **NORM)
        assert same_everywhere(found[-1])
        for _, have, want in stages.pairs(whole):
            torch.testing.assert_close(have, want, **CLIPPED)
        if sharded:
            opt.close()
    assert found[1] == found[2]  # the same sums, however gradients are cut
    stages = Stages(mesh, seed, "dtensor")
    assert stages.train(stages.optimizer(max_grad_norm=1.0, backend="triton"), 1) == found[0][:1]
    for form in ("plain", "dtensor"):
        stages = Stages(mesh, seed, form)
        stages.set_gradients(0, summed=True)
        norm = pyshard.clip_grad_norm_(stages.model.parameters(), 1.0)
        exact = torch.cat([g.flatten().double() for g in stages.whole_gradients(0)]).norm()
        torch.testing.assert_close(norm.double(), exact, rtol=2.0**-24, atol=0)
        assert same_everywhere(float(norm))


def _decisions(rank: int, world: int, seed: int, sizes: dict[str, int]) -> None:
    mesh = pyshard.init_mesh(**sizes)
    for form, sharded in FORMS:
        for nonfinite in ("skip", "raise"):
            stages = Stages(mesh, seed, form)
            opt = stages.optimizer(sharded, nonfinite=nonfinite)
            for bad in (0, world - 1):  # the one rank whose part of the gradient is not finite
                before = stages.local()
                stages.set_gradients(0, summed=not sharded)
                if rank == bad:
                    grad = stages.model["embedding"].grad
                    local = grad.to_local() if isinstance(grad, DTensor) else grad
                    local.view(-1)[0] = math.inf
                if nonfinite == "skip":
                    opt.step()
                else:
                    with pytest.raises(FloatingPointError, match="holds inf or NaN"):
                        opt.step()
                for name, value in stages.local().items():
                    assert torch.equal(value, before[name]), f"{form} {sharded}: {name}"
                opt.zero_grad()
                stages.set_gradients(0, summed=not sharded)
                opt.step()
                opt.zero_grad()
                assert not torch.equal(before["plain"], stages.local()["plain"])
            assert opt.skipped_steps == (2 if nonfinite == "skip" else 0)
            # An error of one rank is one of all, at once, with its own words.
            before = stages.local()
            stages.set_gradients(0, summed=not sharded)
            if rank == 1:
                opt.param_groups[0]["lr"] = -1.0
            with pytest.raises(ValueError if rank == 1 else PeerError, match=r"lr.*-1") as caught:
                opt.step()
            assert rank == 1 or caught.value.rank == 1
            for name, value in stages.local().items():
                assert torch.equal(value, before[name]), f"{form} {sharded}: {name}"


def test_all_three_at_once(seed: int) -> None:
    ranks.run(_everything, 8, seed, {"dp": 2, "tp": 2, "pp": 2}, seconds=110)


def test_decisions_of_eight_ranks(seed: int) -> None:
    ranks.run(_decisions, 8, seed, {"dp": 2, "tp": 2, "pp": 2}, seconds=110)


def test_full_sharding_of_tensor_parallel_parts(seed: int) -> None:
    ranks.run(_everything, 4, seed, {"dp": 2, "tp": 2}, seconds=60)


def _hybrid(rank: int, world: int, seed: int) -> None:
    """Two replicas of two shards, and a tensor-parallel cut beside: replicas count once."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator) for shape in ((5, 3), (1, 4), (7,), ())]
    params = []
    for value in values:
        cut = [Replicate(), Shard(0) if value.dim() else Replicate()]
        param = nn.Parameter(distribute_tensor(value, mesh, cut))
        param.grad = distribute_tensor(value.clone(), mesh, cut)
        params.append(param)
    opt = pyshard.AdamW(params, lr=0.1, max_grad_norm=math.inf)
    exact = torch.cat([v.flatten().double() for v in values]).norm()
    norm = pyshard.clip_grad_norm_(params, math.inf)
    torch.testing.assert_close(norm.double(), exact, rtol=2.0**-24, atol=0)
    opt.step()
    assert_same_bits(opt.grad_norm, norm)
    shards = dist.get_process_group_ranks(mesh.get_group("shard"))
    text = opt.explain()
    assert f"DTensors over ranks {shards}: 3 parameters are sharded" in text and text.count("over ranks") == 1


def test_replicas_count_once(seed: int) -> None:
    ranks.run(_hybrid, 4, seed)


def _fsdp(rank: int, world: int, seed: int) -> None:
    """torch's fully_shard over hand-made tensor-parallel parts: a real backward, and a norm of the whole."""
    mesh = pyshard.init_mesh(dp=2, tp=2)
    tp = mesh.get_group("tp")
    torch.manual_seed(seed)
    whole = nn.Sequential(nn.Linear(6, 9, bias=False), nn.Linear(9, 5))
    part = nn.Sequential(nn.Linear(6, 9, bias=False), nn.Linear(9, 5))
    part.load_state_dict(whole.state_dict())
    cut = TensorShard.even(tp, (9, 6), 0, [5, 4])
    part[0].weight = nn.Parameter(cut.cut(whole[0].weight.detach()).clone())
    set_tensor_shard(part[0].weight, cut)
    before = list(part.parameters())
    # The second layer sees all of the first one's outputs: those of the other rank are constants here.
    rest = TensorShard.even(tp, (9, 6), 0, [5, 4]).cut(whole[0].weight.detach(), 1 - mesh.get_local_rank("tp"))
    first, second = part
    for module in (first, second, part):
        fully_shard(module, mesh=mesh["dp"])
    for old, new in zip(before, part.parameters(), strict=True):
        carry_over(old, new)
    opt = pyshard.AdamW(part.parameters(), lr=0.01, max_grad_norm=0.1)
    single = pyshard.AdamW(whole.parameters(), lr=0.01, max_grad_norm=0.1)
    for step in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed + step))
        mine = x[2 * mesh.get_local_rank("dp") :][:2]
        rest = whole[0].weight.detach().split([5, 4])[1 - mesh.get_local_rank("tp")]
        halves = [first(mine), mine @ rest.t()]
        h = torch.cat(halves if mesh.get_local_rank("tp") == 0 else halves[::-1], 1)
        second(h).square().mean().backward()
        whole(x).square().mean().backward()
        opt.step(), single.step()
        # Means over ranks and matmuls of other shapes round otherwise, each a few steps of fp32.
        torch.testing.assert_close(opt.grad_norm, single.grad_norm, rtol=2**-20, atol=0)
        assert same_everywhere(float(opt.grad_norm))
        opt.zero_grad(), single.zero_grad()
    torch.testing.assert_close(
        first.weight.full_tensor().detach(), cut.cut(whole[0].weight.detach()), rtol=1e-4, atol=1e-5
    )


def test_fully_shard_over_tensor_parallel_parts(seed: int) -> None:
    ranks.run(_fsdp, 4, seed)


def _lost(rank: int, world: int, seed: int, form: str, sharded: int) -> Any:
    mesh = pyshard.init_mesh(dp=2, tp=2, pp=2)
    stages = Stages(mesh, seed, form)
    opt = stages.optimizer(sharded, max_grad_norm=1.0)
    stages.train(opt, 1)
    stages.set_gradients(1, summed=not sharded)
    dist.barrier()
    before = stages.local()
    if rank == 5:
        os._exit(1)
    with pytest.raises(PeerError) as caught:
        opt.step()
    for name, value in stages.local().items():
        assert torch.equal(value, before[name]), f"{form} {sharded}: {name}"
    return caught.value.rank, str(caught.value)


@pytest.mark.parametrize("form, sharded", [("dtensor", 0), ("plain", 2)])
def test_a_lost_rank_is_an_error_on_seven(form: str, sharded: int, seed: int) -> None:
    outcomes = ranks.run(_lost, 8, seed, form, sharded, quiet=True, seconds=60)
    for other, outcome in enumerate(outcomes):
        if other != 5:
            assert outcome.error is None, outcome.trace
            rank, text = outcome.value
            assert rank == 5 and "rank 5" in text, text


# ---- models that pyshard itself has cut ----


def _pipelined(rank: int, world: int, seed: int) -> None:
    """A GPT-2 with tied weights over two stages and two data-parallel ranks: hooks, ties and norms together."""
    mesh = pyshard.init_mesh(dp=2, pp=2)
    dp = mesh.get_local_rank("dp")

    def optimizer_of(pipe: Any, how: str, **options: Any) -> Any:
        if how == "fully_shard":
            pyshard.fully_shard(pipe, mesh["dp"], param_dtype=None)
            return pyshard.AdamW(pipe.parameters(), **options)
        group = mesh.get_group("dp")
        return pyshard.ShardedAdamW(
            pipe.parameters(), stage=int(how), process_group=group, timeout=30, bucket_mb=0.01, **options
        )

    weights = {}
    for how in ("fully_shard", "1", "2"):
        whole = build("gpt2", seed)
        pipe = pipeline(build("gpt2", seed), mesh, "1f1b", 4)
        options = {"lr": 0.01, "max_grad_norm": 0.5}
        opt, single = optimizer_of(pipe, how, **options), pyshard.AdamW(whole.parameters(), **options)
        for step in range(3):
            tokens = batch(seed + step, 16, 9)
            pipe.step(tokens.chunk(2)[dp], target=tokens.chunk(2)[dp])
            one_process(whole, tokens, 8, causal_lm_loss(whole))
            opt.step(), single.step()
            opt.zero_grad(), single.zero_grad()
            # Sums over microbatches and ranks in other orders: some units of fp32 a gradient, and of what was updated
            # by them before.
            torch.testing.assert_close(opt.grad_norm, single.grad_norm, rtol=1e-4, atol=0)
            assert same_everywhere(float(opt.grad_norm))
        weights[how] = [p.detach().clone() for p in pipe.parameters()]
        tied = [p for p in pipe.parameters() if pipeline_share(p).tied]
        assert len(tied) == 1
        mine = tied[0].detach()
        every: list[Any] = [None] * world
        dist.all_gather_object(every, mine.to_local() if isinstance(mine, DTensor) else mine)
        assert_same_bits(every[dp], every[dp + 2], f"{how}: the copies of the tied weight")
        if how != "fully_shard":
            opt.close()
    for one, two in zip(weights["1"], weights["2"], strict=True):
        assert_same_bits(one, two, "stages 1 and 2 of ShardedAdamW")
    # GradScaler: an inf in one microbatch of one data-parallel rank, on the last stage.
    for how in ("fully_shard", "1", "2"):
        bad = [False]

        def loss_fn(logits: Any, target: Any, bad: list[bool] = bad) -> Any:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
            return loss * torch.inf if bad[0] and dp == 1 else loss

        pipe = pipeline(build("gpt2", seed), mesh, "1f1b", 4, loss_fn=loss_fn)
        opt = optimizer_of(pipe, how, lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for step in range(3):
            before = [p.to_local().clone() if isinstance(p, DTensor) else p.detach().clone() for p in pipe.parameters()]
            tokens = batch(seed + step, 16, 9).chunk(2)[dp]
            bad[0] = step == 1
            pipe.step(tokens, target=tokens, scaler=scaler)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            assert scaler.get_scale() == (128.0 if step else 256.0), (how, step)
            after = [p.to_local() if isinstance(p, DTensor) else p for p in pipe.parameters()]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) == (step == 1), (how, step)
        if how != "fully_shard":
            opt.close()


def test_pipelines_of_pyshard(seed: int) -> None:
    ranks.run(_pipelined, 4, seed)
