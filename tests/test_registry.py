"""The choice of a backend: what auto takes, that a named one is used or refused, and the reasons that are given."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyshard
from pyshard.kernels import cast, grad_norm, join, split
from pyshard.kernels.registry import BACKENDS, CHOICES, choose, report, requested

CPU = torch.device("cpu")
LOW = (torch.float32, torch.bfloat16, torch.float16)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever backend the session is run with, these tests set their own."""
    monkeypatch.delenv("PYSHARD_BACKEND", raising=False)


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints, with only these of the variables that matter here."""
    ours = {"TRITON_INTERPRET", "PYSHARD_BACKEND"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    root = str(Path(pyshard.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- auto ----


@pytest.mark.parametrize("dtype", LOW)
def test_auto_takes_the_cpp_kernels_on_cpus(dtype: torch.dtype) -> None:
    """Not Triton's interpreter, although it could serve here: it is for tests, on request only."""
    assert choose("auto", CPU, dtype).name == "cpu"


def test_auto_takes_the_reference_for_fp64_and_for_other_devices() -> None:
    assert choose("auto", CPU, torch.float64).name == "reference"
    assert choose("auto", torch.device("xpu"), torch.float32).name == "reference"


@pytest.mark.gpu
def test_auto_takes_cuda_on_gpus() -> None:
    expected = "cuda" if BACKENDS["cuda"].why_not("cuda", torch.float32) is None else "triton"
    assert choose("auto", torch.device("cuda"), torch.float32).name == expected


def test_nothing_serves_integers() -> None:
    with pytest.raises(RuntimeError, match=r"pyshard: no backend serves torch.int32 parameters on cpu; expected"):
        choose("auto", CPU, torch.int32)


# ---- a named backend ----


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_named_backend_is_the_one(name: str) -> None:
    for dtype in LOW:
        assert choose(name, CPU, dtype).name == name


@pytest.mark.parametrize(
    ("name", "device", "dtype", "says"),
    [
        ("cpu", "cpu", torch.float64, r"it serves float32, bfloat16, float16, not float64.*one of: reference\."),
        ("cpu", "cuda", torch.float32, r"it serves cpu tensors, not cuda"),
        ("cuda", "cpu", torch.float32, r"it serves cuda tensors, not cpu.*one of: cpu, .*reference\."),
        ("triton", "xpu", torch.float32, r"it serves cuda and cpu tensors, not xpu.*one of: reference\."),
        ("reference", "cpu", torch.int8, r"it serves float32, bfloat16, float16, float64, not int8"),
    ],
)
def test_a_named_backend_that_cannot_is_refused(name: str, device: str, dtype: torch.dtype, says: str) -> None:
    with pytest.raises(
        RuntimeError, match=rf"pyshard: backend '{name}' cannot serve {dtype} parameters on {device}: {says}"
    ):
        choose(name, torch.device(device), dtype)


def test_functions_and_optimizer_refuse_and_change_nothing() -> None:
    """Each public way in: backend="cuda" for CPU tensors never runs on something else."""
    refused = pytest.raises(RuntimeError, match=r"pyshard: backend 'cuda' cannot serve .* on cpu")
    x = torch.ones(3)
    for call in (
        lambda: cast(x, torch.bfloat16, backend="cuda"),
        lambda: split(x, backend="cuda"),
        lambda: join(x.bfloat16(), torch.zeros(3, dtype=torch.int16), backend="cuda"),
        lambda: grad_norm([x], backend="cuda"),
    ):
        with refused:
            call()
    param = torch.nn.Parameter(x.clone())
    param.grad = torch.ones(3)
    optimizer = pyshard.AdamW([param], backend="cuda")
    with refused:
        optimizer.step()
    assert torch.equal(param, x) and not optimizer.state


def test_unknown_names() -> None:
    for name in ("gpu", "CPU", "", "Reference"):
        with pytest.raises(ValueError, match=rf"pyshard: unknown backend '{name}'; expected one of auto, cpu, cuda"):
            choose(name, CPU, torch.float32)
    with pytest.raises(ValueError, match=r"unknown backend 'gpu'"):
        pyshard.AdamW([torch.nn.Parameter(torch.ones(2))], backend="gpu")
    assert CHOICES == ("auto", "cpu", "cuda", "triton", "reference")


# ---- PYSHARD_BACKEND ----


def test_the_variable_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSHARD_BACKEND", "reference")
    assert requested("auto") == "reference"
    assert choose("auto", CPU, torch.float32).name == "reference"
    assert choose("cpu", CPU, torch.float32).name == "cpu", "an argument that names a backend wins"


def test_the_variable_reaches_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSHARD_BACKEND", "reference")
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = pyshard.AdamW([param])
    optimizer.step()
    assert "reference on cpu: 1 tensors" in optimizer.explain()


def test_the_variable_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSHARD_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=r"pyshard: backend 'cuda' cannot serve torch.float32 parameters on cpu"):
        cast(torch.ones(2), torch.bfloat16)


@pytest.mark.parametrize("value", ["auto", ""])
def test_the_variable_may_be_auto_or_empty(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PYSHARD_BACKEND", value)
    assert choose("auto", CPU, torch.float32).name == "cpu"


def test_the_variable_may_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSHARD_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"pyshard: unknown PYSHARD_BACKEND 'fastest'; expected one of auto, cpu"):
        choose("auto", CPU, torch.float32)
    with pytest.raises(ValueError, match=r"PYSHARD_BACKEND 'fastest'"):
        pyshard.AdamW([torch.nn.Parameter(torch.ones(2))])


# ---- why not ----


def test_report_names_every_backend_and_agrees_with_choose() -> None:
    lines = report()
    assert [(name, device) for name, device, _ in lines] == [
        *(("cpu", "cpu"), ("cuda", "cuda"), ("triton", "cuda"), ("triton", "cpu"), ("reference", "cpu")),
    ]
    for name, device, reason in lines:
        if reason == "available":
            assert choose(name, torch.device(device), torch.float32).name == name
        else:
            with pytest.raises(RuntimeError) as refusal:
                choose(name, torch.device(device), torch.float32)
            assert reason in str(refusal.value)


@no_gpu
def test_reasons_without_a_gpu() -> None:
    reasons = {(name, device): reason for name, device, reason in report()}
    assert reasons["cpu", "cpu"] == reasons["reference", "cpu"] == "available"
    assert reasons["cuda", "cuda"] != "available"
    assert "TRITON_INTERPRET is set" in reasons["triton", "cuda"]
    assert reasons["triton", "cpu"] == "available"  # conftest.py sets TRITON_INTERPRET


REASON = "{(name, device): reason for name, device, reason in registry.report()}['triton', 'cpu']"


def test_a_fresh_process_looks_at_triton_when_it_is_asked_for() -> None:
    lines = python(
        f"""
import sys, pyshard
from pyshard.kernels import registry
print("triton" in sys.modules, "pyshard.kernels.cuda" in sys.modules)
print({REASON})
"""
    ).splitlines()
    assert lines[0] == "False False"
    assert lines[1].startswith("CPU tensors need Triton's interpreter. Set TRITON_INTERPRET=1 before triton is first")


def test_triton_that_is_not_installed_or_too_old() -> None:
    missing, old = python(
        f"""
import sys
from pyshard.kernels import registry
sys.modules["triton"] = None
print({REASON})
del sys.modules["triton"]
registry._unavailable.cache_clear()
import triton
triton.__version__ = "3.5.1"
print({REASON})
"""
    ).splitlines()
    assert missing.startswith("triton cannot be imported") and "pip install 'triton>=3.6'" in missing
    assert old == "triton 3.5.1 is too old. Install it with: pip install 'triton>=3.6'"
