"""Checkpoints that a killed save cannot break, saved and loaded by any number of ranks. See docs/checkpoints.md."""

from .background import AsyncSave
from .loading import load_checkpoint
from .ranks import CheckpointError
from .safetensors import export_safetensors
from .safetensors_load import load_safetensors
from .saving import save_checkpoint

__all__ = [
    "AsyncSave",
    "CheckpointError",
    "export_safetensors",
    "load_checkpoint",
    "load_safetensors",
    "save_checkpoint",
]
