"""Models for the pipeline's tests, and what one process computes with them."""

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 53
BLOCKS = 8


def build(kind: str, seed: int, **changes: Any) -> nn.Module:
    """A tiny causal model of 8 blocks with random weights, so that no part of a gradient vanishes."""
    import transformers

    transformers.logging.set_verbosity_error()
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "use_cache": True, "bos_token_id": 0, "eos_token_id": None}
    if kind == "gpt2":
        common |= {"n_embd": 16, "n_head": 2, "n_layer": BLOCKS, "n_positions": 32, "n_inner": 24}
        common |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config: Any = transformers.GPT2Config(**common | changes)
        maker: Any = transformers.GPT2LMHeadModel
    else:
        common |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
        common |= {"num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": None}
        name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[kind]
        config = getattr(transformers, f"{name}Config")(**common | changes)
        maker = getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(seed % 100_000)
    model = maker(config)
    for name, param in model.named_parameters():
        mean = float(param.dim() == 1 and ("norm.weight" in name or ".ln" in name))
        nn.init.normal_(param, mean=mean, std=0.15)
    return model.train()


class Custom(nn.Module):
    """A model of our own: blocks called by index with an argument beside the hidden states, a weight used twice."""

    def __init__(self, blocks: int = BLOCKS, width: int = 12):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.scale_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(CustomBlock(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, factor: Tensor | None = None) -> Tensor:
        x = self.scale_in(self.embedding(tokens))
        shift = torch.arange(tokens.shape[1], dtype=x.dtype)[:, None] / 10
        for i in range(len(self.blocks)):
            x = self.blocks[i](x, shift)
        if factor is not None:
            x = x * factor
        return nn.functional.linear(self.norm(x), self.embedding.weight)


class CustomBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x) + shift)))


def custom(seed: int) -> Custom:
    torch.manual_seed(seed % 100_000)
    return Custom()


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), target.flatten())


def batch(seed: int, rows: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def one_process(model: nn.Module, tokens: Tensor, microbatches: int, loss_fn: Any, **inputs: Any) -> dict[str, Tensor]:
    """The losses and logits of the microbatches, one after the other; gradients are added to the model's .grad."""
    losses, logits = [], []
    for chunk in tokens.chunk(microbatches):
        output = model(chunk, **inputs)
        output = output if isinstance(output, Tensor) else output.logits
        loss = loss_fn(output, chunk)
        (loss / microbatches).backward()
        losses.append(loss.detach())
        logits.append(output.detach())
    return {"losses": torch.stack(losses), "logits": torch.cat(logits)}
