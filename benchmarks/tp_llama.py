"""One rank of bench_tp_llama.py: a Llama of transformers, whole or cut over the ranks, forward and backward.

All ranks see the same batches, and all ways have the same weights.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from benchmarks.distributed_model import BATCHES
from benchmarks.distributed_training import MB, Training, pss


@dataclass(frozen=True)
class Llama:
    """Model and batch."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    batch: int
    length: int

    def missing(self) -> str:
        """Why the model cannot be built here, or "" if it can."""
        if importlib.util.find_spec("transformers") is None:
            return "transformers is not installed (requirements/bench.txt)"
        return ""

    def title(self) -> str:
        heads = f"{self.heads} heads, {self.key_value_heads} for keys and values"
        shape = f"{self.layers} layers of width {self.hidden} and {self.intermediate}, {heads}"
        return f"LlamaForCausalLM, {shape}, vocabulary {self.vocabulary:,}, {self.batch} x {self.length} tokens"

    def model(self) -> nn.Module:
        transformers = importlib.import_module("transformers")
        config = transformers.LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.length,
            attention_dropout=0.0,
            use_cache=False,
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        model: nn.Module = transformers.LlamaForCausalLM(config).train()
        return model

    def batches(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        return [torch.randint(self.vocabulary, (self.batch, self.length), generator=generator) for _ in range(BATCHES)]


LLAMA = Llama(512, 1536, 6, 8, 4, 4096, batch=2, length=256)
TINY = Llama(32, 48, 2, 4, 2, 64, batch=2, length=16)


def unsharded(model: nn.Module) -> None:
    """The whole model on every rank, without communication."""


def module(model: nn.Module, ends: bool, sequence: bool = False) -> None:
    """torch's parallelize_module: the layers as transformers' own plan cuts them, the rest as torch's tutorial does.

    ends: the embedding and the output layer are cut, too. sequence: with them, hidden states between the layers.
    """
    layer, between = "model.layers.*", Shard(1) if sequence else Replicate()
    column = [*(f"self_attn.{name}_proj" for name in "qkv"), "mlp.gate_proj", "mlp.up_proj"]
    row = ["self_attn.o_proj", "mlp.down_proj"]
    plan: dict[str, Any] = {f"{layer}.{name}": ColwiseParallel() for name in column}
    plan |= {f"{layer}.{name}": RowwiseParallel(output_layouts=between) for name in row}
    if ends:
        plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
        plan["lm_head"] = ColwiseParallel(input_layouts=between, output_layouts=Replicate())
    if sequence:
        whole: dict[str, Placement] = {"hidden_states": Replicate()}
        plan[f"{layer}.self_attn"] = PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": between}, desired_input_kwarg_layouts=whole
        )
        plan[f"{layer}.mlp"] = PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),))
        norms = ["model.norm", f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
        plan |= {name: SequenceParallel() for name in norms}
    parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)


def pyshard(model: nn.Module, **options: Any) -> None:
    """pyshard.tp.parallelize with its own plan for Llama."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    importlib.import_module("pyshard").tp.parallelize(model, mesh, **options)


WAYS: dict[str, Callable[..., None]] = {"unsharded": unsharded, "module": module, "pyshard": pyshard}


class Passes:
    """A model that goes forward and backward on this rank, with what it holds."""

    def __init__(self, work: Llama, way: str, options: dict[str, Any]):
        before = pss()
        self.model = work.model()
        WAYS[way](self.model, **options)
        self.training = Training(self.model, self.loss, None, list, work.batches())
        self.training.sample(1)
        self.saved = saved_bytes(lambda: self.loss(self.training.batches[0]), self.model)
        self.gradient = self._gradient()
        self.training.measure(before)
        self.losses: list[float] = []

    def loss(self, tokens: Tensor) -> Tensor:
        # Given, since a model whose hidden states are cut would count those of one rank.
        positions = torch.arange(tokens.shape[1])[None]
        found: Tensor = self.model(tokens, labels=tokens, position_ids=positions).loss
        return found

    def _gradient(self) -> list[float]:
        """Of the weight of the first norm, which all of backward leads to; of the loss summed over all tokens."""
        tokens = self.training.batches[0]
        self.loss(tokens).backward()
        (weight,) = (p for name, p in self.model.named_parameters() if name.endswith("layers.0.input_layernorm.weight"))
        grad = weight.grad
        assert grad is not None
        values = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
        self.model.zero_grad(set_to_none=True)
        return (values * tokens.numel()).tolist()

    def sample(self, calls: int) -> dict[str, float]:
        """Seconds and bytes sent per pass, after one without the clock."""
        found = self.training.sample(calls)
        self.losses = found["losses"]
        return {"seconds": found["seconds"], "sent": found["sent"]}

    def result(self) -> list[float]:
        """The losses of the last sample, and a gradient."""
        return self.losses + self.gradient

    def notes(self) -> dict[str, float]:
        """MB; activations: what forward keeps for backward."""
        sizes = self.training.sizes()
        return {"activations MB": self.saved / MB} | {key: sizes[key] for key in ("params MB", "held MB", "peak MB")}


def build(way: str, options: dict[str, Any], work: dict[str, int]) -> Passes:
    """A small one comes and goes before: what a library's code takes in a process is no contestant's memory."""
    Passes(replace(Llama(**work), hidden=32, intermediate=32, layers=1, vocabulary=64), way, options)
    return Passes(Llama(**work), way, options)


def saved_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes of the memory that autograd keeps for backward, parameters aside. Views of one memory count once."""
    known = {_local(param).untyped_storage().data_ptr() for param in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = _local(tensor).untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(found.values())


def _local(tensor: Tensor) -> Tensor:
    """The tensor that holds the memory, inside those that wrap one."""
    for inner in ("_local_tensor", "elem"):  # of a DTensor; of a collective's result
        tensor = getattr(tensor, inner, tensor)
    return tensor
