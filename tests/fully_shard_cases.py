"""A small model with what full sharding has to cope with, and its training on one rank of several or alone."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BATCH, VOCABULARY, WIDTH = 12, 11, 6  # sequences of all ranks together: even for worlds 1 to 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Tied weights; a parameter of one row, one without elements, one that is not trained."""

    def __init__(self, blocks: int = 3):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.scale = nn.Parameter(torch.ones(1, WIDTH))
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.frozen = nn.Parameter(torch.full((5,), 0.5), requires_grad=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.scale * self.frozen.sum()) + self.nothing.sum()


def model(seed: int, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(seed)
    return Model().to(dtype)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Tokens, and the ones to guess."""
    tokens = torch.randint(VOCABULARY, (BATCH, 5), generator=torch.Generator().manual_seed(seed))
    return tokens, tokens.flip(1)


def loss(net: nn.Module, tokens: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(net(tokens).float().flatten(0, 1), target.flatten())


def train(
    net: nn.Module, optimizer: Any, seed: int, rank: int = 0, world: int = 1, steps: int = 5, clear: bool = True
) -> list[float]:
    """The losses over the whole batch, of which each rank has the sequences rank, rank + world, ..."""
    found = []
    for step in range(steps):
        tokens, target = batch(seed + step)
        own = loss(net, tokens[rank::world], target[rank::world])
        own.backward()
        optimizer.step()
        if clear:
            optimizer.zero_grad()
        total = own.detach().double()
        if world > 1:
            dist.all_reduce(total)
        found.append(total.item() / world)
    return found
