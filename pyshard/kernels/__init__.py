"""The kernels: their backends (registry), the checks before them, and the functions that users may call.

The same functions are torch.library operators, torch.ops.pyshard.*, for use under torch.compile (ops.py).
"""

from . import ops as _ops  # registers torch.ops.pyshard.*
from .casts import cast, join, split
from .functional import adam_
from .norm import grad_norm

__all__ = ["adam_", "cast", "grad_norm", "join", "split"]
del _ops
