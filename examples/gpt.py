"""A byte-level GPT: pre-norm blocks, causal attention with rotary positions, a tied output layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns pairs of coordinates of x (..., time, width) by the angles of its positions (time, width / 2), so
    that products of queries and keys depend on their distance (rotary embedding, Su et al. 2021)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over all bytes, in nats, computed in fp32 whatever the dtype of the logits (batch, time, 256)."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Block(nn.Module):
    """Attention, then a two-layer network, each added to its input: (batch, time, width) in and out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, _ = x.shape
        # As many heads as there are: where the layers are cut over ranks, each rank has some of them.
        qkv = self.qkv(self.attention_norm(x)).view(batch, time, 3, -1, self.head_width)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (batch, heads, time, width / heads)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """Maps bytes (batch, time) int64 to logits (batch, time, 256) in the dtype of the weights."""

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        pairs = width // heads // 2
        angles = torch.arange(context)[:, None] * 10_000.0 ** (-torch.arange(pairs) / pairs)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # The layers that write to the residual stream start smaller: 2 * layers of them add up in it.
                writes = name.endswith(("attention_out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if writes else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        time = tokens.shape[1]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos[:time], self.sin[:time])
        return F.linear(self.norm(x), self.embedding.weight)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of the model's predictions, in nats per byte."""
        return cross_entropy(self(tokens), targets)

    @torch.no_grad()
    def generate(self, prompt: bytes, length: int, seed: int, temperature: float = 0.7) -> str:
        """The prompt and `length` sampled bytes after it. The same seed gives the same text."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.tensor([list(prompt)])
        for _ in range(length):
            logits = self(tokens[:, -self.context :])[:, -1].float()
            drawn = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
            tokens = torch.cat([tokens, drawn], dim=1)
        return bytes(tokens[0].tolist()).decode("utf-8", errors="replace")
