"""Parameters that several ranks of a pipeline hold, such as an embedding whose weight also makes the logits.

Each copy gets the gradient of its own uses; Sums makes all of them the sum, added in the order of the ranks, so
that the copies stay the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.launch import local_tensor

_TAGS = 8192  # tags of messages start here; those of the schedule have 0


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


class Sums:
    """One step's sums of the gradients of tied parameters. Made on all ranks before the step's first microbatch.

    As a context: gradients of tied parameters begin anew inside; on leaving, what they were before is added. What
    earlier steps have accumulated is a sum over ranks already, and must not be added up again.
    """

    def __init__(self, ties: Sequence[Tie], params: dict[str, nn.Parameter], group: dist.ProcessGroup):
        self.group, self.rank = group, dist.get_rank(group)
        # Frozen ones are that on all ranks, which have agreed about it.
        mine = ((tie, params[tie.here], _TAGS + i) for i, tie in enumerate(ties) if tie.here is not None)
        self.ties = [each for each in mine if each[1].requires_grad]
        self.before: dict[nn.Parameter, Tensor] = {}
        self.expected: dict[str, tuple[dict[int, Tensor], list[dist.Work]]] = {}
        # Backends other than gloo know no tags, and would take the messages of the schedule for these.
        self.tagged = "cpu:gloo" in dist.get_backend_config(group).split(",")
        if self.tagged:
            # The first stage has its gradient last: those of the others come while it still computes.
            for tie, param, tag in self.ties:
                if self.rank == tie.ranks[0]:
                    parts = self._parts(tie, param)
                    self.expected[tie.name] = parts, self._receive(parts, tag)

    def _parts(self, tie: Tie, param: nn.Parameter) -> dict[int, Tensor]:
        """Memory for the gradients of the other ranks."""
        like, dtype = local_tensor(param), getattr(param, "grad_dtype", None) or param.dtype
        others = (rank for rank in tie.ranks if rank != self.rank)
        return {rank: torch.empty(like.shape, dtype=dtype, device=like.device) for rank in others}

    def _receive(self, parts: dict[int, Tensor], tag: int) -> list[dist.Work]:
        works = (dist.irecv(part, group=self.group, group_src=rank, tag=tag) for rank, part in parts.items())
        return [work for work in works if work is not None]

    def _swap(self, tie: Tie, param: nn.Parameter, own: Tensor, tag: int) -> dict[int, Tensor]:
        """The gradients of the other ranks, which get this one's."""
        if not self.tagged:
            parts = self._parts(tie, param)
            ops = [dist.P2POp(dist.isend, own, group=self.group, group_peer=rank) for rank in parts]
            ops += [dist.P2POp(dist.irecv, part, group=self.group, group_peer=rank) for rank, part in parts.items()]
            works = dist.batch_isend_irecv(ops)
        else:
            if tie.name in self.expected:
                parts, works = self.expected.pop(tie.name)
            else:
                parts = self._parts(tie, param)
                works = self._receive(parts, tag)
            sent = (dist.isend(own, group=self.group, group_dst=rank, tag=tag) for rank in parts)
            works += [work for work in sent if work is not None]
        for work in works:
            work.wait()
        return parts

    def __enter__(self) -> Sums:
        for _, param, _ in self.ties:
            if param.grad is not None:
                self.before[param] = param.grad
                param.grad = None
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with torch.no_grad():
            for param, grad in self.before.items():
                if param.grad is not None:
                    local_tensor(grad).add_(local_tensor(param.grad))
                param.grad = grad

    @torch.no_grad()
    def __call__(self) -> None:
        """Makes the gradients of all copies their sum, in place. One that is None on a rank counts as zero there."""
        for tie, param, tag in self.ties:
            own = _gradient(param)
            parts = self._swap(tie, param, own, tag)
            first, *others = [own if rank == self.rank else parts[rank] for rank in tie.ranks]
            total = first + others[0]
            for other in others[1:]:
                total += other
            own.copy_(total)


def _gradient(param: nn.Parameter) -> Tensor:
    """This rank's memory of the gradient, contiguous; made if there is none."""
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    local = local_tensor(param.grad)
    if not local.is_contiguous():
        raise ValueError(
            f"pyshard.pp: the gradient of a tied weight has strides {local.stride()} for shape {tuple(local.shape)}; "
            "expected a contiguous one, as backward makes it. Leave .grad to backward."
        )
    return local
