"""Checkpoints that a killed save cannot break, saved and loaded by any number of ranks. See docs/checkpoints.md."""

from .loading import load_checkpoint
from .ranks import CheckpointError
from .saving import save_checkpoint

__all__ = ["CheckpointError", "load_checkpoint", "save_checkpoint"]
