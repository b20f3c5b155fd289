"""An embedding whose rows, the vocabulary, are cut over the ranks of a group.

Each rank looks up the tokens whose rows it holds and the ranks' results are added, as in Shoeybi et al., Megatron-LM
(2019). Rows that a rank does not hold count as -0.0, which alone leaves every number as it is when added, also -0.0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..placement import Keeping, TensorShard, set_tensor_shard
from . import mappings
from .splits import bounds, split_sizes
from .vocabulary import check_id_dtype, check_ids

WHO = "pyshard.tp.VocabParallelEmbedding"
ELSEWHERE = -1  # as a local index: another rank's row, or one without a gradient


class _LookUp(torch.autograd.Function):
    """weight[ids], and -0.0 where ids are ELSEWHERE."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, trained: Tensor) -> Tensor:
        ctx.save_for_backward(trained)
        ctx.rows = weight.shape[0]
        shape = (*ids.shape, weight.shape[1])
        if not weight.shape[0]:
            return weight.new_full(shape, -0.0)
        rows = weight.index_select(0, ids.clamp(min=0).reshape(-1)).view(shape)
        return rows.masked_fill_((ids == ELSEWHERE).unsqueeze(-1), -0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (trained,) = ctx.saved_tensors
        return _AddUp.apply(grad, trained, ctx.rows), None, None


class _AddUp(torch.autograd.Function):
    """[rows, D]: the sums of grad over the tokens of each row; the adjoint of _LookUp."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, ids: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(ids)
        # torch's own sum skips the padding index, so neither other ranks' tokens nor the padding cost any work.
        sums: Tensor = torch.ops.aten.embedding_dense_backward(grad.contiguous(), ids, rows, ELSEWHERE, False)
        return sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        return _LookUp.apply(grad, ids, ids), None, None


class VocabParallelEmbedding(Keeping):
    """torch.nn.Embedding with its rows cut over a group: the same values, bit for bit, and the same gradients.

    Args:
        num_embeddings: rows of the whole; the first num_embeddings % world ranks hold one more than the others.
        embedding_dim: of each.
        padding_idx: a row of the whole that starts at zero and gets no gradient; negative ones count from the end.
        group: the ranks that share the rows.
        sequence_parallel: True: forward returns this rank's part along dim -2, cut by split_sizes, and not the whole.
        device, dtype: of the weight; fp64, fp32, bf16 or fp16.

    The weight, [own rows, embedding_dim], carries its TensorShard, and may be shared with a ColumnParallelLinear of the
    same vocabulary. It starts as torch.nn.Embedding's for the same seed. For that the whole is made once, so for a
    moment memory for [num_embeddings, embedding_dim] is needed, except on the meta device.

    Shape:
        ids [...], int64 or int32 of the whole vocabulary, the same on all ranks -> [..., embedding_dim]; with
        sequence_parallel [..., S] -> [..., own part of S, embedding_dim].
    Raises:
        ValueError: of sizes or of a padding_idx out of range. TypeError: of a dtype.
        IndexError: an id outside the vocabulary, on all ranks. On an accelerator its own assertion fails instead, as
            for torch.nn.Embedding.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        group: dist.ProcessGroup,
        sequence_parallel: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                f"{WHO}: dtype={dtype}; expected float64, float32, bfloat16 or float16. Choose one of them."
            )
        if num_embeddings < 0 or embedding_dim < 0:
            raise ValueError(
                f"{WHO}: num_embeddings={num_embeddings} and embedding_dim={embedding_dim}; expected no negative "
                "number. Give the sizes of the whole."
            )
        if padding_idx is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ValueError(
                    f"{WHO}: padding_idx={padding_idx} of {num_embeddings} rows; expected {-num_embeddings} to "
                    f"{num_embeddings - 1}. Give a row of the whole vocabulary."
                )
            padding_idx %= num_embeddings
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.group, self.sequence_parallel = group, sequence_parallel
        self.world = dist.get_world_size(group)
        sizes = split_sizes(num_embeddings, self.world)
        self.begin, self.end = bounds(sizes, dist.get_rank(group))
        self.shard = TensorShard.even(group, (num_embeddings, embedding_dim), 0, sizes)
        self.weight = nn.Parameter(torch.empty(self.shard.local_shape(), device=device, dtype=dtype))
        set_tensor_shard(self.weight, self.shard)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The rows that torch.nn.Embedding would have here; takes as many random numbers from the generator."""
        with torch.no_grad():
            whole = self.weight if self.world == 1 else self.weight.new_empty(self.shard.shape)
            nn.init.normal_(whole)
            if self.padding_idx is not None:
                whole[self.padding_idx].fill_(0)
            if whole is not self.weight:
                self.weight.copy_(self.shard.cut(whole))

    def forward(self, ids: Tensor) -> Tensor:
        check_id_dtype(WHO, "ids", ids)
        if self.sequence_parallel and not ids.dim():
            raise ValueError(
                f"{WHO}: ids has shape [] and sequence_parallel is True; expected [..., sequence]. Give it a "
                "dimension, or leave sequence_parallel out."
            )
        check_ids(WHO, ids, self.num_embeddings)
        own = (ids >= self.begin) & (ids < self.end)
        local = (ids - self.begin).masked_fill_(~own, ELSEWHERE)
        trained = local if self.padding_idx is None else local.masked_fill(ids == self.padding_idx, ELSEWHERE)
        rows = _LookUp.apply(self.weight, local, trained)
        if not self.sequence_parallel:
            return mappings.all_reduce(rows, self.group)
        return mappings.reduce_scatter(rows, -2, split_sizes(ids.shape[-1], self.world), self.group)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VocabParallelEmbedding:
        """As any module's; some conversions, as from the meta device, make a new parameter, which is told its cut."""
        super()._apply(fn, recurse)
        set_tensor_shard(self.weight, self.shard)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> VocabParallelEmbedding:
        """As any module's: a parameter of its own, told its cut. The group, which cannot be copied, is shared."""
        new = type(self).__new__(type(self))
        memo |= {id(self): new, id(self.group): self.group, id(self.shard): self.shard}
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        set_tensor_shard(new.weight, self.shard)
        return new

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{padding}, rows={self.begin}:{self.end}, world={self.world}, "
            f"sequence_parallel={self.sequence_parallel}"
        )
