"""Optimizers."""

from .adam import Adam, AdamW

__all__ = ["Adam", "AdamW"]
