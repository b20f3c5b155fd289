"""The collectives of a sharded model, each with a name that its error tells.

FSDP2 takes them through its hooks for custom communication. Over gloo a shard goes straight to every other rank, and
a reduction sums in fp32 what came from all ranks, in rank order: the same bits as every transport of pyshard, and half
of the bytes of gloo's reduce_scatter, which is an all-reduce. Two ranks of one thread over loopback, 7 M fp32 elements,
medians of 12: reduce-scatter 8.5 ms (gloo's own 23, all_to_all_single and a sum 9.8), all-gather 6.8 ms (19).

Each kind of message has its own tag, so that ranks in different operations run into the group's timeout instead of
taking each other's messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..comm.notes import Notes
from ..comm.transport import PeerError

_WHO = "pyshard.fully_shard"
_TAGS = 4096  # tags of messages start here; nothing else in these groups sends any


class _Named:
    """A collective of one unit: FSDP2's interface `Comm` with what all of them have in common."""

    def __init__(self, operation: str, tag: int):
        self.operation, self.tag = operation, _TAGS + tag

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a message, as FSDP2 asks for it."""
        return torch.empty(*size, dtype=dtype, device=device)

    def failure(self, error: Exception, group: dist.ProcessGroup) -> PeerError:
        """What to raise for an error of torch.distributed."""
        return error if isinstance(error, PeerError) else Notes(_WHO, group).error(self.operation, error)


class AllGather(_Named):
    """output = what all ranks have as input, in rank order. Both flat; the input may be its own part of the output."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        try:
            if not over_gloo(group, output_tensor):
                gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # newer name, older
                work = gather(output_tensor, input_tensor, group=group, async_op=async_op)
                return work if work is None else _Wait([work], self, group)
            rank, parts = group.rank(), output_tensor.chunk(group.size())
            if parts[rank].data_ptr() != input_tensor.data_ptr():
                parts[rank].copy_(input_tensor)
            sent = [parts[rank]] * len(parts)
            # Not waited for here: FSDP2 waits before it uses the parameters, so that in backward those of the next
            # block come while this one computes.
            return _Wait(_to_all(sent, list(parts), group, self.tag), self, group)
        except RuntimeError as error:
            raise self.failure(error, group) from error


class ReduceScatter(_Named):
    """output = the sum over ranks, or their mean, of this rank's part of the input. Both flat."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        try:
            if not over_gloo(group, output_tensor) or op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
                scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
                work = scatter(output_tensor, input_tensor, group=group, op=op, async_op=async_op)
                return work if work is None else _Wait([work], self, group)
            rank, parts = group.rank(), list(input_tensor.chunk(group.size()))
            theirs = [part if i == rank else torch.empty_like(part) for i, part in enumerate(parts)]
            for work in _to_all(parts, theirs, group, self.tag):
                work.wait()
        except RuntimeError as error:
            raise self.failure(error, group) from error
        _sum(theirs, output_tensor)
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(len(parts))
        return None


def _sum(parts: list[Tensor], out: Tensor) -> None:
    """In fp32, from the left."""
    if len(parts) == 1:
        out.copy_(parts[0])
    elif out.dtype in (torch.float32, torch.float64):
        torch.add(parts[0], parts[1], out=out)
        for part in parts[2:]:
            out.add_(part)
    else:
        total = parts[0].float()
        for part in parts[1:]:
            total.add_(part)
        out.copy_(total)


def _to_all(sent: list[Tensor], received: list[Tensor], group: dist.ProcessGroup, tag: int) -> list[dist.Work]:
    """One message to and from each other rank; sent[i] goes to rank i, what it sends comes into received[i]."""
    if not sent[0].numel():
        return []
    others = [(group.rank() + i) % group.size() for i in range(1, group.size())]  # each rank begins with another one
    works = [group.recv([received[i]], i, tag) for i in others]
    return works + [group.send([sent[i]], i, tag) for i in others]


def over_gloo(group: dist.ProcessGroup, tensor: Tensor) -> bool:
    """True if gloo carries the tensor, in this host's memory, in the group."""
    return tensor.device.type == "cpu" and "cpu:gloo" in dist.get_backend_config(group).split(",")


class _Wait(dist.Work):
    """Several works as one, whose failure is told by name. Keeps what they read and write."""

    def __init__(self, works: Sequence[dist.Work], comm: _Named, group: dist.ProcessGroup):
        super().__init__()
        self._works, self._comm, self._group = list(works), comm, group

    def wait(self, timeout: timedelta | None = None) -> bool:
        works, self._works = self._works, []
        try:
            for work in works:
                work.wait() if timeout is None else work.wait(timeout)
        except RuntimeError as error:
            raise self._comm.failure(error, self._group) from error
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


def name_collectives(unit: nn.Module, of: str, index: int) -> None:
    """Gives a unit that FSDP2 has wrapped these collectives. `of`: whose parameters, for error messages."""
    module: Any = unit
    module.set_custom_all_gather(AllGather(f"the all-gather of the parameters of {of}", 2 * index))
    module.set_custom_reduce_scatter(ReduceScatter(f"the reduce-scatter of the gradients of {of}", 2 * index + 1))
    # Sums, and a division after them, on whatever carries them: a mean over gloo was a sum in some versions of torch
    # (pytorch#162338), in silence.
    module.set_force_sum_reduction_for_comms(True)
    for params in module._get_fsdp_state()._fsdp_param_groups:
        if params.mesh_info.mesh.ndim > 1:
            _name_all_reduce(params, f"the all-reduce of the gradients of {of}")


def _name_all_reduce(params: Any, operation: str) -> None:
    """Of an HSDP mesh: FSDP2 has no hook for that one, so it is told by its error where it is called."""
    inner, comm = params.post_backward, _Named(operation, 0)

    def post_backward(*unused: Any) -> None:
        try:
            inner(*unused)
        except RuntimeError as error:
            if isinstance(error, PeerError) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise comm.failure(error, params._all_reduce_process_group) from error

    params.post_backward = post_backward
