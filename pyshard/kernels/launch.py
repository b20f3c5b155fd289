"""A launch: the parameters of an optimizer that one backend updates on one device, all in one go.

An Entry names the tensors of one parameter, already checked. A Launch keeps the table of their addresses
(pyshard._C.AdamTable), which notices between steps when anything has changed. HostLaunch computes the scalars of a
step on the host; kernels/device.py has the launch that leaves everything on a GPU.

Neither holds on to gradients or state: what zero_grad() drops or the user moves away is freed at once.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import reference
from .formats import Format

_NO_SUMS = torch.empty(0, dtype=torch.float64)


@dataclass(slots=True)
class Entry:
    """One parameter of a step."""

    name: str
    param: Tensor  # as the optimizer holds it
    states: Mapping[Tensor, dict[str, Any]]  # the optimizer's
    group: int
    fmt: Format | None  # None: fp64
    kind: int  # -1 for fp64
    grad_dtype: torch.dtype
    low_key: str | None  # of the remainder or master
    amsgrad: bool
    coupled: bool
    # Dense stand-ins for a parameter or gradient that does not lie in memory as the moments do.
    param_buffer: Tensor | None = None
    grad_buffer: Tensor | None = None

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state of the parameter."""
        return self.states[self.param]

    @property
    def local(self) -> Tensor:
        """The parameter's own memory: of a DTensor, the local shard."""
        return local_tensor(self.param)

    def is_dtensor(self) -> bool:
        return is_dtensor(self.param)

    def keys(self) -> tuple[str | None, ...]:
        """Items of the state that a step uses, in the order that AdamTable.add takes them."""
        return ("step", self.low_key, "exp_avg", "exp_avg_sq", "max_exp_avg_sq" if self.amsgrad else None)

    def grad(self) -> Tensor | None:
        """The gradient that this step uses, as it lies in memory."""
        grad = self.param.grad
        return grad if grad is None else local_tensor(grad) if self.grad_buffer is None else self.grad_buffer


def is_dtensor(tensor: Tensor) -> bool:
    """True for a DTensor, without importing torch.distributed."""
    return hasattr(tensor, "_local_tensor")


def local_tensor(tensor: Tensor) -> Tensor:
    """The memory behind a tensor: of a DTensor its local shard, waited for if it is still on its way."""
    local: Tensor | None = getattr(tensor, "_local_tensor", None)
    if local is None:
        return tensor
    wait = getattr(local, "wait", None)
    return local if wait is None else wait()


class Launch:
    """Entries of one backend on one device, in the order of the parameters, spread over the same ranks."""

    mask: int | None = 0  # levels (optim/levels.py) over which the parameters are cut; None: they count elsewhere

    def __init__(self, backend: str, device: torch.device, entries: list[Entry], idle: list[Tensor]):
        self.backend = backend
        self.device = device
        self.entries = entries
        self.idle = idle  # kept for the table, which holds on to nothing
        self.copied = [e for e in entries if e.param_buffer is not None]
        self.table = _C.AdamTable()
        for e in entries:
            self.table.add(
                param=e.param,
                state=e.state,
                keys=e.keys(),
                kind=e.kind,
                grad_is_fp32=e.grad_dtype == torch.float32,
                group=e.group,
                is_dtensor=e.is_dtensor(),
                param_buffer=e.param_buffer,
                grad_buffer=e.grad_buffer,
            )
        for param in idle:
            self.table.add_idle(param)

    def active(self) -> list[Entry]:
        """The entries that have a gradient now."""
        return [self.entries[i] for i in self.table.active()]

    def first_nonfinite(self) -> str | None:
        """Name of the first parameter whose gradient is not finite on this rank; for an error message."""
        for e in self.active():
            grad = e.grad()
            if grad is not None and not torch.isfinite(grad).all():
                return e.name
        return None

    def gather(self) -> None:
        """Copies parameters and gradients that do not lie in memory as the moments do into their buffers."""
        for e in self.copied:
            grad = e.param.grad
            if grad is None or e.param_buffer is None or e.grad_buffer is None:
                continue
            if is_dtensor(grad) and grad.placements != e.param.placements:  # type: ignore[attr-defined]
                grad = grad.redistribute(placements=e.param.placements)  # type: ignore[attr-defined]
            e.param_buffer.copy_(e.local)
            e.grad_buffer.copy_(local_tensor(grad))

    def scatter(self) -> None:
        """Copies updated buffers back to their parameters, and tells autograd that all parameters have changed.

        Without that a backward of what was computed before the step would use the new weights in silence.
        """
        for e in self.copied:
            if e.param.grad is not None and e.param_buffer is not None:
                e.local.copy_(e.param_buffer)
        torch.autograd.graph.increment_version(self.table.changed())


class HostLaunch(Launch):
    """A launch whose step counts and scalars live on the host: CPU tensors, or the reference on any device."""

    def square_sum(self) -> float:
        """Sum of squares of the gradients on this rank, in the fixed order of blocks."""
        if self.backend == "cpu":
            return self.table.square_sum(torch.get_num_threads())
        grads = [e.grad() for e in self.active()]
        total = float(reference.square_sum([g for g in grads if g is not None]))
        if not math.isfinite(total) and all(bool(g.isfinite().all()) for g in grads if g is not None):
            total = sys.float_info.max  # squares of finite fp64 gradients overflow; of other dtypes they cannot
        return total

    def block_sums(self, groups: list[list[float]], sources: Sequence[int] = (0,)) -> Tensor:
        """Sums of squares of the blocks of the gradients, doubles, in the order of the active rows.

        `sources`: as in adam().
        """
        if self.backend == "cpu":
            sums = self.table.block_sums(torch.get_num_threads(), list(sources))
            return torch.frombuffer(bytearray(sums), dtype=torch.float64) if sums else _NO_SUMS
        grads = [e.grad() for e in self.active()]
        return reference.block_sums([g for g in grads if g is not None])

    def adam(
        self,
        groups: list[list[float]],
        grad_scale: float,
        sources: Sequence[int] = (0,),
        targets: Sequence[int] = (),
    ) -> None:
        """One step: counts it, and updates parameters and moments. `groups` as AdamTable.prepare takes them.

        `sources`: byte distances from each gradient to those that are summed up in its stead, in this order. `targets`:
        byte distances from each parameter to copies of it, which are written too. Other than default ones: cpu only.
        """
        if self.backend == "cpu":
            self.table.prepare(groups, False)
            if tuple(sources) == (0,) and not targets:
                self.table.adam(grad_scale, torch.get_num_threads())
            else:
                self.table.adam(grad_scale, torch.get_num_threads(), list(sources), list(targets))
            return
        for e in self.active():
            step, low, exp_avg, exp_avg_sq, max_exp_avg_sq = (
                None if key is None else local_tensor(e.state[key]) for key in e.keys()
            )
            grad = e.grad()
            if step is None or exp_avg is None or exp_avg_sq is None or grad is None:
                continue  # never of an active entry
            step.add_(1)
            lr, beta1, beta2, eps, weight_decay, sign, decoupled = groups[e.group]
            hyper = [lr, beta1, beta2, eps, weight_decay, float(step), sign, decoupled]
            scalars = reference.adam_scalars(hyper, grad_scale)
            param = e.local if e.param_buffer is None else e.param_buffer
            reference.adam_(e.fmt, param, low, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, scalars, e.coupled)
