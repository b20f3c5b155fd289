"""Checkpoints of fully sharded models between forwards without backward, and of blocks that are computed again."""

from pathlib import Path
from typing import Any

import ranks
import torch
from fully_shard_cases import batch, model, train
from pp_cases import build
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import pyshard
from pyshard.checkpoint import load_checkpoint, save_checkpoint


def wholes(net: nn.Module) -> dict[str, Tensor]:
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    found = {}
    for name, param in net.named_parameters():
        whole = param.full_tensor() if isinstance(param, DTensor) else param
        found[name.replace("_checkpoint_wrapped_module.", "")] = whole.detach().clone()
    return found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


# ---- after a forward without backward ----


def evaluated(rank: int, world: int, seed: int, root: str) -> None:
    mesh = pyshard.init_mesh(dp=world)
    tokens = batch(seed)[0]

    def logits(net: nn.Module) -> Tensor:
        with torch.no_grad():
            return net(tokens)

    for units in (None, []):  # []: one unit, all of whose parameters stay gathered
        path = f"{root}/{units}"
        net, other = model(seed), model(seed + 1)
        for each in (net, other):
            pyshard.fully_shard(each, mesh, param_dtype=None, units=units)
        opt, its = (pyshard.AdamW(each.parameters(), lr=0.01) for each in (net, other))
        train(net, opt, seed, rank, world, steps=2)
        wanted, expected = wholes(net), logits(net)
        assert not isinstance(net.embed.weight, DTensor)  # what all of this is about
        save_checkpoint(f"{path}/a", net, opt)
        logits(net)
        save_checkpoint(f"{path}/b", net, opt, async_save=True).wait()
        logits(net)
        pyshard.export_safetensors(f"{path}/c", net)
        for way in "abc":
            with torch.no_grad():
                for module in other.modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()
                for param in other.parameters():
                    param.mul_(0.5)
            logits(other)
            if way == "c":
                pyshard.load_safetensors(f"{path}/c", other)
            else:
                load_checkpoint(f"{path}/{way}", other, its)
            assert torch.equal(logits(other), expected)  # not the weights that were gathered before
            assert_same(wholes(other), wanted)
        logits(net), logits(other)
        assert train(net, opt, seed + 7, rank, world) == train(other, its, seed + 7, rank, world)
        assert_same(wholes(net), wholes(other))


def test_after_an_evaluation(seed: int, tmp_path: Path) -> None:
    ranks.run(evaluated, 2, seed % 2**31, str(tmp_path))


def evaluated_pipeline(rank: int, world: int, seed: int, root: str) -> None:
    mesh = pyshard.init_mesh(dp=2, pp=2)
    sizes = {"n_layer": 2, "n_embd": 12, "vocab_size": 31}
    pipe, other = (pyshard.pp.pipeline(build("gpt2", seed + i, **sizes), mesh, n_microbatches=2) for i in range(2))
    tokens = torch.randint(31, (4, 7), generator=torch.Generator().manual_seed(seed))
    opts = []
    for each in (pipe, other):
        pyshard.fully_shard(each, mesh)
        opts.append(pyshard.AdamW(each.parameters(), lr=0.01))
    pipe.step(tokens, target=tokens)
    opts[0].step(), opts[0].zero_grad()
    wanted = wholes(pipe)
    pipe.evaluate(tokens, target=tokens)
    save_checkpoint(f"{root}/a", pipe, opts[0])
    pipe.evaluate(tokens, target=tokens)
    pyshard.export_safetensors(f"{root}/c", pipe)
    other.evaluate(tokens, target=tokens)
    assert all(isinstance(param, DTensor) for param in other.parameters())  # pipelines take them back themselves
    load_checkpoint(f"{root}/a", other, opts[1])
    assert_same(wholes(other), wanted)


def test_after_an_evaluation_of_a_pipeline(seed: int, tmp_path: Path) -> None:
    ranks.run(evaluated_pipeline, 4, seed % 2**31, str(tmp_path))


# ---- blocks that are computed again in backward ----


def again(net: nn.Module, kind: str) -> nn.Module:
    apply_activation_checkpointing(net, check_fn=lambda module: type(module).__name__ == kind)
    assert any("_checkpoint_wrapped_module" in name for name, _ in net.named_parameters())
    return net


def wrapped(rank: int, world: int, seed: int, root: str) -> None:
    mesh = pyshard.init_mesh(dp=world)
    for to_wrapped in (False, True):
        path = f"{root}/{to_wrapped}"
        net, other = model(seed), model(seed + 1)
        again(other if to_wrapped else net, "Block")
        for each in (net, other):
            pyshard.fully_shard(each, mesh, units=["Block"], param_dtype=None)
            names = [name for name, module in each.named_modules() if isinstance(module, FSDPModule)]
            assert names == ["", "blocks.0", "blocks.1", "blocks.2"]
        opt, its = (pyshard.AdamW(each.parameters(), lr=0.01) for each in (net, other))
        train(net, opt, seed, rank, world, steps=2)
        save_checkpoint(f"{path}/a", net, opt)
        pyshard.export_safetensors(f"{path}/c", net)
        load_checkpoint(f"{path}/a", other, its)
        assert_same(wholes(other), wholes(net))
        assert train(net, opt, seed + 7, rank, world) == train(other, its, seed + 7, rank, world)
        whole = model(seed + 2)
        load_checkpoint(f"{path}/a", whole, None)
        pyshard.load_safetensors(f"{path}/c", other)
        assert_same(wholes(other), wholes(whole))


def test_blocks_that_are_computed_again(seed: int, tmp_path: Path) -> None:
    ranks.run(wrapped, 2, seed % 2**31, str(tmp_path))


def wrapped_parts(rank: int, world: int, seed: int, root: str) -> None:
    """Over tensor-parallel ranks, and over stages."""
    sizes = {"n_layer": 2, "n_embd": 12, "vocab_size": 31}
    tokens = torch.randint(31, (4, 7), generator=torch.Generator().manual_seed(seed))

    def built(seed: int, way: str) -> Any:
        net = build("gpt2", seed, **sizes)
        mesh = pyshard.init_mesh(**{way: world})
        if way == "pp":
            return pyshard.pp.pipeline(again(net, "GPT2Block"), mesh, n_microbatches=2)
        pyshard.tp.parallelize(net, mesh)
        return again(net, "GPT2Block")

    for way in ("tp", "pp"):
        net = built(seed, way)
        opt = pyshard.AdamW(net.parameters(), lr=0.01)
        if way == "pp":
            net.step(tokens, target=tokens)
        else:
            net(input_ids=tokens, labels=tokens).loss.backward()
        opt.step()
        save_checkpoint(f"{root}/{way}", net, opt)
        pyshard.export_safetensors(f"{root}/{way} exported", net)
        other = built(seed + 1, way)
        load_checkpoint(f"{root}/{way}", other, pyshard.AdamW(other.parameters()))
        assert_same(wholes(other), wholes(net))


def test_parts_of_blocks_that_are_computed_again(seed: int, tmp_path: Path) -> None:
    ranks.run(wrapped_parts, 2, seed % 2**31, str(tmp_path))
    found = []
    for way in ("tp", "pp"):
        net = build("gpt2", seed % 2**31 + 5, n_layer=2, n_embd=12, vocab_size=31)
        opt = pyshard.AdamW(net.parameters())
        load_checkpoint(tmp_path / way, net, opt)
        assert len(opt.state) == len(list(net.parameters()))
        found.append(wholes(net))
        pyshard.load_safetensors(tmp_path / f"{way} exported", net)
        assert_same(found[-1], wholes(net))
    for name, value in found[0].items():  # one step of Adam from the same weights: each moves by 0.01 at most
        torch.testing.assert_close(value, found[1][name], rtol=0, atol=0.021, msg=name)
