"""A model in training on one rank: a sample of its steps, timed, with the bytes it sent and the memory it takes.

Ways to train (DDP, sharded optimizers, ...) are built in distributed_ways.py.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

MB = 1e6


def pss() -> int:
    """Bytes of memory of this process, a page that n processes map counted as 1/n; free memory given back before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])


def resident(field: str) -> int:
    """VmRSS, or VmHWM: the most it has been since forget_peak()."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def sent_bytes() -> int:
    """Bytes that this host has put on its network so far, headers included.

    Where all ranks are on one host: this rank's share of what all of them have put on loopback.
    """
    counts = {}
    for line in Path("/proc/self/net/dev").read_text().splitlines()[2:]:
        name, numbers = line.split(":")
        counts[name.strip()] = int(numbers.split()[8])
    if one_host():
        return counts["lo"] // dist.get_world_size()
    return sum(count for name, count in counts.items() if name != "lo")


def one_host() -> bool:
    return os.environ.get("GLOO_SOCKET_IFNAME", "lo") == "lo"


def nbytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the parts that this rank holds; views of one memory count once."""
    seen: dict[tuple[int, int], int] = {}
    for tensor in tensors:
        if tensor is None:
            continue
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        seen[local.data_ptr(), local.numel()] = local.numel() * local.element_size()
    return sum(seen.values())


def tensors_of(state: Any) -> list[Tensor]:
    """All tensors in nested dicts and lists."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors_of(value)]
    if isinstance(state, (list, tuple)):
        return [tensor for value in state for tensor in tensors_of(value)]
    return []


class Training:
    """One rank of one contestant.

    Args:
        model: whose parameters and gradients are counted.
        forward: the loss of a batch. backward: as loss.backward(), which it is by default.
        update: the step and what clears the gradients. None: forward and backward alone.
        state: what the optimizer keeps, tensors anywhere in nested dicts and lists.
        settle: waits until nothing is under way that a step has begun.
        close: gives back what outlives the objects.
        batches: what it trains on, in turn.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[Tensor], Tensor],
        update: Callable[[], object] | None,
        state: Callable[[], Any],
        batches: list[Tensor],
        backward: Callable[[Tensor], object] = lambda loss: loss.backward(),
        settle: Callable[[], object] = lambda: None,
        close: Callable[[], object] = lambda: None,
    ):
        self.model, self.forward, self.backward = model, forward, backward
        self.settle, self.close = settle, close
        self.update = update or self._clear
        self.state = state
        self.batches = batches
        self.steps = 0
        self.found: dict[str, float] = {}

    def _clear(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def _step(self) -> tuple[Tensor, float]:
        """The loss, and the seconds that the update took."""
        batch = self.batches[self.steps % len(self.batches)]
        self.steps += 1
        loss = self.forward(batch)
        self.backward(loss)
        begin = time.perf_counter()
        self.update()
        return loss.detach(), time.perf_counter() - begin

    def sample(self, steps: int) -> dict[str, Any]:
        """Seconds and bytes of one step, a mean over `steps` in a row.

        One step more comes first, without the clock: it fills the caches after the contestant before, and the first
        timed step finds what a step of this way leaves behind, such as parameters still on their way.
        """
        dist.barrier()
        before = sent_bytes()
        self._step()
        begin = time.perf_counter()
        losses, updates = zip(*(self._step() for _ in range(steps)))
        seconds = time.perf_counter() - begin
        self.settle()
        dist.barrier()
        return {
            "seconds": seconds / steps,
            "update": sum(updates) / steps,
            "sent": (sent_bytes() - before) / (steps + 1),
            "losses": [float(loss) for loss in losses],
        }

    def measure(self, before: int) -> None:
        """Takes the sizes, with a step for the peak. before: pss() when nothing of this was there yet."""
        held = pss() - before
        start = resident("VmRSS")
        forget_peak()
        self._step()
        self.settle()
        peak = resident("VmHWM") - start
        self.backward(self.forward(self.batches[0]))
        grads = nbytes(p.grad for p in self.model.parameters())
        self.update()  # a step for that backward, too, so that nobody waits for one
        self.settle()
        self.found = {
            "params MB": nbytes(self.model.parameters()) / MB,
            "grads MB": grads / MB,
            "state MB": nbytes(tensors_of(self.state())) / MB,
            "held MB": held / MB,
            "peak MB": (held + max(peak, 0)) / MB,
        }

    def sizes(self) -> dict[str, float]:
        """MB: of tensors by kind (gradients: when the step begins), held between steps, and at the peak of a step."""
        return self.found
