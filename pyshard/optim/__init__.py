"""Optimizers."""

from .adam import Adam, AdamW
from .sharded import ShardedAdam, ShardedAdamW

__all__ = ["Adam", "AdamW", "ShardedAdam", "ShardedAdamW"]
