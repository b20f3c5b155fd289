"""Compiles CUDA and Triton kernels to PTX, without a GPU."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

TIMEOUT = 240  # seconds; a cold compilation of a dozen kernels takes some 20


def nvcc() -> str | None:
    """The CUDA compiler, or None."""
    return shutil.which("nvcc")


def compile_cuda(source: str | Path, *, arch: int = 80, flags: Sequence[str] = ("--fmad=false",)) -> str:
    """PTX of a CUDA source, given as text or as the path of a file."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("compile_cuda: nvcc is not on PATH; install the CUDA toolkit")
    with tempfile.TemporaryDirectory() as folder:
        path = source
        if isinstance(source, str):
            path = Path(folder, "kernel.cu")
            path.write_text(source)
        target = Path(folder, "kernel.ptx")
        command = [
            compiler,
            "-ptx",
            f"-arch=compute_{arch}",
            "-std=c++17",
            *flags,
            str(path),
            "-o",
            str(target),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        if done.returncode:
            raise RuntimeError(f"nvcc failed:\n{done.stderr}")
        return target.read_text()


@dataclass
class TritonKernel:
    """What to compile: a @triton.jit function and its specialization.

    `source` is a file or an importable module name. `signature` gives a type to each argument in order
    ("*fp32", "i64", "constexpr", ...), `constants` the values of the constexpr ones, `divisible` those that
    are multiples of 16 (pointers: aligned to 16 bytes).
    """

    source: str
    name: str
    signature: Mapping[str, str]
    constants: Mapping[str, object] = field(default_factory=dict)
    divisible: Sequence[str] = ()
    num_warps: int = 4
    arch: int = 80


@dataclass
class TritonPtx:
    """PTX of one kernel, its dynamic shared memory in bytes, its threads per block.

    The kernel takes two more pointers than its signature says (scratch memory of the runtime; 0 if unused).
    """

    text: str
    name: str
    shared_bytes: int
    threads: int


def compile_triton(kernels: Sequence[TritonKernel], python_path: Sequence[str] = ()) -> list[TritonPtx]:
    """PTX of Triton kernels as they are for a GPU, with multiplications and additions kept apart.

    Compiled in a process of its own, because in this one Triton may be in interpreter mode.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*python_path, environment.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        done = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps([{**asdict(k), "signature": list(k.signature.items())} for k in kernels]),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            env=environment,
        )
    if done.returncode:
        raise RuntimeError(f"compiling Triton kernels failed:\n{done.stderr}")
    return [TritonPtx(**item) for item in json.loads(done.stdout.splitlines()[-1])]


def _serve() -> None:
    """The process of compile_triton: requests on stdin, results on stdout."""
    import importlib
    import importlib.util

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    out = []
    for request in json.load(sys.stdin):
        if request["source"].endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(request["source"]).stem, request["source"])
            if spec is None or spec.loader is None:
                raise RuntimeError(f"cannot import {request['source']}")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(request["source"])
        signature = dict(request["signature"])
        names = list(signature)
        source = ASTSource(
            fn=getattr(module, request["name"]),
            signature=signature,
            constexprs={(names.index(k),): v for k, v in request["constants"].items()},
            attrs={(names.index(k),): [["tt.divisibility", 16]] for k in request["divisible"]},
        )
        options = {"num_warps": request["num_warps"], "enable_fp_fusion": False}
        kernel = triton.compile(source, target=GPUTarget("cuda", request["arch"], 32), options=options)
        meta = kernel.metadata
        out.append(
            {
                "text": kernel.asm["ptx"],
                "name": meta.name,
                "shared_bytes": meta.shared,
                "threads": 32 * meta.num_warps,
            }
        )
    print(json.dumps(out))


if __name__ == "__main__":
    # The folder of this file would otherwise stand first on the path.
    sys.path.pop(0)
    _serve()
