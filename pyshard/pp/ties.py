"""Parameters that several ranks of a pipeline hold, such as an embedding whose weight also makes the logits.

Each copy gets the gradient of its own uses; exchange() makes all of them the sum, added in the order of the ranks, so
that the copies stay the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.launch import local_tensor


@dataclass
class Tie:
    """One tied parameter.

    Attributes:
        name: in the whole model, the first of its names.
        here: the name under which this rank's stages have it; None if they do not.
        ranks: of the pipeline, that hold it; in the order of their first stage with it.
    """

    name: str
    here: str | None
    ranks: list[int]


@contextmanager
def set_aside(ties: Sequence[Tie], params: dict[str, nn.Parameter]) -> Iterator[None]:
    """Inside, gradients of tied parameters begin anew; afterwards what they were before is added.

    What earlier steps have accumulated is a sum over ranks already, and must not be added up again.
    """
    mine = [params[tie.here] for tie in ties if tie.here is not None]
    before = {param: param.grad for param in mine if param.grad is not None}
    for param in before:
        param.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for param, grad in before.items():
                if param.grad is not None:
                    local_tensor(grad).add_(local_tensor(param.grad))
                param.grad = grad


@torch.no_grad()
def exchange(ties: Sequence[Tie], params: dict[str, nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sums the gradients of tied parameters over the ranks that hold them, in place. All ranks of the group call it.

    A gradient that is None on a rank counts as zero there.
    """
    me = dist.get_rank(group)
    for tie in ties:
        if tie.here is None:
            continue
        own = _gradient(params[tie.here])
        parts = {rank: torch.empty_like(own) for rank in tie.ranks if rank != me}
        works = [dist.irecv(part, group=group, group_src=rank) for rank, part in parts.items()]
        works += [dist.isend(own, group=group, group_dst=rank) for rank in parts]
        for work in works:
            if work is not None:
                work.wait()
        parts[me] = own
        total = parts[tie.ranks[0]].clone()
        for rank in tie.ranks[1:]:
            total += parts[rank]
        own.copy_(total)


def _gradient(param: nn.Parameter) -> Tensor:
    """This rank's memory of the gradient, contiguous; made if there is none."""
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    local = local_tensor(param.grad)
    if not local.is_contiguous():
        raise RuntimeError(
            f"pyshard.pp: the gradient of a tied weight has strides {local.stride()} for shape {tuple(local.shape)}; "
            "expected a contiguous one"
        )
    return local
