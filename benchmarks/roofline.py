"""The machine's bandwidth: plain sweeps over as many bytes as the case moves, timed in the same rounds.

Bandwidth is (bytes read + bytes written) per second, as STREAM counts it: a line that is fetched only to be
overwritten is not counted. Several sweeps run, in C++ (sweep.cpp, pyshard) and in operations of torch.
The fastest one's median is the roofline, so a slow sweep cannot flatter a kernel.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import Absent, Contestant, Run

SOURCE = Path(__file__).with_name("sweep.cpp")
FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]


@functools.cache
def _library() -> ctypes.CDLL | str:
    """sweep.cpp compiled for this machine, or the reason why not."""
    compiler = os.environ.get("CXX", "g++")
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join([compiler, *FLAGS]).encode()).hexdigest()[:16]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"sweep-{key}.so"
        try:
            subprocess.run(
                [compiler, *FLAGS, "-o", str(target), str(SOURCE)],
                check=True,
                capture_output=True,
                timeout=120,
            )
        except (OSError, subprocess.SubprocessError) as error:
            return f"sweep.cpp did not compile with {compiler}: {error}"
        return ctypes.CDLL(str(target))  # stays mapped after the file is gone


def _own(nbytes: int) -> Contestant | Absent:
    """The library's sweep: four arrays += 1 in lock-step, with its own threads and instruction set."""
    name = "sweep a,b,c,d += 1 (pyshard)"
    if importlib.util.find_spec("pyshard._C") is None:
        return Absent(name, "pyshard._C is not built")
    module = importlib.import_module("pyshard._C")
    n = max(1, nbytes // 32)

    def make() -> Run:
        tensors = [_floats(n, "cpu") for _ in range(4)]
        addresses, threads = [t.data_ptr() for t in tensors], torch.get_num_threads()
        return Run(lambda _keep=tensors: module.cpu_sweep(addresses, n, threads))

    return Contestant(name, "pyshard._C", make, 32 * n, "8 B per float", "sweep")


def _floats(n: int, device: str) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.float32, device=device)


def _native(name: str, function: str, arrays: int, bytes_per_float: int, nbytes: int) -> Contestant | Absent:
    """A function of sweep.cpp over `arrays` arrays, together `nbytes` of traffic."""
    library = _library()
    if isinstance(library, str):
        return Absent(name, library)
    n = max(1, nbytes // bytes_per_float)

    def make() -> Run:
        tensors = [_floats(n, "cpu") for _ in range(arrays)]
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        call = getattr(library, function)
        size, threads = ctypes.c_long(n), torch.get_num_threads()
        # the default argument keeps the tensors alive as long as the pointers to them
        return Run(lambda _keep=tensors: call(*pointers, size, threads))

    return Contestant(name, "sweep.cpp", make, n * bytes_per_float, f"{bytes_per_float} B per float", "sweep")


def _torch(
    name: str,
    step: Callable[[list[torch.Tensor]], object],
    arrays: int,
    bytes_per_float: int,
    nbytes: int,
    device: str,
) -> Contestant:
    """A torch operation over `arrays` arrays, together `nbytes` of traffic."""
    n = max(1, nbytes // bytes_per_float)

    def make() -> Run:
        tensors = [_floats(n, device) for _ in range(arrays)]
        return Run(lambda: step(tensors))

    traffic = f"{bytes_per_float} B per float"
    return Contestant(name, torch.__version__, make, n * bytes_per_float, traffic, "sweep")


def update_sweeps(nbytes: int, device: str) -> list[Contestant | Absent]:
    """Sweeps that read and write in place, as an optimizer step does."""
    sweeps: list[Contestant | Absent] = [
        _torch("sweep x += 1 (torch)", lambda t: t[0].add_(1.0), 1, 8, nbytes, device),
        _torch("sweep x += y (torch)", lambda t: t[0].add_(t[1]), 2, 12, nbytes, device),
    ]
    if device == "cpu":
        sweeps.append(_native("sweep a,b,c += g", "sweep_update", 4, 28, nbytes))
        sweeps.append(_native("sweep x += 1", "sweep_inplace", 1, 8, nbytes))
        sweeps.append(_own(nbytes))
    return sweeps


def read_sweeps(nbytes: int, device: str) -> list[Contestant | Absent]:
    """Sweeps that only read, as a norm does."""
    sweeps: list[Contestant | Absent] = [_torch("sweep sum (torch)", lambda t: t[0].sum(), 1, 4, nbytes, device)]
    if device == "cpu":
        sweeps.append(_native("sweep sum", "sweep_read", 1, 4, nbytes))
    return sweeps


def copy_sweeps(nbytes: int, device: str) -> list[Contestant | Absent]:
    """Sweeps that read one array and write another, as a cast does."""
    sweeps: list[Contestant | Absent] = [
        _torch("sweep y = x (torch)", lambda t: t[0].copy_(t[1]), 2, 8, nbytes, device)
    ]
    if device == "cpu":
        sweeps.append(_native("sweep y = x", "sweep_copy", 2, 8, nbytes))
    return sweeps
