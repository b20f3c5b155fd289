"""state_dict: to and from torch.optim, through files and distributed.checkpoint, and on again bit for bit."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from reference import assert_same_bits
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp_state_dict

import pyshard

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (F32, {}),
    "fp64": (F64, {}),
    "bf16 split": (BF16, {}),
    "bf16 master": (BF16, {"master_weights": "fp32"}),
    "fp16 master": (F16, {}),
    "bf16 none": (BF16, {"master_weights": "none"}),
    "fp16 none": (F16, {"master_weights": "none"}),
    "bf16 split amsgrad": (BF16, {"amsgrad": True}),
    "fp32 amsgrad": (F32, {"amsgrad": True}),
}
IN_FP32_OR_64 = [name for name in FORMATS if name.startswith("fp32") or name == "fp64"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch starts its threads for the smallest tensors, and on a busy machine they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(seed: int, dtype: torch.dtype = F32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int = 5) -> list[float]:
    """Fits a fixed function of random inputs; returns the losses."""
    g = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    losses = []
    for _ in range(steps):
        x = torch.randn(16, 6, generator=g)
        y = torch.stack([x.sum(1), (x * x).mean(1)], 1)
        optimizer.zero_grad()
        loss = (model(x.to(dtype)).float() - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def through_a_file(state: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def assert_same(a: Any, b: Any, what: str = "") -> None:
    """Nested dictionaries and lists with the same bits in their tensors."""
    assert type(a) is type(b), what
    if isinstance(a, Tensor):
        assert_same_bits(a, b, what)
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), what
        for key in a:
            assert_same(a[key], b[key], f"{what}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), what
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{what}[{i}]")
    else:
        assert a == b, what


# ---- save, load, go on: as if nothing had happened ----


@pytest.mark.parametrize("first", ["model", "optimizer"])
@pytest.mark.parametrize("form", FORMATS)
def test_resumed_run_has_the_same_bits(seed: int, form: str, first: str) -> None:
    dtype, options = FORMATS[form]
    whole, broken = network(seed, dtype), network(seed, dtype)
    a = pyshard.AdamW(whole.parameters(), lr=0.01, **options)
    b = pyshard.AdamW(broken.parameters(), lr=0.01, **options)
    losses = train(whole, a, seed) + train(whole, a, seed + 1)

    assert train(broken, b, seed) == losses[:5]
    saved = through_a_file({"model": broken.state_dict(), "optimizer": b.state_dict()})
    resumed = network(seed + 9, dtype)
    c = pyshard.AdamW(resumed.parameters(), lr=123.0, **options)
    if first == "model":
        resumed.load_state_dict(saved["model"])
    c.load_state_dict(saved["optimizer"])
    assert_same(c.state_dict(), b.state_dict(), "saved again before any step")
    if first == "optimizer":
        resumed.load_state_dict(saved["model"])
    assert train(resumed, c, seed + 1) == losses[5:]
    assert_same(resumed.state_dict(), whole.state_dict())
    assert_same(c.state_dict(), a.state_dict())
    assert_same(train(broken, b, seed + 1), losses[5:], "saving changes nothing")


@pytest.mark.parametrize("form", FORMATS)
def test_what_a_state_dict_holds(seed: int, form: str) -> None:
    """torch's items, plain fp32 (or fp64), and the master weight of which the parameter is the rounding."""
    dtype, options = FORMATS[form]
    model = network(seed, dtype)
    optimizer = pyshard.AdamW(model.parameters(), lr=0.01, **options)
    twin = torch.optim.AdamW(network(seed).parameters())
    train(model, optimizer, seed)
    saved = optimizer.state_dict()
    assert saved.keys() == twin.state_dict().keys()
    assert saved["param_groups"][0].keys() == twin.state_dict()["param_groups"][0].keys()
    assert list(saved["state"]) == [0, 1, 2, 3]
    for param, state in zip(model.parameters(), saved["state"].values()):
        keys = {"step", "exp_avg", "exp_avg_sq"}
        keys |= {"max_exp_avg_sq"} if options.get("amsgrad") else set()
        keys |= {"master"} if "split" in form or "master" in form else set()
        assert state.keys() == keys
        assert state["step"] == 5 and state["step"].dtype == F32
        for key in keys - {"step"}:
            assert state[key].dtype == (F64 if dtype == F64 else F32) and state[key].shape == param.shape
        if "master" in keys:
            assert (state["master"] - param.detach().float()).abs().max() > 0, "it is finer than the parameter"
            if "split" in form:
                assert_same_bits(pyshard.kernels.split(state["master"])[0], param.detach())
            else:
                assert_same_bits(state["master"].to(dtype), param.detach())


def test_a_state_dict_is_alive_as_torchs_is_and_a_loaded_one_is_not(seed: int) -> None:
    model, other = network(seed), network(seed)
    a, b = pyshard.AdamW(model.parameters()), pyshard.AdamW(other.parameters())
    train(model, a, seed)
    saved = a.state_dict()
    b.load_state_dict(saved)
    kept = copy.deepcopy(saved)
    train(other, b, seed)
    assert_same(saved, kept, "training the loaded optimizer")
    train(model, a, seed)
    assert saved["state"][0]["step"] == 10, "as with torch, the tensors are the optimizer's own"
    assert saved["state"][0]["exp_avg"].data_ptr() == a.state[model[0].weight]["exp_avg"].data_ptr()


@pytest.mark.parametrize("source", ["bf16 split", "bf16 master", "bf16 none"])
@pytest.mark.parametrize("target", ["bf16 split", "bf16 master", "bf16 none", "fp32"])
@pytest.mark.filterwarnings("ignore:pyshard. the loaded state has fp32 master weights")
def test_load_across_master_weights(seed: int, source: str, target: str) -> None:
    """Where both have a master it crosses exactly; where the target has none, training goes on from the parameter."""
    dtype, options = FORMATS[source]
    model = network(seed, dtype)
    optimizer = pyshard.AdamW(model.parameters(), lr=0.01, **options)
    train(model, optimizer, seed)
    saved = optimizer.state_dict()

    dtype, options = FORMATS[target]
    model2 = network(seed, dtype)
    model2.load_state_dict(model.state_dict())
    optimizer2 = pyshard.AdamW(model2.parameters(), lr=0.0, weight_decay=0.0, **options)
    optimizer2.load_state_dict(saved)
    for group in optimizer2.param_groups:
        group.update(lr=0.0)
    for param in model2.parameters():
        param.grad = torch.zeros_like(param)
    optimizer2.step()  # changes no weight
    again = optimizer2.state_dict()
    for i, (old, new) in enumerate(zip(model.parameters(), model2.parameters())):
        assert_same_bits(new.detach().to(old.dtype), old.detach())
        master = saved["state"][i].get("master", old.detach().float())
        if target == "bf16 split" or target == "bf16 master":
            assert_same_bits(again["state"][i]["master"], master, f"master {i}")


@pytest.mark.parametrize("source, target", [("fp32", "split"), ("split", "fp32")])
def test_masters_half_way_between_two_bf16_numbers(seed: int, source: str, target: str) -> None:
    """The two formats round them apart, to even and away from zero; they cross with one step of fp32, not of bf16."""
    bits = torch.tensor([0x3F808000, 0x3F818000, -0x407F8000, -0x407E8000, 0x00008000, 0x3F807FFF], dtype=torch.int64)
    master = bits.to(torch.int32).view(torch.float32)
    high = master.to(BF16) if source == "fp32" else pyshard.kernels.split(master)[0]
    params = [nn.Parameter(torch.zeros(6, dtype=BF16))], [nn.Parameter(high.clone())]
    a = pyshard.AdamW(params[0], lr=0.0, master_weights=source)
    params[0][0].grad = torch.zeros_like(params[0][0])
    a.step()
    saved = copy.deepcopy(a.state_dict())
    saved["state"][0]["master"] = master.clone()
    b = pyshard.AdamW(params[1], lr=0.0, weight_decay=0.0, master_weights=target)
    b.load_state_dict(saved)
    b.param_groups[0].update(lr=0.0)
    params[1][0].grad = torch.zeros_like(high)
    b.step()
    assert_same_bits(params[1][0].detach(), high)
    now = b.state_dict()["state"][0]["master"]
    assert (now.view(torch.int32) - master.view(torch.int32)).abs().max() <= 1
    assert torch.equal(now[5], master[5])


def test_dropped_masters_are_told(seed: int) -> None:
    model = network(seed, BF16)
    a = pyshard.AdamW(model.parameters())
    train(model, a, seed)
    b = pyshard.AdamW(model.parameters(), master_weights="none")
    b.load_state_dict(a.state_dict())
    with pytest.warns(UserWarning, match=r"pyshard: the loaded state has fp32 master weights.*dropped"):
        train(model, b, seed, steps=1)


def test_weights_loaded_after_the_optimizer_count(seed: int) -> None:
    """A loaded master is used only where the parameter is its rounding."""
    model = network(seed, BF16)
    a = pyshard.AdamW(model.parameters(), lr=0.01)
    train(model, a, seed)
    other = model[0].weight.detach() + 4  # no element is the rounding of its master
    b = pyshard.AdamW(model.parameters(), lr=0.0)
    b.load_state_dict(a.state_dict())
    b.param_groups[0].update(lr=0.0, weight_decay=0.0)
    with torch.no_grad():
        model[0].weight.copy_(other)
        kept = model[2].weight.detach().clone()
    train(model, b, seed, steps=1)
    state = b.state_dict()["state"]
    assert_same_bits(state[0]["master"], other.float())
    assert_same_bits(state[2]["master"], a.state_dict()["state"][2]["master"])
    assert_same_bits(model[2].weight.detach(), kept)


# ---- torch.optim, both ways ----

# Two correct fp32 implementations part by rounding. Losses of size 1 after 5 more steps: observed 2e-7 to 6e-7.
LOSS = {"rel": 5e-6}


@pytest.mark.parametrize("form", IN_FP32_OR_64)
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
@pytest.mark.parametrize("fused", [None, True])
def test_torchs_checkpoint_goes_on_here_and_back(seed: int, name: str, form: str, fused: bool | None) -> None:
    dtype, options = FORMATS[form]
    options = {"lr": 0.01, "weight_decay": 0.05, **options}
    model = network(seed, dtype)
    theirs = getattr(torch.optim, name)(model.parameters(), fused=fused, **options)
    train(model, theirs, seed)
    saved = through_a_file({"model": model.state_dict(), "optimizer": theirs.state_dict()})
    reference = train(model, theirs, seed + 1) + train(model, theirs, seed + 2)

    here = network(seed + 9, dtype)
    ours = getattr(pyshard, name)(here.parameters())
    here.load_state_dict(saved["model"])
    ours.load_state_dict(saved["optimizer"])
    assert ours.param_groups[0]["weight_decay"] == 0.05
    assert train(here, ours, seed + 1) == pytest.approx(reference[:5], **LOSS)

    saved = through_a_file({"model": here.state_dict(), "optimizer": ours.state_dict()})
    back = network(seed + 9, dtype)
    again = getattr(torch.optim, name)(back.parameters())
    back.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    assert again.param_groups[0]["fused"] == fused
    assert train(back, again, seed + 2) == pytest.approx(reference[5:], **LOSS)


def test_torchs_bf16_checkpoint_with_bf16_moments(seed: int) -> None:
    """The moments become fp32 with the same values; the master starts at the parameter."""
    model = network(seed, BF16)
    theirs = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, theirs, seed)
    saved = through_a_file(theirs.state_dict())
    ours = pyshard.AdamW(model.parameters())
    ours.load_state_dict(saved)
    for i, param in enumerate(model.parameters()):
        for key in ("exp_avg", "exp_avg_sq"):
            assert saved["state"][i][key].dtype == BF16
            assert_same_bits(ours.state[param][key], saved["state"][i][key].float(), key)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    kept = [p.detach().clone() for p in model.parameters()]
    ours.param_groups[0].update(lr=0.0)
    ours.step()
    for i, (param, value) in enumerate(zip(model.parameters(), kept)):
        assert_same_bits(ours.state_dict()["state"][i]["master"], value.float())
        assert ours.state[param]["step"] == 6


def test_our_bf16_checkpoint_in_torch(seed: int) -> None:
    """torch casts the moments to bf16, as it always does, and ignores the master."""
    model = network(seed, BF16)
    ours = pyshard.AdamW(model.parameters(), lr=0.01)
    first = train(model, ours, seed)
    theirs = torch.optim.AdamW(model.parameters())
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    for param in model.parameters():
        assert_same_bits(theirs.state[param]["exp_avg"], ours.state[param]["exp_avg"].to(BF16))
    assert sum(train(model, theirs, seed, steps=30)[-5:]) < sum(first)


def test_adam_and_adamw_checkpoints_keep_their_decay(seed: int) -> None:
    """As torch: an AdamW stays decoupled whatever it loads; an Adam takes over what the checkpoint says."""
    model = network(seed)
    adam, adamw = torch.optim.Adam(model.parameters(), weight_decay=0.1), torch.optim.AdamW(model.parameters())
    train(model, adam, seed), train(model, adamw, seed)
    a, w = pyshard.Adam(model.parameters()), pyshard.AdamW(model.parameters())
    w.load_state_dict(adam.state_dict())
    assert w.param_groups[0]["decoupled_weight_decay"] is True
    a.load_state_dict(adamw.state_dict())
    assert a.param_groups[0]["decoupled_weight_decay"] is True


def test_state_dict_of_an_old_torch(seed: int) -> None:
    """Step counts that are numbers, and groups without the newer keys."""
    model, twin = network(seed), network(seed)
    a, b = pyshard.AdamW(model.parameters(), lr=0.01), pyshard.AdamW(twin.parameters(), lr=0.01)
    train(model, a, seed), train(twin, b, seed)
    old = copy.deepcopy(a.state_dict())
    for state in old["state"].values():
        state["step"] = int(state["step"])
    for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
        del old["param_groups"][0][key]
    a.load_state_dict(old)
    assert train(model, a, seed + 1) == train(twin, b, seed + 1)


# ---- before any step, hooks ----


def test_its_own_empty_state(seed: int) -> None:
    model, twin = network(seed, BF16), network(seed, BF16)
    a, b = pyshard.AdamW(model.parameters()), pyshard.AdamW(twin.parameters())
    a.load_state_dict(a.state_dict())
    assert a.state_dict()["state"] == {}
    assert train(model, a, seed) == train(twin, b, seed)


def test_hooks(seed: int) -> None:
    """Hooks see state_dicts as torch's hooks do: plain tensors, masters joined, loaded values in place afterwards."""
    model = network(seed, BF16)
    optimizer = pyshard.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, seed)
    calls: list[str] = []

    def before_save(o: torch.optim.Optimizer) -> None:
        calls.append("before save")

    def after_save(o: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        calls.append("after save")
        assert saved["state"][0]["master"].dtype == F32 and "remainder" not in saved["state"][0]
        return {**saved, "extra": 7}

    def before_load(o: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
        calls.append("before load")
        assert isinstance(loaded["state"][0]["exp_avg"], Tensor)
        loaded = copy.deepcopy(loaded)
        loaded["state"][0]["exp_avg"].fill_(0.25)
        return loaded

    def after_load(o: torch.optim.Optimizer) -> None:
        calls.append("after load")
        assert_same_bits(o.state[model[0].weight]["exp_avg"], torch.full((8, 6), 0.25))

    handles = [
        optimizer.register_state_dict_pre_hook(before_save),
        optimizer.register_state_dict_post_hook(after_save),
        optimizer.register_load_state_dict_pre_hook(before_load),
        optimizer.register_load_state_dict_post_hook(after_load),
    ]
    saved = optimizer.state_dict()
    assert saved["extra"] == 7
    optimizer.load_state_dict(saved)
    assert calls == ["before save", "after save", "before load", "after load"]
    for handle in handles:
        handle.remove()
    assert not optimizer._optimizer_state_dict_post_hooks and not optimizer._optimizer_load_state_dict_pre_hooks
    optimizer.state_dict()
    assert len(calls) == 4


def test_an_error_in_a_hook_leaves_no_hook_behind(seed: int) -> None:
    model = network(seed)
    optimizer = pyshard.AdamW(model.parameters())

    def fails(*_: Any) -> None:
        raise KeyError("mine")

    handles = [
        optimizer.register_state_dict_post_hook(fails),
        optimizer.register_load_state_dict_pre_hook(fails),
    ]
    saved = torch.optim.AdamW(model.parameters()).state_dict()
    for call in (optimizer.state_dict, lambda: optimizer.load_state_dict(saved)):
        with pytest.raises(KeyError, match="mine"):
            call()
    for handle in handles:
        handle.remove()
    assert not optimizer._optimizer_state_dict_post_hooks and not optimizer._optimizer_load_state_dict_pre_hooks


# ---- torch.distributed.checkpoint, in one process ----


@pytest.mark.parametrize("form", FORMATS)
def test_distributed_state_dict_of_a_fresh_optimizer_changes_nothing(seed: int, form: str) -> None:
    """It takes a real step with zero gradients and lr = 0 to make the state."""
    dtype, options = FORMATS[form]
    model, twin = network(seed, dtype), network(seed, dtype)
    a = pyshard.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, **options)
    b = pyshard.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1, **options)
    before = copy.deepcopy(model.state_dict())
    state = dcp_state_dict.get_optimizer_state_dict(model, a)
    assert_same(model.state_dict(), before)
    assert set(state["state"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    dcp_state_dict.set_optimizer_state_dict(model, a, copy.deepcopy(state))
    assert_same(model.state_dict(), before)
    assert a.param_groups[0]["lr"] == 0.01
    for value in a.state.values():
        value["step"].zero_()  # the step with lr = 0 has counted, with torch.optim as well
    train(model, a, seed), train(twin, b, seed)
    assert_same(model.state_dict(), twin.state_dict())
    assert_same(a.state_dict()["state"], b.state_dict()["state"])


@pytest.mark.parametrize("form", FORMATS)
def test_distributed_state_dict_there_and_back(seed: int, form: str) -> None:
    dtype, options = FORMATS[form]
    model, other = network(seed, dtype), network(seed + 9, dtype)
    a = pyshard.AdamW(model.parameters(), lr=0.01, **options)
    b = pyshard.AdamW(other.parameters(), lr=0.5, **options)
    train(model, a, seed)
    saved = through_a_file(
        {"model": model.state_dict(), "optimizer": dcp_state_dict.get_optimizer_state_dict(model, a)}
    )
    other.load_state_dict(saved["model"])
    dcp_state_dict.set_optimizer_state_dict(other, b, saved["optimizer"])
    assert train(model, a, seed + 1) == train(other, b, seed + 1)
    assert_same(a.state_dict(), b.state_dict())


def test_load_keeps_layouts(seed: int) -> None:
    """Moments saved in one memory layout load into a parameter of another."""
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    layouts: list[Callable[[Tensor], Tensor]] = [lambda w: w.clone(), lambda w: w.t().contiguous().t()]
    optimizers = [pyshard.AdamW([nn.Parameter(layout(weight))], lr=0.01) for layout in layouts]

    def step(optimizer: pyshard.AdamW, n: int) -> None:
        g = torch.Generator().manual_seed(seed + n)
        for _ in range(3):
            optimizer.param_groups[0]["params"][0].grad = torch.randn(4, 6, generator=g)
            optimizer.step()

    for optimizer in optimizers:
        step(optimizer, 1)
    crossed = [through_a_file(optimizer.state_dict()) for optimizer in reversed(optimizers)]
    for optimizer, saved in zip(optimizers, crossed):
        optimizer.load_state_dict(saved)
        step(optimizer, 2)
    assert_same(optimizers[0].state_dict(), optimizers[1].state_dict())
    assert optimizers[1].state[optimizers[1].param_groups[0]["params"][0]]["exp_avg"].stride() == (1, 4)
