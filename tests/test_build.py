"""The build: what the wheel holds, what setup.py says and refuses, and that tools are pinned in one voice.

One wheel is built from the real sources. The logic of setup.py (objects per instruction set, rebuilding,
errors) runs on a toy module that compiles in a second.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_WHEEL_BYTES = 3_000_000
POISON = 'raise ImportError(f"the build must not import {__name__}")'


def pins(path: Path) -> dict[str, str]:
    """Every name==version in a file of any format."""
    return dict(re.findall(r"([\w-]+)==([\w.]+)", path.read_text()))


def python(arguments: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs this Python with the environment's own choices for the build taken out."""
    ours = {"CXX", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "PYSHARD_NO_CUDA", "PYSHARD_SANITIZE"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=kept | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )


def load(library: Path, expression: str) -> str:
    """Loads a built module by its path, without its package and thus without torch, and evaluates."""
    loader = f"importlib.machinery.ExtensionFileLoader('pyshard._C', {str(library)!r})"
    code = (
        "import importlib.machinery, importlib.util\n"
        f"spec = importlib.util.spec_from_loader('pyshard._C', {loader})\n"
        "_C = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(_C)\n"
        f"print({expression})"
    )
    done = python(["-c", code], cwd=library.parent)
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


# ---- pins ----


def test_pre_commit_pins_equal_those_of_make() -> None:
    hooks = pins(ROOT / ".pre-commit-config.yaml")
    tools = pins(ROOT / "requirements" / "dev.txt")
    assert hooks == {name: tools[name] for name in ("ruff", "clang-format")}


def test_pinned_versions_meet_the_declared_floors() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    declared = [*project["project"]["dependencies"], *extras["triton"], *project["build-system"]["requires"]]
    floors = dict(requirement.split(">=") for requirement in declared)
    assert floors["torch"] == "2.11" and floors["triton"] == "3.6"
    tools = pins(ROOT / "requirements" / "dev.txt")

    def number(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    for name, floor in floors.items():
        assert number(tools[name]) >= number(floor), f"{name}=={tools[name]} is below {floor}"


# ---- the wheel ----


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree, built without an index, and where torch, triton and numpy raise on import."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy2(ROOT / name, tree)
    for name in ("csrc", "pyshard", "triton_kernels"):
        without = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=without)
    # Objects that a build of this very tree left are taken over; where there are none, all are compiled.
    for objects in (ROOT / "build").glob("objects-*"):
        shutil.copytree(objects, tree / "build" / objects.name)
    poison = tmp_path_factory.mktemp("poison")
    for name in ("torch", "triton", "numpy"):
        (poison / f"{name}.py").write_text(POISON)
    done = python(["-c", "import torch"], cwd=tree, PYTHONPATH=str(poison))
    assert "the build must not import torch" in done.stdout
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist"]
    done = python(["-m", "pip", "wheel", "-v", *options, "."], cwd=tree, PYTHONPATH=str(poison))
    assert done.returncode == 0, done.stdout
    (built,) = (tree / "dist").glob("*.whl")
    return built


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "pyshard").rglob("*.py")}
    sources |= {str("pyshard" / path.relative_to(ROOT)) for path in (ROOT / "triton_kernels").rglob("*.py")}
    assert "pyshard/triton_kernels/__init__.py" in sources
    library = {name for name in names if name.endswith(".so")}
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - library - metadata == sources | {"pyshard/py.typed", "pyshard/_C.pyi"}
    assert len(library) == 1 and library.pop().startswith("pyshard/_C.")
    assert wheel.stat().st_size <= MAX_WHEEL_BYTES, f"{wheel.stat().st_size} bytes"


def test_wheel_metadata(wheel: Path) -> None:
    version = re.search(r'"(.+)"', (ROOT / "pyshard" / "_version.py").read_text().split("=")[1])
    assert version is not None
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Name"] == "pyshard-torch"
    assert metadata["Version"] == version[1]
    assert metadata["Requires-Python"] == ">=3.11"
    required = metadata.get_all("Requires-Dist")
    assert [entry for entry in required if "extra ==" not in entry] == ["torch>=2.11"]


def test_wheel_module_loads_and_says_how_it_was_built(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (library,) = tmp_path.glob("pyshard/_C.*.so")
    note = load(library, "_C.build_note")
    if shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin"):
        assert re.fullmatch(r"CUDA [\d.]+ code for sm_80, sm_90(, sm_100)?, PTX for newer", note)
    else:
        assert note.startswith("CUDA part left out: no nvcc")


# ---- setup.py on a toy module ----

TOY_BINDINGS = r"""
#include <Python.h>
#include "value.h"
extern "C" int isa_baseline();
#if defined(PYSHARD_X86)
extern "C" int isa_avx2();
extern "C" int isa_avx512();
static int isas() { return isa_baseline() + isa_avx2() + isa_avx512(); }
#else
static int isas() { return isa_baseline(); }
#endif
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1};
PyMODINIT_FUNC PyInit__C() {
  PyObject* made = PyModule_Create(&module);
  PyModule_AddIntConstant(made, "value", VALUE);
  PyModule_AddIntConstant(made, "isas", isas());
  PyModule_AddStringConstant(made, "build_note", PYSHARD_BUILD_NOTE);
  return made;
}
"""
TOY_KERNELS = r"""
#define JOIN(a, b) a##b
#define NAME(isa) JOIN(isa_, isa)
extern "C" int NAME(PYSHARD_ISA)();
extern "C" int NAME(PYSHARD_ISA)() {
#if defined(__AVX512F__)
  return 100;
#elif defined(__AVX2__)
  return 10;
#else
  return 1;
#endif
}
"""
BUILD = ["setup.py", "build_ext", "--inplace"]


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy2(ROOT / name, tmp_path)
    for folder in ("pyshard", "csrc/cpu"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "README.md").write_text("toy\n")
    (tmp_path / "pyshard" / "__init__.py").write_text("")
    (tmp_path / "pyshard" / "_version.py").write_text('__version__ = "1.0"\n')
    (tmp_path / "csrc" / "value.h").write_text("#define VALUE 1\n")
    (tmp_path / "csrc" / "bindings.cpp").write_text(TOY_BINDINGS)
    (tmp_path / "csrc" / "cpu" / "kernels.cpp").write_text(TOY_KERNELS)
    return tmp_path


def library(toy: Path) -> Path:
    (found,) = (toy / "pyshard").glob("_C.*.so")
    return found


def test_rebuilds_only_what_changed(toy: Path) -> None:
    first = python(BUILD, toy, PYSHARD_NO_CUDA="1")
    assert first.returncode == 0, first.stdout
    x86 = platform.machine() == "x86_64"
    count = 4 if x86 else 2
    assert f"compiling {count} of {count} objects" in first.stdout
    assert load(library(toy), "_C.isas") == ("111" if x86 else "1")  # each object has its own instruction set
    assert load(library(toy), "_C.value") == "1"

    second = python(BUILD, toy, PYSHARD_NO_CUDA="1")
    assert second.returncode == 0 and "compiling" not in second.stdout, second.stdout

    (toy / "csrc" / "value.h").write_text("#define VALUE 2\n")
    third = python(BUILD, toy, PYSHARD_NO_CUDA="1")
    assert third.returncode == 0 and f"compiling 1 of {count} objects" in third.stdout, third.stdout
    assert load(library(toy), "_C.value") == "2"

    other_flags = python(BUILD, toy, PYSHARD_NO_CUDA="1", CXXFLAGS="-DUNUSED")
    assert other_flags.returncode == 0 and f"compiling {count} of {count}" in other_flags.stdout


def test_says_in_one_line_that_cuda_was_left_out(toy: Path) -> None:
    empty = toy / "no-toolkit"
    for environment, reason in (
        ({"CUDA_HOME": str(empty)}, f"no nvcc in CUDA_HOME ({empty}). To get it, install the CUDA toolkit"),
        ({"PYSHARD_NO_CUDA": "1"}, "PYSHARD_NO_CUDA is set. Unset it and build again to get it."),
    ):
        done = python(BUILD, toy, **environment)
        assert done.returncode == 0, done.stdout
        (line,) = [line for line in done.stdout.splitlines() if "CUDA" in line]
        assert line.startswith(f"pyshard: CUDA part left out: {reason}")
        assert f"pyshard: {load(library(toy), '_C.build_note')}" == line


def test_broken_nvcc_fails_the_build_with_its_message(toy: Path) -> None:
    nvcc = toy / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho unsupported GNU version >&2\nexit 1\n")
    nvcc.chmod(0o755)
    done = python(BUILD, toy, CUDA_HOME=str(toy / "toolkit"))
    assert done.returncode != 0
    assert "unsupported GNU version" in done.stdout
    assert "set PYSHARD_NO_CUDA=1 to build without the CUDA part" in done.stdout
    assert not list((toy / "pyshard").glob("_C.*.so"))


def test_compile_error_fails_the_build_with_the_compilers_message(toy: Path) -> None:
    (toy / "csrc" / "value.h").write_text("#error no value today\n")
    done = python(BUILD, toy, PYSHARD_NO_CUDA="1")
    assert done.returncode != 0
    assert "no value today" in done.stdout
    assert "failed on csrc/bindings.cpp" in done.stdout
    assert not list((toy / "pyshard").glob("_C.*.so"))


def test_missing_compiler_is_named_with_its_remedy(toy: Path) -> None:
    done = python(BUILD, toy, PYSHARD_NO_CUDA="1", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "no compiler 'no-such-compiler'. Install g++" in done.stdout
