"""GradScaler beside a sharded optimizer: what it reads in .grad says what holds for all ranks.

torch's GradScaler looks for inf and NaN in the gradients of its own process, before step(). On another rank they may
be finite, and at stage 2 they are on their way already; the scales of the ranks would drift apart. So while a
GradScaler is in use the ranks agree at the end of each backward whether all gradients are finite, and .grad of one
small parameter tells it: at stage 2 it holds a finite number or NaN; at stage 1 its first element becomes NaN if
another rank's gradients are not finite.

Whether a GradScaler is in use is known from the first step on; until then it is assumed.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .sharded import ShardedAdam


class Witness:
    """The gradient that a GradScaler reads."""

    def __init__(self) -> None:
        self.watching = True
        self.queued = False  # the end of this backward will be noticed
        self._param: Tensor | None = None
        self._grad: Tensor | None = None  # at stage 2, what was put into .grad
        self._value = 0.0
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def tell(self, optimizer: "ShardedAdam", finite: bool) -> None:
        """Puts into .grad of one parameter what holds for all ranks."""
        params = [
            p for generation in optimizer._generations for p in generation.params if p.numel() and p.requires_grad
        ]
        if optimizer.stage == 1:
            params = [p for p in params if p.grad is not None]
            if params and not finite:
                grad = min(params, key=Tensor.numel).grad
                if grad is not None:
                    grad.detach()[(0,) * grad.dim()] = torch.nan
            return
        params = [p for p in params if p.grad is None]
        if not params:
            return
        param = min(params, key=Tensor.numel)
        if param is not self._param:
            if self._hook is not None:
                self._hook.remove()
            self._param, self._hook = param, param.register_hook(lambda grad: self._drop())
        # Large, so that clipping by its norm would change it, and be noticed.
        dtype = getattr(param, "grad_dtype", None) or param.dtype
        self._value = torch.finfo(dtype).max / 2 if finite else torch.nan
        self._grad = torch.full_like(param, self._value, dtype=dtype)
        param.grad = self._grad

    def _drop(self) -> None:
        """Before a backward adds to it."""
        if self._param is not None and self._param.grad is self._grad:
            self._param.grad = None
        self._grad = None

    def take_back(self, who: str) -> None:
        """Before a step: removes it from .grad.

        Raises:
            RuntimeError: it was changed: by something that wanted to change all gradients.
        """
        if self._grad is None or self._param is None or self._param.grad is not self._grad:
            self._grad = None
            return
        unchanged = self._value != self._value or bool((self._grad == self._value).all())
        self._drop()
        if not unchanged:
            raise RuntimeError(
                f"{who}: gradients were changed between backward and step(), as by GradScaler.unscale_() or "
                "clip_grad_norm_(); expected them untouched at stage=2, where they have left .grad by then. Use "
                "max_grad_norm, which unscales first, or stage=1."
            )


__all__ = ["Witness"]
