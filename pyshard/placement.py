"""Which part of a whole model a parameter on this rank is, told by attributes of the parameter.

Layers that cut their weights over a tensor-parallel group set `param.tensor_shard`, pipelines `param.pipeline_share`;
optimizers, norms and checkpoints read them and know nothing else of tensor or pipeline parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ATTRIBUTE = "tensor_shard"

# [begin, end) along the cut dimension of the whole.
Piece = tuple[int, int]


@dataclass(frozen=True)
class TensorShard:
    """The cut of one parameter over the ranks of a group.

    Attributes:
        group: the ranks that hold the parts.
        shape: of the whole parameter.
        dim: along which it is cut; None: every rank of the group holds the whole.
        pieces: for each rank, what its tensor holds along dim, in the order in which it holds it. A fused query, key
            and value weight has three pieces a rank.
    """

    group: dist.ProcessGroup
    shape: tuple[int, ...]
    dim: int | None = None
    pieces: tuple[tuple[Piece, ...], ...] = ()

    @classmethod
    def even(cls, group: dist.ProcessGroup, shape: Sequence[int], dim: int, sizes: Sequence[int]) -> TensorShard:
        """One piece a rank, of these sizes, in rank order."""
        ends = [sum(sizes[: rank + 1]) for rank in range(len(sizes))]
        pieces = tuple(((end - size, end),) for end, size in zip(ends, sizes, strict=True))
        return cls(group, tuple(shape), dim, pieces)

    @property
    def rank(self) -> int:
        """Of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def sizes(self) -> list[int]:
        """What each rank holds along dim."""
        return [sum(end - begin for begin, end in pieces) for pieces in self.pieces]

    def local_shape(self, rank: int | None = None) -> tuple[int, ...]:
        """Of the tensor on a rank; None: on this one."""
        if self.dim is None:
            return self.shape
        size = self.sizes[self.rank if rank is None else rank]
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])

    def cut(self, whole: Tensor, rank: int | None = None) -> Tensor:
        """A rank's part of the whole; a view where it is one piece."""
        if self.dim is None:
            return whole
        pieces = self.pieces[self.rank if rank is None else rank]
        parts = [whole.narrow(self.dim, begin, end - begin) for begin, end in pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def place(self, part: Tensor, whole: Tensor, rank: int) -> None:
        """Writes a rank's part where it belongs in the whole."""
        if self.dim is None:
            whole.copy_(part)
            return
        begin = 0
        for first, end in self.pieces[rank]:
            whole.narrow(self.dim, first, end - first).copy_(part.narrow(self.dim, begin, end - first))
            begin += end - first


def tensor_shard(param: Tensor) -> TensorShard | None:
    """How the parameter is cut; None: it is an ordinary one."""
    return getattr(param, ATTRIBUTE, None)


def set_tensor_shard(param: Tensor, shard: TensorShard) -> None:
    """Says how the parameter is cut. Raises ValueError if its shape is not that of this rank's part."""
    if tuple(param.shape) != shard.local_shape():
        raise ValueError(
            f"pyshard: a parameter of shape {tuple(param.shape)} is said to be rank {shard.rank}'s part of "
            f"{shard.shape} cut along {shard.dim}; expected shape {shard.local_shape()}"
        )
    setattr(param, ATTRIBUTE, shard)


# ---- pipelines ----

PIPELINE_ATTRIBUTE = "pipeline_share"


@dataclass
class PipelineShare:
    """What a parameter of a pipeline stage is to the whole model.

    Attributes:
        group: the pipeline's ranks, which hold the other stages' parameters.
        name: of the parameter in the whole model, the first of its names if it has several (tied weights).
        counted: False if an earlier stage holds a copy of it, which counts in norms and is the one that is saved.
        accumulating: more microbatches of this step will add to the gradient: it must not be sent to other ranks yet.
        tied: another rank of the pipeline holds a copy of it, and its gradient is added to this one's after backward.
    """

    group: dist.ProcessGroup
    name: str
    counted: bool = True
    accumulating: bool = False
    tied: bool = False


def pipeline_share(param: Tensor) -> PipelineShare | None:
    """What the parameter is to a pipeline; None: its model is not cut into stages."""
    return getattr(param, PIPELINE_ATTRIBUTE, None)


def set_pipeline_share(param: Tensor, share: PipelineShare) -> None:
    """Says what the parameter is to a pipeline."""
    setattr(param, PIPELINE_ATTRIBUTE, share)


@contextmanager
def said_again(module: nn.Module) -> Iterator[None]:
    """What is said of a module's parameters holds for those that have their places afterwards; tied ones stay tied.

    A move from the meta device and load_state_dict(assign=True) make new parameters. For `_apply` and the like.
    """
    places = [(m, key, p) for m in module.modules() for key, p in m._parameters.items() if p is not None]
    yield
    new: dict[int, nn.Parameter] = {}
    for owner, key, old in places:
        param = owner._parameters[key]
        if param is not None and param is not old:
            owner._parameters[key] = param = new.setdefault(id(old), param)
            carry_over(old, param)


class Keeping(nn.Module):
    """A module whose parameters stay what they are said to be, whatever takes their places."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        with said_again(self):
            return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with said_again(self):
            super()._load_from_state_dict(*args, **kwargs)


def carry_over(old: Tensor, new: Tensor) -> None:
    """Gives a parameter that takes another's place what is said of that one: another wrapper makes new parameters."""
    for name in (ATTRIBUTE, PIPELINE_ATTRIBUTE):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
