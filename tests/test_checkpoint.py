"""save_checkpoint and load_checkpoint in one process: what comes back, what is refused, what damage is found."""

import copy
import ctypes
import hashlib
import json
import resource
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import run
from reference import assert_same_bits
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import pyshard
from pyshard.checkpoint import CheckpointError, files, load_checkpoint, save_checkpoint

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (F32, {}),
    "fp32 amsgrad": (F32, {"amsgrad": True}),
    "fp64": (F64, {}),
    "bf16 split": (BF16, {}),
    "bf16 split amsgrad": (BF16, {"amsgrad": True}),
    "bf16 master": (BF16, {"master_weights": "fp32"}),
    "bf16 none": (BF16, {"master_weights": "none"}),
    "fp16": (F16, {}),
}


class Network(nn.Module):
    """Tied, unused, scalar and empty parameters, a layout of its own, buffers, and state that is no tensor."""

    def __init__(self, seed: int, dtype: torch.dtype = F32, channels_last: bool = True):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 4, bias=False)
        self.a.weight = nn.Parameter(self.b.weight.detach().t().contiguous())
        self.tied = self.b
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.unused = nn.Parameter(torch.randn(5))
        self.frozen = nn.Parameter(torch.randn(2, 2), requires_grad=False)
        self.calls = 0
        self.to(dtype)
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.norm(self.conv(x)).mean((2, 3))
        return self.tied(self.a(hidden).relu() * self.scale) + self.nothing.sum()

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


def train(model: Network, optimizer: torch.optim.Optimizer, seed: int, steps: int = 3) -> list[float]:
    found = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed + step)
        x = torch.randn(2, 3, 5, 5, generator=generator).to(model.conv.weight.dtype)
        optimizer.zero_grad()
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def pair(seed: int, form: str = "fp32", **options: Any) -> tuple[Network, pyshard.AdamW]:
    dtype, defaults = FORMATS[form]
    model = Network(seed, dtype)
    return model, pyshard.AdamW(model.parameters(), **{"lr": 0.01, **defaults, **options})


def contents(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Everything, copied, by name."""
    found: dict[str, Any] = {f"model.{k}": copy.deepcopy(v) for k, v in model.state_dict().items()}
    if optimizer is not None:
        held = copy.deepcopy(optimizer.state_dict())
        found |= {f"state.{i}.{k}": v for i, items in held["state"].items() for k, v in items.items()}
        found |= {f"group.{i}.{k}": v for i, group in enumerate(held["param_groups"]) for k, v in group.items()}
    return found


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for key, value in a.items():
        if isinstance(value, Tensor):
            assert_same_bits(b[key], value, key)
        else:
            assert b[key] == value, key


# ---- there and back ----


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_there_and_back(seed: int, tmp_path: Path, form: str, trained: bool) -> None:
    """Bit for bit into a fresh or a trained optimizer, and training goes on as if nothing had happened."""
    model, optimizer = pair(seed, form)
    train(model, optimizer, seed)
    save_checkpoint(tmp_path, model, optimizer)
    before = contents(model, optimizer)
    other, again = pair(seed + 9, form, lr=0.5, weight_decay=0.7)
    if trained:
        train(other, again, seed + 5, steps=2)
    assert load_checkpoint(tmp_path, other, again) == {}
    assert_same(before, contents(other, again))
    assert again.param_groups[0]["lr"] == 0.01
    assert other.calls == model.calls == 3
    assert train(model, optimizer, seed + 50) == train(other, again, seed + 50)
    assert_same(contents(model, optimizer), contents(other, again))


@pytest.mark.parametrize("form", ["fp32", "bf16 split", "bf16 master"])
def test_in_place(seed: int, tmp_path: Path, form: str) -> None:
    """Weights and state stay where they are in memory."""
    model, optimizer = pair(seed, form)
    train(model, optimizer, seed)
    save_checkpoint(tmp_path, model, optimizer)
    before = contents(model, optimizer)
    train(model, optimizer, seed + 5)

    def addresses() -> list[int]:
        tensors = [*model.state_dict().values(), *(t for items in optimizer.state.values() for t in items.values())]
        return [t.data_ptr() for t in tensors if isinstance(t, Tensor) and t.dim()]

    there = addresses()
    load_checkpoint(tmp_path, model, optimizer)
    assert addresses() == there
    assert_same(before, contents(model, optimizer))


def test_an_optimizer_that_has_not_stepped(seed: int, tmp_path: Path) -> None:
    """No state is made up by a save, and what is there goes at a load."""
    model, optimizer = pair(seed)
    save_checkpoint(tmp_path, model, optimizer)
    assert not optimizer.state
    train(model, optimizer, seed)
    load_checkpoint(tmp_path, model, optimizer)
    assert not optimizer.state
    other, again = pair(seed)
    assert train(model, optimizer, seed) == train(other, again, seed)


def test_parameters_without_state_stay_without(seed: int, tmp_path: Path) -> None:
    model, optimizer = pair(seed)
    train(model, optimizer, seed)
    assert model.unused not in optimizer.state and model.frozen not in optimizer.state
    save_checkpoint(tmp_path, model, optimizer)
    other, again = pair(seed + 1)
    other.unused.grad = torch.ones_like(other.unused)
    train(other, again, seed)
    again.state[other.unused] = copy.deepcopy(again.state[other.a.bias])
    load_checkpoint(tmp_path, other, again)
    assert other.unused not in again.state
    assert_same(contents(model, optimizer), contents(other, again))


@pytest.mark.parametrize("form", ["fp32", "fp32 amsgrad", "fp64"])
@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "NAdam"])
def test_torch_there_and_here_and_back(seed: int, tmp_path: Path, name: str, form: str) -> None:
    """torch's optimizers load their own; pyshard's Adam and AdamW load those of torch's, and the other way."""
    dtype, options = FORMATS[form]
    options = {"lr": 0.01, **{"SGD": {"momentum": 0.9}, "NAdam": {}}.get(name, options)}

    def fresh(module: Any, seed: int) -> tuple[Network, torch.optim.Optimizer]:
        model = Network(seed, dtype)
        return model, getattr(module, name)(model.parameters(), **(options if seed == 0 else {**options, "lr": 0.3}))

    model, optimizer = fresh(torch.optim, 0)
    train(model, optimizer, seed)
    save_checkpoint(tmp_path / "a", model, optimizer)
    before = contents(model, optimizer)
    other, again = fresh(torch.optim, 7)
    load_checkpoint(tmp_path / "a", other, again)
    assert_same(before, contents(other, again))
    assert train(model, optimizer, seed + 5) == train(other, again, seed + 5)
    if name in ("SGD", "NAdam"):
        return
    ours, here = fresh(pyshard, 8)
    load_checkpoint(tmp_path / "a", ours, here)
    assert_same(before, contents(ours, here))
    save_checkpoint(tmp_path / "b", ours, here)
    load_checkpoint(tmp_path / "b", other, again)
    assert_same(before, contents(other, again))


def test_torchs_bf16_state(seed: int, tmp_path: Path) -> None:
    """torch has bf16 moments and no master; in pyshard they become fp32, and the weights start the master."""
    model = Network(seed, BF16)
    theirs = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, theirs, seed)
    save_checkpoint(tmp_path, model, theirs)
    for form in ("bf16 split", "bf16 master", "bf16 none"):
        other, ours = pair(seed + 1, form)
        train(other, ours, seed + 3)  # a master that must go
        load_checkpoint(tmp_path, other, ours)
        for p, q in zip(model.parameters(), other.parameters()):
            assert_same_bits(q.detach(), p.detach())
            for key in ("exp_avg", "exp_avg_sq") if theirs.state.get(p) else ():
                assert_same_bits(ours.state[q][key], theirs.state[p][key].float(), key)
        for group in ours.param_groups:
            group.update(lr=0.0, weight_decay=0.0)
        train(other, ours, seed, steps=1)
        for i, q in enumerate(other.parameters()):
            if "master" in ours.state_dict()["state"].get(i, {}):
                assert_same_bits(ours.state_dict()["state"][i]["master"], q.detach().float())


def test_our_bf16_state_in_torch(seed: int, tmp_path: Path) -> None:
    """torch keeps moments in bf16 and no master; that it is dropped is said."""
    model, ours = pair(seed, "bf16 split")
    train(model, ours, seed)
    save_checkpoint(tmp_path, model, ours)
    other = Network(seed + 1, BF16)
    theirs = torch.optim.AdamW(other.parameters())
    with pytest.warns(
        UserWarning, match="master weights, which this AdamW does not keep for scale, nothing, .*dropped"
    ):
        load_checkpoint(tmp_path, other, theirs)
    for p, q in zip(model.parameters(), other.parameters()):
        assert_same_bits(q.detach(), p.detach())
        if p in ours.state and p.requires_grad:
            assert set(theirs.state[q]) == {"step", "exp_avg", "exp_avg_sq"}
            assert_same_bits(theirs.state[q]["exp_avg"], ours.state[p]["exp_avg"].to(BF16))
    train(other, theirs, seed)


@pytest.mark.parametrize("source", ["bf16 split", "bf16 master"])
@pytest.mark.parametrize("target", ["bf16 split", "bf16 master"])
def test_across_kinds_of_master(seed: int, tmp_path: Path, source: str, target: str) -> None:
    """Both keep the same fp32 number, but for one half-way between two bf16, which moves by one step of fp32."""
    model, optimizer = pair(seed, source)
    train(model, optimizer, seed)
    save_checkpoint(tmp_path, model, optimizer)
    other, again = pair(seed + 1, target)
    train(other, again, seed + 7)
    load_checkpoint(tmp_path, other, again)
    for i, items in optimizer.state_dict()["state"].items():
        now = again.state_dict()["state"][i]
        distance = now["master"].contiguous().view(torch.int32) - items["master"].contiguous().view(torch.int32)
        tie = (items["master"].contiguous().view(torch.int32) & 0xFFFF) == 0x8000
        assert not distance[~tie].any()
        assert distance.numel() == 0 or distance.abs().max() <= 1


def test_amsgrad_comes_from_the_checkpoint(seed: int, tmp_path: Path) -> None:
    with_it, without = pair(seed, "fp32 amsgrad"), pair(seed, "fp32")
    for name, (model, optimizer) in (("with", with_it), ("without", without)):
        train(model, optimizer, seed)
        save_checkpoint(tmp_path / name, model, optimizer)
    a, b = pair(seed + 1, "fp32"), pair(seed + 1, "fp32 amsgrad")
    train(*b, seed)
    load_checkpoint(tmp_path / "with", *a)
    load_checkpoint(tmp_path / "without", *b)
    assert_same(contents(*with_it), contents(*a))
    assert_same(contents(*without), contents(*b))
    assert train(*a, seed + 5) == train(*with_it, seed + 5) and train(*b, seed + 5) == train(*without, seed + 5)


def test_into_another_memory_layout(seed: int, tmp_path: Path) -> None:
    model, optimizer = pair(seed, "bf16 split")
    train(model, optimizer, seed)
    save_checkpoint(tmp_path, model, optimizer)
    other = Network(seed + 1, BF16, channels_last=False)
    again = pyshard.AdamW(other.parameters())
    load_checkpoint(tmp_path, other, again)
    assert other.conv.weight.is_contiguous() and not model.conv.weight.is_contiguous()
    assert again.state[other.conv.weight]["exp_avg"].is_contiguous()
    assert_same(contents(model, optimizer), contents(other, again))


def test_groups_names_and_tensor_rates(seed: int, tmp_path: Path) -> None:
    """Hyperparameters come back in their groups, whatever their order inside; names of parameters stay."""

    def build(seed: int, **first: Any) -> tuple[Network, pyshard.AdamW]:
        model = Network(seed)
        named = [(f"my.{k}", p) for k, p in model.named_parameters()]
        if seed != 0:
            named = named[:4][::-1] + named[4:]
        return model, pyshard.AdamW([{"params": named[:4], **first}, {"params": named[4:], "lr": 0.03}], lr=0.02)

    model, optimizer = build(0, lr=torch.tensor(0.25), betas=(0.8, 0.9), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(model, optimizer, seed)
    scheduler.step()
    save_checkpoint(tmp_path, model, optimizer, scheduler=scheduler.state_dict())
    other, again = build(1)
    later = torch.optim.lr_scheduler.StepLR(again, 1)
    later.load_state_dict(load_checkpoint(tmp_path, other, again)["scheduler"])
    first, second = again.param_groups
    assert isinstance(first["lr"], Tensor) and first["lr"].item() == pytest.approx(0.025, rel=1e-6)
    assert (first["betas"], first["weight_decay"], second["lr"]) == ((0.8, 0.9), 0.0, pytest.approx(0.003))
    assert first["param_names"] == optimizer.param_groups[0]["param_names"][::-1]
    assert train(model, optimizer, seed + 5) == train(other, again, seed + 5)
    assert later.last_epoch == 1


def test_hyperparameters_of_dicts_and_lists(seed: int, tmp_path: Path) -> None:
    model, optimizer = pair(seed)
    extra = {"a": 1, "b": [torch.ones(2), torch.zeros(1), {"c": (1, 2)}], "d": {"e": torch.tensor(3.0)}, "f": [1, 2]}
    optimizer.param_groups[0]["extra"] = copy.deepcopy(extra)
    save_checkpoint(tmp_path, model, optimizer)
    other, again = pair(seed + 1)
    load_checkpoint(tmp_path, other, again)
    found = again.param_groups[0]["extra"]
    assert_same_bits(found["b"][0], extra["b"][0])  # type: ignore[index]
    assert_same_bits(found["b"][1], extra["b"][1])  # type: ignore[index]
    assert (found["a"], found["b"][2:], found["d"], found["f"]) == (1, [{"c": (1, 2)}], {"e": 3.0}, [1, 2])
    for odd, message in (
        ({"x": [{7: 1}]}, r"\[0\] in \['x'\] in extra of group 0 .*key 7 \(int\)"),
        ({}, "an empty dict"),
    ):
        optimizer.param_groups[0]["extra"] = odd
        with pytest.raises(ValueError, match=message + r".*expected dicts with strings.*Nothing was written"):
            save_checkpoint(tmp_path / "new", model, optimizer)


@pytest.mark.parametrize("target", ["bf16 split", "bf16 master"])
@pytest.mark.parametrize("cls", [pyshard.AdamW, torch.optim.AdamW])
def test_fp32_weights_are_the_masters_of_a_16_bit_model(seed: int, tmp_path: Path, target: str, cls: Any) -> None:
    """All bits of them, but for one half-way between two bf16, which moves by one step of fp32."""
    model = Network(seed)
    optimizer = cls(model.parameters(), lr=0.01)
    train(model, optimizer, seed)
    save_checkpoint(tmp_path, model, optimizer)
    other, again = pair(seed + 1, target)
    load_checkpoint(tmp_path, other, again)
    masters = again.state_dict()["state"]
    found = 0
    for index, (p, q) in enumerate(zip(model.parameters(), other.parameters(), strict=True)):
        assert_same_bits(q.detach(), p.detach().to(q.dtype))
        if index in masters and q.dtype == BF16:
            found += 1
            bits, expected = (x.detach().contiguous().view(torch.int32) for x in (masters[index]["master"], p))
            tie = (expected & 0xFFFF) == 0x8000
            assert torch.equal(bits[~tie], expected[~tie]) and not ((bits - expected).abs() > 1).any()
    assert found > 3


def test_the_model_alone(seed: int, tmp_path: Path) -> None:
    model, optimizer = pair(seed)
    train(model, optimizer, seed)
    save_checkpoint(tmp_path / "both", model, optimizer)
    save_checkpoint(tmp_path / "model", model, None, why="weights")
    for name in ("both", "model"):
        other = Network(seed + 1)
        extra = load_checkpoint(tmp_path / name, other, None)
        assert_same(contents(model, None), contents(other, None))
        assert extra == ({} if name == "both" else {"why": "weights"})
    with pytest.raises(ValueError, match="no state of an optimizer"):
        load_checkpoint(tmp_path / "model", *pair(seed))


def test_a_compiled_model_has_the_names_of_the_model(seed: int, tmp_path: Path) -> None:
    model, optimizer = pair(seed)
    train(model, optimizer, seed)
    save_checkpoint(tmp_path, torch.compile(model), optimizer)
    other, again = pair(seed + 1)
    load_checkpoint(tmp_path, other, again)
    assert_same(contents(model, optimizer), contents(other, again))
    third, last = pair(seed + 2)
    load_checkpoint(tmp_path, torch.compile(third), last)
    assert_same(contents(model, optimizer), contents(third, last))


def test_torch_reads_the_directory(seed: int, tmp_path: Path) -> None:
    """It is a checkpoint of torch.distributed.checkpoint, with the keys that torch gives it."""
    model, optimizer = pair(seed)
    for param in model.parameters():  # torch's getter makes state for all, where there is none at all
        param.requires_grad_(True)
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.zero_grad()
    save_checkpoint(tmp_path, model, optimizer)
    other = Network(seed + 1)
    for param in other.parameters():
        param.requires_grad_(True)
    again = torch.optim.AdamW(other.parameters())
    weights, state = get_state_dict(other, again)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=next(tmp_path.glob("0*")))
    set_state_dict(other, again, model_state_dict=weights, optim_state_dict=state)
    ours, theirs = contents(model, optimizer), contents(other, again)
    for found in (ours, theirs):  # of the groups, torch's own optimizer has other items
        for key in [key for key in found if key.startswith("group")]:
            del found[key]
    assert_same(ours, theirs)
    # Its converter, too.
    dcp_to_torch_save(next(tmp_path.glob("0*")), tmp_path / "one file")
    converted = torch.load(tmp_path / "one file", weights_only=True)
    assert_same_bits(converted["model"]["conv.weight"], model.conv.weight.detach())
    assert_same_bits(converted["optimizer"]["state"]["a.bias"]["exp_avg"], optimizer.state[model.a.bias]["exp_avg"])
    assert converted["optimizer"]["param_groups"][0]["lr"] == 0.01


# ---- extra values ----


def test_extra_values(seed: int, tmp_path: Path) -> None:
    model, optimizer = pair(seed)
    values = {
        "epoch": 3,
        "loss": float("inf"),
        "name": "ø",
        "nested": {"a": [1, (2, None, True)], "b": b"bytes"},
        "rng": torch.get_rng_state(),
        "dtype": torch.bfloat16,
    }
    save_checkpoint(tmp_path, model, optimizer, **values)
    found = load_checkpoint(tmp_path, model, optimizer)
    assert_same({"rng": values.pop("rng")}, {"rng": found.pop("rng")})
    assert found == values


PLAIN = "Pass its state_dict(), or a plain form of it."


@pytest.mark.parametrize(
    ("value", "what", "instead"),
    [
        (lambda: 0, "mine (function)", PLAIN),
        (object(), "mine (object)", PLAIN),
        (nn.Linear(1, 1), "mine (torch.nn.modules.linear.Linear)", PLAIN),
        (Path("a"), "mine (pathlib.PosixPath)", "Pass str() of it."),
        (np.random.get_state(), "mine[1] (numpy.ndarray)", "Pass torch.from_numpy() of it."),
        ({"a": [1, np.float32(2)]}, "mine['a'][1] (numpy.float32)", "Pass its item()."),
    ],
    ids=["lambda", "object", "module", "path", "numpy state", "numpy number"],
)
def test_extra_values_that_could_not_be_loaded(seed: int, tmp_path: Path, value: Any, what: str, instead: str) -> None:
    model, optimizer = pair(seed)
    with pytest.raises(TypeError) as error:
        save_checkpoint(tmp_path / "new", model, optimizer, fine=1, mine=value)
    assert str(error.value) == (
        f"pyshard.save_checkpoint: the extra value {what} cannot be loaded again by torch.load(weights_only=True). "
        f"Expected tensors, numbers, strings, and lists, tuples and dicts of them. {instead} Nothing was written."
    )
    assert not (tmp_path / "new").exists()


# ---- directories ----


def names(root: Path) -> list[str]:
    return sorted(path.name[:6] for path in root.iterdir())


def test_keep(seed: int, tmp_path: Path) -> None:
    model, optimizer = pair(seed)
    for i, keep in enumerate([2, 2, 2, 3, 3, 5, 5, 9, 1], start=1):
        save_checkpoint(tmp_path, model, optimizer, keep=keep, i=i)
        assert load_checkpoint(tmp_path, model, optimizer) == {"i": i}
        left = {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [3, 4, 5], 6: [3, 4, 5, 6], 7: [3, 4, 5, 6, 7]}
        left |= {8: [3, 4, 5, 6, 7, 8], 9: [9]}
        assert names(tmp_path) == [f"{n:06d}" for n in left[i]] + ["latest"]
    for keep in (0, -1, 1.0, True, None):
        with pytest.raises(ValueError, match=r"keep=.*expected a whole number, at least 1"):
            save_checkpoint(tmp_path, model, optimizer, keep=keep)  # type: ignore[arg-type]
    assert names(tmp_path) == ["000009", "latest"]


def test_an_older_checkpoint_by_its_path(seed: int, tmp_path: Path) -> None:
    model, optimizer = pair(seed)
    train(model, optimizer, seed)
    save_checkpoint(tmp_path, model, optimizer, i=1)
    before = contents(model, optimizer)
    train(model, optimizer, seed)
    save_checkpoint(str(tmp_path), model, optimizer, i=2)
    older = next(tmp_path.glob("000001-*"))
    assert load_checkpoint(str(older), model, optimizer) == {"i": 1}
    assert_same(before, contents(model, optimizer))


def test_relative_paths_and_new_directories(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, optimizer = pair(seed)
    save_checkpoint("runs/one", model, optimizer, i=1)
    assert load_checkpoint(Path("runs") / "one", model, optimizer) == {"i": 1}
    assert load_checkpoint(tmp_path / "runs" / "one", model, optimizer) == {"i": 1}


def test_where_there_is_nothing(seed: int, tmp_path: Path) -> None:
    model, optimizer = pair(seed)
    for path in (tmp_path, tmp_path / "not there"):
        with pytest.raises(FileNotFoundError, match=r"load_checkpoint: .* has no complete checkpoint.*'latest'"):
            load_checkpoint(path, model, optimizer)
    save_checkpoint(tmp_path, model, optimizer)
    assert names(tmp_path) == ["000001", "latest"]


def test_a_first_save_that_did_not_come_to_its_end(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no complete checkpoint, even if all of its files are there: the next start is a first one."""
    model, optimizer = pair(seed)
    for when in ("write_sealed", "switch"):
        original = getattr(files, when)
        calls = iter(range(9))

        def fails(*arguments: Any, when: str = when, original: Any = original, calls: Any = calls) -> Any:
            if when == "write_sealed" and next(calls) == 0:  # the pointer to nothing
                return original(*arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(files, when, fails)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, model, optimizer)
        monkeypatch.undo()
        with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
            load_checkpoint(tmp_path, model, optimizer)
    save_checkpoint(tmp_path, model, optimizer)
    assert names(tmp_path) == ["000001", "latest"]


def test_a_lost_pointer_is_no_first_start(seed: int, tmp_path: Path) -> None:
    """Deleted, or not copied along. What is complete stays, and the way back is in the error."""
    model, optimizer = pair(seed)
    for i in (1, 2):
        save_checkpoint(tmp_path, model, optimizer, i=i)
    (tmp_path / "latest").unlink()
    one, two = sorted(tmp_path.glob("0*"))
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path, model, optimizer)
    assert f"{tmp_path / 'latest'}, which names the newest complete checkpoint, is missing" in str(error.value)
    assert f"can be loaded by their path: {two}, {one}. The next save makes that file anew." in str(error.value)
    assert load_checkpoint(two, model, optimizer) == {"i": 2}
    save_checkpoint(tmp_path, model, optimizer, i=3)
    assert names(tmp_path) == ["000002", "000003", "latest"]
    assert load_checkpoint(tmp_path, model, optimizer) == {"i": 3}


def test_a_damaged_pointer(seed: int, tmp_path: Path) -> None:
    model, optimizer = pair(seed)
    for i in (1, 2):
        save_checkpoint(tmp_path, model, optimizer, i=i)
    one, two = sorted(tmp_path.glob("0*"))
    (tmp_path / "latest").write_bytes(b"")
    for call in (load_checkpoint, save_checkpoint):
        with pytest.raises(CheckpointError) as error:
            call(tmp_path, model, optimizer)
        assert f"{tmp_path / 'latest'} is damaged" in str(error.value)
        assert "Remove that file: the next save makes it anew." in str(error.value)
        assert f"can be loaded by their path: {two}, {one}." in str(error.value)
    (tmp_path / "latest").unlink()
    assert load_checkpoint(two, model, optimizer) == {"i": 2}
    save_checkpoint(tmp_path, model, optimizer, i=3)
    assert load_checkpoint(tmp_path, model, optimizer) == {"i": 3}


@pytest.mark.parametrize("gone", ["manifest.json", "."])
def test_the_newest_checkpoint_is_gone(seed: int, tmp_path: Path, gone: str) -> None:
    model, optimizer = pair(seed)
    for i in (1, 2):
        save_checkpoint(tmp_path, model, optimizer, i=i)
    one, two = sorted(tmp_path.glob("0*"))
    if gone == ".":
        shutil.rmtree(two)
    else:
        (two / gone).unlink()
    for path in (tmp_path, two)[: 1 if gone == "." else 2]:
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(path, model, optimizer)
        assert f"{two / 'manifest.json'} is missing" in str(error.value)
        assert f"can be loaded by their path: {one}." in str(error.value)
    assert load_checkpoint(one, model, optimizer) == {"i": 1}
    save_checkpoint(tmp_path, model, optimizer, i=3)
    assert load_checkpoint(tmp_path, model, optimizer) == {"i": 3}


@pytest.mark.parametrize("when", ["begin", "write_sealed"])
def test_another_save_meanwhile(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Two runs that save to one path: one of them is told, and its checkpoint does not take the other's place."""
    model, optimizer = pair(seed)
    save_checkpoint(tmp_path, model, optimizer, which="first")
    original, begin = getattr(files, when), files.begin

    def and_another(*arguments: Any) -> Any:
        found = original(*arguments)
        monkeypatch.undo()
        if when == "write_sealed":  # the other one began before, so it leaves this one's directory alone
            monkeypatch.setattr(files, "begin", lambda root: _begin_without_removing(root, begin, monkeypatch))
        save_checkpoint(tmp_path, model, optimizer, which="the other")
        return found

    monkeypatch.setattr(files, when, and_another)
    message = "made for this save, is not there.*no other run saves|another save has put its checkpoint"
    with pytest.raises((FileNotFoundError, CheckpointError), match=message):
        save_checkpoint(tmp_path, model, optimizer, which="this one")
    assert load_checkpoint(tmp_path, model, optimizer) == {"which": "the other"}
    left = {"begin": ["000001", "000002"], "write_sealed": ["000003"]}[when]  # the other one kept two: its own and this
    assert names(tmp_path) == [*left, "latest"]


def _begin_without_removing(root: Path, begin: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    remove = files.remove
    monkeypatch.setattr(files, "remove", lambda path: None)
    found = begin(root)
    monkeypatch.setattr(files, "remove", remove)
    return found


# ---- damage ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    for i in (1, 2):
        model, optimizer = pair(i, "bf16 split")
        train(model, optimizer, i)
        save_checkpoint(root, model, optimizer, i=i)
    return root


FILES = ["latest", "manifest.json", ".metadata", "__0_0.distcp", "extra.pt"]


def find(root: Path, name: str) -> Path:
    return root / name if name == "latest" else next(root.glob("000002-*")) / name


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_found(seed: int, saved: Path, name: str) -> None:
    """In small files at every place, in large ones at both ends and many between. Nothing is loaded."""
    path = find(saved, name)
    good = path.read_bytes()
    generator = torch.Generator().manual_seed(seed)
    places = range(len(good))
    if len(good) > 600:
        drawn = torch.randint(len(good), (60,), generator=generator).tolist()
        places = sorted({0, 1, len(good) - 2, len(good) - 1, *drawn})  # type: ignore[assignment]
    model, optimizer = pair(5, "bf16 split")
    train(model, optimizer, 5, steps=1)
    before = contents(model, optimizer)
    try:
        for place in places:
            bit = int(torch.randint(8, (), generator=generator))
            path.write_bytes(good[:place] + bytes([good[place] ^ (1 << bit)]) + good[place + 1 :])
            with pytest.raises(CheckpointError) as error:
                load_checkpoint(saved, model, optimizer)
            assert f"{path} is damaged" in str(error.value) and "Nothing was changed" in str(error.value)
            assert "can be loaded by their path: " in str(error.value)
            assert str(next(saved.glob("000001-*"))) in str(error.value)
    finally:
        path.write_bytes(good)
    assert_same(before, contents(model, optimizer))
    assert load_checkpoint(saved, model, optimizer) == {"i": 2}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "shorter", "longer", "empty"])
def test_other_damage(saved: Path, name: str, how: str) -> None:
    path = find(saved, name)
    good = path.read_bytes()
    model, optimizer = pair(5, "bf16 split")
    before = contents(model, optimizer)
    try:
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes({"shorter": good[:-1], "longer": good + b"\0", "empty": b""}[how])
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(saved, model, optimizer)
        assert str(path) in str(error.value) and str(next(saved.glob("000001-*"))) in str(error.value)
    finally:
        path.write_bytes(good)
    assert_same(before, contents(model, optimizer))


def test_blocks_of_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Checksums are per block: the share of each rank, the last short block, and where the damage is."""
    monkeypatch.setattr(files, "BLOCK", 100)
    data = bytes(torch.randint(256, (950,), generator=torch.Generator().manual_seed(seed)).tolist())
    folder = files.Folder()
    for name, size in (("a", 950), ("b", 0), ("c", 100)):
        with folder.create_stream(tmp_path / name, "wb") as stream:
            for start in range(0, size, 70):
                part = data[start : min(start + 70, size)]
                assert stream.write(memoryview(part)) == len(part)
            assert stream.tell() == size
    sums = [f"{zlib.crc32(data[i : i + 100]):08x}" for i in range(0, 950, 100)]
    assert folder.entries == {
        "a": {"bytes": 950, "crc32": sums},
        "b": {"bytes": 0, "crc32": []},
        "c": {"bytes": 100, "crc32": sums[:1]},
    }
    for world in (1, 2, 5, 20):
        for rank in range(world):
            files.verify(tmp_path, folder.entries, 100, rank, world)
    (tmp_path / "a").write_bytes(data[:640] + b"\0\0" + data[642:])
    finders = []
    for rank in range(4):
        try:
            files.verify(tmp_path, folder.entries, 100, rank, 4)
        except RuntimeError as error:
            finders.append((rank, str(error)))
    assert [rank for rank, _ in finders] == [2] and "bytes [600, 700)" in finders[0][1]
    (tmp_path / "b").write_bytes(b"x")
    with pytest.raises(RuntimeError, match=r"b is damaged: it has 1 bytes; expected 0"):
        for rank in range(4):
            files.verify(tmp_path, {k: v for k, v in folder.entries.items() if k != "a"}, 100, rank, 4)


# ---- what does not fit ----


def refused(path: Path, model: nn.Module, optimizer: Any, message: str) -> None:
    before = contents(model, optimizer)
    with pytest.raises(ValueError, match=rf"(?s)load_checkpoint: .*{message}.*Nothing was changed"):
        load_checkpoint(path, model, optimizer)
    assert_same(before, contents(model, optimizer))


def test_another_model(seed: int, tmp_path: Path) -> None:
    model, optimizer = pair(seed)
    train(model, optimizer, seed)
    save_checkpoint(tmp_path, model, optimizer)
    other, _ = pair(seed)
    other.a = nn.Linear(4, 6, bias=False)
    refused(tmp_path, other, None, r"has model\.a\.bias, which the model does not have; expected the same names")
    other, _ = pair(seed)
    other.more, other.again = nn.Linear(1, 1), nn.Linear(1, 1)
    names = r"has no model\.more\.weight, model\.more\.bias, model\.again\.weight \(and 1 more\)"
    refused(tmp_path, other, None, names)
    other, _ = pair(seed)
    other.unused = nn.Parameter(torch.zeros(6))
    refused(tmp_path, other, None, r"model\.unused has shape \(5,\) in the checkpoint; expected \(6,\)")
    with torch.device("meta"):
        nowhere = Network(seed)
    with pytest.raises(ValueError, match=r"scale of the model is on the meta device.*to_empty"):
        load_checkpoint(tmp_path, nowhere, None)


def test_another_optimizer(seed: int, tmp_path: Path) -> None:
    model, optimizer = pair(seed)
    train(model, optimizer, seed)
    save_checkpoint(tmp_path, model, optimizer)
    params = list(model.parameters())
    two = pyshard.AdamW([{"params": params[:3]}, {"params": params[3:]}])
    refused(tmp_path, model, two, "has 1 parameter groups; expected 2")
    fewer = pyshard.AdamW(params[1:])
    refused(tmp_path, model, fewer, r"has \S+, which group 0 of the optimizer does not have")
    foreign = pyshard.AdamW([*params, nn.Parameter(torch.zeros(3))])
    refused(tmp_path, model, foreign, r"parameter \d+ of the optimizer, of shape \(3,\), is not in the model")
    with pytest.raises(ValueError, match=r"save_checkpoint: parameter \d+ of the optimizer.*Nothing was written"):
        save_checkpoint(tmp_path / "b", model, foreign)
    assert not (tmp_path / "b").exists()


def test_a_newer_format(seed: int, tmp_path: Path) -> None:
    model, optimizer = pair(seed)
    save_checkpoint(tmp_path, model, optimizer)
    for path in (next(tmp_path.glob("0*")) / "manifest.json", tmp_path / "latest"):
        good = path.read_bytes()
        value = json.loads(good.splitlines()[0])
        files.write_sealed(path, {**value, "format": 2, "pyshard": "9.1"})
        refused(tmp_path, model, optimizer, r"has format 2; this version of pyshard reads formats up to 1.*9\.1")
        if path.name == "latest":  # nor is it overwritten by a save
            with pytest.raises(ValueError, match="format 2"):
                save_checkpoint(tmp_path, model, optimizer)
        path.write_bytes(good)


def test_a_checkpoint_of_some_ranks_only(seed: int, tmp_path: Path) -> None:
    """torch saves what one rank has of a cut tensor, if it is told to be alone; that is not loaded for the whole."""
    from pyshard.optim.flat_shard import FlatShard

    model = nn.Linear(3, 4, bias=False)
    optimizer = pyshard.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path, model, optimizer)
    directory = next(tmp_path.glob("0*"))
    part = FlatShard(torch.zeros(5), model.weight, 2)
    folder = files.Folder()
    writer = dcp.FileSystemWriter(directory)
    writer.fs = folder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": {"weight": part}}, storage_writer=writer)
    files.write_sealed(directory / "manifest.json", {"format": 1, "block": files.BLOCK, "files": folder.entries})
    refused(tmp_path, model, None, r"has 5 of the 12 elements of model\.weight")


# ---- failures, memory ----


def _full_disk(rank: int, world: int, root: str) -> tuple[list[str], str]:
    model = nn.Linear(300, 100)
    optimizer = pyshard.AdamW(model.parameters())
    save_checkpoint(root, model, optimizer, i=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, -1))
    try:
        save_checkpoint(root, model, optimizer, i=2)
        said = "nothing"
    except CheckpointError as error:
        said = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    left = names(Path(root))
    assert load_checkpoint(root, model, optimizer) == {"i": 1}
    save_checkpoint(root, model, optimizer, i=3)
    assert load_checkpoint(root, model, optimizer) == {"i": 3}
    return left, said


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    """The error names the file and the reason, what was written is removed, and the previous checkpoint is in force."""
    (outcome,) = run(_full_disk, 1, str(tmp_path), group=False)
    left, said = outcome.value
    assert left == ["000001", "latest"]
    assert "save_checkpoint: failed while writing: OSError: [Errno 27] File too large: " in said
    assert "__0_0.distcp'" in said
    assert "Complete checkpoints in" in said and "are as they were" in said


def _peak(rank: int, world: int, root: str, dtype: torch.dtype, fresh: bool) -> tuple[int, int, int]:
    """(bytes of state that were there before, of state, peak above what was there before) of a load."""
    n, layers = 1 << 20, 24
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: freed tensors go back at once; the heap would keep some

    def build() -> tuple[nn.ParameterList, pyshard.AdamW]:
        model = nn.ParameterList([nn.Parameter(torch.randn(n).to(dtype)) for _ in range(layers)])
        return model, pyshard.AdamW(model.parameters(), lr=0.01)

    def step(model: nn.ParameterList, optimizer: pyshard.AdamW) -> None:
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = build()
    step(model, optimizer)
    save_checkpoint(root, model, optimizer)
    before = contents_digest(model, optimizer)
    if fresh:
        del model, optimizer
        model, optimizer = build()
    else:
        step(model, optimizer)
    held = sum(t.nbytes for items in optimizer.state.values() for t in items.values())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    start = memory("VmRSS")
    load_checkpoint(root, model, optimizer)
    peak = memory("VmHWM") - start
    total = sum(t.nbytes for items in optimizer.state.values() for t in items.values())
    assert contents_digest(model, optimizer) == before
    return held, total, peak


def memory(what: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) << 10


def contents_digest(model: nn.Module, optimizer: pyshard.AdamW) -> str:
    found = hashlib.sha256()
    for param in model.parameters():
        found.update(param.detach().view(torch.uint8).numpy().tobytes())
        for key, value in sorted(optimizer.state[param].items()):
            found.update(key.encode() + value.view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "trained"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_memory_of_a_load(tmp_path: Path, dtype: torch.dtype, fresh: bool) -> None:
    """No second copy of the state: 24 tensors of 2**20 elements, of which at most a few are in memory twice."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc/self/clear_refs to measure the peak of a part of a process")
    (outcome,) = run(_peak, 1, str(tmp_path), dtype, fresh, group=False)
    held, total, peak = outcome.value
    assert held == (0 if fresh else total)
    one = 4 << 20  # bytes of an fp32 tensor
    # The buffer for checksums, a tensor as it was read and torch.load's copy of it; for split weights also its fp32
    # master and the arithmetic that cuts it in two (int32 and bool, of one size each). 8 MiB for what allocators keep.
    bound = max(min(files.BLOCK, 24 * 3 * one), 2 * one + (6 * one if dtype == BF16 else 0)) + (8 << 20)
    assert peak < total - held + bound, f"{peak / one:.1f} tensors above the {(total - held) / one:.0f} of new state"
    assert bound < total / 2  # a second copy would be found
