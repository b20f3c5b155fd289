"""Saves in the background: what is written is what was there at the call, whatever happens after it."""

import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from reference import assert_same_bits
from torch import Tensor, nn

import pyshard
from pyshard.checkpoint import AsyncSave, CheckpointError, background, files, load_checkpoint, save_checkpoint
from pyshard.comm import PeerError

F32, BF16 = torch.float32, torch.bfloat16
SHAPES = ((31, 17), (4097,), (), (5, 3, 7), (0, 3), (64, 129))


def model_of(seed: int, dtype: torch.dtype = BF16, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> nn.ParameterList:
    generator = torch.Generator().manual_seed(seed)
    model = nn.ParameterList([torch.randn(shape, generator=generator).to(dtype) for shape in shapes])
    model.register_buffer("mean", torch.randn(3, generator=generator))
    return model


def step(model: nn.Module, opt: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        value = torch.randn(param.shape, generator=generator).to(param.dtype)
        if hasattr(param, "device_mesh"):
            value = torch.distributed.tensor.distribute_tensor(value, param.device_mesh, param.placements)
        param.grad = value
    opt.step()
    opt.zero_grad()


def whole(model: nn.Module, opt: Any) -> dict[str, Tensor]:
    """Copies of all that a checkpoint holds."""
    full = lambda value: value.full_tensor() if hasattr(value, "full_tensor") else value  # noqa: E731
    found = {name: full(value).clone() for name, value in model.state_dict().items()}
    for i, items in opt.full_state_dict()["state"].items():
        found |= {f"{i}.{key}": full(value).clone() for key, value in items.items()}
    return found


def overwrite(model: nn.Module, opt: Any) -> None:
    """All that lies in memory."""
    values = [*model.parameters(), *model.buffers(), *(v for items in opt.state.values() for v in items.values())]
    with torch.no_grad():
        for value in values:
            local = getattr(value, "_local_tensor", value)
            local.fill_(77)
    opt.param_groups[0]["lr"] = 77.0


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    assert found.keys() == wanted.keys(), what
    for key, value in wanted.items():
        assert_same_bits(found[key], value, f"{what}: {key}")


# ---- copies ----


def _copies(rank: int, world: int, seed: int, root: str) -> None:
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    for kind in ("AdamW", "ShardedAdamW", "fsdp"):
        if kind == "ShardedAdamW" and world == 1:
            continue
        for dtype, more in ((BF16, {}), (BF16, {"master_weights": "fp32"}), (F32, {"amsgrad": True})):

            def build(seed: int, kind: str = kind, dtype: torch.dtype = dtype, more: Any = more) -> tuple[Any, Any]:
                shapes = tuple(shape for shape in SHAPES if shape or kind != "fsdp")  # torch cuts no 0-d ones
                model = model_of(seed, dtype, shapes)
                if kind == "fsdp":
                    pyshard.fully_shard(model, dist.init_device_mesh("cpu", (world,)))
                if kind == "ShardedAdamW":
                    return model, pyshard.ShardedAdamW(model.parameters(), timeout=60, **options, **more)
                return model, pyshard.AdamW(model.parameters(), **options, **more)

            path, what = Path(root) / f"{kind} {dtype} {more}", f"{kind} {dtype} {more}"
            model, opt = build(seed)
            again, other = build(seed + 1)
            memory = {}
            for i in range(2):
                step(model, opt, seed + i)
                expected = whole(model, opt)
                numbers = torch.arange(5)
                handle = save_checkpoint(path, model, opt, async_save=True, i=i, numbers=numbers)
                assert isinstance(handle, AsyncSave)
                numbers.fill_(77)
                overwrite(model, opt)
                handle.wait()
                assert handle.done() and "done" in repr(handle)
                # Copies of what this rank writes, in the memory of the last ones.
                places = {index: copy.data_ptr() for index, copy in background._spare.items() if copy.numel()}
                assert not memory or places == memory, what
                memory = places
                assert load_checkpoint(path, again, other)["i"] == i
                assert_same(whole(again, other), expected, f"{what} {i}")
                assert other.param_groups[0]["lr"] == 0.01
                loaded = load_checkpoint(path, model, opt)
                assert torch.equal(loaded["numbers"], torch.arange(5))
            copied = torch.tensor([sum(copy.nbytes for copy in background._spare.values())])
            if world > 1:
                every = [torch.empty_like(copied) for _ in range(world)]
                dist.all_gather(every, copied)
                copied = sum(every)  # type: ignore[assignment]
                assert max(every) <= copied * 0.75, "one rank copies nearly all"  # type: ignore[type-var]
            total = sum(value.nbytes for value in expected.values())
            assert total <= int(copied) <= total + 200, what  # a learning rate in a tensor and the like
            save_checkpoint(path, model, opt)
            assert not background._spare, "a save without copies frees their memory"
            for each in (opt, other):
                if hasattr(each, "close"):
                    each.close()


@pytest.mark.parametrize("world", [1, 3])
def test_what_is_written_was_there_at_the_call(seed: int, tmp_path: Path, world: int) -> None:
    """Everything is overwritten as soon as the call returns."""
    run(_copies, world, seed % 2**30, str(tmp_path), seconds=100)


def test_training_goes_on(seed: int, tmp_path: Path) -> None:
    """Steps are made while some 200 MB are written."""
    model = model_of(seed, F32, ((2000, 4000), (8_000_000,)))
    opt = pyshard.AdamW(model.parameters(), lr=0.01)
    step(model, opt, seed)
    expected = whole(model, opt)
    handle = save_checkpoint(tmp_path, model, opt, async_save=True)
    steps = 0
    while not handle.done():
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        opt.step()
        steps += 1
    handle.wait()
    assert steps > 0
    assert float(opt.state[model[0]]["step"]) == 1 + steps
    again = model_of(seed + 1, F32, ((2000, 4000), (8_000_000,)))
    other = pyshard.AdamW(again.parameters())
    load_checkpoint(tmp_path, again, other)
    assert_same(whole(again, other), expected, "after steps")


# ---- the handle, and several saves ----


def big(seed: int) -> tuple[nn.Module, pyshard.AdamW]:
    model = model_of(seed, F32, ((5_000_000,),))
    return model, pyshard.AdamW(model.parameters(), lr=0.01)


def test_waiting_with_a_timeout(seed: int, tmp_path: Path) -> None:
    """A save that cannot go on: what it is about to open, to replace the pointer, is a pipe that nobody reads."""
    model, opt = big(seed)
    save_checkpoint(tmp_path, model, opt, i=1)
    pipe = tmp_path / "latest.tmp"
    os.mkfifo(pipe)
    handle = save_checkpoint(tmp_path, model, opt, async_save=True, i=2)
    for timeout in (0, 0.1):
        with pytest.raises(TimeoutError, match=rf"is not done after {timeout} s; it goes on"):
            handle.wait(timeout)
    assert not handle.done() and "going on" in repr(handle)
    step(model, opt, seed)
    with open(pipe, "rb"):  # it goes on, and fails: a pipe is not kept
        with pytest.raises(CheckpointError, match=r"Errno 22.*Complete checkpoints in"):
            handle.wait(60)
    assert handle.done()
    pipe.unlink()
    assert load_checkpoint(tmp_path, model, opt) == {"i": 1}
    save_checkpoint(tmp_path, model, opt, async_save=True, i=3).wait()
    assert load_checkpoint(tmp_path, model, opt) == {"i": 3}


def test_one_after_the_other(seed: int, tmp_path: Path) -> None:
    """Saves and loads wait for the one that is going on."""
    model, opt = big(seed)
    first = save_checkpoint(tmp_path, model, opt, async_save=True, i=1)
    second = save_checkpoint(tmp_path, model, opt, async_save=True, i=2)
    assert first.done()
    assert load_checkpoint(tmp_path, model, opt) == {"i": 2}
    assert second.done()
    third = save_checkpoint(tmp_path, model, opt, async_save=True, i=3)
    save_checkpoint(tmp_path, model, opt, i=4)
    assert third.done()
    assert load_checkpoint(tmp_path, model, opt) == {"i": 4}
    assert len(list(tmp_path.glob("0*"))) == 2
    for handle in (first, second, third):
        handle.wait(0)


def _failing(rank: int, world: int, seed: int, root: str) -> list[str]:
    """What an error of rank 1 is on this one, asked for and not asked for."""
    model = model_of(seed)
    opt = pyshard.ShardedAdamW(model.parameters(), timeout=60) if world > 1 else pyshard.AdamW(model.parameters())
    step(model, opt, seed)
    expected, said = whole(model, opt), []
    save_checkpoint(root, model, opt, i=1)

    def fail() -> AsyncSave:
        if rank == world - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, -1))
        handle = save_checkpoint(root, model, opt, async_save=True, i=2)
        background.finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        return handle

    handle = fail()
    assert handle.done() and "failed" in repr(handle)
    for _ in range(2):
        with pytest.raises(CheckpointError) as found:
            handle.wait()
        said.append(str(found.value))
    assert found.value.rank == world - 1
    save_checkpoint(root, model, opt, i=3)  # it has been told
    fail()
    with pytest.raises(CheckpointError) as found:
        load_checkpoint(root, model, opt)
    said.append(str(found.value))
    fail()
    if rank == 0 and world > 1:  # it is told here only: the next save is an error of all the same
        with pytest.raises(CheckpointError):
            background._newest.wait()  # type: ignore[union-attr]
    with pytest.raises(CheckpointError) as found:
        save_checkpoint(root, model, opt, i=4)
    said.append(str(found.value))
    with pytest.raises(ValueError, match=r"async_save=\w+ on rank \d and" if world > 1 else "keep=0"):
        save_checkpoint(root, model, opt, async_save=rank == 0, keep=1 if world > 1 else 0)
    step(model, opt, seed + 1)
    assert load_checkpoint(root, model, opt) == {"i": 3}
    assert_same(whole(model, opt), expected, "the one before")
    assert len(list(Path(root).glob("0*"))) == 2, "what failed is removed"
    if hasattr(opt, "close"):
        opt.close()
    return said


@pytest.mark.parametrize("world", [1, 2])
def test_a_failure(seed: int, tmp_path: Path, world: int) -> None:
    for outcome in run(_failing, world, seed % 2**30, str(tmp_path)):
        where = " on rank 1" if world > 1 else ""
        for text in outcome.value[2:]:
            assert "the save in the background before this has failed" in text
        for text in outcome.value:
            assert re.search(rf"save_checkpoint: failed{where} while writing: OSError: \[Errno 27\]", text), text


def _killed(rank: int, world: int, root: str) -> tuple[str, int | None, str]:
    model = nn.ParameterList([nn.Parameter(torch.ones(20_000) * i) for i in range(4)])
    opt = pyshard.ShardedAdamW(model.parameters(), transport="collective", timeout=60)
    save_checkpoint(root, model, opt, i=1)
    if rank == 1:  # when its data is written
        files.sync_directory = lambda path: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    handle = save_checkpoint(root, model, opt, async_save=True, i=2)
    try:
        handle.wait()
    except PeerError as error:
        return str(error), error.rank, error.operation
    raise AssertionError("no error")


def test_a_killed_rank(tmp_path: Path) -> None:
    outcomes = run(_killed, 3, str(tmp_path), quiet=True, seconds=60)
    for rank in (0, 2):
        assert outcomes[rank].error is None, outcomes[rank].trace
        text, lost, operation = outcomes[rank].value
        assert (lost, operation) == (1, "writing") and "Complete checkpoints in" in text
    model = nn.ParameterList([nn.Parameter(torch.zeros(20_000)) for i in range(4)])
    assert load_checkpoint(tmp_path, model, pyshard.AdamW(model.parameters())) == {"i": 1}
    assert torch.equal(model[3], torch.full((20_000,), 3.0))


def _without_groups(rank: int, world: int, root: str) -> None:
    """The groups of training may be gone before the save is done."""
    model = nn.ParameterList([nn.Parameter(torch.ones(2_000_000) * i) for i in range(3)])
    handle = save_checkpoint(root, model, None, async_save=True)
    dist.barrier()
    dist.destroy_process_group()
    handle.wait()


def test_the_process_groups_end_first(tmp_path: Path) -> None:
    run(_without_groups, 2, str(tmp_path))
    model = nn.ParameterList([nn.Parameter(torch.zeros(2_000_000)) for i in range(3)])
    load_checkpoint(tmp_path, model, None)
    assert torch.equal(model[2], torch.full((2_000_000,), 2.0))


# ---- the end of the process ----

_PROGRAM = """
import os, resource, signal, sys, time
from pathlib import Path
import torch
import pyshard

root, how = Path(sys.argv[1]), sys.argv[2]
model = torch.nn.ParameterList([torch.ones(5_000_000)])
opt = pyshard.AdamW(model.parameters())
model[0].grad = torch.ones_like(model[0])
opt.step()
pyshard.save_checkpoint(root, model, opt, i=1)
if how == "killed":
    os.mkfifo(root / "latest.tmp")  # nobody reads it: the save stops there
if how == "fails":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
handle = pyshard.save_checkpoint(root, model, opt, async_save=True, i=2)
if how == "killed":
    while not list(root.glob("000002-*/manifest.json")):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
if how == "raises":
    raise KeyError("of the program")
"""


def program(root: Path, how: str) -> subprocess.CompletedProcess[str]:
    package = str(Path(pyshard.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _PROGRAM, str(root), how]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("how", ["ends", "raises", "fails", "killed"])
def test_the_process_ends_first(tmp_path: Path, how: str) -> None:
    """A process that comes to its end waits; one that is killed in the middle leaves the previous checkpoint."""
    done = program(tmp_path, how)
    loaded = {"ends": 2, "raises": 2, "fails": 1, "killed": 1}[how]
    assert done.returncode == {"ends": 0, "raises": 1, "fails": 0, "killed": -signal.SIGKILL}[how], done.stderr
    if how == "fails":
        assert re.search(
            r"UserWarning: pyshard: the save to .* in the background has failed: .*File too large", done.stderr
        )
    (tmp_path / "latest.tmp").unlink(missing_ok=True)
    model = nn.ParameterList([torch.zeros(5_000_000)])
    opt = pyshard.AdamW(model.parameters())
    assert load_checkpoint(tmp_path, model, opt) == {"i": loaded}
    assert float(opt.state[model[0]]["step"]) == 1
    save_checkpoint(tmp_path, model, opt, i=3)
    assert len(list(tmp_path.glob("0*"))) == 2, "what a dead save has left is removed"
