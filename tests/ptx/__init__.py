"""A PTX interpreter for the tests; see interpreter.py."""

from .errors import (
    InexactInstructionError,
    MemoryFaultError,
    PtxError,
    RaceError,
    SynchronizationError,
    TrapError,
    UnknownInstructionError,
)
from .interpreter import Kernel, Module
from .memory import Memory

__all__ = [
    "InexactInstructionError",
    "Kernel",
    "Memory",
    "MemoryFaultError",
    "Module",
    "PtxError",
    "RaceError",
    "SynchronizationError",
    "TrapError",
    "UnknownInstructionError",
]
