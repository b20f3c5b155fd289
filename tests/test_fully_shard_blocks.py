"""The lists of blocks that are found in models, without being told."""

import pytest
import torch
from fully_shard_cases import Model
from torch import nn

from pyshard.blocks import block_list, find_blocks


def found(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, len(blocks)) for name, blocks in find_blocks(model)]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3))


def test_models_of_torch() -> None:
    assert found(Model()) == [("blocks", 3)]
    assert found(mlp()) == []  # layers, no blocks
    assert found(nn.Sequential(*(mlp() for _ in range(4)))) == [("", 4)]
    assert found(nn.ModuleDict({"a": nn.Sequential(mlp(), mlp()), "experts": nn.ModuleList([nn.Linear(3, 3)])})) == [
        ("a", 2)
    ]
    with torch.device("meta"):
        model = nn.Transformer(16, 2, 2, 3, 32, batch_first=True)
    assert found(model) == [("encoder.layers", 2), ("decoder.layers", 3)]
    # A list inside of a block is its own affair; one that is small against the others is no part of the model.
    outer = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList([mlp(), mlp()])}) for _ in range(2))
    small = nn.ModuleList([nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))])
    assert found(nn.ModuleDict({"list": nn.ModuleList([nn.Sequential(b) for b in outer]), "small": small})) == [
        ("list", 2)
    ]


def test_models_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="looks at its models (requirements/bench.txt)")
    with torch.device("meta"):
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=3, n_embd=64, n_head=2))
        t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(num_layers=2, d_model=64))
    assert found(gpt2) == [("transformer.h", 3)] and block_list(gpt2)[1] is gpt2.transformer.h
    assert found(t5) == [("encoder.block", 2), ("decoder.block", 2)]
    with pytest.raises(ValueError, match=r"several lists of blocks \(encoder.block of 2, decoder.block of 2\)"):
        block_list(t5)


def test_what_a_pipeline_cannot_cut() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no list of blocks \(none\); expected one nn.ModuleList"):
        block_list(mlp())
    with pytest.raises(ValueError, match=r"the model itself, are in a Sequential; expected an nn.ModuleList"):
        block_list(nn.Sequential(mlp(), mlp()))
