"""Messages between the GPUs of a group over its own NCCL communicator, in the order of the current stream."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .transport import PeerError


class NcclBatch:
    """What one call has started. NCCL runs it as one group, so its sends and its receives end together."""

    def __init__(self, works: list[Any]):
        self.receives = self.sends = works


class NcclWire:
    """Messages over `group`. To wait is to order the current stream after them: the host goes on."""

    def __init__(self, group: dist.ProcessGroup | None, rank: int, ranks: list[int], device: torch.device):
        self._group, self.rank, self.ranks = group, rank, ranks
        self._others = [(rank + i) % len(ranks) for i in range(1, len(ranks))]
        self._open = True
        # All ranks make the communicator here: the first messages need not be of all of them.
        self.all_gather(torch.zeros(1, dtype=torch.uint8, device=device), "making connections")

    def all_gather(self, mine: Tensor, operation: str) -> list[Tensor]:
        """The tensors of all ranks, on the CPU; one size on all ranks."""
        self.check(operation)
        parts = [torch.empty_like(mine) for _ in self.ranks]
        with _naming(operation):
            dist.all_gather(parts, mine, group=self._group)
            return [part.cpu() for part in parts]

    def post(self, stream: int, receives: Sequence[Tensor], sends: Sequence[Tensor], operation: str) -> NcclBatch:
        """Starts a receive from, and a send to, each other rank with these tensors, one per rank of the group.

        Nothing for an empty tensor. `stream` is not needed: NCCL keeps the order in which messages were posted.
        """
        self.check(operation)
        receiving = [
            dist.P2POp(dist.irecv, receives[r], group=self._group, group_peer=r)
            for r in self._others
            if receives[r].numel()
        ]
        sending = [
            dist.P2POp(dist.isend, sends[r], group=self._group, group_peer=r) for r in self._others if sends[r].numel()
        ]
        with _naming(operation):
            return NcclBatch(dist.batch_isend_irecv(receiving + sending) if receiving or sending else [])

    def ready(self, works: Sequence[Any], operation: str) -> bool:
        """True if all are complete."""
        self.check(operation)
        with _naming(operation):
            return all(work.is_completed() for work in works)

    def wait(self, works: Sequence[Any], operation: str) -> None:
        """Orders the current stream after them."""
        self.check(operation)
        with _naming(operation):
            for work in works:
                work.wait()

    def check(self, operation: str) -> None:
        if not self._open:
            raise RuntimeError(f"collective transport: {operation} after close(). Make another optimizer.")

    def abort(self, text: str) -> None:
        """Nothing can be told over NCCL."""

    def close(self) -> None:
        """The communicator belongs to the group and stays."""
        self._open = False


@contextmanager
def _naming(operation: str) -> Iterator[None]:
    """NCCL's errors as PeerError; they do not tell whose message failed."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(
            f"collective transport, {operation}: NCCL failed ({str(error).strip()}). It does not tell which rank was "
            "lost: look for the rank that failed first, then start all ranks again from the last checkpoint.",
            None,
            operation,
        ) from error
