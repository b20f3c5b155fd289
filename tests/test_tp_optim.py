"""Optimizers of parameters that are cut over tensor-parallel ranks, against one process that holds the whole."""

import copy
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from reference import assert_same_bits
from torch import Tensor, nn
from tp_parts import BF16, F16, F32, Mesh, gradients, make_mesh, model_of, part_of, set_gradients, summed

import pyshard
from pyshard.comm import PeerError
from pyshard.placement import TensorShard, set_tensor_shard

SHAPES = [(2, 1), (2, 2), (4, 1)]
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"dtypes": (F32,), "options": {"amsgrad": True}},
    "mixed": {"dtypes": (BF16, F32, F16), "options": {}},
}


def same_everywhere(value: Any, mesh: Mesh) -> bool:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return all(one == every[0] for one in every)


def optimizer_of(model: nn.Module, mesh: Mesh, sharded: bool, **options: Any) -> Any:
    options = {"lr": 0.01, "weight_decay": 0.1, **options}
    if sharded:
        return pyshard.ShardedAdamW(model.parameters(), process_group=mesh.dp, timeout=30, bucket_mb=0.05, **options)
    return pyshard.AdamW(model.parameters(), **options)


def expected(
    seed: int, dp: int, dtypes: Any, steps: int, **options: Any
) -> tuple[nn.Module, dict[int, Any], list[float]]:
    """One process with whole parameters and gradients."""
    model = model_of(seed, None, dtypes)
    opt = pyshard.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, **options)
    norms = []
    for step in range(steps):
        set_gradients(model, summed(seed + step, dp, dtypes))
        opt.grad_scale = torch.tensor(float(dp))
        opt.step()
        if opt.options.needs_norm():
            norms.append(float(opt.grad_norm))
    return model, opt.state_dict()["state"], norms


def train(model: nn.Module, opt: Any, mesh: Mesh, seed: int, dtypes: Any, steps: int, alone: int = 0) -> list[float]:
    """`alone`: not sharded; the gradients are the sums over so many data-parallel ranks, as DDP would make them."""
    norms = []
    for step in range(steps):
        if alone:
            set_gradients(model, summed(seed + step, alone, dtypes))
            opt.grad_scale = torch.tensor(float(alone))
        else:
            set_gradients(model, gradients(seed + step, mesh.dp_rank, dtypes))
        opt.step()
        opt.zero_grad()
        if opt.options.needs_norm():
            norms.append(float(opt.grad_norm))
    return norms


def check_params(model: nn.Module, whole: nn.Module, what: str, **close: float) -> None:
    for (name, param), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        wanted = part_of(param, other.detach())
        if close:
            torch.testing.assert_close(param.detach(), wanted, **close)
        else:
            assert_same_bits(param.detach().contiguous(), wanted.contiguous(), f"{what}: {name}")


def check_state(opt: Any, whole: dict[int, Any], what: str) -> None:
    found = opt.full_state_dict()["state"]
    assert found.keys() == whole.keys()
    for index, items in whole.items():
        assert found[index].keys() == items.keys(), f"{what}: {index}"
        for key, value in items.items():
            assert found[index][key].shape == value.shape, f"{what}: {key} of {index}"
            assert_same_bits(found[index][key].contiguous(), value.contiguous(), f"{what}: {key} of {index}")


def _training(rank: int, world: int, seed: int, tp: int, dp: int) -> None:
    mesh = make_mesh(rank, world, tp, dp)
    assert mesh is not None
    for kind, case in KINDS.items():
        dtypes, options = case["dtypes"], case["options"]
        whole, state, _ = expected(seed, dp, dtypes, 3, **options)
        for stage in (0, 1, 2):
            what = f"{kind}, stage {stage}"
            model = model_of(seed, mesh.tp, dtypes)
            opt = optimizer_of(model, mesh, stage > 0, **options, **({"stage": stage} if stage else {}))
            alone = dp if stage == 0 or dp == 1 else 0
            train(model, opt, mesh, seed, dtypes, 3, alone)
            check_params(model, whole, what)
            check_state(opt, state, what)
            text = opt.explain()
            assert f"tensor parallel over ranks {dist.get_process_group_ranks(mesh.tp)}: 7 parameters are cut" in text
            assert "no message in a step" in text
            if hasattr(opt, "close"):
                opt.close()


@pytest.mark.parametrize("tp, dp", SHAPES)
def test_the_same_bits_as_one_process(tp: int, dp: int, seed: int) -> None:
    run(_training, tp * dp, seed, tp, dp)


def _clipping(rank: int, world: int, seed: int, tp: int, dp: int) -> None:
    mesh = make_mesh(rank, world, tp, dp)
    assert mesh is not None
    dtypes = (BF16, F32)
    whole, _, norms = expected(seed, dp, dtypes, 3, max_grad_norm=1.0)
    found = []
    for sharded in (False, True):
        model = model_of(seed, mesh.tp, dtypes)
        opt = optimizer_of(model, mesh, sharded, max_grad_norm=1.0)
        found.append(train(model, opt, mesh, seed, dtypes, 3, 0 if sharded and dp > 1 else dp))
        # Doubles summed in another order differ by parts of 2^-50; in fp32 by the last bit, if at all.
        torch.testing.assert_close(torch.tensor(found[-1]), torch.tensor(norms), rtol=2**-23, atol=0)
        # The factor on gradients may differ by half a step of fp32, and so an update of lr, by a few; bf16 by one step.
        check_params(model, whole, f"sharded={sharded}", rtol=2**-7, atol=1e-6)
        assert same_everywhere({n: model[n].float().tolist() for n in ("norm", "plain", "scalar")}, mesh)
        assert "squares of the gradients" in opt.explain()
    # Kernels of a device, here in the interpreter, sum up over ranks by another path.
    model = model_of(seed, mesh.tp, dtypes)
    opt = optimizer_of(model, mesh, False, max_grad_norm=1.0, backend="triton")
    found.append(train(model, opt, mesh, seed, dtypes, 1, dp))
    assert found.pop() == found[0][:1]
    check_params(model, expected(seed, dp, dtypes, 1, max_grad_norm=1.0)[0], "triton", rtol=2**-7, atol=1e-6)
    assert found[0] == found[1]  # whatever the number of data-parallel ranks
    assert same_everywhere(found, mesh)


@pytest.mark.parametrize("tp, dp", SHAPES)
def test_the_norm_is_of_all_ranks(tp: int, dp: int, seed: int) -> None:
    run(_clipping, tp * dp, seed, tp, dp)


def _nonfinite(rank: int, world: int, seed: int, tp: int, dp: int) -> None:
    mesh = make_mesh(rank, world, tp, dp)
    assert mesh is not None
    for sharded in (False, True):
        for nonfinite in ("skip", "raise"):
            for bad in range(world):  # the one rank whose part of the gradient is not finite
                model = model_of(seed, mesh.tp)
                opt = optimizer_of(model, mesh, sharded, nonfinite=nonfinite)
                before = copy.deepcopy(model.state_dict())
                set_gradients(model, gradients(seed, 0, (F32,)))
                if rank == bad or (not sharded and mesh.tp_rank == bad % tp):  # DDP would have brought it to all
                    model["embedding"].grad[0, 0] = torch.nan if nonfinite == "skip" else torch.inf
                if nonfinite == "skip":
                    opt.step()
                    assert opt.skipped_steps == 1
                else:
                    with pytest.raises(FloatingPointError, match="holds inf or NaN"):
                        opt.step()
                for name, value in before.items():
                    assert torch.equal(value, model[name]), name
                opt.zero_grad()
                set_gradients(model, gradients(seed, 0, (F32,)))
                opt.step()  # and it goes on
                assert not torch.equal(before["embedding"], model["embedding"])
                if sharded:
                    opt.close()


@pytest.mark.parametrize("tp, dp", [(2, 1), (2, 2)])
def test_all_ranks_skip_or_raise(tp: int, dp: int, seed: int) -> None:
    run(_nonfinite, tp * dp, seed, tp, dp)


def _scaler(rank: int, world: int, seed: int, tp: int, dp: int) -> None:
    mesh = make_mesh(rank, world, tp, dp)
    assert mesh is not None
    for sharded in (False, True):
        for unscale in (False, True) if not sharded else (False,):
            model = model_of(seed, mesh.tp)
            opt = optimizer_of(model, mesh, sharded)
            scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
            scales = []
            for step in range(5):
                before = model["row"].detach().clone()
                targets = [
                    part_of(p, v) for p, v in zip(model.parameters(), gradients(seed + step, 0, (F32,)), strict=True)
                ]
                loss = sum((p * t).sum() for p, t in zip(model.parameters(), targets, strict=True))
                if step == 1 and (rank == world - 1 or (not sharded and mesh.tp_rank == tp - 1)):
                    loss = loss * torch.inf
                scaler.scale(loss).backward()
                if unscale:
                    scaler.unscale_(opt)
                scaler.step(opt)
                scaler.update()
                opt.zero_grad()
                scales.append(scaler.get_scale())
                assert torch.equal(before, model["row"]) == (step == 1)
            assert scales == [256.0, 128.0, 128.0, 256.0, 256.0]
            assert opt.skipped_steps == 1
            assert same_everywhere(scales, mesh)
            if sharded:
                opt.close()


@pytest.mark.parametrize("tp, dp", [(2, 1), (2, 2)])
def test_grad_scaler_hears_of_all_ranks(tp: int, dp: int, seed: int) -> None:
    run(_scaler, tp * dp, seed, tp, dp)


def _errors(rank: int, world: int, seed: int) -> None:
    mesh = make_mesh(rank, world, 2, 2)
    assert mesh is not None
    model = model_of(seed, mesh.tp)
    with pytest.raises(ValueError, match=r"ranks \[.*\] of process_group hold different parts .*mesh\[.dp.\]"):
        pyshard.ShardedAdamW(model.parameters())
    with pytest.raises(ValueError, match=r"lr of group 0 is 0\.0 on rank"):
        pyshard.ShardedAdamW(model.parameters(), process_group=mesh.dp, lr=0.1 * mesh.tp_rank)
    with pytest.raises(ValueError, match=r"parameter 0 is .*\(70, 130\) cut along 0 into .* and .*\(71, 130\)"):
        other = model_of(seed, mesh.tp)
        if mesh.tp_rank == 1:
            shard = TensorShard.even(mesh.tp, (71, 130), 0, [36, 35])
            set_tensor_shard(other["embedding"], shard)
        pyshard.ShardedAdamW(other.parameters(), process_group=mesh.dp)
    # A rank that fails in its constructor is heard of by all.
    with pytest.raises(ValueError, match=r"betas|on rank 3"):
        betas = (0.9, 2.0) if rank == 3 else (0.9, 0.99)
        pyshard.ShardedAdamW(model.parameters(), process_group=mesh.dp, betas=betas)

    # The plain optimizer looks at its first step, and after that at all that decides.
    opt = pyshard.AdamW(model.parameters(), lr=0.1 * (1 + mesh.tp_rank))
    set_gradients(model, gradients(seed, 0, (F32,)))
    with pytest.raises(ValueError, match=r"lr of group 0 is 0\.1 on rank"):
        opt.step()
    assert not opt.state
    opt.param_groups[0]["lr"] = 0.1
    opt.step()
    for opt in (
        pyshard.AdamW(model.parameters(), max_grad_norm=1.0),
        pyshard.ShardedAdamW(model.parameters(), process_group=mesh.dp, max_grad_norm=1.0, timeout=20),
    ):
        set_gradients(model, gradients(seed, 0, (F32,)))
        if mesh.tp_rank == 1:
            model["row"].grad = None
        with pytest.raises(ValueError, match="other parameters have a gradient on this rank"):
            opt.step()
        set_gradients(model, gradients(seed, 0, (F32,)))
        opt.step()
        # An error of one rank is one of all: no rank waits.
        set_gradients(model, gradients(seed, 0, (F32,)))
        if rank == 3:
            opt.param_groups[0]["lr"] = -1.0
        before = model["plain"].detach().clone()
        with pytest.raises(ValueError if rank == 3 else PeerError, match="lr") as caught:
            if rank in (2, 3) or isinstance(opt, pyshard.ShardedAdamW):
                opt.step()
            else:
                raise PeerError("the other tensor-parallel group goes on: lr", 3, "")
        assert torch.equal(before, model["plain"])
        assert rank == 3 or caught.value.rank in (1, 3)


def test_errors_are_those_of_all_ranks(seed: int) -> None:
    run(_errors, 4, seed)


def _one_process(rank: int, world: int, seed: int) -> None:
    """A group of one rank is no tensor parallelism: nothing is exchanged, and state is whole."""
    model = model_of(seed, dist.new_group([0]))
    opt = pyshard.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, max_grad_norm=1.0)
    train(model, opt, Mesh(None, None, [0], 0, 0), seed, (F32,), 2)  # type: ignore[arg-type]
    whole, state, _ = expected(seed, 1, (F32,), 2, max_grad_norm=1.0)
    check_params(model, whole, "one rank")
    check_state(opt, state, "one rank")
    assert type(opt.state_dict()["state"][0]["exp_avg"]) is Tensor
    assert "tensor parallel" not in opt.explain()
    # Two groups, or pieces that leave something out.
    bad = nn.Parameter(torch.zeros(2))
    bad.tensor_shard = TensorShard(dist.group.WORLD, (4,), 0, (((0, 2),),))
    with pytest.raises(ValueError, match=r"the pieces of parameter 0 are \[\(0, 2\)\] of \[0, 4\)"):
        pyshard.AdamW([bad])
    bad.tensor_shard = TensorShard(dist.group.WORLD, (4,), 0, (((0, 4),),))
    with pytest.raises(ValueError, match=r"parameter 0 has shape \(2,\); expected \(4,\)"):
        pyshard.AdamW([bad])


def test_a_group_of_one(seed: int) -> None:
    run(_one_process, 1, seed)


def _lost(rank: int, world: int, seed: int, sharded: bool) -> Any:
    mesh = make_mesh(rank, world, 2, world // 2)
    assert mesh is not None
    model = model_of(seed, mesh.tp)
    opt = optimizer_of(model, mesh, sharded, max_grad_norm=1.0)
    set_gradients(model, gradients(seed, 0, (F32,)))
    opt.step()
    before = model["plain"].detach().clone()
    if rank == world - 1:
        os._exit(1)
    set_gradients(model, gradients(seed, 0, (F32,)))
    with pytest.raises(PeerError) as caught:
        opt.step()
    assert torch.equal(before, model["plain"])
    return str(caught.value)


@pytest.mark.parametrize("world, sharded", [(2, False), (4, True)])
def test_a_lost_rank_is_an_error_on_all(world: int, sharded: bool, seed: int) -> None:
    """On its tensor-parallel ranks, on its data-parallel ranks, and on the tensor-parallel ranks of those."""
    outcomes = run(_lost, world, seed, sharded, quiet=True, seconds=60)
    for outcome in outcomes[:-1]:
        assert outcome.error is None, outcome.trace
    assert (
        f"agreement of the tensor-parallel group in step() failed on rank {world - 2}: rank {world - 1} is lost"
        in outcomes[world - 2].value
    )
