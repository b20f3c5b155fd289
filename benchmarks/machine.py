"""What a number was measured on: machine, versions, commit. Stored with every result."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = [
    "torch",
    "deepspeed",
    "torchao",
    "bitsandbytes",
    "triton",
    "numpy",
    "pytest-benchmark",
]
RANKS_PACKAGES = ["transformers"]  # what only distributed benchmarks use


def output(*command: str) -> str:
    """What a command prints, or "" if it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def first_line(*command: str) -> str:
    """The first line that a command prints, or "" if it cannot run."""
    return output(*command).split("\n")[0]


def version(package: str) -> str:
    """The version of a distribution, of pyshard in a bare source tree too; "" if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package != "pyshard-torch" or importlib.util.find_spec("pyshard") is None:
            return ""
        return str(importlib.import_module("pyshard._version").__version__)


def cpu_model() -> str:
    """The processor's name as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.machine()


def _huge_pages() -> str:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return text[text.find("[") + 1 : text.find("]")]


def openmp_runtimes() -> list[str]:
    """The OpenMP libraries in this process. Threads of a second one would spin beside those of the first."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    return sorted({line.split()[-1] for line in lines if re.search(r"lib(gomp|iomp|omp)[^/]*$", line)})


def cpu_isa() -> str:
    """The widest vector instructions that torch found here."""
    return torch.backends.cpu.get_cpu_capability()


def environment(device: str, ranks: bool = False) -> dict[str, object]:
    """Machine and versions: equal for two runs whose numbers may stand in one table.

    ranks: the work is done by processes of one thread each (distributed_ranks.py), not by this one.
    """
    packages = [*PACKAGES, *(RANKS_PACKAGES if ranks else [])]
    found = {"pyshard": version("pyshard-torch"), **{name: version(name) for name in packages}}
    machine: dict[str, object] = {
        "cpu": cpu_model(),
        "isa": cpu_isa(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": 1 if ranks else torch.get_num_threads(),
        **({"per_rank": True} if ranks else {"openmp_runtimes": len(openmp_runtimes())}),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "transparent_huge_pages": _huge_pages(),
        "kernel": platform.release(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine["gpu"] = properties.name
        machine["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        machine["cuda"] = torch.version.cuda
    return {
        "device": device,
        "machine": machine,
        "python": platform.python_version(),
        "compiler": first_line(os.environ.get("CXX", "g++"), "--version"),
        "versions": {name: number for name, number in found.items() if number},
    }


def commit() -> str:
    """The commit that was measured; "+" after it: files of the library differ from that commit."""
    changed = first_line("git", "status", "--porcelain", "--untracked-files=no", "--", "pyshard", "csrc", "setup.py")
    return first_line("git", "rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def slug(device: str) -> str:
    """The name of the result file: cpu-<model>, or the card."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else f"cpu {cpu_model()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def fresh_python(code: str, timeout: float = 120) -> str:
    """What `code` prints in a new interpreter; RuntimeError with its last line of error if it fails."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=timeout)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(lines[-1])
    return done.stdout.strip()
