"""The command line, run as a user runs it."""

import subprocess
import sys

import pytest

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


def test_names_of_the_contract_that_are_not_built_say_so() -> None:
    with pytest.raises(AttributeError, match=r"pyshard\.ShardedAdamW is not built yet in version"):
        _ = pyshard.ShardedAdamW
    with pytest.raises(AttributeError, match="has no attribute 'AdamX'"):
        _ = pyshard.AdamX
