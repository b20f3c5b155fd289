"""Builds pyshard._C, the one compiled module: CPU kernels per instruction set, and CUDA where nvcc is found.

It imports no torch and needs no GPU and no network. Objects stay in build/objects-* and are compiled again
only when their command, or a file that they include, has changed.

Environment variables:
  CXX, CXXFLAGS, LDFLAGS  the compiler (default g++), and flags that go before ours
  CUDA_HOME               the CUDA toolkit; if unset, nvcc on PATH, then /usr/local/cuda
  PYSHARD_NO_CUDA=1       leave the CUDA part out although nvcc is there
  PYSHARD_SANITIZE=1      a build under the address and undefined-behaviour sanitizers
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

CSRC = Path("csrc")
BINDINGS = CSRC / "bindings.cpp"
CPU_KERNELS = CSRC / "cpu" / "kernels.cpp"  # one text, compiled once per instruction set

X86_64 = platform.machine() in ("x86_64", "AMD64")
ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if X86_64:
    ISA_FLAGS["avx2"] = ["-mavx2"]
    ISA_FLAGS["avx512"] = [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mf16c",
        "-mfma",
        "-mprefer-vector-width=512",
    ]
    # gcc 12 warns about its own intrinsics, whose undefined operands are meant to be undefined.
    ISA_FLAGS["avx512"] += ["-Wno-maybe-uninitialized"]

# Every operation is rounded on its own (no contraction), so that all backends give the same bits. Without
# errno and traps the compiler may vectorize sqrt and selects, which changes no value.
FLOAT_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS = ["-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra", *FLOAT_FLAGS]
RELEASE_FLAGS = ["-O3", "-DNDEBUG"]
SANITIZE_FLAGS = [  # -O2: below it gcc 12 cannot inline a body that the host run passes by name
    *("-O2", "-g1", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
]

# Ampere, Hopper, Blackwell; the newest also as PTX, which later cards compile for themselves.
CUDA_TARGETS = (80, 90, 100)
NVCC_FLAGS = ["-O3", "-std=c++17", "--fmad=false"]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"]


def enabled(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


def words(variable: str, default: str = "") -> list[str]:
    return shlex.split(os.environ.get(variable) or default)


def say(text: str) -> None:
    print(f"pyshard: {text}", flush=True)


@dataclass(frozen=True)
class Cuda:
    """The CUDA toolkit of this build, or why there is none (`nvcc` is None then)."""

    nvcc: str | None
    note: str
    targets: tuple[int, ...] = ()
    library_dir: str = ""


def find_cuda() -> Cuda:
    if enabled("PYSHARD_NO_CUDA"):
        return Cuda(None, "CUDA part left out: PYSHARD_NO_CUDA is set. Unset it and build again to get it.")
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc, places = shutil.which("nvcc", path=f"{home}/bin"), f"in CUDA_HOME ({home})"
    else:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        places = "on PATH or in /usr/local/cuda"
    if nvcc is None:
        return Cuda(
            None,
            f"CUDA part left out: no nvcc {places}. To get it, install the CUDA toolkit (12.8 or newer "
            "for Blackwell) or set CUDA_HOME, and build again.",
        )

    def ask(*arguments: str) -> str:
        answer = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
        if answer.returncode:
            raise CompileError(
                f"{nvcc} {' '.join(arguments)} failed:\n{answer.stdout}{answer.stderr}"
                "Repair the CUDA toolkit, or set PYSHARD_NO_CUDA=1 to build without the CUDA part."
            )
        return answer.stdout + answer.stderr

    known = {int(number) for number in re.findall(r"compute_(\d+)\b", ask("--list-gpu-arch"))}
    targets = tuple(number for number in CUDA_TARGETS if number in known)
    if not targets:
        raise CompileError(
            f"{nvcc} compiles for none of the GPU targets {CUDA_TARGETS}, only for {sorted(known)}. "
            "Install CUDA 12.8 or newer, or set PYSHARD_NO_CUDA=1 to build without the CUDA part."
        )
    # nvcc may be a wrapper or live far from its libraries; only itself knows where they are.
    layout = ask("--dryrun", "-x", "cu", "/dev/null")
    library_dirs = [Path(found) for found in re.findall(r'"-L([^"]+)"', layout)]
    library_dir = next((d for d in library_dirs if (d / "libcudart_static.a").is_file()), None)
    if library_dir is None:
        raise CompileError(
            f"{nvcc} is there but libcudart_static.a is not (looked in {', '.join(map(str, library_dirs))}). "
            "Install the CUDA runtime's development files, or set PYSHARD_NO_CUDA=1."
        )
    release = re.search(r"release ([\d.]+)", ask("--version"))
    names = ", ".join(f"sm_{number}" for number in targets)
    note = f"CUDA {release[1] if release else '?'} code for {names}, PTX for newer"
    return Cuda(nvcc, note, targets, str(library_dir))


@dataclass(frozen=True)
class Object:
    """One object file, and the command that makes it (without output and dependency file)."""

    source: Path
    output: Path
    command: tuple[str, ...]

    @property
    def record(self) -> Path:
        return self.output.with_suffix(".json")

    def is_fresh(self) -> bool:
        try:
            built = self.output.stat().st_mtime_ns
            record = json.loads(self.record.read_text())
            return record["command"] == list(self.command) and all(
                os.stat(path).st_mtime_ns <= built for path in record["includes"]
            )
        except (OSError, ValueError, KeyError):
            return False

    def compile(self) -> None:
        # Written aside and moved, so that a build beside this one never reads half a file.
        started = time.time_ns()
        aside = self.output.with_suffix(f".{os.getpid()}.o")
        rules = aside.with_suffix(".d")
        run([*self.command, "-MD", "-MF", str(rules), "-c", str(self.source), "-o", str(aside)], self.source)
        includes = parse_rules(rules.read_text())
        rules.unlink()
        self.record.write_text(json.dumps({"command": self.command, "includes": includes}))
        # Dated to the start: a header changed while the compiler ran must count as newer.
        os.utime(aside, ns=(started, started))
        os.replace(aside, self.output)


def parse_rules(text: str) -> list[str]:
    """The prerequisites in a compiler's dependency file, which escapes a space in a name by a backslash."""
    prerequisites = text.replace("\\\n", " ").split(":", 1)[1]
    return [name.replace("\\ ", " ") for name in re.findall(r"(?:\\ |\S)+", prerequisites)]


def run(command: list[str], what: object) -> None:
    """Runs a compiler, shows what it says, and fails with it."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError:
        raise CompileError(
            f"no compiler {command[0]!r}. Install g++ (apt-get install g++), or name yours in CXX."
        ) from None
    if done.stdout:
        print(done.stdout, end="", flush=True)
    if done.returncode:
        name = Path(command[0]).name
        hint = " Or set PYSHARD_NO_CUDA=1 to build without the CUDA part." if name == "nvcc" else ""
        raise CompileError(f"{name} failed on {what} (its message is above).{hint}\n{shlex.join(command)}")


class BuildExt(build_ext):
    """Compiles the objects in parallel and links them (setuptools knows one set of flags per module)."""

    def build_extension(self, ext: Extension) -> None:
        if sys.platform != "linux":
            raise PlatformError(f"pyshard builds on Linux only; this is {sys.platform}")
        self.sanitize = enabled("PYSHARD_SANITIZE")
        self.cuda = find_cuda()
        say(self.cuda.note)
        tag = f"{sys.implementation.cache_tag}-{platform.machine()}{'-sanitize' if self.sanitize else ''}"
        folder = Path("build") / f"objects-{tag}"
        folder.mkdir(parents=True, exist_ok=True)

        objects = self.objects(folder)
        stale = [o for o in objects if self.force or not o.is_fresh()]
        if stale:
            jobs = min(len(stale), len(os.sched_getaffinity(0)))
            say(f"compiling {len(stale)} of {len(objects)} objects, {jobs} at a time")
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(Object.compile, stale))
        self.link([str(o.output) for o in objects], Path(self.get_ext_fullpath(ext.name)))

    def objects(self, folder: Path) -> list[Object]:
        """All objects, the slowest to compile first."""
        python = sysconfig.get_path("include")
        if not Path(python, "Python.h").is_file():
            raise CompileError(f"no Python.h in {python}. Install Python's headers (python3-dev).")
        import pybind11

        flags = [*words("CXXFLAGS"), *CXX_FLAGS, *(SANITIZE_FLAGS if self.sanitize else RELEASE_FLAGS)]
        flags += ["-DPYSHARD_X86"] if X86_64 else []
        cxx = [*words("CXX", "g++"), *flags]

        def make(source: Path, command: list[str], variant: str = "") -> Object:
            name = "-".join(source.relative_to(CSRC).parts) + variant + ".o"
            return Object(source, folder / name, tuple(command))

        binding = [*cxx, f"-I{python}", f"-I{pybind11.get_include()}"]
        binding += ["-DPYSHARD_CUDA"] if self.cuda.nvcc else []
        made = []
        if self.cuda.nvcc:
            nvcc = [self.cuda.nvcc, *NVCC_FLAGS]
            if len(words("CXX")) == 1:  # with flags or a wrapper it is no host compiler for nvcc
                nvcc += ["-ccbin", *words("CXX")]
            for number in self.cuda.targets:
                nvcc += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
            newest = f"compute_{self.cuda.targets[-1]}"
            nvcc += ["-gencode", f"arch={newest},code={newest}"]
            made += [make(source, nvcc) for source in sorted(CSRC.rglob("*.cu"))]
        # Files with bindings lie in fewer folders, and compile longest.
        for source in sorted(CSRC.rglob("*.cpp"), key=lambda path: (len(path.parts), path)):
            if source == CPU_KERNELS:
                for isa, isa_flags in ISA_FLAGS.items():
                    made.append(make(source, [*cxx, f"-DPYSHARD_ISA={isa}", *isa_flags], f"-{isa}"))
            elif source.parent == CPU_KERNELS.parent:
                made.append(make(source, cxx))  # knows neither Python nor CUDA
            elif source == BINDINGS:
                note = f"-DPYSHARD_BUILD_NOTE={json.dumps(self.cuda.note)}"
                made.append(make(source, [*binding, note]))
            else:
                # Bodies of CUDA kernels, here compiled for the host, carry pragmas that only nvcc knows.
                made.append(make(source, [*binding, "-Wno-unknown-pragmas"]))
        return made

    def link(self, objects: list[str], output: Path) -> None:
        # Symbols of static libraries stay inside: torch brings a CUDA runtime of its own.
        command = [*words("CXX", "g++"), *words("LDFLAGS"), "-shared", "-fopenmp", "-Wl,--exclude-libs,ALL"]
        command += ["-fsanitize=address,undefined"] if self.sanitize else ["-Wl,-s"]
        command += objects
        if self.cuda.nvcc:
            command += [f"-L{self.cuda.library_dir}", "-lcudart_static", "-lpthread", "-ldl", "-lrt"]
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = output.with_suffix(f".{os.getpid()}")
        run([*command, "-o", str(aside)], output)
        os.replace(aside, output)


setup(
    ext_modules=[Extension("pyshard._C", sources=[str(path) for path in sorted(CSRC.rglob("*.cpp"))])],
    cmdclass={"build_ext": BuildExt},
)
