"""Which transport serves a process group, and why."""

import warnings
from collections.abc import Iterable

import torch
import torch.distributed as dist

from .transport import Transport

CHOICES = ("auto", "shm", "symm_mem", "collective")


def choose(who: str, name: str, group: dist.ProcessGroup | None, device: torch.device, timeout: float) -> Transport:
    """The transport asked for; all ranks call this and get the same one.

    Raises:
        RuntimeError: on all ranks, if the named one cannot serve them; says why. "auto" takes the next one instead.
    """
    reasons: list[str] = []
    for candidate in _candidates(name, device):
        made = _make(candidate, group, device, timeout)
        if isinstance(made, Transport):
            if name != "auto":
                made.why = f"asked for by transport={name!r}"
            elif reasons:
                made.why = "; ".join(reasons)
            return made
        reasons.append(f"{candidate} cannot be used: {made}")
        if name == "auto" and candidate == "shm" and not _expected(made):
            warnings.warn(f"{who}: {reasons[-1]}. Falling to another transport, which is slower.", stacklevel=4)
    raise RuntimeError(f"{who}: transport={name!r}: {'; '.join(reasons)}. Use transport='auto' or 'collective'.")


def fall_back(
    who: str, error: MemoryError, group: dist.ProcessGroup | None, device: torch.device, timeout: float
) -> Transport:
    """The collective transport instead of one in whose memory the parameters do not fit; warns."""
    warnings.warn(f"{who}: {error} Falling to the collective transport, which is slower.", stacklevel=4)
    made = _make("collective", group, device, timeout)
    if isinstance(made, str):
        raise RuntimeError(f"{who}: {error} And the collective transport cannot be used: {made}")
    made.why = str(error)
    return made


def _candidates(name: str, device: torch.device) -> Iterable[str]:
    if name != "auto":
        return (name,)
    return ("shm", "collective") if device.type == "cpu" else ("symm_mem", "collective")


def _expected(reason: str) -> bool:
    """Ranks on several hosts are no fault that a warning should point at."""
    return "host" in reason


def _make(name: str, group: dist.ProcessGroup | None, device: torch.device, timeout: float) -> "Transport | str":
    if name == "shm":
        if device.type != "cpu":
            return f"it serves CPU tensors, and the parameters are on {device}"
        from .shm import ShmTransport

        return ShmTransport.create(group, timeout)
    if name == "symm_mem":
        from .symm_mem import SymmMemTransport

        return SymmMemTransport.create(group, device, timeout)
    from .collective import CollectiveTransport

    return CollectiveTransport(group, device, timeout)
