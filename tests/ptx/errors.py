"""The errors of the PTX interpreter. Each message names the PTX line, the instruction and the thread."""


class PtxError(RuntimeError):
    """Anything that went wrong while reading or running PTX."""


class UnknownInstructionError(PtxError):
    """An instruction, a modifier or a piece of syntax that the interpreter does not know."""


class InexactInstructionError(PtxError):
    """An instruction whose result PTX does not fix to the last bit."""


class MemoryFaultError(PtxError):
    """An access outside the buffers handed in, a misaligned one, or a write to read-only memory."""


class RaceError(PtxError):
    """Two threads touch the same bytes with nothing that orders them."""


class SynchronizationError(PtxError):
    """A barrier or warp operation that not all of its threads reach, or code that never ends."""


class TrapError(PtxError):
    """The kernel executed `trap` or called an external function such as __assertfail."""
