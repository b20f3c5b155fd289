"""Pipelines on 1 to 4 ranks against the same model in one process: gradients, losses, logits, names."""

import gc
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pp_cases import BLOCKS, batch, build, cross_entropy, custom, one_process
from ranks import run
from reference import assert_same_bits
from torch import Tensor, nn

import pyshard
from pyshard.placement import pipeline_share
from pyshard.pp import SCHEDULES, Plan, causal_lm_loss, pipeline
from pyshard.pp.schedules import kind_of, ranks_of_stages

MICROBATCHES = 8
# Schedules that take the microbatches of each stage in their order: gradients are added in the order of one process.
IN_ORDER = ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble", "dual_pipe_v")
# Eight terms added in another order, each with an error of some units in the last place of the largest.
CLOSE = {"rtol": 2e-5, "atol": 1e-6}
CUSTOM = Plan("blocks", first=["embedding", "scale_in"], last=["norm", "embedding"])


def pipe_of(model: nn.Module, mesh: Any, schedule: str = "1f1b", n: int = MICROBATCHES, **more: Any) -> Any:
    return pipeline(model, mesh, schedule, n, **more)


def compare(pipe: Any, whole: nn.Module, bits: bool, what: str) -> None:
    """Gradients of this rank's stages with those of the whole model."""
    params = dict(whole.named_parameters())
    used = Counter(id(param) for _, param in whole.named_parameters(remove_duplicate=False))
    for name, param in pipe.named_parameters():
        share = pipeline_share(param)
        want = params[share.name].grad
        assert param.grad is not None and want is not None, (what, name)
        if bits and used[id(params[share.name])] == 1:
            assert_same_bits(param.grad, want, f"{what}: {name}")
        else:
            torch.testing.assert_close(param.grad, want, **CLOSE, msg=lambda m: f"{what}: {name}: {m}")  # noqa: B023


def same_on_ranks(pipe: Any) -> None:
    """Copies of tied weights have the same gradient, bit for bit."""
    mine = {pipeline_share(p).name: p.grad for _, p in pipe.named_parameters() if pipeline_share(p).tied}
    every: list[Any] = [None] * pipe.group.size()
    dist.all_gather_object(every, mine, group=pipe.group)
    holders = [found for found in every if found]
    for found in holders:
        for name, grad in found.items():
            assert_same_bits(grad, holders[0][name], name)


# ---- schedules ----


def all_schedules(rank: int, world: int, seed: int, kind: str, tie: bool, schedules: list[str]) -> None:
    mesh = pyshard.init_mesh(pp=world)
    tokens = batch(seed, 16, 9)
    for schedule in schedules:
        whole = build(kind, seed, tie_word_embeddings=tie)
        want = one_process(whole, tokens, MICROBATCHES, causal_lm_loss(whole))
        pipe = pipe_of(build(kind, seed, tie_word_embeddings=tie), mesh, schedule)
        got = pipe.step(tokens, target=tokens, return_logits=True)
        what = f"{schedule} {kind} over {world}"
        compare(pipe, whole, schedule in IN_ORDER, what)
        same_on_ranks(pipe)
        assert_same_bits(got.losses, want["losses"], what)
        assert_same_bits(got.loss, want["losses"].mean(), what)
        seen = pipe.evaluate(tokens, target=tokens)
        assert_same_bits(seen.losses, want["losses"], what)
        last = ranks_of_stages(kind_of(schedule), world, len(pipe.settings.bounds))[-1]
        for output in (got, seen):
            assert (output.logits is not None) == (rank == last)
            if rank == last:
                assert_same_bits(output.logits, want["logits"], what)
        assert sorted(i for stage in pipe.stages for i in range(stage.begin, stage.end)) == sorted(
            int(name) for stage in pipe.stages for name in dict(stage.blocks.named_children())
        )


@pytest.mark.parametrize(("world", "kind", "tie"), [(2, "gpt2", True), (4, "gpt2", True), (2, "llama", False)])
def test_every_schedule_gives_the_gradients_of_one_process(world: int, kind: str, tie: bool, seed: int) -> None:
    run(all_schedules, world, seed, kind, tie, list(SCHEDULES), seconds=120)


@pytest.mark.parametrize(("world", "kind", "tie"), [(1, "gpt2", True), (3, "llama", True), (2, "mistral", False)])
def test_odd_worlds(world: int, kind: str, tie: bool, seed: int) -> None:
    schedules = ["gpipe", "1f1b"] + ["interleaved_1f1b"] * (world != 3)  # 8 microbatches do not divide by 3 ranks
    run(all_schedules, world, seed, kind, tie, schedules, seconds=120)


# ---- other models, inputs and states ----


def other_models(rank: int, world: int, seed: int) -> None:
    mesh = pyshard.init_mesh(pp=world)
    tokens = batch(seed, 16, 9)
    # A model of our own, with a weight used on both ends, and an input that every microbatch gets whole.
    factor = torch.linspace(0.5, 2.0, 9)[:, None]
    for schedule in ("1f1b", "zbv_zero_bubble", "looped_bfs"):
        whole = custom(seed)
        want = one_process(whole, tokens, MICROBATCHES, cross_entropy, factor=factor)
        pipe = pipe_of(custom(seed), mesh, schedule, plan=CUSTOM, loss_fn=cross_entropy)
        got = pipe.step(tokens, factor, target=tokens)
        compare(pipe, whole, False, f"custom {schedule}")
        same_on_ranks(pipe)
        assert_same_bits(got.losses, want["losses"], schedule)
    # Padding, given by name and cut with the batch; position ids whole; layers that differ by their index.
    mask = torch.ones_like(tokens)
    mask[::3, :4] = 0
    positions = torch.arange(9)[None]
    for kind in ("qwen2", "gpt2"):
        changes = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3} if kind == "qwen2" else {}
        whole = build(kind, seed, **changes)
        loss_fn = causal_lm_loss(whole)
        losses = []
        for chunk, cut in zip(tokens.chunk(4), mask.chunk(4), strict=True):
            loss = loss_fn(whole(chunk, attention_mask=cut, position_ids=positions).logits, chunk)
            (loss / 4).backward()
            losses.append(loss.detach())
        pipe = pipe_of(build(kind, seed, **changes), mesh, n=4)
        got = pipe.step(tokens, attention_mask=mask, position_ids=positions, target=tokens)
        compare(pipe, whole, True, kind)
        assert_same_bits(got.losses, torch.stack(losses), kind)
    # Activation checkpointing of transformers, frozen parameters, sums instead of means.
    whole = build("llama", seed)
    model = build("llama", seed)
    model.gradient_checkpointing_enable()
    for each in (whole, model):
        for name, param in each.named_parameters():
            param.requires_grad_("mlp" in name or "lm_head" in name)
    loss_fn = causal_lm_loss(whole)
    total = torch.zeros(())
    for chunk in tokens.chunk(MICROBATCHES):
        loss = loss_fn(whole(chunk).logits, chunk)
        loss.backward()
        total += loss.detach()
    pipe = pipe_of(model, mesh, loss_reduction="sum")
    got = pipe.step(tokens, target=tokens)
    assert_same_bits(got.loss, got.losses.sum(), "sum")
    torch.testing.assert_close(got.loss, total, rtol=1e-6, atol=0)  # eight terms, in another order
    params = dict(whole.named_parameters())
    for name, param in pipe.named_parameters():
        assert (param.grad is None) == (params[name].grad is None), name
        if param.grad is not None:
            assert_same_bits(param.grad, params[name].grad, name)


def test_other_models_and_inputs(seed: int) -> None:
    run(other_models, 2, seed, seconds=120)


def several_steps(rank: int, world: int, seed: int) -> None:
    """Gradients accumulate over steps, shapes change, evaluation comes between; nothing is kept of past steps."""
    mesh = pyshard.init_mesh(pp=world)
    whole = build("gpt2", seed)
    loss_fn = causal_lm_loss(whole)
    pipe = pipe_of(build("gpt2", seed), mesh, n=4)
    for step, (rows, length) in enumerate([(8, 9), (4, 9), (8, 5), (8, 9)]):
        tokens = batch(seed + step, rows, length)
        want = one_process(whole, tokens, 4, loss_fn)
        got = pipe.step(tokens, target=tokens)
        assert_same_bits(got.losses, want["losses"], f"step {step}")
        seen = pipe.evaluate(tokens)
        assert seen.loss is None and seen.losses is None
        if rank == world - 1:
            assert_same_bits(seen.logits, want["logits"], f"step {step}")
    compare(pipe, whole, True, "four steps")
    same_on_ranks(pipe)
    tokens = batch(seed, 8, 9)
    for each in range(12):
        if each == 4:
            gc.collect()
            before = len(gc.get_objects())
        pipe.step(tokens, target=tokens)
        pipe.evaluate(tokens, target=tokens)
    gc.collect()
    assert len(gc.get_objects()) - before < 100  # of some 40 objects a microbatch and step, nothing stays


def test_several_steps(seed: int) -> None:
    run(several_steps, 2, seed, seconds=120)


def scaled(rank: int, world: int, seed: int) -> None:
    """A GradScaler multiplies losses on the last stage; every rank unscales, and a rank's inf skips the step on all."""
    mesh = pyshard.init_mesh(pp=world)
    tokens = batch(seed, 8, 9)
    whole = build("gpt2", seed)
    want = one_process(whole, tokens, 4, causal_lm_loss(whole))
    pipe = pipe_of(build("gpt2", seed), mesh, n=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    opt = pyshard.AdamW(pipe.parameters(), lr=1e-2, fused=True)
    got = pipe.step(tokens, target=tokens, scaler=scaler)
    assert_same_bits(got.losses, want["losses"], "losses are not scaled")
    params = dict(whole.named_parameters())
    for _, param in pipe.named_parameters():
        share = pipeline_share(param)
        torch.testing.assert_close(param.grad / 2.0**10, params[share.name].grad, **CLOSE)
    before = [param.detach().clone() for param in pipe.parameters()]
    if rank == 0:
        next(pipe.parameters()).grad.view(-1)[0] = float("inf")
    scaler.step(opt)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, pipe.parameters(), strict=True))
    assert scaler.get_scale() == 2.0**9
    opt.zero_grad()
    pipe.step(tokens, target=tokens, scaler=scaler)
    scaler.step(opt)
    assert not any(torch.equal(a, b) for a, b in zip(before, pipe.parameters(), strict=True))


def test_grad_scaler(seed: int) -> None:
    run(scaled, 2, seed, seconds=60)


# ---- names ----


def names(rank: int, world: int, seed: int) -> dict[str, Tensor]:
    mesh = pyshard.init_mesh(pp=world)
    whole = build("gpt2", seed)
    pipe = pipe_of(build("gpt2", seed), mesh, "interleaved_1f1b")
    held = pipe.state_dict()
    for name, value in held.items():
        assert_same_bits(value, whole.state_dict()[name], name)
    assert {name for name, _ in pipe.named_parameters(remove_duplicate=False)} <= set(held)
    # A model without memory is cut first and gets its values afterwards.
    with torch.device("meta"):
        empty = build("gpt2", seed)
    again = pipe_of(empty, mesh, "interleaved_1f1b")
    again.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match=r"load_state_dict: missing"):
        again.load_state_dict({})
    again.load_state_dict(whole.state_dict())
    tokens = batch(seed, 8, 7)
    for one, other in zip(pipe.step(tokens, target=tokens)[:2], again.step(tokens, target=tokens)[:2], strict=True):
        assert_same_bits(one, other, "loss")
    with pytest.raises(RuntimeError, match=r"called like a module; .* Call step\(inputs, target=\.\.\.\)"):
        pipe(tokens)
    text = pipe.explain()
    assert "interleaved_1f1b over 2 ranks, 4 stages, 8 microbatches" in text
    assert "stage 3 on rank 1: blocks 6 to 7" in text
    return held


def test_names_are_those_of_the_whole_model(seed: int) -> None:
    held = [outcome.value for outcome in run(names, 2, seed, seconds=60)]
    assert set(held[0]) | set(held[1]) == set(build("gpt2", seed).state_dict())
    assert set(held[0]) & set(held[1]) == set()  # wte.weight is the first stage's, lm_head.weight the last one's


def training(rank: int, world: int, seed: int) -> tuple[list[float], list[float]]:
    mesh = pyshard.init_mesh(pp=world)
    pipe = pipe_of(build("gpt2", seed), mesh, n=4)
    opt = pyshard.AdamW(pipe.parameters(), lr=1e-2, max_grad_norm=0.5)
    losses, norms = [], []
    for step in range(5):
        tokens = batch(seed + step, 8, 9)
        opt.zero_grad()
        losses.append(float(pipe.step(tokens, target=tokens).loss))
        opt.step()
        norms.append(float(opt.grad_norm))
    tied = [p for p in pipe.parameters() if pipeline_share(p).tied]
    every: list[Any] = [None] * world
    dist.all_gather_object(every, [p.detach() for p in tied])
    for mine, other in zip(every[0], every[-1], strict=True):
        assert_same_bits(mine, other, "tied weights after training")
    return losses, norms


def test_training_with_one_norm_over_all_stages(seed: int) -> None:
    """Losses and norms of a run with clipping over all stages are those of one process."""
    whole = build("gpt2", seed)
    opt = pyshard.AdamW(whole.parameters(), lr=1e-2, max_grad_norm=0.5)
    losses, norms = [], []
    for step in range(5):
        opt.zero_grad()
        want = one_process(whole, batch(seed + step, 8, 9), 4, causal_lm_loss(whole))
        losses.append(float(want["losses"].mean()))
        opt.step()
        norms.append(float(opt.grad_norm))
    for outcome in run(training, 2, seed, seconds=60):
        # The tied weight's gradient is added up in another order, which Adam's division carries into the weights.
        assert outcome.value[0] == pytest.approx(losses, rel=1e-4)
        assert outcome.value[1] == pytest.approx(norms, rel=1e-3)


def test_all_schedules_of_torch_are_there() -> None:
    from torch.distributed.pipelining import schedules

    classes = {
        value for name, value in vars(schedules).items() if name.startswith("Schedule") and isinstance(value, type)
    }
    assert {kind.cls for kind in SCHEDULES.values()} == classes
    assert BLOCKS == 8
