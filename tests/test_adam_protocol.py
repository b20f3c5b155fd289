"""The optimizers under everything that a training loop does with torch's: closures, schedulers, GradScaler, copies,
parameters of all kinds, and values that change between steps.

Values are held to torch.optim's run of the same loop, or, bit for bit, to a plain run of the same numbers.
"""

import copy
import gc
import io
import math
import multiprocessing
import pickle
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import assert_same_bits
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

import pyshard

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# Weights of size about 1 after some 20 steps of lr 0.01: torch's own implementations (for-loop, foreach, fused) differ
# from one another by up to 3 ulp of fp32 here (2e-7); ten times that.
CLOSE = {"rtol": 2e-6, "atol": 2e-6}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = F32) -> list[nn.Parameter]:
    g = generator(seed)
    return [nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in shapes or ((5, 3), (7,))]


def set_grads(params: list[nn.Parameter], g: torch.Generator, scale: float = 1.0) -> None:
    for param in params:
        param.grad = (torch.randn(param.shape, generator=g) * scale).to(param.dtype)


def train(optimizer: torch.optim.Optimizer, seed: int, steps: int = 4) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    g = generator(seed + 1)
    for _ in range(steps):
        set_grads(params, g)
        optimizer.step()


def values(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters and state tensors, in order."""
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param) or {}
            found += [param.detach(), *(state[key] for key in sorted(state))]
    return found


def assert_same_run(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    left, right = values(a), values(b)
    assert len(left) == len(right)
    for i, (x, y) in enumerate(zip(left, right)):
        assert_same_bits(x, y, f"value {i}")


def assert_close(a: list[nn.Parameter], b: list[nn.Parameter]) -> None:
    for i, (x, y) in enumerate(zip(a, b)):
        torch.testing.assert_close(x.detach(), y.detach(), **CLOSE, msg=lambda m, i=i: f"parameter {i}: {m}")


# ---- step ----


def test_closure(seed: int) -> None:
    """The closure runs with gradients switched on, its result comes back, and backward may be in it."""
    params, twins = make(seed), make(seed)
    optimizer, twin = pyshard.AdamW(params), torch.optim.AdamW(twins)

    def closure_of(weights: list[nn.Parameter], opt: torch.optim.Optimizer) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            assert torch.is_grad_enabled()
            opt.zero_grad()
            loss = sum(((w - 1) ** 2).sum() for w in weights)
            loss.backward()
            return loss

        return closure

    for _ in range(10):
        with torch.no_grad():
            got = optimizer.step(closure_of(params, optimizer))
            want = twin.step(closure_of(twins, twin))
        torch.testing.assert_close(got, want, **CLOSE)
    assert_close(params, twins)


def test_step_hooks_see_values_before_and_after(seed: int) -> None:
    (param,) = params = make(seed, (4,))
    optimizer = pyshard.AdamW(params)
    seen: list[Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(param.detach().clone()))
    optimizer.register_step_post_hook(lambda *_: seen.append(param.detach().clone()))
    start = param.detach().clone()
    set_grads(params, generator(seed))
    optimizer.step()
    assert_same_bits(seen[0], start)
    assert_same_bits(seen[1], param.detach())
    assert not torch.equal(seen[0], seen[1])


def test_global_step_hooks_run_once_for_each_class(seed: int) -> None:
    calls: list[str] = []
    hook = register_optimizer_step_post_hook(lambda o, *_: calls.append(type(o).__name__))
    try:
        for cls in (pyshard.AdamW, pyshard.Adam, pyshard.AdamW):
            train(cls(make(seed)), seed, steps=1)
    finally:
        hook.remove()
    assert calls == ["AdamW", "Adam", "AdamW"]


def test_step_wrapped_by_its_function(seed: int) -> None:
    """Schedulers replace optimizer.step by a wrapper around step.__func__."""
    a, b = pyshard.AdamW(make(seed)), pyshard.AdamW(make(seed))
    inner = a.step.__func__
    calls = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(a, *args, **kwargs)

    a.step = wrapped  # type: ignore[method-assign]
    train(a, seed), train(b, seed)
    assert len(calls) == 4
    assert_same_run(a, b)


def test_profiler_record(seed: int) -> None:
    optimizer = pyshard.AdamW(make(seed))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(optimizer, seed, steps=2)
        optimizer.zero_grad()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["Optimizer.step#AdamW.step"] == 2
    assert counts["Optimizer.zero_grad#AdamW.zero_grad"] == 1


def test_backward_through_weights_that_a_step_has_changed_is_an_error(seed: int) -> None:
    """As with torch.optim: the update counts as a change in place, for split weights and copied ones too."""
    for dtype in (F32, BF16, F64):
        for view in (lambda w: w, lambda w: w[:, :2]):
            weight = nn.Parameter(view(torch.randn(3, 4, generator=generator(seed)).to(dtype)))
            weight = nn.Parameter(weight.detach())
            optimizer = pyshard.AdamW([weight])
            loss = (weight * weight).sum()
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_compiled_forward_with_this_step(seed: int) -> None:
    """A model under torch.compile sees the new weights of each step. eager backend: guards and tracing are real."""
    layer, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(4, 3, generator=generator(seed))
    losses: list[list[float]] = []
    for module, forward in ((layer, torch.compile(layer, backend="eager")), (twin, twin)):
        optimizer = pyshard.AdamW(module.parameters(), lr=0.1)
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            loss = forward(x).square().sum()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_step_under_compile(seed: int) -> None:
    """torch.compile(optimizer.step) gives the same bits."""
    a, b = pyshard.AdamW(make(seed)), pyshard.AdamW(make(seed))
    step = torch.compile(a.step, backend="eager")
    ga, gb = generator(seed), generator(seed)
    for _ in range(3):
        set_grads(a.param_groups[0]["params"], ga)
        set_grads(b.param_groups[0]["params"], gb)
        step()
        b.step()
    assert_same_run(a, b)


# ---- groups and hyperparameters ----


def test_add_param_group_after_training_began(seed: int) -> None:
    runs = []
    for cls in (pyshard.AdamW, torch.optim.AdamW):
        first, second = make(seed), make(seed + 7, (3,), (2, 2))
        optimizer = cls(first, lr=0.01)
        train(optimizer, seed)
        optimizer.add_param_group({"params": second, "lr": 0.1, "weight_decay": 0.5, "betas": (0.5, 0.9)})
        train(optimizer, seed + 3)
        assert [float(optimizer.state[p]["step"]) for p in (*first, *second)] == [8, 8, 4, 4]
        runs.append([*first, *second])
    assert_close(*runs)


def test_named_parameters(seed: int) -> None:
    layer, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(layer.state_dict())
    named, plain = pyshard.AdamW(layer.named_parameters()), pyshard.AdamW(twin.parameters())
    train(named, seed), train(plain, seed)
    assert_same_run(named, plain)
    assert named.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "lr": lambda g: g.update(lr=g["lr"] * 3),
    "lr to 0": lambda g: g.update(lr=0.0),
    "lr to a tensor": lambda g: g.update(lr=torch.tensor(0.02)),
    "betas": lambda g: g.update(betas=(0.8, 0.99)),
    "betas to a list": lambda g: g.update(betas=[0.8, 0.99]),
    "eps": lambda g: g.update(eps=1e-3),
    "weight_decay from 0": lambda g: g.update(weight_decay=0.3),
    "maximize": lambda g: g.update(maximize=True),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_hyperparameters_changed_between_steps(seed: int, name: str, change: str, dtype: torch.dtype) -> None:
    """weight_decay 0 -> x with Adam changes the kernel (coupled), not only a scalar."""
    runs = []
    for library in (pyshard, torch.optim):
        params = make(seed, dtype=dtype)
        optimizer = getattr(library, name)(params, lr=0.01, weight_decay=0.0)
        train(optimizer, seed)
        CHANGES[change](optimizer.param_groups[0])
        train(optimizer, seed + 3)
        runs.append(params)
    assert_close(*runs)


def test_betas_list_changed_in_place(seed: int) -> None:
    runs = []
    for library in (pyshard, torch.optim):
        params = make(seed)
        optimizer = library.AdamW([{"params": params, "betas": [0.9, 0.999]}], lr=0.01)
        train(optimizer, seed)
        optimizer.param_groups[0]["betas"][0] = 0.5
        train(optimizer, seed + 3)
        runs.append(params)
    assert_close(*runs)


def test_amsgrad_switched_on_midway(seed: int) -> None:
    """From then on the maximum over the steps with amsgrad; torch.optim stops with a KeyError."""
    params, twins = make(seed), make(seed)
    optimizer, twin = pyshard.AdamW(params, lr=0.01), torch.optim.AdamW(twins, lr=0.01)
    train(optimizer, seed), train(twin, seed)
    optimizer.param_groups[0]["amsgrad"] = twin.param_groups[0]["amsgrad"] = True
    for param in twins:
        twin.state[param]["max_exp_avg_sq"] = torch.zeros_like(param)
    train(optimizer, seed + 3), train(twin, seed + 3)
    assert_close(params, twins)
    optimizer.param_groups[0]["amsgrad"] = twin.param_groups[0]["amsgrad"] = False
    train(optimizer, seed + 5), train(twin, seed + 5)
    assert_close(params, twins)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR, betas too": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=20),
    "CyclicLR, betas too": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.02, step_size_up=4),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 5), lr_scheduler.ExponentialLR(o, 0.8)], milestones=[5]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(seed: int, scheduler: str, tensor_lr: bool) -> None:
    runs, rates = [], []
    for library in (pyshard, torch.optim):
        params = make(seed)
        optimizer = library.AdamW(params, lr=torch.tensor(0.01) if tensor_lr else 0.01)
        schedule = SCHEDULERS[scheduler](optimizer)
        g, used = generator(seed), []
        for _ in range(12):
            set_grads(params, g)
            optimizer.step()
            schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
            used.append((float(optimizer.param_groups[0]["lr"]), *map(float, optimizer.param_groups[0]["betas"])))
        if tensor_lr and scheduler != "OneCycleLR, betas too":
            assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
        runs.append(params)
        rates.append(used)
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1, "the schedule has changed something"
    assert_close(*runs)


# ---- GradScaler ----


def overflow_run(
    library: Any, seed: int, fused: bool | None, clip: float | None = None
) -> tuple[list[Any], list[float]]:
    """Ten steps, the third and seventh with an inf in one gradient; returns parameters and the scales."""
    params = make(seed)
    optimizer = library.AdamW(params, lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    g, scales = generator(seed), []
    for step in range(10):
        optimizer.zero_grad()
        targets = [torch.randn(p.shape, generator=g) for p in params]
        scaler.scale(sum((p * t).sum() for p, t in zip(params, targets))).backward()
        if step in (2, 6):
            params[1].grad[3] = math.inf  # type: ignore[index]
        if clip is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, clip)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    counts = [float(optimizer.state[p]["step"]) for p in params]
    return [*params, counts, getattr(optimizer, "skipped_steps", None)], scales


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler(seed: int, fused: bool | None, clip: float | None) -> None:
    """Overflow skips the step and its count and halves the scale; the scale grows; unscale_ and clip come before."""
    ours, scales = overflow_run(pyshard, seed, fused, clip)
    theirs, their_scales = overflow_run(torch.optim, seed, fused, clip)
    assert scales == their_scales
    ratios = {b / a for a, b in zip([1024.0, *scales], scales)}
    assert ratios == {0.5, 1.0, 2.0}, "it has backed off, stayed, and grown"
    assert ours[2] == theirs[2] == [8.0, 8.0]
    assert ours[3] == (2 if fused else 0)  # by default GradScaler does not call step() at all
    assert_close(ours[:2], theirs[:2])


def test_grad_scaler_with_fused_and_fp16_parameters(seed: int) -> None:
    """fp16 gradients are unscaled in fp32 inside the step; the same bits as with unscaled gradients of that value."""
    scaled, plain = make(seed, dtype=F16), make(seed, dtype=F16)
    optimizer, twin = pyshard.AdamW(scaled, lr=0.01, fused=True), pyshard.AdamW(plain, lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    g = generator(seed)
    for _ in range(5):
        scaler.scale(torch.zeros(()))  # the scaler makes its scale when it is first used
        for a, b in zip(scaled, plain):
            # Multiples of 1/64 below 16: exact in fp16, also 256 times as large.
            a.grad = (torch.randint(-64, 64, a.shape, generator=g) / 64).to(F16) * 256
            b.grad = a.grad / 256
        scaler.step(optimizer)
        scaler.update()
        twin.step()
    assert_same_run(optimizer, twin)


# ---- copies ----


FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (F32, {}),
    "fp64": (F64, {}),
    "bf16 split": (BF16, {}),
    "bf16 master": (BF16, {"master_weights": "fp32"}),
    "fp16 master": (F16, {}),
    "bf16 none": (BF16, {"master_weights": "none"}),
    "bf16 split amsgrad": (BF16, {"amsgrad": True}),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_alike(seed: int, how: str, form: str) -> None:
    """A copy of parameters and optimizer shares nothing with the original and goes on with the same bits."""
    dtype, options = FORMATS[form]
    optimizer = pyshard.AdamW(make(seed, dtype=dtype), lr=0.01, nonfinite="skip", fused=True, **options)
    train(optimizer, seed)
    optimizer.param_groups[0]["params"][0].grad[0] = math.nan
    optimizer.step()
    if how == "deepcopy":
        other = copy.deepcopy(optimizer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(optimizer))
    else:
        file = io.BytesIO()
        torch.save(optimizer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is pyshard.AdamW and other.options == optimizer.options
    assert other.skipped_steps == optimizer.skipped_steps == 1
    assert other._step_supports_amp_scaling is True
    shared = {t.data_ptr() for t in values(optimizer)} & {t.data_ptr() for t in values(other)}
    assert not shared
    before = [t.clone() for t in values(optimizer)]
    train(other, seed + 3)
    for x, y in zip(values(optimizer), before):
        assert_same_bits(x, y, "the original")
    train(optimizer, seed + 3)
    assert_same_run(optimizer, other)


def test_a_copied_model_keeps_its_tie_to_the_copied_optimizer(seed: int) -> None:
    layer = nn.Linear(3, 2)
    optimizer = pyshard.AdamW(layer.parameters())
    train(optimizer, seed)
    layer2, optimizer2 = copy.deepcopy((layer, optimizer))
    train(optimizer2, seed + 3)
    assert optimizer2.param_groups[0]["params"][0] is layer2.weight
    assert not torch.equal(layer.weight, layer2.weight)


def _step_in_child(connection: Any, data: bytes, seed: int) -> None:
    torch.set_num_threads(1)
    optimizer = pickle.loads(data)
    train(optimizer, seed)
    connection.send(pickle.dumps(optimizer))
    connection.close()


def test_pickle_to_a_process_and_back(seed: int) -> None:
    optimizer = pyshard.AdamW(make(seed, dtype=BF16))
    train(optimizer, seed)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_step_in_child, args=(there, pickle.dumps(optimizer), seed + 3))
    child.start()
    there.close()
    assert here.poll(120), "the child process has not answered"
    other = pickle.loads(here.recv())
    child.join(60)
    assert child.exitcode == 0
    train(optimizer, seed + 3)
    assert_same_run(optimizer, other)


def test_repr(seed: int) -> None:
    text = repr(pyshard.AdamW(make(seed), lr=0.25))
    assert text.startswith("AdamW (") and "lr: 0.25" in text


# ---- parameters ----


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(seed: int, set_to_none: bool) -> None:
    params, twins = make(seed), make(seed)
    optimizer, twin = pyshard.AdamW(params, lr=0.01), torch.optim.AdamW(twins, lr=0.01)
    for step in range(6):
        for opt, weights in ((optimizer, params), (twin, twins)):
            opt.zero_grad(set_to_none=set_to_none)
            used = weights if step % 2 else weights[:1]
            sum((w.sin() * (step + 1)).sum() for w in used).backward()
            opt.step()
    assert_close(params, twins)
    # Unused at the odd steps: no gradient is no step, a gradient of zeros is one.
    assert float(optimizer.state[params[1]]["step"]) == (3 if set_to_none else 5)


def test_frozen_then_thawed(seed: int) -> None:
    runs = []
    for library in (pyshard, torch.optim):
        params = make(seed)
        params[0].requires_grad_(False)
        optimizer = library.AdamW(params, lr=0.01)
        for step in range(6):
            params[0].requires_grad_(step >= 3)
            optimizer.zero_grad()
            (params[0].sum() * params[1].sum()).backward()
            optimizer.step()
        assert [float(optimizer.state[p]["step"]) for p in params] == [3, 6]
        runs.append(params)
    assert_close(*runs)


def test_no_parameter_has_a_gradient(seed: int) -> None:
    params = make(seed)
    before = [p.detach().clone() for p in params]
    optimizer = pyshard.AdamW(params, max_grad_norm=1.0, nonfinite="raise")
    optimizer.step()
    assert not optimizer.state
    assert optimizer.grad_norm == 0
    for param, value in zip(params, before):
        assert_same_bits(param.detach(), value)


def test_tied_weights(seed: int) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    a, b = Tied(), Tied()
    b.load_state_dict(a.state_dict())
    tokens = torch.randint(5, (8,), generator=generator(seed))
    for module, library in ((a, pyshard), (b, torch.optim)):
        optimizer = library.AdamW(module.parameters(), lr=0.01)
        assert len(optimizer.param_groups[0]["params"]) == 1
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module.head(module.embed(tokens)), tokens).backward()
            optimizer.step()
        assert module.head.weight is module.embed.weight
    assert_close([a.head.weight], [b.head.weight])


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_empty_and_0d(seed: int, dtype: torch.dtype) -> None:
    """Tensors without elements and without dimensions, beside ordinary ones, change nothing of their bits."""
    params = make(seed, (0,), (), (3, 0, 2), (5,), dtype=dtype)
    alone = make(seed, (0,), (), (3, 0, 2), (5,), dtype=dtype)
    optimizer, twin = pyshard.AdamW(params, max_grad_norm=0.5), pyshard.AdamW([alone[1], alone[3]], max_grad_norm=0.5)
    g = generator(seed)
    for _ in range(3):
        set_grads(params, g)
        for a, b in zip(params, alone):
            b.grad = a.grad.clone()
        optimizer.step(), twin.step()
        assert_same_bits(optimizer.grad_norm, twin.grad_norm)
    for a, b in zip((params[1], params[3]), (alone[1], alone[3])):
        assert_same_bits(a.detach(), b.detach())
    assert [float(optimizer.state[p]["step"]) for p in params] == [3] * 4


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "slice with gaps": lambda x: torch.cat([x, x], dim=3)[..., ::2].copy_(x),
    "slice of rows": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]].copy_(x),
    "size-1 strides": lambda x: x.as_strided(x.shape, x.stride()),
}


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("param_layout", LAYOUTS)
def test_layouts(seed: int, param_layout: str, grad_layout: str, dtype: torch.dtype) -> None:
    """The layout of parameter and gradient does not change a bit, and the layout of the parameter stays."""
    shape = (2, 3, 4, 5)
    plain = make(seed, shape, dtype=dtype)
    weight = nn.Parameter(LAYOUTS[param_layout](plain[0].detach().clone()))
    strides, address = weight.stride(), weight.data_ptr()
    optimizer, twin = pyshard.AdamW([weight], lr=0.01), pyshard.AdamW(plain, lr=0.01)
    g = generator(seed)
    for _ in range(3):
        set_grads(plain, g)
        weight.grad = LAYOUTS[grad_layout](plain[0].grad.clone())
        optimizer.step(), twin.step()
    assert (weight.stride(), weight.data_ptr()) == (strides, address)
    assert_same_run(optimizer, twin)


def test_expanded_gradient(seed: int) -> None:
    a, b = pyshard.AdamW(make(seed, (4, 3))), pyshard.AdamW(make(seed, (4, 3)))
    for step in range(3):
        a.param_groups[0]["params"][0].grad = torch.tensor(float(step)).expand(4, 3)
        b.param_groups[0]["params"][0].grad = torch.full((4, 3), float(step))
        a.step(), b.step()
    assert_same_run(a, b)


def test_gradients_that_require_grad(seed: int) -> None:
    """backward(create_graph=True) leaves gradients with a graph; the step must not extend it."""
    for layout in ("contiguous", "slice with gaps"):
        weight = nn.Parameter(LAYOUTS[layout](torch.randn(2, 3, 4, 5, generator=generator(seed))))
        optimizer = pyshard.AdamW([weight])
        for _ in range(2):
            weight.grad = None
            weight.grad = torch.autograd.grad((weight**3).sum(), weight, create_graph=True)[0]
            assert weight.grad.requires_grad
            optimizer.step()
        assert all(not t.requires_grad for t in optimizer.state[weight].values())
        assert weight.is_leaf


def test_mixed_dtypes_in_one_group(seed: int) -> None:
    """Each parameter as it would go alone; one step, one norm."""
    dtypes = (F32, BF16, F16, F64, BF16, F32)
    params = [make(seed + i, (4, 3), dtype=dtype)[0] for i, dtype in enumerate(dtypes)]
    twins = copy.deepcopy(params)
    together = pyshard.AdamW(params, lr=0.01)
    alone = [pyshard.AdamW([twin], lr=0.01) for twin in twins]
    g = generator(seed)
    for _ in range(4):
        set_grads(params, g)
        for a, b in zip(params, twins):
            b.grad = a.grad.clone()
        together.step()
        for optimizer in alone:
            optimizer.step()
    for a, b, optimizer in zip(params, twins, alone):
        assert_same_bits(a.detach(), b.detach(), str(a.dtype))
        for key, value in optimizer.state[b].items():
            assert_same_bits(together.state[a][key], value, key)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_fp32_gradients_of_16_bit_parameters(seed: int, dtype: torch.dtype) -> None:
    """Gradients accumulated in fp32 (`.data`, as torch refuses other dtypes) are used in full."""
    a, b = make(seed, (64,), dtype=dtype), make(seed, (64,), dtype=F32)
    b[0].data.copy_(a[0].data.float())
    optimizer, twin = pyshard.AdamW(a, lr=0.01), pyshard.AdamW(b, lr=0.01)
    g = generator(seed)
    for step in range(4):
        set_grads(b, g)
        a[0].grad = torch.zeros_like(a[0])
        a[0].grad.data = b[0].grad.clone() if step != 2 else b[0].grad.to(dtype)  # the dtype may change
        if step == 2:
            b[0].grad = a[0].grad.float()
        optimizer.step(), twin.step()
    assert_same_bits(a[0].detach(), b[0].detach().to(dtype))
    for key in ("exp_avg", "exp_avg_sq"):
        assert_same_bits(optimizer.state[a[0]][key], twin.state[b[0]][key], key)


# ---- things that are swapped under a running optimizer ----


SWAPS: dict[str, Callable[[pyshard.AdamW], None]] = {}


def swap(function: Callable[[pyshard.AdamW], None]) -> Callable[[pyshard.AdamW], None]:
    SWAPS[function.__name__] = function
    return function


@swap
def same_values_in_new_memory(optimizer: pyshard.AdamW) -> None:
    for param in optimizer.param_groups[0]["params"]:
        param.data = param.data.clone()


@swap
def params_transposed_in_memory(optimizer: pyshard.AdamW) -> None:
    (param, *_) = optimizer.param_groups[0]["params"]
    param.data = param.data.t().contiguous().t()


@swap
def state_to_another_place_and_back(optimizer: pyshard.AdamW) -> None:
    for state in optimizer.state.values():
        for key in list(state):
            state[key] = state[key].clone()


@swap
def state_data_swapped(optimizer: pyshard.AdamW) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


@swap
def state_in_new_dictionaries(optimizer: pyshard.AdamW) -> None:
    for param in list(optimizer.state):
        optimizer.state[param] = {key: value.clone() for key, value in optimizer.state[param].items()}


@swap
def state_in_another_order(optimizer: pyshard.AdamW) -> None:
    for param in reversed(list(optimizer.state)):
        optimizer.state[param] = {key: v.clone() for key, v in reversed(optimizer.state.pop(param).items())}


@swap
def groups_replaced(optimizer: pyshard.AdamW) -> None:
    optimizer.param_groups[:] = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]


@swap
def group_split_in_two(optimizer: pyshard.AdamW) -> None:
    groups = optimizer.param_groups
    groups[:] = [{**group, "params": [param]} for group in groups for param in group["params"]]


@swap
def loaded_from_itself(optimizer: pyshard.AdamW) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


@swap
def foreign_state_beside(optimizer: pyshard.AdamW) -> None:
    optimizer.state[torch.zeros(1)] = {"what": torch.ones(2)}
    for state in optimizer.state.values():
        state["mine"] = torch.zeros(3)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", SWAPS)
def test_swapped_and_gone_on(seed: int, name: str, form: str) -> None:
    dtype, options = FORMATS[form]
    a = pyshard.AdamW(make(seed, dtype=dtype), lr=0.01, **options)
    b = pyshard.AdamW(make(seed, dtype=dtype), lr=0.01, **options)
    train(a, seed), train(b, seed)
    for i in range(2):
        SWAPS[name](a)
        train(a, seed + 3 + i), train(b, seed + 3 + i)
    params_a = [p for group in a.param_groups for p in group["params"]]
    params_b = b.param_groups[0]["params"]
    for x, y in zip(params_a, params_b):
        assert_same_bits(x.detach(), y.detach())
        for key, value in b.state[y].items():
            assert_same_bits(a.state[x][key], value, key)


@pytest.mark.parametrize("when", ["before any step", "after steps"])
def test_parameters_swapped_in_the_groups(seed: int, when: str) -> None:
    """Accelerate with FSDP2 replaces every entry twice, and loads the optimizer's own state_dict, before any step."""
    params, twins = make(seed), make(seed)
    optimizer, twin = pyshard.AdamW(params, lr=0.01), pyshard.AdamW(twins, lr=0.01)
    if when == "after steps":
        train(optimizer, seed)
    group = optimizer.param_groups[0]
    group["params"] = [torch.empty(1) for _ in params]
    group["params"] = swapped = make(seed)
    optimizer.load_state_dict(optimizer.state_dict()) if when == "before any step" else None
    if when == "after steps":
        optimizer.state.clear()
    train(optimizer, seed + 3), train(twin, seed + 3)
    assert group["params"] is swapped or optimizer.param_groups[0]["params"] == swapped
    for a, b in zip(swapped, twins):
        assert_same_bits(a.detach(), b.detach())


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_weights_written_between_steps(seed: int, dtype: torch.dtype) -> None:
    """What the user writes is what training goes on with: to half a bf16 step where a remainder stays beside it."""
    a, b = make(seed, (64,), dtype=dtype), make(seed, (64,), dtype=F32)
    optimizer, twin = pyshard.AdamW(a, lr=0.01), pyshard.AdamW(b, lr=0.01)
    b[0].data.copy_(a[0].data)
    written = torch.randn(64, generator=generator(seed + 9)).to(dtype)
    for step in range(4):
        if step == 2:
            with torch.no_grad():
                a[0].copy_(written)
                b[0].copy_(written)
        g = torch.randn(64, generator=generator(seed + step)).to(dtype)
        a[0].grad, b[0].grad = g, g.float()
        optimizer.step(), twin.step()
    if dtype == BF16:
        # Half a step of what was written, whose lower half stays, and the rounding of what it has become.
        bound = 2**-8 * (written.float().abs() + b[0].detach().abs())
        assert bool(((a[0].detach().float() - b[0].detach()).abs() <= bound).all())
    else:
        assert_same_bits(a[0].detach(), b[0].detach().to(dtype))


def test_averaged_weights_swapped_in_and_out(seed: int) -> None:
    """An average of the weights, swapped in for a while without a step, leaves training as it was, bit for bit."""
    layer, twin = nn.Linear(8, 8, dtype=BF16), nn.Linear(8, 8, dtype=BF16)
    twin.load_state_dict(layer.state_dict())
    average = torch.optim.swa_utils.AveragedModel(layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    a, b = pyshard.AdamW(layer.parameters(), lr=0.01), pyshard.AdamW(twin.parameters(), lr=0.01)
    for i in range(4):
        train(a, seed + i, steps=1), train(b, seed + i, steps=1)
        average.update_parameters(layer)
        kept = {key: value.clone() for key, value in layer.state_dict().items()}
        layer.load_state_dict(average.module.state_dict())
        layer.load_state_dict(kept)
    assert_same_run(a, b)
    assert not torch.equal(average.module.weight, layer.weight)


# ---- nonfinite and the norm ----


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("form", FORMATS)
def test_nonfinite(seed: int, form: str, bad: float) -> None:
    """propagate is torch's way; skip and raise change nothing, at the first step as at a later one."""
    dtype, options = FORMATS[form]
    for first in (True, False):
        optimizers = {
            mode: pyshard.AdamW(make(seed, dtype=dtype), nonfinite=mode, **options)
            for mode in ("propagate", "skip", "raise")
        }
        for mode, optimizer in optimizers.items():
            params = optimizer.param_groups[0]["params"]
            if not first:
                train(optimizer, seed)
            before, count = [t.clone() for t in values(optimizer)], len(optimizer.state)
            set_grads(params, generator(seed))
            params[1].grad[4] = bad
            if mode == "raise":
                with pytest.raises(FloatingPointError, match=r"pyshard.AdamW: the gradient of parameter 1 holds inf"):
                    optimizer.step()
                assert len(optimizer.state) == count
            else:
                optimizer.step()
            if mode == "propagate":
                assert params[1][4].isnan() and params[1][:4].isfinite().all() and params[0].isfinite().all()
                continue
            if not first:
                for x, y in zip(values(optimizer), before):
                    assert_same_bits(x, y)
            assert optimizer.skipped_steps == (1 if mode == "skip" else 0)
            train(optimizer, seed + 3)  # goes on
        assert_same_run(optimizers["skip"], optimizers["raise"])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
def test_max_grad_norm(seed: int, form: str, max_norm: float) -> None:
    """The norm and the clipping of clip_grad_norm_, without writing the gradients."""
    dtype, options = FORMATS[form]
    clipped = pyshard.AdamW(make(seed, dtype=dtype), lr=0.01, max_grad_norm=max_norm, **options)
    twin = pyshard.AdamW(make(seed, dtype=dtype), lr=0.01, **options)
    g = generator(seed)
    for _ in range(4):
        a, b = clipped.param_groups[0]["params"], twin.param_groups[0]["params"]
        set_grads(a, g, scale=0.3)
        for x, y in zip(a, b):
            if dtype in (BF16, F16):  # clip_grad_norm_ would round the gradients to 16 bits
                y.grad = torch.zeros_like(y)
                y.grad.data = x.grad.float()
            else:
                y.grad = x.grad.clone()
        kept = [x.grad.clone() for x in a]
        want = torch.nn.utils.clip_grad_norm_(b, max_norm)
        clipped.step(), twin.step()
        torch.testing.assert_close(clipped.grad_norm.double(), want.double(), rtol=1e-6, atol=0)
        assert clipped.grad_norm.dtype == F32 and clipped.grad_norm.dim() == 0
        for x, grad in zip(a, kept):
            assert_same_bits(x.grad, grad)
    for key in ("exp_avg", "exp_avg_sq"):
        # There the norm, the coefficient and the product are rounded to fp32: 3 ulp of gradients that enter the moments
        # (of size 0.1) by a tenth, and cancel.
        for x, y in zip(a, b):
            torch.testing.assert_close(clipped.state[x][key], twin.state[y][key], rtol=1e-6, atol=3e-8)


def test_norm_alone_and_norm_of_scaled_gradients(seed: int) -> None:
    optimizer, twin = pyshard.AdamW(make(seed), max_grad_norm=math.inf, fused=True), pyshard.AdamW(make(seed))
    with pytest.raises(RuntimeError, match="no gradient norm yet"):
        _ = optimizer.grad_norm
    params = optimizer.param_groups[0]["params"]
    set_grads(params, generator(seed))
    set_grads(twin.param_groups[0]["params"], generator(seed))
    exact = math.sqrt(sum(float(p.grad.double().square().sum()) for p in params))
    for param in params:
        param.grad *= 1024
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)  # type: ignore[attr-defined]
    optimizer.step()
    twin.step()
    assert float(optimizer.grad_norm) == pytest.approx(exact, rel=1e-7)
    assert_same_run(optimizer, twin)


# ---- memory ----


def test_nothing_keeps_gradients_state_or_the_optimizer_alive(seed: int) -> None:
    """zero_grad() frees gradients; state that is moved away is freed; so is a dropped optimizer, in a cycle too."""
    params = make(seed, dtype=BF16)
    optimizer = pyshard.AdamW(params, max_grad_norm=1.0)
    train(optimizer, seed)
    grads = [weakref.ref(p.grad) for p in params]
    optimizer.zero_grad()
    assert all(ref() is None for ref in grads)

    moments = [weakref.ref(optimizer.state[p]["exp_avg"]) for p in params]
    optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].clone()
    optimizer.state[params[1]] = {key: value.clone() for key, value in optimizer.state[params[1]].items()}
    assert all(ref() is None for ref in moments)

    train(optimizer, seed)
    params[0].owner = optimizer  # type: ignore[attr-defined]
    refs = [weakref.ref(t) for t in (*params, *values(optimizer))]
    del params, optimizer
    gc.collect()
    assert all(ref() is None for ref in refs)


def live_tensors() -> int:
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def test_memory_does_not_grow(seed: int) -> None:
    """2,000 steps with new gradients each: after a warm-up nothing more stays allocated."""
    params = make(seed, (8,), (4, 4), (3,)) + make(seed, (16,), dtype=BF16)
    optimizer = pyshard.AdamW(params, max_grad_norm=1.0, nonfinite="skip")
    g = generator(seed)

    def steps(n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            set_grads(params, g)
            optimizer.step()

    steps(200)
    gc.collect()
    tensors = live_tensors()
    tracemalloc.start()
    steps(100)
    first = tracemalloc.get_traced_memory()[0]
    steps(1900)
    grown = tracemalloc.get_traced_memory()[0] - first
    tracemalloc.stop()
    assert grown < 20_000, f"{grown} bytes more after 1,900 steps"  # 10 bytes a step would be a leak of anything
    gc.collect()
    assert live_tensors() <= tensors


def test_explain_names_the_paths(seed: int) -> None:
    params = [*make(seed, (4, 3)), *make(seed, (5,), dtype=BF16), *make(seed, (2,), dtype=F64)]
    params.append(nn.Parameter(torch.zeros(4, 6)[:, ::2]))
    optimizer = pyshard.AdamW(params, max_grad_norm=1.0)
    assert "no step taken yet" in optimizer.explain()
    train(optimizer, seed)
    text = optimizer.explain()
    assert "cpu on cpu: 1 tensors, 5 elements, 54 bytes" in text  # 4+4 moments, 2 remainder, step count of 4 bytes
    assert "reference on cpu: 1 tensors, 2 elements" in text
    assert "1 of them copied to and fro" in text


def test_finite_fp64_gradients_whose_squares_overflow_are_not_skipped() -> None:
    param = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = pyshard.AdamW([param], lr=0.1, weight_decay=0.0, nonfinite="raise")
    param.grad = torch.full((3,), 1e200, dtype=torch.float64)
    optimizer.step()
    # The first step of Adam is lr long in each coordinate, whatever the gradient's size; v overflows, so here it is 0.
    assert optimizer.state[param]["step"] == 1
    assert torch.equal(optimizer.state[param]["exp_avg"], torch.full((3,), 1e200 * (1 - 0.9), dtype=torch.float64))
