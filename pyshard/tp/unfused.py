"""The tensor-parallel matmuls as a collective and a matmul, each with its own gradient.

What the overlapped forms must equal; and what they become in a double backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import mappings


def all_gather_matmul(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    sizes: Sequence[int],
    dim: int,
    group: dist.ProcessGroup,
) -> list[Tensor]:
    """Outputs of all weights on the gathered x."""
    whole = mappings.gather(x, dim, sizes, group, summed=True)
    return [F.linear(whole, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def copied_matmul(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], group: dist.ProcessGroup
) -> list[Tensor]:
    """Outputs of all weights on x, which is whole on every rank."""
    whole = mappings.copy_to_ranks(x, group)
    return [F.linear(whole, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def matmul_reduce_scatter(
    x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int], dim: int, group: dist.ProcessGroup
) -> Tensor:
    """This rank's rows of the sum over ranks, and the bias."""
    rows = mappings.reduce_scatter(F.linear(x, weight), dim, sizes, group)
    return rows if bias is None else rows + mappings.copy_to_ranks(bias, group)


def matmul_all_reduce(x: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, and the bias."""
    total = mappings.all_reduce(F.linear(x, weight), group)
    return total if bias is None else total + bias
