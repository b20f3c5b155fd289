"""Transports: how the ranks of a process group exchange gradients, parameters and small messages."""

from .transport import Arena, PeerError, Transport

__all__ = ["Arena", "PeerError", "Transport"]
