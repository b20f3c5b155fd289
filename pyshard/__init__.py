"""pyshard: large-model training in PyTorch with less memory and time, through fused kernels."""

from ._version import __version__
from .optim import Adam, AdamW

__all__ = ["Adam", "AdamW", "__version__"]
