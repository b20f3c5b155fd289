"""What pyshard costs before the first step: importing it beside torch, and building it from source."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks import machine, peers
from benchmarks.harness import Absent, Contestant, Run
from benchmarks.results import Case, fact_within, within

# what a script imports to get the optimizer of each library
IMPORTS = [
    (peers.PYSHARD, "from pyshard import AdamW"),
    (peers.TORCHAO, "from torchao.optim import AdamW8bit"),
    (peers.BITSANDBYTES, "from bitsandbytes.optim import AdamW8bit"),
    (peers.DEEPSPEED, "from deepspeed.ops.adam import DeepSpeedCPUAdam"),
]


def _import(library: peers.Library, statement: str, wanted: list[str]) -> Contestant | Absent:
    name = library.package.removesuffix("-torch")
    reason = peers.missing(library, "cpu", wanted)
    code = f"import torch, time\nt = time.perf_counter()\n{statement}\nprint('\\n', time.perf_counter() - t)"

    def make() -> Run:
        return Run(lambda: float(machine.fresh_python(code).split()[-1]), times_itself=True)

    return (
        Absent(name, reason) if reason else Contestant(name, machine.version(library.package), make, role=library.role)
    )


def bench_import(measure, settings) -> None:
    if settings.device != "cpu":
        pytest.skip("import time does not depend on the device; see the CPU result")
    measure(
        Case(
            name="import",
            title="Importing the optimizer into a fresh process that has imported torch",
            entries=[_import(library, statement, settings.peers) for library, statement in IMPORTS],
            targets=[within(50, "ms")],
            rounds=7,
            warmup=1,  # the files come from the page cache afterwards, for everyone
        )
    )


def _copy_sources(target: Path) -> None:
    """The files that a commit of the working tree would hold: no build products that would save work."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=machine.ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        source = machine.ROOT / name
        if source.is_symlink() or source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)


def bench_build(measure, settings) -> None:
    if settings.device != "cpu" or settings.quick:
        pytest.skip("builds the wheel, which takes up to a minute: on a full CPU run only")
    if not (machine.ROOT / "setup.py").exists():
        pytest.skip("no setup.py beside benchmarks/: nothing to build")
    # the last line of what nvcc says names its build
    nvcc = (machine.output("nvcc", "--version") or "none: no CUDA code").splitlines()[-1]
    facts: dict[str, object] = {"cores": os.cpu_count(), "nvcc": nvcc}

    def build() -> float:
        with tempfile.TemporaryDirectory() as folder:
            _copy_sources(Path(folder, "source"))
            command = [
                sys.executable,
                "-m",
                "pip",
                "wheel",
                "./source",
                "--no-deps",
                "--no-build-isolation",
                "-w",
                "out",
            ]
            start = time.perf_counter()
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            seconds = time.perf_counter() - start
            if done.returncode:
                raise RuntimeError("pip wheel failed:\n" + "\n".join(done.stderr.splitlines()[-20:]))
            (wheel,) = Path(folder, "out").glob("*.whl")
            facts["wheel"], facts["wheel_mb"] = wheel.name, round(wheel.stat().st_size / 1e6, 3)
        return seconds

    version = machine.version("pyshard-torch")
    measure(
        Case(
            name="build",
            title="Building the wheel from a clean copy of the sources",
            entries=[Contestant("pyshard", version, lambda: Run(build, times_itself=True), role="subject")],
            targets=[within(60, "s"), fact_within("wheel_mb", 3.0, "wheel ≤ 3 MB")],
            rounds=1,
            warmup=0,
            unit="s",
            facts=facts,
        )
    )
