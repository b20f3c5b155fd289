"""What a sharded optimizer is constructed from: its ranks, its arguments, its parameters; and word of a failure."""

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm.choose import CHOICES
from ..kernels import checks
from ..kernels.launch import is_dtensor
from . import agreement
from .peers import find_peers

if TYPE_CHECKING:
    from .sharded import ShardedAdam

TIMEOUT = 300.0  # seconds


def ranks_of(who: str, group: dist.ProcessGroup | None) -> tuple[int, int, list[int]]:
    """Number of ranks, this one's place among them, and the global rank of each."""
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise ValueError(f"{who}: process_group is given, but torch.distributed is not initialized.")
        return 1, 0, [0]
    ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    if dist.get_rank() not in ranks:
        raise ValueError(
            f"{who}: rank {dist.get_rank()} is not in the process group of ranks {ranks}; expected only its members to "
            "make the optimizer."
        )
    return len(ranks), ranks.index(dist.get_rank()), ranks


def check_arguments(
    who: str, stage: int, transport: str, bucket_mb: float, seconds: object, reduce_dtype: object
) -> None:
    if stage not in (1, 2):
        raise ValueError(f"{who}: stage={stage!r}; expected 1 or 2. To cut the weights too, use torch's fully_shard.")
    if transport not in CHOICES:
        raise ValueError(f"{who}: transport={transport!r}; expected one of {', '.join(CHOICES)}.")
    if not isinstance(bucket_mb, (int, float)) or not 0 < bucket_mb < float("inf"):
        raise ValueError(f"{who}: bucket_mb={bucket_mb!r}; expected a positive number of MB, such as 25.")
    if seconds is not None and (not isinstance(seconds, (int, float)) or not 0 < seconds < float("inf")):
        raise ValueError(f"{who}: timeout={seconds!r}; expected a positive number of seconds, or None for {TIMEOUT}.")
    if reduce_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{who}: reduce_dtype={reduce_dtype!r}; expected None, torch.float32, bfloat16 or float16.")


def check_shardable(who: str, name: str, param: Tensor) -> None:
    if is_dtensor(param):
        raise TypeError(
            f"{who}: {name} is a DTensor; expected a whole parameter, the same on all ranks. Use pyshard.AdamW, which "
            "updates the local shards of DTensors."
        )
    if param.dtype == torch.float64:
        raise TypeError(f"{who}: {name} is float64; expected float32, bfloat16 or float16. Use pyshard.AdamW for it.")
    checks.check_param(who, name, param)


def tell_failure(who: str, optimizer: "ShardedAdam", params: Any, error: Exception) -> None:
    """Tells the ranks that construct their optimizer, its peers too, that this one has failed."""
    with suppress(type(error)):
        agreement.check(who, optimizer.process_group, optimizer.ranks, [], error)
    members: list[Any] = [] if isinstance(params, Tensor) else list(params)
    members = [one for each in members for one in (each.get("params", []) if isinstance(each, dict) else [each])]
    flat = [one[1] if isinstance(one, tuple) and len(one) == 2 else one for one in members]
    with suppress(type(error), TypeError, ValueError):
        peers = find_peers(who, flat, optimizer._seconds)
        if peers is not None:
            peers.compare(optimizer, error)
