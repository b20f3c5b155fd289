"""The ways to train that the demo compares: what each does with a fresh model."""

from argparse import Namespace
from typing import Any

import torch
from baseline import TorchAdamW, ZeroAdamW, averaged
from gpt import GPT, cross_entropy
from group import RANK, WORLD
from options import BATCH, LAYOUT
from report import Run
from torch import nn

from pyshard import AdamW, ShardedAdamW, fully_shard, init_mesh, pp, tp

SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "max_grad_norm": 1.0}
# MB. Gradients pass through three slots of this size, or of the largest bucket. With the default, made for larger
# models, the slots would hold as much as all gradients of this small one.
BUCKET = 1

Way = tuple[nn.Module, torch.optim.Optimizer]  # what to call for logits (a pipeline: to step), and what trains it


def fused(model: GPT) -> Way:
    return model, AdamW(model.parameters(), **SETTINGS)


def sharded(model: GPT, stage: int) -> Way:
    return model, ShardedAdamW(model.parameters(), stage=stage, bucket_mb=BUCKET, **SETTINGS)


def cut(model: GPT, options: Namespace) -> Way:
    """The model in parts: attention heads and features of the two-layer networks over the `tp` ranks, layers over the
    `pp` stages; and over the `dp` ranks the optimizer's state, with gradients and, fully sharded, weights."""
    mesh = init_mesh(dp=options.dp, tp=options.tp, pp=options.pp)
    whole: nn.Module = model
    if options.tp > 1:
        width = model.blocks[0].head_width
        plan = {
            "blocks.*.qkv": tp.Rule("column", parts=3, unit=width),
            "blocks.*.attention_out": tp.Rule("row", unit=width),
            "blocks.*.up": "column",
            "blocks.*.down": "row",
        }
        tp.parallelize(model, mesh, plan)
    if options.pp > 1:
        # Named, since the model uses the embedding twice: its weight also makes the logits.
        parts = pp.Plan("blocks", first=["embedding"], last=["norm", "embedding"])
        sequences = BATCH // options.dp
        whole = pp.pipeline(model, mesh, n_microbatches=sequences, loss_fn=cross_entropy, plan=parts)
    if options.full_shard:
        fully_shard(whole, mesh, param_dtype=None)  # computes in the dtype of the weights, as the others do
    if options.full_shard or options.dp == 1:
        return whole, AdamW(whole.parameters(), **SETTINGS)
    group = mesh["dp"].get_group()
    return whole, ShardedAdamW(whole.parameters(), process_group=group, bucket_mb=BUCKET, **SETTINGS)


def torch_alone(model: GPT) -> Way:
    return model, TorchAdamW(model.parameters(), **SETTINGS)


def torch_ddp(model: GPT) -> Way:
    return averaged(model), TorchAdamW(model.parameters(), **SETTINGS)


def torch_zero(model: GPT) -> Way:
    return averaged(model), ZeroAdamW(model.parameters(), **SETTINGS)


def ways(options: Namespace) -> list[Run]:
    """The runs to make. The last one is pyshard's; it is saved, and gives the sample."""
    no_compare = options.no_compare
    if WORLD == 1:
        ours = Run("pyshard", ("pyshard.AdamW", ""), fused)
        return [ours] if no_compare else [Run("torch", ("torch.optim.AdamW", ""), torch_alone), ours]
    if options.cut:
        sizes = ", ".join(f"{name} {size}" for name in LAYOUT if (size := getattr(options, name)) > 1)
        over_dp = "fully_shard" if options.full_shard else "ShardedAdamW" if options.dp > 1 else "AdamW"
        part = (RANK // options.tp % options.dp, options.dp)  # as init_mesh places ranks
        ours = Run("pyshard", (sizes, over_dp), lambda model: cut(model, options), part=part)
        return [ours] if no_compare else [Run("torch", ("torch AdamW", "one process"), torch_alone, alone=True), ours]
    ours = Run("stage2", ("ShardedAdamW", "stage 2"), lambda model: sharded(model, 2))
    if no_compare:
        return [ours]
    runs = [
        Run("torch", ("torch AdamW", "one process"), torch_alone, alone=True),
        Run("ddp", ("DDP", "torch AdamW"), torch_ddp),
        Run("zero", ("DDP", "ZeroRedundancy"), torch_zero),
        Run("stage1", ("ShardedAdamW", "stage 1"), lambda model: sharded(model, 1)),
        ours,
    ]
    if options.dtype != torch.float32:
        print("ZeroRedundancyOptimizer is left out: torch keeps no fp32 master weights in it.")
        runs = [run for run in runs if run.name != "zero"]
    return runs
