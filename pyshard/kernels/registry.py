"""The backends: who they are, what they serve, and why one cannot be used.

One table, one choice. ``backend="auto"`` takes the first backend that serves the device and dtype and is
available; a named backend is used or refused, never replaced. PYSHARD_BACKEND=name acts like naming it everywhere.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

_LOW = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """A set of kernels. `devices` None means any device of torch; `module` holds `unavailable(device_type)`.

    `on_device`: the scalars of a step are computed by the kernels, beside the tensors, and not on the host.
    """

    name: str
    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]
    module: str
    on_device: bool = False

    def why_not(self, device_type: str, dtype: torch.dtype) -> str | None:
        """Why this backend cannot serve parameters of `dtype` on `device_type`; None if it can."""
        if self.devices is not None and device_type not in self.devices:
            return f"it serves {' and '.join(self.devices)} tensors, not {device_type}"
        if dtype not in self.dtypes:
            served = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"it serves {served}, not {str(dtype).removeprefix('torch.')}"
        return _unavailable(self.module, device_type)


@cache
def _unavailable(module: str, device_type: str) -> str | None:
    check: Callable[[str], str | None] = importlib.import_module(module).unavailable
    return check(device_type)


# In the order in which "auto" tries them.
BACKENDS = {
    b.name: b
    for b in (
        Backend("cpu", ("cpu",), _LOW, "pyshard.kernels.cpu"),
        Backend("cuda", ("cuda",), _LOW, "pyshard.kernels.cuda", on_device=True),
        Backend("triton", ("cuda", "cpu"), _LOW, "pyshard.kernels.triton", on_device=True),
        Backend("reference", None, (*_LOW, torch.float64), "pyshard.kernels.reference"),
    )
}
CHOICES = ("auto", *BACKENDS)


def requested(backend: str) -> str:
    """The backend asked for: the argument if it names one, else PYSHARD_BACKEND, else "auto".

    Raises ValueError for an unknown name.
    """
    source, name = "backend", backend
    if backend == "auto":
        source, name = "PYSHARD_BACKEND", os.environ.get("PYSHARD_BACKEND") or "auto"
    if name not in CHOICES:
        raise ValueError(f"pyshard: unknown {source} {name!r}; expected one of {', '.join(CHOICES)}.")
    return name


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that will serve parameters of `dtype` on `device`.

    Raises RuntimeError when a named backend cannot: the message says why and what can be done.
    """
    name = requested(backend)
    if name != "auto":
        reason = BACKENDS[name].why_not(device.type, dtype)
        if reason is None:
            return BACKENDS[name]
        usable = [b.name for b in BACKENDS.values() if b.why_not(device.type, dtype) is None]
        raise RuntimeError(
            f"pyshard: backend {name!r} cannot serve {dtype} parameters on {device}: {reason}. "
            f"Use backend='auto' or one of: {', '.join(usable)}."
        )
    for candidate in BACKENDS.values():
        if device.type == "cpu" and candidate.name == "triton":
            continue  # the interpreter is for tests: only on request
        if candidate.why_not(device.type, dtype) is None:
            return candidate
    raise RuntimeError(
        f"pyshard: no backend serves {dtype} parameters on {device}; expected a floating-point dtype among "
        f"float32, bfloat16, float16, float64."
    )


def report() -> list[tuple[str, str, str]]:
    """(backend, device type, "available" or why not) for every backend and device type it could serve here."""
    lines = []
    for backend in BACKENDS.values():
        for device_type in backend.devices or ("cpu",):
            reason = backend.why_not(device_type, backend.dtypes[0])
            lines.append((backend.name, device_type, reason or "available"))
    return lines
