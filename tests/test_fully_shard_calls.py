"""What pyshard.fully_shard is called with, good and bad: meshes, options, models; and what outlives the call."""

import time
import warnings
from datetime import timedelta
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from fully_shard_cases import Block, Model, batch, loss, model, train
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

import pyshard
from pyshard.comm import PeerError
from pyshard.placement import PipelineShare, pipeline_share, set_pipeline_share


def units_of(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, FSDPModule)]


# ---- meshes ----


def meshes(rank: int, world: int, seed: int) -> None:
    def placed(shape: tuple[int, ...], names: tuple[str, ...]) -> tuple[Any, ...]:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        net, whole = model(seed), model(seed)
        pyshard.fully_shard(net, mesh, param_dtype=None)
        a, b = pyshard.AdamW(net.parameters(), lr=0.01), pyshard.AdamW(whole.parameters(), lr=0.01)
        # fp32, gradients summed in another order.
        assert train(net, a, seed, rank, world) == pytest.approx(train(whole, b, seed), rel=1e-5), names
        weight = net.embed.weight
        return weight.placements, weight.device_mesh.mesh_dim_names, weight.to_local().shape[0]

    # All four ranks have other data: whatever a mesh says, it must not leave any of them out.
    assert placed((2, 2), ("dp", "fsdp")) == ((Replicate(), Shard(0)), ("dp", "fsdp"), 6 - rank % 2)
    assert placed((2, 2), ("replicate", "shard"))[0] == (Replicate(), Shard(0))
    assert placed((4, 1), ("dp", "fsdp"))[:2] == ((Shard(0),), ("dp",))
    assert placed((1, 4, 1), ("pp", "dp", "tp"))[:2] == ((Shard(0),), ("dp",))
    assert placed((1, 4, 1), ("cp", "dp", "ep"))[:2] == ((Shard(0),), ("dp",))
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net = model(seed)
    pyshard.fully_shard(net, both)
    assert net.embed.weight.device_mesh.mesh_dim_names == ("dp",)
    cube = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("dp", "cp", "tp"))
    for mesh, text in (
        (cube, r"3 dimensions \('dp', 'cp', 'tp'\) of sizes \(2, 2, 1\); expected"),
        (init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tp")), r"\('shard', 'tp'\) of sizes \(2, 2\)"),
        (init_device_mesh("cpu", (2, 2)), r"2 dimensions \(\)"),
    ):
        net = model(seed)
        with pytest.raises(ValueError, match=text):
            pyshard.fully_shard(net, mesh)
        assert not units_of(net)


def test_only_what_is_known_is_left_out_of_a_mesh(seed: int) -> None:
    ranks.run(meshes, 4, seed % 2**31)


# ---- what cannot be cut, and options ----


class Odd(nn.Module):
    def __init__(self, odd: torch.Tensor):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.odd = nn.Parameter(odd)


def refusals(rank: int, world: int, seed: int) -> None:
    mesh = pyshard.init_mesh(dp=world)

    def refused(error: type[Exception], match: str, net: Any = None, **options: Any) -> None:
        net = model(seed) if net is None else net
        with pytest.raises(error, match=match):
            pyshard.fully_shard(net, mesh, **options)
        assert not isinstance(net, nn.Module) or not units_of(net)

    refused(ValueError, r"odd has no dimensions; expected one at least.*shape \(1,\)", Odd(torch.tensor(1.0)))
    refused(ValueError, r"odd, of shape \(4, 6\) and strides \(1, 4\), is not contig", Odd(torch.ones(6, 4).t()))
    refused(ValueError, "the model is a ModuleList, which is not called", nn.ModuleList([Block(), Block()]))
    refused(ValueError, "blocks is a ModuleList, which is not called", units=["ModuleList"])
    refused(TypeError, "model is a list; expected an nn.Module", [Block()])
    refused(TypeError, r"units is 'Block'; expected a list.*Pass units=\['Block'\]", units="Block")
    refused(TypeError, "units is 3; expected a list of names", units=3)
    refused(TypeError, "units has 3; expected a list of names", units=["Block", 3])
    refused(TypeError, "ignored_params has 'embed.weight'; expected", ignored_params=["embed.weight"])
    refused(ValueError, r"ignored_params has a tensor of shape \(2,\)", ignored_params=[nn.Parameter(torch.ones(2))])
    refused(TypeError, r"ignored_params is a tensor of shape \(2,\)", ignored_params=nn.Parameter(torch.ones(2)))
    refused(TypeError, "cpu_offload='yes'; expected True, False", cpu_offload="yes")
    refused(TypeError, "param_dtype='bf16'; expected a torch.dtype", param_dtype="bf16")
    refused(ValueError, "reshard_after_forward=3; expected a divisor of the 2 ranks", reshard_after_forward=3)
    refused(TypeError, "reshard_after_forward='no'; expected True", reshard_after_forward="no")
    # Of one rank only: the others hear it.
    said = "rank 1 stopped with TypeError: pyshard.fully_shard: "
    for name, value in (("units", "Block"), ("cpu_offload", "yes"), ("ignored_params", ["x"])):
        kind, text = (TypeError, f"{name}") if rank == 1 else (RuntimeError, f"{said}{name}")
        refused(kind, text, **({name: value} if rank == 1 else {}))
    refused(
        *((TypeError, "model is a list") if rank else (RuntimeError, said + "model is a list")), [] if rank else None
    )
    # Other options on one rank. A generator is read once, and compared by what it gives.
    refused(ValueError, "rank [01] was called with units=", units=(u for u in (["Block"] if rank else ["blocks.0"])))
    refused(ValueError, "rank [01] was called with cpu_offload=", cpu_offload=rank == 1)
    policy = CPUOffloadPolicy(pin_memory=rank == 1)
    refused(ValueError, "rank [01] was called with cpu_offload=CPUOffloadPolicy", cpu_offload=policy)
    net = model(seed)
    refused(ValueError, "with ignored_params=", net, ignored_params=[net.blocks[0].norm.weight] if rank else [])

    net = model(seed)
    pyshard.fully_shard(net, mesh, units=(unit for unit in ["Block"]), ignored_params=iter([net.frozen]))
    assert units_of(net) == ["", "blocks.0", "blocks.1", "blocks.2"] and not isinstance(net.frozen, DTensor)
    # The scalar may stay whole.
    net = Odd(torch.tensor(1.0))
    pyshard.fully_shard(
        net, init_device_mesh("cpu", (world,)), ignored_params=[net.odd], units=["Block"], param_dtype=None
    )
    assert units_of(net) == ["", "blocks.0", "blocks.1"]
    named = model(seed)
    pyshard.fully_shard(named, mesh)
    rest = named._get_fsdp_state()._fsdp_param_groups[0]._all_gather_comm.operation
    assert rest == "the all-gather of the parameters of scale and 2 others outside of the units"


def test_errors_come_first_and_on_all_ranks(seed: int) -> None:
    ranks.run(refusals, 2, seed % 2**31)


def missing(rank: int, world: int, seed: int) -> Any:
    group = dist.new_group(timeout=timedelta(seconds=1))
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("dp",))
    if rank == 1:
        time.sleep(4)  # longer than the others wait, and read notes
        return None
    with pytest.raises(PeerError) as error:
        pyshard.fully_shard(model(seed), mesh)
    return str(error.value), error.value.rank


def test_a_rank_that_does_not_call_it(seed: int) -> None:
    (text, blamed), _ = (outcome.value for outcome in ranks.run(missing, 2, seed % 2**31, seconds=40))
    assert text.startswith("pyshard.fully_shard: the comparison of models") and "rank 1 does not answer" in text
    assert blamed == 1


# ---- what outlives the call ----


class Rotary(nn.Module):
    """With a buffer that state_dict() does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.register_buffer("frequencies", torch.arange(3.0), persistent=False)
        self.register_buffer("kept", torch.arange(3.0))


def lasting(rank: int, world: int, seed: int) -> None:
    mesh = pyshard.init_mesh(dp=world)
    with torch.device("meta"):
        empty, bare = Rotary(), Model()
    with pytest.warns(
        UserWarning, match=r"fully_shard: frequencies of the model on the meta .*Fill them after to_empty"
    ):
        pyshard.fully_shard(empty, mesh)
    share = PipelineShare(mesh.get_group("dp"), "embed.weight")
    set_pipeline_share(bare.embed.weight, share)
    set_pipeline_share(bare.blocks[0].up.weight, share)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pyshard.fully_shard(bare, mesh)
        pyshard.fully_shard(Rotary(), mesh)

    def said(net: nn.Module) -> bool:
        params = net.embed.weight, net.head.weight, net.blocks[0].up.weight
        return all(isinstance(p, DTensor) and pipeline_share(p) is share for p in params)

    bare.to_empty(device="cpu")
    assert said(bare) and bare.head.weight is bare.embed.weight
    bare.load_state_dict({name: value.clone() for name, value in bare.state_dict().items()}, assign=True)
    assert said(bare) and bare.head.weight is bare.embed.weight
    bare.blocks[0].to(torch.float64)
    with torch.no_grad():
        bare.blocks[0].to(torch.float32)
        bare(batch(seed)[0])  # the outermost weights stay gathered
    assert not isinstance(bare.embed.weight, DTensor)
    bare.to(torch.bfloat16)
    assert said(bare) and bare.embed.weight.dtype == torch.bfloat16


def test_what_is_said_of_parameters_outlives_moves(seed: int) -> None:
    ranks.run(lasting, 2, seed % 2**31)


def gathered(rank: int, world: int, seed: int) -> None:
    """An optimizer that is made while weights are gathered would train copies."""
    mesh = pyshard.init_mesh(dp=world)
    tokens, target = batch(seed)
    for reshard in (None, False, 2):
        net = model(seed)
        pyshard.fully_shard(net, init_device_mesh("cpu", (4,)) if reshard == 2 else mesh, reshard_after_forward=reshard)
        good = pyshard.AdamW(net.parameters(), lr=0.01)
        with torch.no_grad():
            net(tokens)
        for make in (pyshard.AdamW, pyshard.ShardedAdamW, pyshard.Adam):
            with pytest.raises(ValueError, match=r"of the group, of shape \(\d+, .*gathered by full sharding, a copy"):
                make(net.parameters(), lr=0.01)
        extra = pyshard.AdamW([nn.Parameter(torch.ones(2))])
        with pytest.raises(ValueError, match=r"parameter 0 of the group, of shape \(1, 6\), is scale gathered"):
            extra.add_param_group({"params": iter(net.parameters())})
        assert len(extra.param_groups) == 1
        for module in net.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        before = net.embed.weight.full_tensor().clone()
        pyshard.AdamW(net.parameters(), lr=0.01)
        loss(net, tokens, target).backward()
        good.step()
        assert not torch.equal(net.embed.weight.full_tensor(), before)


def test_an_optimizer_of_gathered_weights_is_refused(seed: int) -> None:
    ranks.run(gathered, 4, seed % 2**31)
