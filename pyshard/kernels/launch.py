"""A launch: the parameters of an optimizer that one backend updates on one device, all in one go.

An Entry holds the tensors of one parameter, already checked. A Launch keeps the table of their addresses
(pyshard._C.AdamTable), which notices between steps when anything has changed. HostLaunch computes the scalars of a
step on the host; kernels/device.py has the launch that leaves everything on a GPU.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _C
from . import reference
from .formats import Format


@dataclass(slots=True)
class Entry:
    """One parameter of a step. Tensors are local shards where the parameter is a DTensor."""

    name: str
    param: Tensor  # as the optimizer holds it
    local: Tensor  # its own memory
    state: dict[str, Tensor]  # the optimizer's state of it
    held: list[tuple[str, Tensor]]  # items of the state whose memory is used
    group: int
    fmt: Format | None  # None: fp64
    kind: int  # -1 for fp64
    grad_dtype: torch.dtype
    stride: tuple[int, ...] | None  # of all its tensors; None if contiguous
    low: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    step: Tensor
    coupled: bool
    # Dense stand-ins for a parameter or gradient whose elements do not lie in the order of the moments.
    param_buffer: Tensor | None = None
    grad_buffer: Tensor | None = None

    def is_dtensor(self) -> bool:
        return self.local is not self.param

    def grad(self) -> Tensor | None:
        """The local gradient as it is now."""
        grad = self.param.grad
        if grad is None or not self.is_dtensor():
            return grad
        return local_tensor(grad)

    def row(self) -> tuple[int, ...]:
        """Addresses, size and kind, in the order of AdamRow, and the address of the step count."""
        grad = self.grad() if self.grad_buffer is None else self.grad_buffer
        param = self.local if self.param_buffer is None else self.param_buffer
        optional = [0 if t is None else t.data_ptr() for t in (self.low, grad, self.max_exp_avg_sq)]
        low, grad_address, vmax = optional
        moments = (self.exp_avg.data_ptr(), self.exp_avg_sq.data_ptr(), vmax)
        return (param.data_ptr(), low, grad_address, *moments, param.numel(), self.kind, self.step.data_ptr())


def local_tensor(tensor: Tensor) -> Tensor:
    """The memory behind a tensor: of a DTensor its local shard, waited for if it is still on its way."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    with torch.no_grad():
        local: Tensor = to_local()
    wait = getattr(local, "wait", None)
    return wait() if wait is not None else local


class Launch:
    """Entries of one backend on one device, in the order of the parameters."""

    def __init__(self, backend: str, device: torch.device, entries: list[Entry], idle: list[Tensor]):
        self.backend = backend
        self.device = device
        self.entries = entries
        self.copied = [e for e in entries if e.param_buffer is not None]
        self.table = _C.AdamTable()
        for e in entries:
            self.table.add(
                param=e.param,
                state=e.state,
                held=e.held,
                row=e.row(),
                grad=e.param.grad,
                dtype=e.grad_dtype,
                stride=e.stride,
                group=e.group,
                is_dtensor=e.is_dtensor(),
                copied=e.param_buffer is not None,
            )
        for param in idle:
            self.table.add_idle(param)

    def active(self) -> list[Entry]:
        """The entries that have a gradient now."""
        return [self.entries[i] for i in self.table.active()]

    def first_nonfinite(self) -> str | None:
        """Name of the first parameter whose gradient is not finite; for an error message."""
        for e in self.active():
            grad = e.grad()
            if grad is not None and not math.isfinite(float(grad.double().square().sum())):
                return e.name
        return None

    def gather(self) -> None:
        """Copies parameters and gradients that do not lie in the order of the moments into their buffers."""
        for e in self.copied:
            grad = e.grad()
            if grad is not None and e.param_buffer is not None and e.grad_buffer is not None:
                e.param_buffer.copy_(local_tensor(e.param).detach())
                e.grad_buffer.copy_(grad)

    def scatter(self) -> None:
        """Copies updated buffers back to their parameters."""
        for e in self.copied:
            if e.param.grad is not None and e.param_buffer is not None:
                local_tensor(e.param).detach().copy_(e.param_buffer)


class HostLaunch(Launch):
    """A launch whose step counts and scalars live on the host: CPU tensors, or the reference on any device."""

    def square_sum(self) -> float:
        """Sum of squares of the gradients, in the fixed order of blocks."""
        if self.backend == "cpu":
            return self.table.square_sum(torch.get_num_threads())
        grads = [e.grad() if e.grad_buffer is None else e.grad_buffer for e in self.active()]
        return float(reference.square_sum([g for g in grads if g is not None]))

    def adam(self, groups: list[list[float]], grad_scale: float) -> None:
        """One step: counts it, and updates parameters and moments. `groups` as AdamTable.prepare takes them."""
        if self.backend == "cpu":
            self.table.prepare(groups, False)
            self.table.adam(grad_scale, torch.get_num_threads())
            return
        for e in self.active():
            grad = e.grad() if e.grad_buffer is None else e.grad_buffer
            if grad is None:
                continue
            e.step.add_(1)
            lr, beta1, beta2, eps, weight_decay, sign, decoupled = groups[e.group]
            hyper = [lr, beta1, beta2, eps, weight_decay, float(e.step), sign, decoupled]
            reference.adam_(
                e.fmt,
                e.local.detach() if e.param_buffer is None else e.param_buffer,
                e.low,
                grad,
                e.exp_avg,
                e.exp_avg_sq,
                e.max_exp_avg_sq,
                reference.adam_scalars(hyper, grad_scale),
                e.coupled,
            )
