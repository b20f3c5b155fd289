"""Data-parallel, tensor-parallel and pipeline-parallel ranks together, on 8 processes, against one process.

Weights over dp are kept whole with their optimizer sharded (ShardedAdamW), or sharded themselves (fully_shard). Every
combination trains for some steps with one norm over all gradients; losses, norms and the weights at the end are those
of a run in one process within what sums in another order explain.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from pp_cases import batch, build
from ranks import run
from torch import nn

import pyshard
from pyshard.placement import pipeline_share, tensor_shard
from pyshard.pp import causal_lm_loss, pipeline

STEPS, ROWS, LENGTH, MICRO = 5, 16, 9, 2  # microbatches of MICRO rows
# The gradient of a key's bias is zero but for rounding, and Adam would make whole steps of that noise with a small eps.
ADAM = {"lr": 1e-2, "eps": 1e-3, "max_grad_norm": 0.5}
# Sums over ranks, heads and features are added in another order, each with errors of some units in the last place.
LOSS, NORM, WEIGHT = 2e-6, 1e-5, 2e-5


def one_process(kind: str, seed: int) -> dict[str, Any]:
    model = build(kind, seed)
    loss_fn = causal_lm_loss(model)
    opt = pyshard.AdamW(model.parameters(), **ADAM)
    losses, norms = [], []
    for step in range(STEPS):
        opt.zero_grad()
        total = 0.0
        chunks = batch(seed + step, ROWS, LENGTH).split(MICRO)
        for chunk in chunks:
            loss = loss_fn(model(chunk).logits, chunk)
            (loss / len(chunks)).backward()
            total += float(loss.detach()) / len(chunks)
        opt.step()
        losses.append(total)
        norms.append(float(opt.grad_norm))
    return {"losses": losses, "norms": norms, "weights": {k: v.detach() for k, v in model.named_parameters()}}


def layout(kind: str, seed: int, dp: int, tp: int, pp: int, full: bool, schedule: str) -> tuple[nn.Module, Any, Any]:
    """A model cut in all ways, and its optimizer."""
    mesh = pyshard.init_mesh(dp=dp, tp=tp, pp=pp)
    model: Any = build(kind, seed)
    if tp > 1:
        pyshard.tp.parallelize(model, mesh)
    model = pipeline(model, mesh, schedule, ROWS // dp // MICRO)
    if full:
        pyshard.fully_shard(model, mesh, param_dtype=None)
        return model, pyshard.AdamW(model.parameters(), **ADAM), mesh
    group = mesh["dp"].get_group()
    return model, pyshard.ShardedAdamW(model.parameters(), **ADAM, process_group=group), mesh


def trained(
    rank: int, world: int, kind: str, seed: int, dp: int, tp: int, pp: int, full: bool, schedule: str
) -> dict[str, Any]:
    pipe, opt, mesh = layout(kind, seed, dp, tp, pp, full, schedule)
    losses, norms = [], []
    for step in range(STEPS):
        rows = batch(seed + step, ROWS, LENGTH).chunk(dp)[mesh.get_local_rank("dp")]
        opt.zero_grad()
        loss = pipe.step(rows, target=rows).loss
        opt.step()
        dist.all_reduce(loss, group=mesh.get_group("dp"))
        losses.append(float(loss) / dp)
        norms.append(float(opt.grad_norm))
    weights = {}
    for param in pipe.parameters():
        held = param.full_tensor() if hasattr(param, "full_tensor") else param
        weights[pipeline_share(param).name] = (held.detach().clone(), tensor_shard(param), pipeline_share(param).tied)
    return {
        "losses": losses,
        "norms": norms,
        "weights": {
            name: (held, None if cut is None else (cut.dim, cut.pieces, cut.rank), tied)
            for name, (held, cut, tied) in weights.items()
        },
    }


def part(whole: torch.Tensor, cut: Any) -> torch.Tensor:
    if cut is None or cut[0] is None:
        return whole
    dim, pieces, rank = cut
    return torch.cat([whole.narrow(dim, begin, end - begin) for begin, end in pieces[rank]], dim)


@pytest.mark.parametrize(
    ("kind", "dp", "tp", "pp", "full", "schedule"),
    [
        ("gpt2", 2, 2, 2, False, "1f1b"),
        ("gpt2", 2, 2, 2, True, "1f1b"),
        ("llama", 2, 2, 2, True, "zbv_zero_bubble"),
        ("llama", 2, 1, 2, False, "interleaved_zero_bubble"),
        ("llama", 1, 2, 3, False, "gpipe"),
    ],
)
def test_trains_like_one_process(kind: str, dp: int, tp: int, pp: int, full: bool, schedule: str, seed: int) -> None:
    want = one_process(kind, seed)
    outcomes = run(trained, dp * tp * pp, kind, seed, dp, tp, pp, full, schedule, seconds=150)
    first = outcomes[0].value
    tied: dict[str, torch.Tensor] = {}
    for outcome in outcomes:
        got = outcome.value
        assert got["losses"] == pytest.approx(want["losses"], rel=LOSS)
        assert got["norms"] == pytest.approx(want["norms"], rel=NORM)
        assert got["norms"] == first["norms"], "the same bits on all ranks"
        for name, (held, cut, shared) in got["weights"].items():
            whole = part(want["weights"][name], cut)
            assert held.shape == whole.shape, name
            scale = float(want["weights"][name].abs().max())
            assert float((held - whole).abs().max()) <= WEIGHT * scale, name
            if shared:
                key = f"{name} {cut}"
                assert torch.equal(held, tied.setdefault(key, held)), f"copies of {name}"
    names = {name for outcome in outcomes for name in outcome.value["weights"]}
    assert names == set(want["weights"])
