"""What a load needs beside the state that it makes, measured by the kernel in real processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run
from reference import assert_same_bits
from torch import nn

import pyshard

MOMENTS = 2 * 4  # bytes of state for each element
# Metadata, modules that are imported by a first load, and the allocator's leftovers.
CONSTANT = 24 << 20
PARTS = 5  # the first has most elements: to hold one of its moments twice would take a third more than the state


def make_model(seed: int) -> nn.Module:
    model = nn.Module()
    generator = torch.Generator().manual_seed(seed)
    for index, rows in enumerate([16_000, *[1_000] * PARTS]):
        model.register_parameter(f"p{index}", nn.Parameter(torch.randn(rows, 1024, generator=generator)))
    return model


def counter(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) << 10


def saved_by_two(rank: int, world: int, path: str, seed: int) -> None:
    model = make_model(seed)
    opt = pyshard.ShardedAdamW(model.parameters(), lr=0.1, transport="collective")
    torch.stack([param.square().sum() for param in model.parameters()]).sum().backward()
    opt.step()
    pyshard.save_checkpoint(path, model, opt)


def grown_by_load(rank: int, world: int, path: str, seed: int) -> tuple[int, int]:
    """By how much the most memory that was ever in use exceeds what was before the load; and the state's bytes."""
    from torch.distributed.fsdp import fully_shard

    model = make_model(seed + 1)
    if world > 1:
        fully_shard(model)
        dist.barrier()
    opt = pyshard.AdamW(model.parameters(), lr=0.1)
    before = counter("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    assert counter("VmHWM") <= before + (4 << 20)  # or this kernel does not do that
    pyshard.load_checkpoint(path, model, opt)
    grown = counter("VmHWM") - before
    size = 0
    for items in opt.state.values():
        for value in (items["exp_avg"], items["exp_avg_sq"]):
            local = value.to_local() if world > 1 else value
            size += local.nbytes
            assert local.any()
        # of a first step with gradient 2p: the moments are 0.1 * 2p and 0.001 * (2p)^2
        wanted = (items["exp_avg"] / 0.2).square() * 0.004
        torch.testing.assert_close(items["exp_avg_sq"], wanted, rtol=1e-5, atol=0)  # a few roundings of 6e-8
    return grown, size


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell peak memory anew")
def test_a_load_needs_the_state_and_little_more(tmp_path: Path, seed: int) -> None:
    run(saved_by_two, 2, str(tmp_path), seed)
    whole = sum(param.numel() for param in make_model(seed).parameters()) * MOMENTS
    for world in (1, 2):
        for outcome in run(grown_by_load, world, str(tmp_path), seed):
            grown, size = outcome.value
            assert size == whole // world
            assert size * 0.9 <= grown <= size * 1.1 + CONSTANT, (world, grown, size)


def two_loads(rank: int, world: int, path: str, seed: int) -> int:
    """Growth of a second load, which finds all its memory there."""
    model = make_model(seed + 1)
    opt = pyshard.AdamW(model.parameters(), lr=0.1)
    pyshard.load_checkpoint(path, model, opt)
    held = {id(v): v.clone() for items in opt.state.values() for v in items.values() if v.dim()}
    before = counter("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    pyshard.load_checkpoint(path, model, opt)
    grown = counter("VmHWM") - before
    for items in opt.state.values():
        for value in items.values():
            if value.dim():
                assert_same_bits(value, held[id(value)], "in place")
    return grown


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell peak memory anew")
def test_a_second_load_needs_nothing(tmp_path: Path, seed: int) -> None:
    run(saved_by_two, 2, str(tmp_path), seed)
    assert run(two_loads, 1, str(tmp_path), seed)[0].value <= CONSTANT
