"""What a training loop does with a ShardedAdamW beyond backward and step, on two or three ranks."""

import copy
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor, nn


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 700), nn.Tanh(), nn.Linear(700, 3), nn.LayerNorm(3))


def _data(rank: int, step: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * step + rank))


def _grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def _twin(model: nn.Module, world: int, **options: Any) -> tuple[nn.Module, Any]:
    """The same training in one process: a model and pyshard.AdamW on the mean of gradients, summed in rank order."""
    import pyshard

    twin = copy.deepcopy(model)
    opt = pyshard.AdamW(twin.parameters(), lr=1e-2, **options)
    opt.grad_scale = torch.tensor(float(world))
    return twin, opt


def _sum_over_ranks(model: nn.Module, world: int, step: int, factor: float = 1.0) -> None:
    """Gradients of all ranks into .grad, summed in rank order."""
    parts = []
    for rank in range(world):
        model.zero_grad()
        (model(_data(rank, step)).square().sum() * factor).backward()
        parts.append(_grads(model))
    for i, p in enumerate(model.parameters()):
        total = parts[0][i]
        for other in parts[1:]:
            total = total + other[i]
        p.grad = total


def _scheduler_and_closure(rank: int, world: int, stage: int) -> bool:
    import pyshard

    model = _model()
    twin, reference = _twin(model, world)
    opt = pyshard.ShardedAdamW(model.parameters(), lr=1e-2, stage=stage)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (opt, reference)]
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            opt.zero_grad()
            loss = model(_data(rank, step)).square().sum()
            loss.backward()
            return loss

        value = opt.step(closure)
        assert isinstance(value, Tensor) and value.item() > 0
        _sum_over_ranks(twin, world, step)
        reference.step()
        for schedule in schedules:
            schedule.step()
    assert opt.param_groups[0]["lr"] == 1e-2 * 0.5**4
    return _equal(_weights(model), _weights(twin))


def _several_backwards(rank: int, world: int, stage: int) -> bool:
    """Two backwards before a step, without no_sync, on a model of which each rank uses different parts."""
    import pyshard

    model = _model()
    extra = nn.Parameter(torch.ones(5000))
    opt = pyshard.ShardedAdamW([*model.parameters(), extra], lr=1e-2, stage=stage, bucket_mb=0.01)
    reference = nn.Parameter(torch.ones(5000))
    twin = pyshard.AdamW([reference], lr=1e-2)
    for step in range(4):
        for micro in range(2):
            loss = model(_data(rank, 2 * step + micro)).square().sum()
            if (rank + micro + step) % 2:
                loss = loss + (extra * (rank + 1.0)).sum()
            loss.backward()
        opt.step()
        opt.zero_grad()
        total = sum((rank + 1.0) * sum((rank + m + step) % 2 for m in range(2)) for rank in range(world))
        reference.grad = torch.full((5000,), total)
        twin.grad_scale = torch.tensor(float(world))
        twin.step()
    assert all(p.grad is None for p in model.parameters())
    return torch.equal(extra, reference)


def _late_parameters(rank: int, world: int, stage: int) -> bool:
    """A group added, and a parameter thawed, after training began."""
    import pyshard

    torch.manual_seed(1)
    a, b, c = (nn.Parameter(torch.randn(n)) for n in (5000, 9000, 7))
    b.requires_grad_(False)
    twins = [nn.Parameter(p.detach().clone()) for p in (a, b, c)]
    opt = pyshard.ShardedAdamW([a, b], lr=1e-2, stage=stage, max_grad_norm=1.0)
    reference = pyshard.AdamW([*twins], lr=1e-2, max_grad_norm=1.0)
    reference.grad_scale = torch.tensor(float(world))
    with torch.no_grad():
        c += rank  # made equal when it joins
    live = [(a, twins[0])]
    for step in range(6):
        if step == 2:
            opt.add_param_group({"params": [c]})
            live.append((c, twins[2]))
        if step == 4:
            b.requires_grad_(True)
            live.append((b, twins[1]))
        sum((p * (rank + 1 + step)).square().sum() for p, _ in live).backward()
        opt.step()
        opt.zero_grad()
        reference.zero_grad()
        for _, twin in live:
            parts = [2 * (twin.detach() * (r + 1 + step)) * (r + 1 + step) for r in range(world)]
            twin.grad = parts[0]
            for part in parts[1:]:
                twin.grad = twin.grad + part
        reference.step()
    return _equal([a.detach(), b.detach(), c.detach()], [t.detach() for t in twins])


def _discarded(rank: int, world: int, stage: int) -> bool:
    """A backward whose gradients are thrown away, also where they have left .grad already."""
    import pyshard

    model = _model()
    twin, reference = _twin(model, world)
    opt = pyshard.ShardedAdamW(model.parameters(), lr=1e-2, stage=stage, bucket_mb=0.01)
    for step in range(5):
        if step in (0, 3):
            model(_data(rank, 50 + step)).square().sum().backward()
            opt.zero_grad()
        model(_data(rank, step)).square().sum().backward()
        opt.step()
        opt.zero_grad()
        _sum_over_ranks(twin, world, step)
        reference.step()
    return _equal(_weights(model), _weights(twin))


def _replaced_memory(rank: int, world: int, stage: int) -> bool:
    """Weights written, loaded and moved between steps."""
    import pyshard

    model = _model()
    twin, reference = _twin(model, world)
    opt = pyshard.ShardedAdamW(model.parameters(), lr=1e-2, stage=stage)
    for step in range(5):
        model(_data(rank, step)).square().sum().backward()
        opt.step()
        opt.zero_grad()
        _sum_over_ranks(twin, world, step)
        reference.step()
        if step == 1:
            for m in (model, twin):
                m.load_state_dict({k: v * 0.5 for k, v in m.state_dict().items()})
        if step == 2:
            for m in (model, twin):
                m.load_state_dict({k: v * 0.5 for k, v in m.state_dict().items()}, assign=True)
    return _equal(_weights(model), _weights(twin))


def _norm_of_a_skipped_step(rank: int, world: int, stage: int) -> bool:
    """inf on one rank: all skip, or all raise, and nothing changes; the next step is as if it had not been."""
    import pyshard

    for nonfinite in ("skip", "raise"):
        model = _model()
        twin, reference = _twin(model, world)
        opt = pyshard.ShardedAdamW(model.parameters(), lr=1e-2, stage=stage, nonfinite=nonfinite)
        raised = 0
        for step in range(4):
            loss = model(_data(rank, step)).square().sum()
            if step in (0, 2):
                loss = loss * (float("inf") if rank == world - 1 else 1.0)
            loss.backward()
            before = _weights(model)
            try:
                opt.step()
            except FloatingPointError as error:
                raised += 1
                assert "holds inf or NaN" in str(error)
            opt.zero_grad()
            if step in (0, 2):
                assert _equal(before, _weights(model))
                assert step or not any(opt.state.values())
            else:
                _sum_over_ranks(twin, world, step)
                reference.step()
                assert torch.isfinite(opt.grad_norm)
        assert (opt.skipped_steps, raised) == ((2, 0) if nonfinite == "skip" else (0, 2))
        if not _equal(_weights(model), _weights(twin)):
            return False
    return True


def _grad_scaler(rank: int, world: int, stage: int) -> list[float]:
    """torch's GradScaler: one scale on all ranks, skipped steps on all, the same weights as without overflow."""
    import pyshard

    model = _model()
    twin, reference = _twin(model, world)
    opt = pyshard.ShardedAdamW(model.parameters(), lr=1e-2, stage=stage)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    scales = []
    for step in range(9):
        overflow = step in (0, 4)
        opt.zero_grad()
        loss = model(_data(rank, step)).square().sum()
        if overflow and rank == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        factor = scaler.get_scale()
        before = _weights(model)
        scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
        if overflow:
            assert _equal(before, _weights(model)), step
        else:
            _sum_over_ranks(twin, world, step, factor)
            reference.grad_scale = torch.tensor(world * factor)
            reference.step()
            assert _equal(_weights(model), _weights(twin)), step
    assert opt.skipped_steps == 2
    return scales


SCENES = [
    _scheduler_and_closure,
    _several_backwards,
    _late_parameters,
    _discarded,
    _replaced_memory,
    _norm_of_a_skipped_step,
]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("scene", SCENES, ids=lambda f: f.__name__.strip("_"))
def test_same_bits_as_one_process(scene: Any, stage: int) -> None:
    for outcome in ranks.run(scene, 2, stage):
        assert outcome.value is True


@pytest.mark.parametrize("stage", [1, 2])
def test_grad_scaler(stage: int) -> None:
    first, second = ranks.run(_grad_scaler, 2, stage)
    assert first.value == second.value == [512.0, 512.0, 512.0, 1024.0, 512.0, 512.0, 512.0, 1024.0, 1024.0]


def _changed_gradients(rank: int, world: int) -> list[str]:
    import pyshard

    messages = []
    for how in ("clip", "unscale"):
        model = _model()
        opt = pyshard.ShardedAdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(model(_data(rank, 0)).square().sum()).backward()
        if how == "clip":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        else:
            scaler.unscale_(opt)
        try:
            opt.step()
            messages.append("no error")
        except RuntimeError as error:
            messages.append(str(error))
    return messages


def test_changing_gradients_at_stage_2_is_an_error() -> None:
    for outcome in ranks.run(_changed_gradients, 2):
        assert all("gradients were changed between backward and step()" in message for message in outcome.value)


def _no_growth(rank: int, world: int, transport: str, stage: int) -> list[int]:
    """Resident memory after 200, 1,100 and 2,000 steps."""
    import pyshard

    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(300)) for _ in range(4)] + [nn.Parameter(torch.randn(5000))]
    opt = pyshard.ShardedAdamW(params, lr=1e-3, stage=stage, transport=transport, max_grad_norm=1.0, bucket_mb=0.01)
    sizes = []
    for step in range(1, 2001):
        sum(p.square().sum() for p in params).backward()
        opt.step()
        opt.zero_grad()
        if step in (200, 1100, 2000):
            with open("/proc/self/statm") as statm:
                sizes.append(int(statm.read().split()[1]) * 4096)
    return sizes


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("transport", ["shm", "collective"])
def test_2000_steps_do_not_grow(transport: str, stage: int) -> None:
    """A leak of one 16-byte object a step would be 29 KB; allocators settle within some 100 KB, a leaked gradient of
    the smallest parameter alone would be 2 MB."""
    for outcome in ranks.run(_no_growth, 2, transport, stage, seconds=300):
        early, _, late = outcome.value
        assert late - early < 1 << 20, outcome.value


def _loaded_in_training(rank: int, world: int, stage: int) -> bool:
    """State loaded, and state replaced by hand, while training goes on."""
    import pyshard

    model = _model()
    twin, reference = _twin(model, world)
    opt = pyshard.ShardedAdamW(model.parameters(), lr=1e-2, stage=stage)
    early: list[Any] = []
    for step in range(6):
        model(_data(rank, step)).square().sum().backward()
        opt.step()
        opt.zero_grad()
        _sum_over_ranks(twin, world, step)
        reference.step()
        if step == 1:
            early = [copy.deepcopy(o.full_state_dict() if o is opt else o.state_dict()) for o in (opt, reference)]
        if step == 3:
            opt.load_state_dict(early[0])
            reference.load_state_dict(early[1])
        if step == 4:
            for o in (opt, reference):
                for p in o.param_groups[0]["params"]:
                    o.state[p] = {k: v * 0.5 if k != "step" else v for k, v in o.state[p].items()}
    return _equal(_weights(model), _weights(twin))


@pytest.mark.parametrize("stage", [1, 2])
def test_state_loaded_in_training(stage: int) -> None:
    for outcome in ranks.run(_loaded_in_training, 2, stage):
        assert outcome.value is True


def _explained(rank: int, world: int, stage: int, transport: str) -> str:
    import pyshard

    model = _model()
    opt = pyshard.ShardedAdamW(model.parameters(), lr=1e-2, stage=stage, transport=transport)
    assert f"transport {transport}" in opt.explain()
    model(_data(rank, 0)).square().sum().backward()
    opt.step()
    text: str = opt.explain()
    return text


@pytest.mark.parametrize("transport", ["shm", "collective"])
def test_explain(transport: str) -> None:
    """Both ranks together hold the state of all parameters."""
    texts = [outcome.value for outcome in ranks.run(_explained, 2, 2, transport)]
    assert f"transport {transport}: asked for by transport='{transport}'" in texts[0]
    assert "gradients travel in float32 and are summed in float32, updated by cpu" in texts[0]
    state = [int(text.rpartition("state ")[2].replace(",", "")) for text in texts]
    numel = 8 * 700 + 700 + 700 * 3 + 3 + 3 + 3
    assert sum(state) == 2 * 4 * numel + 2 * 6 * 4  # both moments, and six step counts on each rank


def _with_the_model(rank: int, world: int) -> bool:
    """Weights on their way while the next forward runs; written over right after step(), too."""
    import pyshard

    model = _model()
    twin, reference = _twin(model, world)
    opt = pyshard.ShardedAdamW(model.parameters(), lr=1e-2, transport="collective", model=model)
    for step in range(8):
        model(_data(rank, step)).square().sum().backward()
        opt.step()
        if step % 2:
            model.load_state_dict({k: v * 0.5 for k, v in twin.state_dict().items()})
        opt.zero_grad()
        _sum_over_ranks(twin, world, step)
        reference.step()
        if step % 2:
            twin.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    opt.synchronize()
    return _equal(_weights(model), _weights(twin))


def test_weights_that_arrive_during_the_next_forward() -> None:
    for outcome in ranks.run(_with_the_model, 2):
        assert outcome.value is True


def _unused_after_all(rank: int, world: int, transport: str) -> bool:
    """Stage 1: a gradient that zero_grad() has cleared does not make a step of its parameter."""
    import pyshard

    a, b = (nn.Parameter(torch.ones(10)) for _ in range(2))
    opt = pyshard.ShardedAdamW([a, b], lr=1e-2, stage=1, transport=transport)
    (a.sum() + b.sum()).backward()
    opt.zero_grad()
    b.sum().backward()
    opt.step()
    return not opt.state[a] and torch.equal(a, torch.ones(10)) and not torch.equal(b, torch.ones(10))


@pytest.mark.parametrize("transport", ["shm", "collective"])
def test_cleared_gradients_do_not_count(transport: str) -> None:
    for outcome in ranks.run(_unused_after_all, 2, transport):
        assert outcome.value is True
