"""The kernels: their backends (registry), the checks before them, and the functions that users may call."""

from .casts import cast, join, split

__all__ = ["cast", "join", "split"]
