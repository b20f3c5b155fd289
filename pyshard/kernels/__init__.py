"""The kernels: their backends (registry), the checks before them, and the functions that users may call."""

from .casts import cast, join, split
from .norm import grad_norm

__all__ = ["cast", "grad_norm", "join", "split"]
