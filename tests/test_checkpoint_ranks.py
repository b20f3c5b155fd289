"""Checkpoints on several ranks: saved at one number of them and loaded at another, and failures of one of them."""

import os
import re
import resource
import signal
import subprocess
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run
from reference import assert_same_bits
from sharded_cases import Case, parameters
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pyshard
from pyshard.checkpoint import CheckpointError, files, load_checkpoint, save_checkpoint
from pyshard.comm import PeerError
from pyshard.optim.flat_shard import FlatShard

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"dtypes": (F32,), "options": {"amsgrad": True}},
    "mixed": {"dtypes": (BF16, F32, F16), "options": {}},
    "bf16 master": {"dtypes": (BF16,), "options": {"master_weights": "fp32"}},
}


def model_of(kind: str, seed: int) -> nn.ParameterList:
    return nn.ParameterList(parameters(Case(seed, dtypes=KINDS[kind]["dtypes"])))


def optimizer_of(kind: str, model: nn.Module, group: Any = None, cls: Any = None, **options: Any) -> Any:
    """A ShardedAdamW over the group, or an optimizer of whole state."""
    options = {"lr": 0.01, "weight_decay": 0.1, **KINDS[kind]["options"], **options}
    if cls is not None:
        return cls(model.parameters(), **options)
    return pyshard.ShardedAdamW(model.parameters(), process_group=group, transport="collective", timeout=60, **options)


def set_gradients(model: nn.Module, seed: int, zero: bool = False) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        value = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = torch.zeros_like(param) if zero else torch.empty_like(param).copy_(value)


def step(model: nn.Module, optimizer: Any, seed: int, zero: bool = False) -> None:
    set_gradients(model, seed, zero)
    optimizer.step()
    optimizer.zero_grad()


def whole(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Weights and state as whole tensors, copied."""
    held = optimizer.full_state_dict() if hasattr(optimizer, "full_state_dict") else optimizer.state_dict()
    found = {f"param {i}": p.detach().clone() for i, p in enumerate(model.parameters())}
    for i, items in held["state"].items():
        found |= {f"{key} {i}": value.clone() for key, value in items.items()}
    return found


def addresses(optimizer: Any) -> list[int]:
    """Where the state is in memory."""
    return [t.data_ptr() for items in optimizer.state.values() for _, t in sorted(items.items()) if t.numel() > 1]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert found.keys() == expected.keys(), f"{what}: {found.keys() ^ expected.keys()}"
    for key, value in expected.items():
        assert_same_bits(found[key], value, f"{what}: {key}")


def close(*optimizers: Any) -> None:
    for optimizer in optimizers:
        if hasattr(optimizer, "close"):
            optimizer.close()


# ---- any number of ranks to any other ----


def _any_to_any(rank: int, world: int, seed: int, root: str, kind: str) -> None:
    groups = {n: dist.new_group(list(range(n))) for n in range(1, world + 1)}
    expected: dict[str, dict[str, Tensor]] = {}
    later: dict[str, dict[str, Tensor]] = {}

    def check(name: str, model: nn.Module, optimizer: Any, what: str) -> None:
        """The state is the saved one, and the next step uses it: gradients of zero leave it all to the state."""
        assert load_checkpoint(Path(root) / name, model, optimizer) == {"name": name}
        assert optimizer.param_groups[0]["lr"] == 0.01
        assert_same(whole(model, optimizer), expected[name], f"{name} to {what}")
        step(model, optimizer, 0, zero=True)
        found = whole(model, optimizer)
        assert_same(found, later.setdefault(name, found), f"{name} to {what}, a step later")

    def saved(name: str, model: nn.Module, optimizer: Any) -> None:
        save_checkpoint(Path(root) / name, model, optimizer, name=name)
        expected[name] = whole(model, optimizer)

    for old in range(1, world + 1):
        name = f"ranks{old}"
        if rank < old:
            model = model_of(kind, seed)
            optimizer = optimizer_of(kind, model, groups[old])
            for i in range(2):
                step(model, optimizer, seed + 10 * i + rank)
            saved(name, model, optimizer)
            close(optimizer)
        everything = [expected.get(name)]
        dist.broadcast_object_list(everything)
        expected[name] = everything[0]  # type: ignore[assignment]
    # Whole state, the same on all ranks, which write it together.
    model = model_of(kind, seed + 1)
    optimizer = optimizer_of(kind, model, cls=pyshard.AdamW)
    step(model, optimizer, seed + 3)
    saved("whole", model, optimizer)

    for name in expected:
        for new in range(1, world + 1):
            if rank < new:
                model = model_of(kind, seed + 5)
                optimizer = optimizer_of(kind, model, groups[new], lr=0.7)
                check(name, model, optimizer, f"{new} fresh ranks")
                mine = sum(t.nbytes for items in optimizer.state.values() for t in items.values() if t.dim())
                total = sum(v.nbytes for k, v in expected[name].items() if "param" not in k and "step" not in k)
                assert mine <= total / new + 16 * 4096 * new, f"{mine} of {total} bytes on one of {new} ranks"
                for i in range(2):
                    step(model, optimizer, seed + 20 + i + rank)
                there = addresses(optimizer)
                check(name, model, optimizer, f"{new} trained ranks")
                assert addresses(optimizer) == there, "not in place"
                close(optimizer)
            dist.barrier()
        model = model_of(kind, seed + 6)
        check(name, model, optimizer_of(kind, model, cls=pyshard.AdamW, lr=0.3), "whole state on all ranks")
    if kind == "fp32":
        for name in expected:
            model = model_of(kind, seed + 6)
            optimizer = optimizer_of(kind, model, cls=torch.optim.AdamW, lr=0.3)
            load_checkpoint(Path(root) / name, model, optimizer)
            assert_same(whole(model, optimizer), expected[name], f"{name} to torch")
        save_checkpoint(Path(root) / "torch", model, optimizer, name="torch")
        expected["torch"] = whole(model, optimizer)
        model = model_of(kind, seed + 7)
        optimizer = optimizer_of(kind, model)
        check("torch", model, optimizer, "ranks from torch")
        close(optimizer)
    dist.barrier()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_ranks_to_any_other(seed: int, tmp_path: Path, kind: str) -> None:
    """1 to 4 ranks, and whole state on all of them, each to each: weights, moments and masters bit for bit."""
    run(_any_to_any, 4, seed % 2**30, str(tmp_path), kind, seconds=280)


def _through_torch(rank: int, world: int, seed: int, root: str, kind: str) -> None:
    """torch's get_ and set_optimizer_state_dict with dcp.save and dcp.load, and its options."""
    warnings.simplefilter("ignore")
    groups = {n: dist.new_group(list(range(n))) for n in (2, 3)}
    path = Path(root) / "saved"
    everything: list[Any] = [None]
    if rank < 2:
        model = model_of(kind, seed)
        optimizer = optimizer_of(kind, model, groups[2])
        for i in range(2):
            step(model, optimizer, seed + 10 * i + rank)
        state = get_optimizer_state_dict(model, optimizer)
        assert isinstance(state["state"]["0"]["exp_avg"], FlatShard)
        dcp.save({"m": get_model_state_dict(model), "o": state}, checkpoint_id=path, process_group=groups[2])
        flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
        dcp.save(flat, checkpoint_id=Path(root) / "flat", process_group=groups[2])
        everything = [whole(model, optimizer)]
        close(optimizer)
    dist.broadcast_object_list(everything)
    expected = everything[0]

    model = model_of(kind, seed + 1)
    optimizer = optimizer_of(kind, model, groups[3], lr=0.5)
    for trained in (False, True):
        if trained:
            step(model, optimizer, seed + rank)
        state = {"m": get_model_state_dict(model), "o": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=path)
        set_model_state_dict(model, state["m"])
        set_optimizer_state_dict(model, optimizer, state["o"])
        assert_same(whole(model, optimizer), expected, "2 to 3 ranks")
        step(model, optimizer, 0, zero=True)
        later = whole(model, optimizer)
        other = model_of(kind, seed + 2)
        again = optimizer_of(kind, other, cls=pyshard.AdamW)
        state = {"m": get_model_state_dict(other), "o": get_optimizer_state_dict(other, again)}
        dcp.load(state, checkpoint_id=path)
        set_model_state_dict(other, state["m"])
        set_optimizer_state_dict(other, again, state["o"])
        assert_same(whole(other, again), expected, "to whole state")
        step(other, again, 0, zero=True)
        assert_same(later, whole(other, again), "a step later")

    set_model_state_dict(model, {str(i): expected[f"param {i}"] for i in range(len(model))})
    if kind != "mixed":  # torch takes the names of the state in memory for those saved, which split weights have not
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        flat = get_optimizer_state_dict(model, optimizer, options=options)
        dcp.load(flat, checkpoint_id=Path(root) / "flat")
        set_optimizer_state_dict(model, optimizer, flat, options=options)
        assert_same(whole(model, optimizer), expected, "flattened")
    else:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        flat = get_optimizer_state_dict(model, optimizer, options=options)
        with pytest.raises(ValueError, match=r"flatten_optimizer_state_dict=True.*master_weights='fp32'"):
            set_optimizer_state_dict(model, optimizer, flat, options=options)
        state = get_optimizer_state_dict(model, optimizer)
        dcp.load({"o": state}, checkpoint_id=path)
        set_optimizer_state_dict(model, optimizer, state)

    # Whole tensors, asked for through torch: on all ranks, or in the memory of the first one.
    for offload in (False, True):
        options = StateDictOptions(full_state_dict=True, cpu_offload=offload)
        found = get_optimizer_state_dict(model, optimizer, options=options)
        if offload and rank > 0:
            assert not found
            continue
        for i, items in ((int(name), items) for name, items in found["state"].items()):
            for key, value in items.items():
                assert type(value) is Tensor
                assert_same_bits(value, expected[f"{key} {i}"], f"full {key} {i}")
    options = StateDictOptions(full_state_dict=True)
    found = get_optimizer_state_dict(model, optimizer, options=options)
    for param in model.parameters():
        optimizer.state[param]["exp_avg"].fill_(7.0)
    set_optimizer_state_dict(model, optimizer, found, options=options)
    assert_same(whole(model, optimizer), expected, "from whole tensors")
    for param in model.parameters():
        optimizer.state[param]["exp_avg"].fill_(7.0)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, optimizer, found if rank == 0 else {}, options=options)
    assert_same(whole(model, optimizer), expected, "from the first rank's whole tensors")

    # In the CPU's memory: the run of each rank still.
    options = StateDictOptions(cpu_offload=True)
    found = get_optimizer_state_dict(model, optimizer, options=options)
    assert isinstance(found["state"]["0"]["exp_avg"], FlatShard)

    # The state_dict of another cut is refused, before anything is changed.
    held = optimizer.state_dict()
    if rank < 2:
        other = model_of(kind, seed)
        fewer = optimizer_of(kind, other, groups[2])
        with pytest.raises(ValueError, match=r"FlatShard.*which this rank owns"):
            fewer.load_state_dict(held)
        assert not fewer.state
        close(fewer)
    close(optimizer)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KINDS)
def test_through_torchs_functions(seed: int, tmp_path: Path, kind: str) -> None:
    run(_through_torch, 3, seed % 2**30, str(tmp_path), kind, seconds=280)


def _others(rank: int, world: int, seed: int, root: str) -> None:
    """DDP's wrapper leaves no trace in names; FSDP2's shards go to whole tensors and back."""

    def network(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 3))

    def train(model: nn.Module, optimizer: Any) -> None:
        for i in range(2):
            model(torch.randn(4, 6, generator=torch.Generator().manual_seed(i))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    mesh = init_device_mesh("cpu", (world,))
    alone = {r: dist.new_group([r]) for r in range(world)}[rank]
    plain = network(seed)
    wrapped = nn.parallel.DistributedDataParallel(plain)
    optimizer = pyshard.AdamW(wrapped.parameters(), lr=0.01)
    train(wrapped, optimizer)
    save_checkpoint(Path(root) / "ddp", wrapped, optimizer)
    expected = whole(plain, optimizer)

    one = network(seed + 1)
    again = pyshard.AdamW(one.parameters())
    again.process_group = alone  # type: ignore[attr-defined]  # as if in a process of its own
    load_checkpoint(Path(root) / "ddp", one, again)
    assert_same(whole(one, again), expected, "from DDP to one process")
    back = nn.parallel.DistributedDataParallel(network(seed + 2))
    optimizer = pyshard.AdamW(back.parameters())
    load_checkpoint(Path(root) / "ddp", back, optimizer)
    assert_same(whole(back.module, optimizer), expected, "from DDP to DDP")

    sharded = network(seed + 3)
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    optimizer = pyshard.AdamW(sharded.parameters())
    load_checkpoint(Path(root) / "ddp", sharded, optimizer)
    found = {f"param {i}": p.full_tensor().detach() for i, p in enumerate(sharded.parameters())}
    for i, items in optimizer.state_dict()["state"].items():
        found |= {f"{k} {i}": v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in items.items()}
    assert_same(found, expected, "from DDP to FSDP2")
    save_checkpoint(Path(root) / "fsdp", sharded, optimizer)
    load_checkpoint(Path(root) / "fsdp", one, again)
    assert_same(whole(one, again), expected, "from FSDP2 to one process")

    first = torch.distributed.fsdp.FullyShardedDataParallel(network(seed), device_id=torch.device("cpu"))
    with pytest.raises(TypeError, match=r"FullyShardedDataParallel modules.*Use torch's fully_shard"):
        save_checkpoint(Path(root) / "fsdp1", first, None)


def test_wrappers(seed: int, tmp_path: Path) -> None:
    run(_others, 2, seed % 2**30, str(tmp_path))


def _frozen(rank: int, world: int, root: str) -> None:
    """State of a parameter that is not trained any more comes and goes with the rest."""
    model = nn.ParameterList([nn.Parameter(torch.full((5000,), float(i))) for i in range(3)])
    optimizer = pyshard.ShardedAdamW(model.parameters(), transport="collective", timeout=60)
    step(model, optimizer, 1)
    save_checkpoint(Path(root) / "a", model, optimizer)
    expected = whole(model, optimizer)
    for how in ("load_checkpoint", "load_state_dict"):
        other = nn.ParameterList([nn.Parameter(torch.zeros(5000), requires_grad=i != 1) for i in range(3)])
        again = pyshard.ShardedAdamW(other.parameters(), transport="collective", timeout=60)
        if how == "load_checkpoint":
            load_checkpoint(Path(root) / "a", other, again)
        else:
            other.load_state_dict(model.state_dict())
            again.load_state_dict(optimizer.full_state_dict())
        assert_same(whole(other, again), expected, how)
        save_checkpoint(Path(root) / how, other, again)
        close(again)
    alone = nn.ParameterList([nn.Parameter(torch.zeros(5000)) for _ in range(3)])
    last = pyshard.AdamW(alone.parameters())
    load_checkpoint(Path(root) / "load_state_dict", alone, last)
    assert_same(whole(alone, last), expected, "saved again")
    close(optimizer)


def test_state_of_a_frozen_parameter(tmp_path: Path) -> None:
    run(_frozen, 2, str(tmp_path))


# ---- failures ----


def _failures(rank: int, world: int, seed: int, root: str) -> list[str]:
    """What each failure says on this rank."""
    kind, said = "mixed", []
    model = model_of(kind, seed)
    optimizer = optimizer_of(kind, model)
    step(model, optimizer, seed + rank)
    save_checkpoint(root, model, optimizer, i=1)
    expected = whole(model, optimizer)
    step(model, optimizer, seed + rank)

    def fails(error: type[BaseException], call: Any) -> None:
        with pytest.raises(error) as found:
            call()
        said.append(f"{type(found.value).__name__} {getattr(found.value, 'rank', None)} {found.value}")

    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, -1))
    fails(CheckpointError, lambda: save_checkpoint(root, model, optimizer, i=2))
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    fails(ValueError, lambda: save_checkpoint(f"{root}/{rank}", model, optimizer))
    fails(TypeError, lambda: save_checkpoint(root, model, optimizer, what=print if rank == 0 else 1))
    fails(ValueError, lambda: save_checkpoint(root, model, optimizer, keep=2 - rank))
    different = nn.ParameterList([nn.Parameter(torch.zeros(3 + rank))])
    fails(ValueError, lambda: save_checkpoint(root, different, None))
    other = nn.ParameterList([nn.Parameter(torch.zeros(3))])
    fails(ValueError, lambda: load_checkpoint(root, other if rank == 2 else model, None))

    # A changed byte: only the rank that checks this block sees it, and all say so.
    files.BLOCK = 1000
    save_checkpoint(root, model, optimizer, i=3)
    newest = next(Path(root).glob("000002-*"))
    for name in ("__0_0.distcp", "__1_0.distcp", "__2_0.distcp", ".metadata"):
        path = newest / name
        good = path.read_bytes()
        dist.barrier()
        if rank == 0:
            path.write_bytes(good[:1500] + bytes([good[1500] ^ 4]) + good[1501:])
        dist.barrier()
        before = whole(model, optimizer)
        fails(CheckpointError, lambda: load_checkpoint(root, model, optimizer))
        assert_same(whole(model, optimizer), before, "after an error")
        dist.barrier()
        if rank == 0:
            path.write_bytes(good)
        dist.barrier()
    assert load_checkpoint(root, model, optimizer) == {"i": 3}
    assert load_checkpoint(next(Path(root).glob("000001-*")), model, optimizer) == {"i": 1}
    assert_same(whole(model, optimizer), expected, "the first checkpoint")

    group = dist.new_group([0, 2])
    optimizer.process_group = group
    if rank == 1:
        fails(ValueError, lambda: save_checkpoint(root, model, optimizer))
    dist.barrier()
    return said


def test_a_failure_of_one_rank_is_an_error_of_all(seed: int, tmp_path: Path) -> None:
    outcomes = run(_failures, 3, seed % 2**30, str(tmp_path))
    first, second, third = (outcome.value for outcome in outcomes)
    assert second[-1].startswith("ValueError None pyshard.save_checkpoint: this process, rank 1, is not in")
    assert first == second[:-1] == third
    full, paths, extra, keep, different, model, *damage = first
    assert re.match(r"CheckpointError 1 .*: failed on rank 1 while writing: OSError: \[Errno 27\].*__1_0\.distcp", full)
    assert re.match(rf"ValueError .*path is '{tmp_path}/1' on rank 1 and '{tmp_path}/0' on rank 0; expected", paths)
    assert re.match(r"TypeError .*the extra value what \(builtin_function_or_method\) cannot be loaded", extra)
    assert re.match(r"ValueError .*keep=0; expected a whole number, at least 1", keep)
    assert re.match(
        r"ValueError .*model\.0 is torch\.float32 \(3,\) on rank 0 and .* \(4,\) on rank 1; expec", different
    )
    assert re.match(r"ValueError .*has model\.1, model\.2, .* which the model does not have", model)
    for name, text in zip(("__0_0", "__1_0", "__2_0", ".metadata"), damage, strict=True):
        assert re.match(rf"CheckpointError \d .*while checking its files: RuntimeError: .*{name}.* is damaged", text)
        assert "bytes [1000, 2000)" in text and "Nothing was changed" in text
    assert len({text.split()[1] for text in damage}) > 1, "one rank has checked all"


def _lost(rank: int, world: int, root: str, victim: int, when: str) -> tuple[str, int | None, str]:
    model = nn.ParameterList([nn.Parameter(torch.ones(50, 3) * i) for i in range(4)])
    optimizer = pyshard.ShardedAdamW(model.parameters(), transport="collective", timeout=60)
    save_checkpoint(root, model, optimizer, i=1)
    if rank == victim:
        target = files.sync_directory if when == "data" else files.verify

        def dies(*arguments: Any, **__: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(files, target.__name__, dies)
    try:
        if when == "data":
            save_checkpoint(root, model, optimizer, i=2)
        else:
            load_checkpoint(root, model, optimizer)
    except PeerError as error:
        return str(error), error.rank, error.operation
    raise AssertionError("no error")


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("when", ["data", "checks"])
def test_a_killed_rank(tmp_path: Path, victim: int, when: str) -> None:
    """All others name it and what was going on, those too that talk to the first rank only."""
    outcomes = run(_lost, 3, str(tmp_path), victim, when, quiet=True, seconds=60)
    assert outcomes[victim].exitcode == -signal.SIGKILL
    for rank in {0, 1, 2} - {victim}:
        assert outcomes[rank].error is None, outcomes[rank].trace
        text, lost, operation = outcomes[rank].value
        assert lost == victim
        assert operation == {"data": "writing", "checks": "checking its files"}[when]
        assert f"rank {victim} is lost or does not answer while {operation}" in text
        assert ("Complete checkpoints in" if when == "data" else "Nothing was changed") in text
    model = nn.ParameterList([nn.Parameter(torch.zeros(50, 3)) for i in range(4)])
    assert load_checkpoint(tmp_path, model, pyshard.AdamW(model.parameters())) == {"i": 1}
    assert torch.equal(model[3], torch.full((50, 3), 3.0))


def _factored(rank: int, world: int, root: str) -> list[str]:
    """State that is no value per element, of a sharded model and into one."""
    mesh = init_device_mesh("cpu", (world,))

    def made(sharded: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
        if sharded:
            fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for param in model.parameters():
            optimizer.state[param] = {"rows": torch.ones(3, 1)}
        return model, optimizer

    said = []
    save_checkpoint(f"{root}/whole", *made(False))
    load_checkpoint(f"{root}/whole", *made(False))
    for call in (
        lambda: save_checkpoint(f"{root}/cut", *made(True)),
        lambda: load_checkpoint(f"{root}/whole", *made(True)),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said


def test_state_that_cannot_be_cut(tmp_path: Path) -> None:
    for outcome in run(_factored, 2, str(tmp_path)):
        saved, loaded = outcome.value
        assert "which is a DTensor, has shape" in saved and "Nothing was written" in saved
        assert "of which this rank holds a part" in loaded and "Nothing was changed" in loaded
        assert "expected a value per element" in saved and "expected a value per element" in loaded


def _slow(rank: int, world: int, root: str, slow: int, stopped: bool) -> tuple[str, int | None]:
    """One rank takes several timeouts of the process group to write: at work, or stopped as a whole."""
    group = dist.new_group([0, 1, 2], timeout=timedelta(seconds=1.5))
    model = nn.ParameterList([nn.Parameter(torch.ones(3))])
    optimizer = pyshard.AdamW(model.parameters())
    optimizer.process_group = group  # type: ignore[attr-defined]
    save_checkpoint(root, model, optimizer)
    dist.barrier()
    sync, calls = files.sync_directory, iter([True])

    def late(path: Path) -> None:
        if not next(calls, False):
            pass
        elif stopped:  # until another process lets it go on
            subprocess.Popen(["sh", "-c", f"sleep 5; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            time.sleep(5)
        sync(path)

    if rank == slow:
        files.sync_directory = late
    try:
        save_checkpoint(root, model, optimizer)
    except PeerError as error:
        return str(error), error.rank
    return "saved", None


@pytest.mark.parametrize("silent", [0, 2])
def test_a_silent_rank(tmp_path: Path, silent: int) -> None:
    """After the timeout of the process group the others name it."""
    outcomes = run(_slow, 3, str(tmp_path), silent, True, quiet=True, seconds=60)
    for rank in {0, 1, 2} - {silent}:
        assert outcomes[rank].error is None, outcomes[rank].trace
        text, who = outcomes[rank].value
        assert who == silent and f"rank {silent} is lost or does not answer while writing" in text, text


@pytest.mark.parametrize("slow", [0, 2])
def test_a_rank_that_is_slow_is_not_lost(tmp_path: Path, slow: int) -> None:
    """Writing may take longer than the timeout of the process group."""
    outcomes = run(_slow, 3, str(tmp_path), slow, False, seconds=60)
    assert [outcome.value for outcome in outcomes] == [("saved", None)] * 3


def _absent(rank: int, world: int, root: str) -> tuple[str, int | None]:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    if rank == 1:
        time.sleep(4)
        return "", None
    model = nn.ParameterList([nn.Parameter(torch.ones(3))])
    optimizer = pyshard.AdamW(model.parameters())
    optimizer.process_group = group  # type: ignore[attr-defined]
    try:
        save_checkpoint(root, model, optimizer)
    except PeerError as error:
        return str(error), error.rank
    return "saved", None


def test_a_rank_that_does_not_come(tmp_path: Path) -> None:
    outcomes = run(_absent, 2, str(tmp_path), quiet=True, seconds=60)
    text, who = outcomes[0].value
    assert who == 1 and "expected all of them to call this. Ranks [1] have not." in text
