"""The work of the distributed benchmarks: a model that all contestants build with the same values, and its batches."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

BATCHES = 8  # after so many steps they come again


@dataclass(frozen=True)
class Work:
    """Model and batch of one rank."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    positions: int
    batch: int
    length: int
    dtype: str = "float32"
    hugging_face: bool = True  # or the demo's model, which needs nothing beyond torch

    def missing(self) -> str:
        """Why the model cannot be built here, or "" if it can."""
        if self.hugging_face and importlib.util.find_spec("transformers") is None:
            return "transformers is not installed (requirements/bench.txt)"
        return ""

    def title(self) -> str:
        kind = "GPT2LMHeadModel" if self.hugging_face else "the demo's GPT"
        shape = f"{self.layers} layers of width {self.width}, vocabulary {self.vocabulary:,}"
        return f"{kind}, {shape}, {self.batch} x {self.length} tokens per rank"

    def model(self) -> tuple[nn.Module, list[nn.Module], Callable[[nn.Module, Tensor], Tensor]]:
        """A model with the same values on all ranks, its blocks, and how it gives the loss of a batch."""
        torch.manual_seed(0)
        build = self._gpt2 if self.hugging_face else self._demo
        model, blocks, loss = build()
        return model.to(getattr(torch, self.dtype)), blocks, loss

    def _gpt2(self) -> tuple[nn.Module, list[nn.Module], Callable[[nn.Module, Tensor], Tensor]]:
        transformers = importlib.import_module("transformers")
        config = transformers.GPT2Config(
            n_layer=self.layers,
            n_head=self.heads,
            n_embd=self.width,
            vocab_size=self.vocabulary,
            n_positions=self.positions,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
        model = transformers.GPT2LMHeadModel(config).train()
        return model, list(model.transformer.h), lambda module, tokens: module(tokens, labels=tokens).loss

    def _demo(self) -> tuple[nn.Module, list[nn.Module], Callable[[nn.Module, Tensor], Tensor]]:
        from benchmarks.bench_interleaved import demo_model

        model = demo_model()(layers=self.layers, width=self.width, heads=self.heads, context=self.length)

        def loss(module: nn.Module, tokens: Tensor) -> Tensor:
            logits = module(tokens).float()
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

        return model, list(model.blocks), loss

    def batches(self) -> list[Tensor]:
        """Different ones on each rank."""
        generator = torch.Generator().manual_seed(1 + dist.get_rank())
        shape = (self.batch, self.length)
        return [torch.randint(self.vocabulary, shape, generator=generator) for _ in range(BATCHES)]


GPT2 = Work(layers=6, width=384, heads=6, vocabulary=8192, positions=256, batch=2, length=64)  # 13.9 M parameters
TINY = Work(layers=2, width=32, heads=2, vocabulary=256, positions=8, batch=1, length=8, hugging_face=False)
