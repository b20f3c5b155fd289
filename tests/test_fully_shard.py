"""pyshard.fully_shard with pyshard.AdamW on real ranks, against one process and against torch's own fully_shard."""

import gc
import os
import tracemalloc
from datetime import timedelta
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from fully_shard_cases import Model, batch, loss, model, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.utils._python_dispatch import TorchDispatchMode

import pyshard
from pyshard.comm import PeerError
from pyshard.placement import PipelineShare, TensorShard, pipeline_share, set_pipeline_share, tensor_shard

F32, BF16 = torch.float32, torch.bfloat16


def assert_same_values(a: nn.Module, b: nn.Module, rtol: float, atol: float) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        torch.testing.assert_close(whole.detach(), q.detach(), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# ---- training ----


def trains(rank: int, world: int, seed: int) -> None:
    mesh = pyshard.init_mesh(dp=world)
    # fp32 as one process: sums of gradients in another order, which Adam's division makes visible where they are near
    # zero. bf16 compute rounds each matmul to 8 bits; a bf16 model's gradients are rounded to bf16 once more.
    for dtype, compute, bound in ((F32, None, 1e-5), (F32, BF16, 0.02), (BF16, BF16, 0.02)):
        for norm in (None, 0.5):
            net, whole = model(seed, dtype), model(seed, dtype)
            assert pyshard.fully_shard(net, mesh, param_dtype=compute) is net
            assert net.head.weight is net.embed.weight
            assert all(isinstance(p, DTensor) and p.dtype == dtype for p in net.parameters() if p.numel())
            a = pyshard.AdamW(net.parameters(), lr=0.01, max_grad_norm=norm)
            b = pyshard.AdamW(whole.parameters(), lr=0.01, max_grad_norm=norm)
            mine, expected = train(net, a, seed, rank, world), train(whole, b, seed)
            assert mine == pytest.approx(expected, rel=bound), (dtype, compute)
            assert expected[-1] != expected[0]
            if compute is None:
                assert_same_values(net, whole, 1e-4, 1e-5)
            if norm:
                assert float(a.grad_norm) == pytest.approx(float(b.grad_norm), rel=1e-5 if compute is None else 0.05)
            if dtype == BF16:
                assert a.state[net.scale]["remainder"].dtype == torch.int16
            assert net.frozen.full_tensor().tolist() == [0.5] * 5 and net.nothing.shape == (0, 3)
    assert net.scale.to_local().numel() == (6 if rank == 0 else 0)
    chunk = -(-5 // world)
    assert net.frozen.to_local().numel() == max(0, min(5, (rank + 1) * chunk) - rank * chunk)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_trains_as_one_process(world: int, seed: int) -> None:
    ranks.run(trains, world, seed % 2**31)


def as_torch(rank: int, world: int, seed: int) -> None:
    """Two ranks: a sum of two has one rounding and its half none, so both libraries give the same bits."""
    mesh = init_device_mesh("cpu", (world,))
    for dtype in (F32, BF16):
        policy = MixedPrecisionPolicy(BF16, F32)
        ours, theirs = model(seed, dtype), model(seed, dtype)
        pyshard.fully_shard(ours, mesh)
        for block in theirs.blocks:
            torch_fully_shard(block, mesh=mesh, mp_policy=policy)
        torch_fully_shard(theirs, mesh=mesh, mp_policy=policy, ignored_params={theirs.nothing})  # or it fails
        for make in (pyshard.AdamW, torch.optim.AdamW):
            a, b = make(ours.parameters(), lr=0.01), make(theirs.parameters(), lr=0.01)
            assert train(ours, a, seed, rank, world) == train(theirs, b, seed, rank, world)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            if not p.numel():
                continue
            assert p.placements == q.placements and torch.equal(p.to_local(), q.to_local())


def test_same_bits_as_torch_on_two_ranks(seed: int) -> None:
    ranks.run(as_torch, 2, seed % 2**31)


def means(rank: int, world: int) -> None:
    """Gradients of whole numbers: a sum in the place of a mean is off by a factor, and nothing is rounded."""
    shapes = [(world,)] if world != 4 else [(4,), (2, 2), (1, 4), (4, 1)]
    for shape in shapes:
        names = ("replicate", "shard")[-len(shape) :]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for dtype in (F32, BF16):
            net = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 1, bias=False))
            nn.init.ones_(net[0].weight), nn.init.ones_(net[1].weight)
            pyshard.fully_shard(net, mesh, units=["Linear"], param_dtype=dtype)
            for factor in (1, 2):  # accumulates: the second backward adds to what the first has left
                net(torch.full((1, 3), 12.0 * (rank + 1))).sum().backward()
                mean = 12 * sum(range(1, world + 1)) / world * factor
                grad = net[0].weight.grad
                assert torch.equal(grad.full_tensor(), torch.full((5, 3), mean)), (shape, grad)
                if len(shape) == 2:
                    assert grad.placements == (Replicate(), Shard(0))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_gradients_are_means_over_all_ranks(world: int) -> None:
    ranks.run(means, world)


def hsdp(rank: int, world: int, seed: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    net, whole = model(seed), model(seed)
    pyshard.fully_shard(net, mesh, param_dtype=None)
    a = pyshard.AdamW(net.parameters(), lr=0.01, max_grad_norm=0.5)
    b = pyshard.AdamW(whole.parameters(), lr=0.01, max_grad_norm=0.5)
    assert train(net, a, seed, rank, world) == pytest.approx(train(whole, b, seed), rel=1e-5)
    assert_same_values(net, whole, 1e-4, 1e-5)
    assert float(a.grad_norm) == pytest.approx(float(b.grad_norm), rel=1e-5)
    same = [torch.empty_like(net.embed.weight.to_local()) for _ in range(2)]
    dist.all_gather(same, net.embed.weight.to_local().detach(), group=mesh.get_group("replicate"))
    assert torch.equal(same[0], same[1])
    # Accumulation: gradients stay on their rank until the last part of the batch.
    tokens, target = batch(seed + 50)
    grads = {}
    for way in ("at once", "in parts"):
        a.zero_grad()
        parts = (
            [slice(rank, None, world)]
            if way == "at once"
            else [slice(rank, 6, world), slice(6 + (rank - 6) % 4, None, world)]
        )
        count = sum(len(tokens[part]) for part in parts)
        for i, part in enumerate(parts):
            net.set_requires_gradient_sync(i == len(parts) - 1)
            (loss(net, tokens[part], target[part]) * len(tokens[part]) / count).backward()
        grads[way] = [p.grad.full_tensor() for p in net.parameters() if p.numel() and p.grad is not None]
    for x, y in zip(*grads.values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)  # other shapes of matmuls


def test_hsdp(seed: int) -> None:
    ranks.run(hsdp, 4, seed % 2**31)


def offload(rank: int, world: int, seed: int) -> None:
    mesh = pyshard.init_mesh(dp=world)
    found = []
    for policy in (False, True, CPUOffloadPolicy(pin_memory=False)):
        net = model(seed)
        pyshard.fully_shard(net, mesh, cpu_offload=policy)
        optimizer = pyshard.AdamW(net.parameters(), lr=0.01, max_grad_norm=1.0)
        found.append(train(net, optimizer, seed, rank, world))
        assert all(
            optimizer.state[p]["exp_avg"].device.type == "cpu"
            for p in net.parameters()
            if p.requires_grad and p.numel()
        )
        assert "cpu" in optimizer.explain()
    assert found[0] == found[1] == found[2]


def test_cpu_offload(seed: int) -> None:
    ranks.run(offload, 2, seed % 2**31)


# ---- what becomes of the model ----


def structure(rank: int, world: int, seed: int) -> None:
    mesh = pyshard.init_mesh(dp=world)

    def sharded(**options: Any) -> list[str]:
        net = model(seed)
        pyshard.fully_shard(net, mesh, **options)
        return [name for name, module in net.named_modules() if isinstance(module, FSDPModule)]

    blocks = ["", "blocks.0", "blocks.1", "blocks.2"]
    assert sharded() == blocks == sharded(units=["Block"]) == sharded(units=["blocks.?"])
    assert sharded(units=[type(model(0).blocks[0])]) == blocks
    assert sharded(units=[]) == [""]
    assert sharded(units=["blocks.1.*", "blocks.1"]) == [
        "",
        "blocks.1",
        "blocks.1.norm",
        "blocks.1.up",
        "blocks.1.down",
    ]

    net = model(seed)
    group = mesh.get_group("dp")
    shard, share = TensorShard(group, tuple(net.scale.shape)), PipelineShare(group, "embed.weight")
    net.scale.tensor_shard = shard  # type: ignore[assignment]
    set_pipeline_share(net.embed.weight, share)
    ignored = net.blocks[0].norm.weight
    pyshard.fully_shard(net, mesh, ignored_params=[ignored], param_dtype=None)
    assert tensor_shard(net.scale) is shard and pipeline_share(net.head.weight) is share
    assert net.blocks[0].norm.weight is ignored and not isinstance(ignored, DTensor)
    optimizer = pyshard.AdamW(net.parameters(), lr=0.01)
    train(net, optimizer, seed, rank, world, steps=1)
    assert tensor_shard(net.scale) is shard and pipeline_share(net.head.weight) is share

    # The whole mesh of a run: "dp" counts. Meta devices are filled afterwards.
    with torch.device("meta"):
        empty = Model()
    whole = init_device_mesh("cpu", (1, world, 1), mesh_dim_names=("pp", "dp", "tp"))
    set_pipeline_share(empty.scale, share)
    pyshard.fully_shard(empty, whole)
    empty.to_empty(device="cpu")
    assert pipeline_share(empty.scale) is share
    assert empty.scale.device_mesh.mesh_dim_names == ("dp",)


def test_units_and_what_is_said_of_parameters(seed: int) -> None:
    ranks.run(structure, 2, seed % 2**31)


def refusals(rank: int, world: int, seed: int) -> None:
    mesh = pyshard.init_mesh(dp=world)
    net = model(seed)
    before = list(net.parameters())

    def refused(error: type[Exception], match: str, net: nn.Module = net, mesh: Any = mesh, **options: Any) -> None:
        with pytest.raises(error, match=match):
            pyshard.fully_shard(net, mesh, **options)
        assert not any(isinstance(module, FSDPModule) for module in net.modules())

    refused(ValueError, r"units=\['Layer'\] fit no module of Model.*Its classes: Model, Embedding", units=["Layer"])
    refused(ValueError, "head.weight, in no unit, is tied to a weight in embed", units=["Embedding"])
    refused(TypeError, "mesh is a ProcessGroup.*expected a DeviceMesh", mesh=mesh.get_group("dp"))
    cube = init_device_mesh("cpu", (world, 1, 1), mesh_dim_names=("a", "b", "c"))
    refused(ValueError, r"3 dimensions \('a', 'b', 'c'\) of sizes \(2, 1, 1\); expected one, two", mesh=cube)
    mixed = model(seed)
    mixed.blocks[1].norm.to(BF16)
    refused(ValueError, r"the unit blocks.1 trains parameters of several dtypes.*use model.to|Use model.to", net=mixed)
    own = model(seed)
    own.blocks[0].up.weight.main_grad = True
    refused(ValueError, "blocks.0.up.weight keeps its own fp32 gradient", net=own)
    # What one rank finds, all raise.
    other = model(seed + (rank == 1))
    refused(ValueError, "parameters of rank 1 differ from rank 0's, the first embed.weight", net=other)
    refused(ValueError, "rank [01] was called with reduce_dtype=torch", reduce_dtype=BF16 if rank else F32)
    odd = {"units": ["Layer"]} if rank == 1 else {}
    refused(ValueError if rank == 1 else RuntimeError, "fit no module" if rank == 1 else "rank 1 stopped with", **odd)
    assert all(a is b for a, b in zip(net.parameters(), before, strict=True))
    pyshard.fully_shard(net, mesh)
    with pytest.raises(ValueError, match="the model is sharded already"):
        pyshard.fully_shard(net, mesh)


def test_errors_come_on_all_ranks_and_change_nothing(seed: int) -> None:
    ranks.run(refusals, 2, seed % 2**31)


# ---- the step ----


class Seen(TorchDispatchMode):
    """Names of the operators that are called, apart from those of plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not str(func).startswith("profiler."):  # torch.optim's own range around each step
            self.names.append(("DTensor " if any(issubclass(t, DTensor) for t in types) else "") + str(func))
        return func(*args, **(kwargs or {}))


def dispatches(rank: int, world: int, seed: int) -> None:
    mesh = pyshard.init_mesh(dp=world)
    for dtype in (F32, BF16):
        for options, expected in (({}, 0), ({"max_grad_norm": 1.0}, None), ({"nonfinite": "skip"}, None)):
            net = model(seed, dtype)
            pyshard.fully_shard(net, mesh)
            optimizer = pyshard.AdamW(net.parameters(), lr=0.01, **options)
            train(net, optimizer, seed, rank, world, steps=2)
            counts = []
            for _ in range(2):
                loss(net, *batch(seed)).backward()
                with Seen() as seen:
                    optimizer.step()
                optimizer.zero_grad()
                assert not [name for name in seen.names if name.startswith("DTensor")], seen.names
                counts.append(len(seen.names))
            assert counts[0] == counts[1] and (expected is None or counts[0] == expected), seen.names


def test_a_step_dispatches_nothing_to_dtensor(seed: int) -> None:
    ranks.run(dispatches, 2, seed % 2**31)


def grows(rank: int, world: int, seed: int) -> None:
    mesh = pyshard.init_mesh(dp=world)
    for options in ({}, {"max_grad_norm": 1.0}):
        net = model(seed)
        pyshard.fully_shard(net, mesh, param_dtype=None)
        params = [p for p in net.parameters() if p.requires_grad and p.numel()]
        optimizer = pyshard.AdamW(params, lr=1e-3, **options)
        values = [torch.ones_like(p.to_local()) for p in params]

        def steps(count: int, params: list[Any] = params, values: Any = values, optimizer: Any = optimizer) -> None:
            for _ in range(count):
                for p, value in zip(params, values, strict=True):
                    p.grad = DTensor(value.clone(), p._spec, requires_grad=False)  # as FSDP2 makes it
                optimizer.step()
                optimizer.zero_grad()

        steps(50)
        gc.collect()
        tracemalloc.start()
        steps(5)
        gc.collect()
        objects, memory = gc.get_objects(), tracemalloc.get_traced_memory()[0]
        before = len(objects), sum(isinstance(x, DTensorSpec) for x in objects)
        del objects
        steps(1500)
        gc.collect()
        objects, memory_after = gc.get_objects(), tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        after = len(objects), sum(isinstance(x, DTensorSpec) for x in objects)
        del objects
        # Less than one object per hundred steps; one leaked object a step would be 1,500 and some 80 KB at least.
        assert after[0] - before[0] < 15 and after[1] == before[1], (before, after)
        assert memory_after - memory < 20_000, (memory, memory_after)


def test_nothing_grows_over_thousands_of_steps(seed: int) -> None:
    ranks.run(grows, 2, seed % 2**31)


def trains_on(rank: int, world: int, seed: int) -> None:
    mesh = pyshard.init_mesh(dp=world)
    net = model(seed)
    pyshard.fully_shard(net, mesh)
    optimizer = pyshard.AdamW(net.parameters(), lr=1e-3, max_grad_norm=1.0)
    tokens, target = batch(seed)

    def steps(count: int) -> None:
        for _ in range(count):
            loss(net, tokens[rank::world], target[rank::world]).backward()
            optimizer.step()
            optimizer.zero_grad()

    def count() -> tuple[int, int, int]:
        gc.collect()
        objects = gc.get_objects()
        kinds = (DTensorSpec, torch.Tensor)
        return len(objects), *(sum(issubclass(type(x), kind) for x in objects) for kind in kinds)

    steps(20)
    before = count()
    steps(300)
    after = count()
    # One object in each of the steps would be 300; tensors and their placements do not grow at all.
    assert after[0] - before[0] < 30 and after[1:] == before[1:], (before, after)


def test_nothing_grows_with_the_backward_of_fsdp(seed: int) -> None:
    ranks.run(trains_on, 2, seed % 2**31)


# ---- lost and late ranks ----


def lost(rank: int, world: int, seed: int, where: str) -> Any:
    """Rank 1 is killed, or sleeps, at a block: in forward or backward."""
    group_timeout = timedelta(seconds=2)
    mesh = init_device_mesh("cpu", (world,))
    dist.distributed_c10d._set_pg_timeout(group_timeout, mesh.get_group())
    net = model(seed)
    pyshard.fully_shard(net, mesh)
    optimizer = pyshard.AdamW(net.parameters(), lr=0.01)
    train(net, optimizer, seed, rank, world, steps=1, clear=True)
    if rank == 1:
        if where == "forward":
            net.blocks[1].register_forward_pre_hook(lambda *_: os._exit(3), prepend=True)
        else:
            net.blocks[1].register_full_backward_pre_hook(lambda *_: os._exit(3), prepend=True)
    with pytest.raises(PeerError) as error:
        loss(net, *batch(seed)).backward()
    return str(error.value), error.value.operation, error.value.rank


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_lost_rank_is_an_error_that_names_the_operation(where: str, seed: int) -> None:
    answers = ranks.run(lost, 2, seed % 2**31, where, quiet=True, seconds=40)
    assert answers[0].error is None, answers[0].trace
    message, operation, rank = answers[0].value
    words = {"forward": ["all-gather of the parameters of blocks.1"]}
    words["backward"] = [f"reduce-scatter of the gradients of blocks.{i}" for i in (1, 2)]
    words["backward"] += [f"all-gather of the parameters of blocks.{i}" for i in (0, 1)]
    assert any(word in operation for word in words[where]), message
    assert rank == 1 and "rank 1 is lost" in message and message.startswith("pyshard.fully_shard: the "), message
