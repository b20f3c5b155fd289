"""Full sharding: parameters, gradients and optimizer state cut over the data-parallel ranks, by torch's FSDP2."""

from .shard import fully_shard

__all__ = ["fully_shard"]
