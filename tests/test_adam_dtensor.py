"""DTensor parameters on two real processes (gloo): sharded evenly, unevenly and to nothing, replicated, under FSDP2.

All checks run in one start of the processes; each is then a test of its own, which fails with what each rank said.
"""

import copy
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from reference import assert_same_bits
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import pyshard

RANKS = 2
TIMEOUT = 240.0  # seconds for everything, on a machine that does other things too
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

CHECKS: dict[str, Callable[[DeviceMesh, int], None]] = {}


def check(function: Callable[[DeviceMesh, int], None]) -> Callable[[DeviceMesh, int], None]:
    CHECKS[function.__name__] = function
    return function


# Sizes along the cut: even, uneven, one row (nothing on the second rank), nothing at all.
LAYOUTS: list[tuple[tuple[int, ...], Placement]] = [
    ((8, 3), Shard(0)),
    ((5, 4), Shard(0)),
    ((1, 6), Shard(0)),
    ((0, 2), Shard(0)),
    ((3, 4), Shard(1)),
    ((7,), Replicate()),
    ((), Replicate()),
]
FORMATS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (F32, {}),
    (BF16, {}),
    (BF16, {"master_weights": "fp32"}),
    (F16, {"amsgrad": True}),
    (F64, {}),
]


def tensors(seed: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype) for shape, _ in LAYOUTS]


def sharded(mesh: DeviceMesh, values: list[Tensor]) -> list[DTensor]:
    return [distribute_tensor(value.clone(), mesh, [cut]) for value, (_, cut) in zip(values, LAYOUTS)]


def twins(mesh: DeviceMesh, seed: int, dtype: torch.dtype, **options: Any) -> tuple[pyshard.AdamW, pyshard.AdamW]:
    """The same parameters as DTensors and whole, each with an optimizer."""
    whole = tensors(seed, dtype)
    cut = [nn.Parameter(p) for p in sharded(mesh, whole)]
    return pyshard.AdamW(cut, lr=0.01, **options), pyshard.AdamW([nn.Parameter(p) for p in whole], lr=0.01, **options)


def set_grads(mesh: DeviceMesh, a: pyshard.AdamW, b: pyshard.AdamW, seed: int, dtype: torch.dtype) -> None:
    grads = tensors(seed, dtype)
    for p, q, d, g in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], sharded(mesh, grads), grads):
        p.grad, q.grad = d, g.clone()


def assert_same_values(a: pyshard.AdamW, b: pyshard.AdamW) -> None:
    """Parameters and state of a sharded and a whole run, gathered, bit for bit."""
    for i, (p, q) in enumerate(zip(a.param_groups[0]["params"], b.param_groups[0]["params"])):
        assert_same_bits(p.full_tensor().detach(), q.detach(), f"parameter {i}")
        assert a.state[p].keys() == b.state[q].keys()
        for key, value in a.state[p].items():
            if key == "step":
                assert value == b.state[q]["step"]
                continue
            assert isinstance(value, DTensor) and value.placements == p.placements and value.shape == p.shape
            assert value.to_local().stride() == p.to_local().stride() or value.to_local().numel() < 2
            want = b.state[q][key]
            if key == "remainder":  # gloo does not carry int16
                value, want = value.to(torch.int32), want.to(torch.int32)
            assert_same_bits(value.full_tensor(), want, f"{key} {i}")


@check
def values_are_those_of_one_process(mesh: DeviceMesh, seed: int) -> None:
    for dtype, options in FORMATS:
        a, b = twins(mesh, seed, dtype, **options)
        for step in range(3):
            set_grads(mesh, a, b, seed + 1 + step, dtype)
            a.step(), b.step()
        assert_same_values(a, b)
        locals_ = [p.to_local().numel() for p in a.param_groups[0]["params"]]
        assert locals_ == ([12, 12, 6, 0, 6, 7, 1], [12, 8, 0, 0, 6, 7, 1])[mesh.get_rank()]


@check
def norm_is_global(mesh: DeviceMesh, seed: int) -> None:
    """Shards add up, replicated parameters count once; every rank has the same bits and clips alike."""
    device_path = (BF16, {"backend": "triton"})  # in the interpreter, where there is no GPU
    for dtype, options in (*FORMATS, (F32, {"backend": "reference"}), device_path):
        a, b = twins(mesh, seed, dtype, max_grad_norm=0.5, **options)
        for step in range(3):
            set_grads(mesh, a, b, seed + 1 + step, dtype)
            a.step(), b.step()
            # The same sum of doubles in another order, rounded to fp32.
            torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-6, atol=0)
            norms = [torch.empty_like(a.grad_norm) for _ in range(RANKS)]
            dist.all_gather(norms, a.grad_norm)
            assert_same_bits(norms[0], norms[1], "norm of the ranks")
        for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"]):
            torch.testing.assert_close(p.full_tensor().detach(), q.detach())


@check
def nonfinite_is_decided_by_all(mesh: DeviceMesh, seed: int) -> None:
    """An inf in the shard of one rank skips the step, or raises, on both."""
    for mode in ("skip", "raise"):
        a, b = twins(mesh, seed, F32, nonfinite=mode)
        set_grads(mesh, a, b, seed, F32)
        a.step(), b.step()
        set_grads(mesh, a, b, seed + 1, F32)
        grad = a.param_groups[0]["params"][1].grad
        if mesh.get_rank() == 1:
            grad.to_local()[1, 2] = float("inf")
        if mode == "skip":
            a.step()
            assert a.skipped_steps == 1
            assert a.grad_norm.isinf()
        else:
            with pytest.raises(FloatingPointError) as error:
                a.step()
            named = "parameter 1" if mesh.get_rank() == 1 else "a parameter on another rank"
            assert f"the gradient of {named} holds inf or NaN" in str(error.value), str(error.value)
        assert_same_values(a, b)


@check
def a_rank_without_gradient_elements_takes_part(mesh: DeviceMesh, seed: int) -> None:
    """One parameter of one row: the second rank has nothing of it, and the same norm."""
    param = nn.Parameter(distribute_tensor(torch.ones(1, 4), mesh, [Shard(0)]))
    optimizer = pyshard.AdamW([param], max_grad_norm=1.0)
    param.grad = distribute_tensor(torch.full((1, 4), 3.0), mesh, [Shard(0)])
    optimizer.step()
    assert optimizer.grad_norm == 6.0


@check
def gradients_of_another_placement(mesh: DeviceMesh, seed: int) -> None:
    """Partial sums and whole gradients are brought to the parameter's cut, as torch.optim does."""
    a, b = twins(mesh, seed, F32, max_grad_norm=1.0)
    for step in range(3):
        grads = tensors(seed + 1 + step, F32)
        for i, (p, q, g) in enumerate(zip(a.param_groups[0]["params"], b.param_groups[0]["params"], grads)):
            if i % 2 and p.grad is None:  # grows from one step to the next: from two halves, and whole
                part = g / 2
                p.grad = DTensor.from_local(part, mesh, [Partial()], run_check=False)
            else:
                p.grad = DTensor.from_local(g, mesh, [Replicate()], run_check=False)
            q.grad = g.clone()
            if step == 2:
                p.grad = distribute_tensor(g, mesh, p.placements)
        a.step(), b.step()
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-6, atol=0)
        for p in a.param_groups[0]["params"]:
            p.grad = None
    for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"]):
        torch.testing.assert_close(p.full_tensor().detach(), q.detach(), rtol=1e-6, atol=1e-6)


@check
def errors(mesh: DeviceMesh, seed: int) -> None:
    value = torch.ones(4, 2)

    def optimizer() -> tuple[pyshard.AdamW, DTensor]:
        param = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
        param.grad = distribute_tensor(value, mesh, [Shard(0)])
        return pyshard.AdamW([param]), param

    opt, param = optimizer()
    opt.step()
    kept = param.full_tensor().detach().clone()
    opt.state[param]["exp_avg"] = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 0 has placements None.*set_optimizer_state_dict"):
        opt.step()
    opt.state[param]["exp_avg"] = distribute_tensor(torch.zeros(4, 2), mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 0 has placements \(Replicate"):
        opt.step()
    assert_same_bits(param.full_tensor().detach(), kept)

    opt, param = optimizer()
    opt.step()
    saved = opt.state_dict()
    saved["state"][0]["exp_avg"] = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"load_state_dict: state 'exp_avg' of parameter 0 has placements None"):
        opt.load_state_dict(saved)

    partial = nn.Parameter(DTensor.from_local(value, mesh, [Partial()], run_check=False))
    partial.grad = DTensor.from_local(value, mesh, [Partial()], run_check=False)
    with pytest.raises(ValueError, match=r"expected Shard or Replicate"):
        pyshard.AdamW([partial]).step()


@check
def ranks_hear_each_other(mesh: DeviceMesh, seed: int) -> None:
    """Settings are compared at the first step; where a norm is asked for, an error of one rank is one of both."""
    rank = mesh.get_rank()
    for options, match in (
        ({"lr": 0.1 + rank}, "lr of group 0 is"),
        ({"max_grad_norm": 1.0 + rank}, "argument options"),
    ):
        params = [nn.Parameter(p) for p in sharded(mesh, tensors(seed, F32))]
        optimizer = pyshard.AdamW(params, **options)
        for param in params:
            param.grad = torch.ones_like(param)
        with pytest.raises(ValueError, match=match):
            optimizer.step()
        assert not optimizer.state
    for options in ({"max_grad_norm": 1.0}, {"nonfinite": "skip", "backend": "triton"}):
        a, b = twins(mesh, seed, F32, **options)
        for step in range(2):
            set_grads(mesh, a, b, seed + step, F32)
            a.step(), b.step()
        set_grads(mesh, a, b, seed, F32)
        if rank == 1:
            a.param_groups[0]["eps"] = -1.0
        with pytest.raises(ValueError if rank == 1 else pyshard.comm.PeerError, match=r"eps.*-1") as caught:
            a.step()
        if rank == 0:
            assert caught.value.rank == 1
            assert caught.value.operation == "agreement of the shard group in step()"
        assert_same_values(a, b)
        a.param_groups[0]["eps"] = b.param_groups[0]["eps"]
        a.step(), b.step()  # and it goes on
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-6, atol=0)
        assert "DTensors over ranks [0, 1]: 5 parameters are sharded" in a.explain()


@check
def nothing_is_exchanged_that_nothing_asks_for(mesh: DeviceMesh, seed: int) -> None:
    """After the first step, a rank may step alone."""
    a, b = twins(mesh, seed, F32)
    set_grads(mesh, a, b, seed, F32)
    a.step(), b.step()
    set_grads(mesh, a, b, seed, F32)
    if mesh.get_rank() == 0:
        a.step()
    dist.barrier()
    if mesh.get_rank() == 1:
        a.step()
    b.step()
    assert_same_values(a, b)
    assert "no message in a step" in a.explain()


# ---- FSDP2 and distributed checkpoints ----


def network(seed: int, dtype: torch.dtype = F32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 3)).to(dtype)


def batch(seed: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(RANKS, 4, 6, generator=g)
    y = torch.stack([x.sum(2), (x * x).mean(2), x[..., 0]], 2)
    return (x[rank].to(dtype), y[rank]) if rank >= 0 else (x.flatten(0, 1).to(dtype), y.flatten(0, 1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, rank: int, steps: int = 4) -> list[float]:
    dtype = next(model.parameters()).dtype
    found = []
    for step in range(steps):
        x, y = batch(seed + step, rank, dtype)
        optimizer.zero_grad()
        loss = (model(x).float() - y).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def shard(mesh: DeviceMesh, model: nn.Sequential) -> nn.Sequential:
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


@check
def fsdp2_trains_as_one_process(mesh: DeviceMesh, seed: int) -> None:
    for dtype, options in ((F32, {"max_grad_norm": 0.5}), (F32, {}), (BF16, {"max_grad_norm": 0.5})):
        model, whole = shard(mesh, network(seed, dtype)), network(seed, dtype)
        a = pyshard.AdamW(model.parameters(), lr=0.01, **options)
        b = pyshard.AdamW(whole.parameters(), lr=0.01, **options)
        mine = train(model, a, seed, mesh.get_rank())
        train(whole, b, seed, -1)
        losses = [torch.empty(len(mine), dtype=F64) for _ in range(RANKS)]
        dist.all_gather(losses, torch.tensor(mine, dtype=F64))
        for p, q in zip(model.parameters(), whole.parameters()):
            assert isinstance(a.state[p]["exp_avg"], DTensor)
            # The mean over ranks is taken in the parameter's dtype: half a bf16 step of the gradient, or of fp32.
            tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == F32 else {"rtol": 0.05, "atol": 0.02}
            torch.testing.assert_close(p.full_tensor().detach(), q.detach(), **tolerance)


@check
def fsdp1_has_no_global_norm(mesh: DeviceMesh, seed: int) -> None:
    """Its shards are plain tensors: they train as with torch.optim, and options that need a norm are refused."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for original in (False, True):
        models = [
            FullyShardedDataParallel(network(seed), device_id=torch.device("cpu"), use_orig_params=original)
            for _ in range(2)
        ]
        pairs = [
            (models[0], pyshard.AdamW(models[0].parameters(), lr=0.01)),
            (models[1], torch.optim.AdamW(models[1].parameters(), lr=0.01)),
        ]
        ours, theirs = (train(model, optimizer, seed, mesh.get_rank()) for model, optimizer in pairs)
        assert ours == pytest.approx(theirs, rel=1e-5)
        refused = pyshard.AdamW(models[0].parameters(), max_grad_norm=1.0)
        with pytest.raises(ValueError, match="part of a FullyShardedDataParallel module"):
            refused.step()
        dist.barrier()


@check
def checkpoint_of_two_ranks(mesh: DeviceMesh, seed: int) -> None:
    """dcp.save and dcp.load, into a fresh model: training goes on with the same bits."""
    import torch.distributed.checkpoint as dcp

    rank = mesh.get_rank()
    for dtype in (F32, BF16, F16):
        model = shard(mesh, network(seed, dtype))
        optimizer = pyshard.AdamW(model.parameters(), lr=0.01, max_grad_norm=1.0)
        train(model, optimizer, seed, rank)
        folder = [tempfile.mkdtemp() if rank == 0 else ""]
        dist.broadcast_object_list(folder)
        weights, state = dcp_state_dict.get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder[0])
        expected = train(model, optimizer, seed + 50, rank)

        other = shard(mesh, network(seed + 9, dtype))
        fresh = pyshard.AdamW(other.parameters(), lr=0.5, max_grad_norm=1.0)
        weights, state = dcp_state_dict.get_state_dict(other, fresh)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder[0])
        dcp_state_dict.set_state_dict(other, fresh, model_state_dict=weights, optim_state_dict=state)
        assert train(other, fresh, seed + 50, rank) == expected
        for p, q in zip(model.parameters(), other.parameters()):
            assert_same_bits(p.to_local().detach(), q.to_local().detach())


@check
def full_state_dict_goes_to_one_process_and_back(mesh: DeviceMesh, seed: int) -> None:
    rank = mesh.get_rank()
    options = dcp_state_dict.StateDictOptions(full_state_dict=True)
    model = shard(mesh, network(seed, BF16))
    optimizer = pyshard.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, seed, rank)
    weights = dcp_state_dict.get_model_state_dict(model, options=options)
    state = dcp_state_dict.get_optimizer_state_dict(model, optimizer, options=options)
    everything: list[Any] = [(weights, state)]
    dist.broadcast_object_list(everything)
    weights, state = everything[0]

    whole = network(seed + 9, BF16)
    alone = pyshard.AdamW(whole.parameters(), lr=0.5)
    whole.load_state_dict(weights)
    dcp_state_dict.set_optimizer_state_dict(whole, alone, copy.deepcopy(state), options=options)
    back = shard(mesh, network(seed + 9, BF16))
    again = pyshard.AdamW(back.parameters(), lr=0.5)
    dcp_state_dict.set_model_state_dict(back, copy.deepcopy(weights), options=options)
    dcp_state_dict.set_optimizer_state_dict(back, again, copy.deepcopy(state), options=options)
    gradients = [
        torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(BF16) for p in whole.parameters()
    ]
    for p, q, r, g in zip(model.parameters(), whole.parameters(), back.parameters(), gradients):
        p.grad, q.grad, r.grad = distribute_tensor(g, mesh, p.placements), g, distribute_tensor(g, mesh, r.placements)
    for o in (optimizer, alone, again):
        o.step()
    for p, q, r in zip(model.parameters(), whole.parameters(), back.parameters()):
        assert_same_bits(p.full_tensor().detach(), q.detach())
        assert_same_bits(r.full_tensor().detach(), q.detach())


@check
def grad_scaler(mesh: DeviceMesh, seed: int) -> None:
    """An overflow on one rank is a skip on both, in both of GradScaler's ways."""
    for fused in (None, True):
        model = shard(mesh, network(seed))
        optimizer = pyshard.AdamW(model.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for step in range(3):
            x, y = batch(seed + step, mesh.get_rank(), F32)
            optimizer.zero_grad()
            scaler.scale((model(x) - y).square().mean()).backward()
            if step == 1 and mesh.get_rank() == 0:
                model[0].weight.grad.to_local()[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 128.0
        assert [float(optimizer.state[p]["step"]) for p in model.parameters()] == [2] * 4
        assert all(p.to_local().isfinite().all() for p in model.parameters())


# ---- the processes ----


def _rank(rank: int, seed: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (RANKS,))
    meeting = dist.new_group(timeout=timedelta(seconds=120))  # a rank may come late: out of a collective that timed out
    for name, function in CHECKS.items():
        try:
            function(mesh, seed)
            error = None
        except BaseException:
            error = traceback.format_exc()
        results.put((rank, name, error))
        dist.barrier(meeting)
    results.close()
    results.join_thread()
    dist.destroy_process_group()
    os._exit(0)  # without waiting for a peer that has failed


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[int, str], str | None]:
    """What each rank says about each check; None is success."""
    seed = int(os.environ["PYSHARD_TEST_SEED"]) % 2**31
    context = mp.get_context("spawn")
    results = context.Queue()
    found: dict[tuple[int, str], str | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(r, seed, f"{folder}/store", results)) for r in range(RANKS)]
        for process in ranks:
            process.start()
        end = time.monotonic() + TIMEOUT
        while len(found) < RANKS * len(CHECKS) and time.monotonic() < end:
            try:
                rank, name, error = results.get(timeout=1.0)
                found[rank, name] = error
            except queue.Empty:
                if not any(process.is_alive() for process in ranks):
                    break
        for process in ranks:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
    return found


@pytest.mark.timeout(TIMEOUT + 60)
@pytest.mark.parametrize("name", CHECKS)
def test_on_two_processes(name: str, outcomes: dict[tuple[int, str], str | None]) -> None:
    said = {rank: outcomes.get((rank, name), "no answer in time") for rank in range(RANKS)}
    failed = {rank: error for rank, error in said.items() if error is not None}
    assert not failed, "\n".join(f"rank {rank}:\n{error}" for rank, error in failed.items())
