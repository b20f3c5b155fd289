"""The command line, run as a user runs it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyshard
from pyshard import _C


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pyshard", *arguments], capture_output=True, text=True, timeout=120)


def test_doctor_names_versions_backends_and_reasons() -> None:
    done = _run("doctor")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"pyshard {pyshard.__version__}, torch ")
    assert f"instruction set: {_C.cpu_isas()[-1]} " in done.stdout
    assert "OpenMP runtimes in this process: 1 (" in done.stdout
    assert "  cpu for cpu tensors: available" in lines
    assert "  reference for cpu tensors: available" in lines
    for backend in ("cuda", "triton"):
        assert any(line.startswith(f"  {backend} for cuda tensors: ") for line in lines)


@pytest.mark.parametrize("command", ["plan", "bench", "train"])
def test_commands_that_are_not_built_say_so(command: str) -> None:
    done = _run(command)
    assert done.returncode == 2
    assert done.stderr == f"pyshard: the command {command!r} is not built yet; there is: doctor\n"
    assert done.stdout == ""


def test_public_names_are_there_and_others_are_not() -> None:
    for name in pyshard.__all__:
        assert getattr(pyshard, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'AdamX'"):
        _ = pyshard.AdamX


def test_a_tree_that_is_not_built_says_how_to_build_it(tmp_path: Path) -> None:
    shutil.copytree(Path(pyshard.__file__).parent, tmp_path / "pyshard", ignore=shutil.ignore_patterns("_C*.so"))
    # Without site, so that no editable install finds the module elsewhere; torch comes by its path.
    paths = os.pathsep.join([str(tmp_path), str(Path(torch.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import pyshard"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "the compiled module pyshard._C cannot be imported" in last
    assert last.endswith("In a source tree, build it with `make build`.")
