"""What a pipeline says of wrong arguments, of ranks that differ, and of ranks that are lost, late or fail."""

import os
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from pp_cases import batch, build, cross_entropy, custom
from ranks import run
from reference import assert_same_bits
from torch import Tensor, nn

import pyshard
from pyshard.comm import PeerError
from pyshard.pp import Plan, pipeline
from pyshard.pp.balance import Costs, by_parameters, split
from pyshard.pp.parts import parts_of

# ---- how blocks are dealt out ----


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.integers(1, 4), st.integers(0, 20), st.integers(0, 20))
def test_split_has_the_least_largest_cost(blocks: list[int], stages: int, first: int, last: int) -> None:
    """Against all ways to cut."""
    if stages > len(blocks):
        return
    costs = Costs(first, blocks, last)

    def largest(bounds: list[tuple[int, int]]) -> float:
        sums = [sum(blocks[begin:end]) for begin, end in bounds]
        sums[0] += first
        sums[-1] += last
        return max(sums)

    def ways(begin: int, left: int) -> Any:
        if left == 1:
            yield [(begin, len(blocks))]
            return
        for end in range(begin + 1, len(blocks) - left + 2):
            for rest in ways(end, left - 1):
                yield [(begin, end), *rest]

    found = split(costs, stages)
    assert found in list(ways(0, stages))
    assert largest(found) == min(largest(way) for way in ways(0, stages))


def test_costs_by_parameters() -> None:
    model = build("gpt2", 1)
    costs = by_parameters(model, parts_of(model, None))
    assert costs.first == 53 * 16 + 32 * 16
    assert costs.last == 2 * 16 + 53 * 16  # the tied weight counts on both ends
    assert len(costs.blocks) == 8
    assert len(set(costs.blocks)) == 1
    assert sum(costs.values()) == sum(p.numel() for p in model.parameters()) + 53 * 16


def test_parts_by_order() -> None:
    parts = parts_of(build("llama", 1), None)
    assert (parts.blocks, parts.first, parts.last) == (
        "model.layers",
        ("model.embed_tokens",),
        ("lm_head", "model.norm"),
    )


# ---- wrong arguments ----


class Loose(nn.Module):
    """Has a parameter that is in no part."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2))
        self.shift = nn.Parameter(torch.zeros(2))


WRONG: list[tuple[str, dict[str, Any]]] = [
    (r"schedule='2f2b'; expected one of gpipe, 1f1b, ", {"schedule": "2f2b"}),
    (r"n_microbatches=0; expected a whole number, at least 1", {"n_microbatches": 0}),
    (r"n_microbatches=1 with '1f1b' over 2 ranks; expected at least 2", {"n_microbatches": 1}),
    (r"n_microbatches=3 with 'dual_pipe_v' .* at least 4", {"n_microbatches": 3, "schedule": "dual_pipe_v"}),
    (r"n_microbatches=5 with 'interleaved_1f1b'", {"n_microbatches": 5, "schedule": "interleaved_1f1b"}),
    (r"stages_per_rank=2 with schedule='1f1b'; expected 1", {"stages_per_rank": 2}),
    (r"stages_per_rank=3 with 'zbv_zero_bubble'; expected 2", {"stages_per_rank": 3, "schedule": "zbv_zero_bubble"}),
    (r"8 blocks for 10 stages .* fewer ranks", {"stages_per_rank": 5, "schedule": "looped_bfs"}),
    (r"balance=\[4, 3\]; expected 2 block counts of 1 or more that make 8", {"balance": [4, 3]}),
    (r"balance='speed'; expected 'parameters', 'time'", {"balance": "speed"}),
    (r"balance='time' without example", {"balance": "time"}),
    (r"loss_reduction='max'; expected 'mean' or 'sum'", {"loss_reduction": "max"}),
    (r"the plan names encoder; expected modules of GPT2LMHeadModel", {"plan": Plan("encoder")}),
    (r"transformer.wte.weight, .* are in no part of the model", {"plan": Plan("transformer.h")}),
    (r"lm_head is a Linear; expected the nn.ModuleList", {"plan": Plan("lm_head")}),
]


def wrong(rank: int, world: int, seed: int) -> None:
    mesh = pyshard.init_mesh(pp=world)
    model = build("gpt2", seed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for text, arguments in WRONG:
        with pytest.raises(ValueError, match=text):
            pipeline(model, mesh, **arguments)
        if rank == 0:  # an error of one rank is one on all
            with pytest.raises(ValueError, match=text):
                pipeline(model, mesh, **arguments)
        else:
            with pytest.raises(ValueError, match=rf"on rank 0: .*{text}|{text}"):
                pipeline(model, mesh)
    with pytest.raises(ValueError, match=r"shift is in no part of the model"):
        pipeline(Loose(), mesh)
    with pytest.raises(ValueError, match=r"no list of blocks"):
        pipeline(nn.Linear(2, 2), mesh)
    with pytest.raises(ValueError, match=r"called with \(schedule, .* expected the same"):
        pipeline(model, mesh, "gpipe" if rank else "1f1b")
    with pytest.raises(ValueError, match=r"expected the same model on all ranks"):
        pipeline(build("gpt2", seed, n_inner=24 + rank), mesh)
    with pytest.raises(ValueError, match=r"transformer.wte.weight has other values .* Seed all ranks alike"):
        pipeline(build("gpt2", seed + rank), mesh)
    with pytest.raises(TypeError, match=r"got mesh of type int"):
        pipeline(model, 3)
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name], name)

    pipe = pipeline(model, mesh, "1f1b", 2)
    tokens = batch(seed, 4, 6)
    calls: list[tuple[str, Any]] = [
        (r"target is None; expected the tensor", lambda: pipe.step(tokens)),
        (r"input_ids has a batch of 3; expected a multiple of n_microbatches=2", lambda: pipe.evaluate(tokens[:3])),
        (r"target is \(2, 6\); expected a tensor with the batch of 4", lambda: pipe.step(tokens, target=tokens[:2])),
        (r"no tensor \[batch, ...\] among the inputs", lambda: pipe.evaluate(5)),
    ]
    for text, call in calls:
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(TypeError, match=r"input_ids was given twice"):
        pipe.step(tokens, input_ids=tokens, target=tokens)
    with pytest.raises(RuntimeError, match=r"gradients are disabled here"), torch.no_grad():
        pipe.step(tokens, target=tokens)
    # Ranks that call something else than the others hear of it before anything is sent, and can go on.
    with pytest.raises(ValueError, match=r"rank 1 was called with \('evaluate'.* rank 0 with \('step'"):
        pipe.step(tokens, target=tokens) if rank == 0 else pipe.evaluate(tokens)
    with pytest.raises(ValueError, match=r"expected the same call with the same batch"):
        pipe.step(tokens[: 4 - 2 * rank], target=tokens[: 4 - 2 * rank])
    with pytest.raises(ValueError, match=r"on rank 0: .*batch of 3|batch of 3"):
        pipe.evaluate(tokens[: 3 if rank == 0 else 4])
    assert torch.isfinite(pipe.step(tokens, target=tokens).loss)
    # A model that uses a module of the other end says which, and how to tell.
    plan = Plan("blocks", first=["embedding", "scale_in"], last=["norm"])
    pipe = pipeline(custom(seed), mesh, "1f1b", 2, cross_entropy, plan=plan)
    said = r"embedding.weight: embedding is on another stage .* plan=pyshard.pp.Plan"
    with pytest.raises((AttributeError, PeerError), match=said):
        pipe.step(tokens, target=tokens)
    with pytest.raises((AttributeError, PeerError), match=said):  # nothing has been sent: the next call finds the same
        pipe.step(tokens, target=tokens)


def test_wrong_arguments_change_nothing(seed: int) -> None:
    run(wrong, 2, seed, seconds=120)


def by_time(rank: int, world: int, seed: int) -> tuple[Any, ...]:
    """A block that takes far longer is alone on its stage, on all ranks, whatever each has measured."""
    model = build("gpt2", seed)
    slow = model.transformer.h[0].mlp
    forward = slow.forward
    slow.forward = lambda x: (time.sleep(0.05), forward(x))[1]
    for param in model.parameters():
        param.grad = torch.full_like(param, 0.5)
    state = torch.get_rng_state()
    example = {"input_ids": batch(seed, 2, 6)}
    pipe = pipeline(model, pyshard.init_mesh(pp=world), "gpipe", 2, balance="time", example=example)
    assert all(bool((p.grad == 0.5).all()) for p in pipe.parameters())
    assert torch.equal(state, torch.get_rng_state())
    return pipe.settings.bounds


def test_balance_by_time(seed: int) -> None:
    outcomes = run(by_time, 2, seed, seconds=60)
    assert outcomes[0].value == outcomes[1].value == ((0, 1), (1, 8))


# ---- ranks that are lost ----


class Trouble(nn.Module):
    """Does something to its process when it sees a token."""

    def __init__(self, inner: nn.Module, what: str, backward: bool):
        super().__init__()
        self.inner, self.what, self.backward, self.armed = inner, what, backward, False

    def _do(self) -> None:
        if self.armed and self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.armed and self.what == "sleep":
            time.sleep(8)
        if self.armed and self.what == "raise":
            raise ArithmeticError("no such number")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.backward:
            self._do()
        output = self.inner(*args, **kwargs)
        if self.backward and output.requires_grad:

            def hook(grad: Tensor) -> None:
                self._do()

            output.register_hook(hook)
        return output


def in_trouble(rank: int, world: int, seed: int, what: str, backward: bool, schedule: str) -> str:
    group = dist.new_group(timeout=timedelta(seconds=3))
    model = build("gpt2", seed)
    block = 6 if schedule.startswith("interleaved") else 5  # on rank 1
    model.transformer.h[block] = Trouble(model.transformer.h[block], what, backward)
    pipe = pipeline(model, group, schedule, 4, balance=[2, 4, 2] if world == 3 else "parameters")
    tokens = batch(seed, 4, 6)
    pipe.step(tokens, target=tokens)
    for module in pipe.modules():
        if isinstance(module, Trouble):
            module.armed = True
    begin = time.monotonic()
    try:
        pipe.step(tokens, target=tokens)
    except (PeerError, ArithmeticError) as error:
        return f"{time.monotonic() - begin:.0f} {type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("what", "backward", "schedule", "world"),
    [
        ("kill", False, "1f1b", 2),
        ("kill", True, "interleaved_1f1b", 2),
        ("raise", False, "zbv_zero_bubble", 2),
        ("raise", True, "1f1b", 3),
        ("sleep", False, "gpipe", 2),
    ],
)
def test_a_rank_in_trouble_is_named(what: str, backward: bool, schedule: str, world: int, seed: int) -> None:
    outcomes = run(in_trouble, world, seed, what, backward, schedule, seconds=60, quiet=True)
    for rank, outcome in enumerate(outcomes):
        if rank == 1 and what == "kill":
            assert outcome.exitcode == -signal.SIGKILL
            continue
        assert outcome.error is None, outcome.trace
        if rank == 1 and what == "raise":
            assert "ArithmeticError: no such number" in outcome.value
        elif rank == 1:
            assert "PeerError" in outcome.value
        else:
            assert "PeerError: pyshard.pp.Pipeline: " in outcome.value
            assert "rank 1" in outcome.value
            assert "microbatch" in outcome.value or "losses" in outcome.value, outcome.value
            if what == "raise":
                assert "no such number" in outcome.value
