"""`pyshard doctor`: versions, backends and why one is not available, and what could slow a step down."""

import platform
import re
from importlib.util import find_spec
from pathlib import Path

import torch

from .. import _C, __version__
from ..kernels.registry import report, requested


def doctor() -> str:
    """A report of this machine as pyshard sees it, a line for each fact."""
    lines = [
        f"pyshard {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}",
        f"triton: {_triton()}",
        f"instruction set: {_C.cpu_isa()} (can run: {', '.join(_C.cpu_isas())}); {torch.get_num_threads()} threads",
        f"OpenMP runtimes in this process: {_openmp()}",
        f"build: {_C.build_note}",
        f"backend asked for: {requested('auto')}",
    ]
    lines += [f"  {name} for {device} tensors: {reason}" for name, device, reason in report()]
    return "\n".join(lines)


def _triton() -> str:
    if find_spec("triton") is None:
        return "not installed"
    import triton

    return str(triton.__version__)


def _openmp() -> str:
    """The OpenMP libraries that are loaded; more than one means that threads of two pools compete."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return "unknown (no /proc/self/maps)"
    names = set(re.findall(r"\S*/(lib[gi]?omp\S*\.so\S*)", maps.read_text()))
    verdict = "" if len(names) <= 1 else "; expected one: steps may be slow, start with one library preloaded"
    return f"{len(names)} ({', '.join(sorted(names)) or 'none'}){verdict}"
