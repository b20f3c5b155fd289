"""Compiles the Triton kernels for GPUs that need not be there, in a process without TRITON_INTERPRET.

Run as a program it reads requests on stdin and writes what came out on stdout, both as JSON.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

TIMEOUT = 280  # seconds; the most that one call compiles takes 25 on two idle cores
CASTS = (("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "fp32"), ("fp16", "fp32"))

TABLE = {"rows": "*i64", "first_block": "*i64", "n_rows": "i32"}
_SIGNATURES: dict[str, dict[str, str]] = {
    "adam.adam_kernel": {**TABLE, "scalars": "*fp32", "control": "*fp64"},
    "norm.square_sum_kernel": {**TABLE, "partials": "*fp64"},
    "norm.sum_kernel": {"values": "*fp64", "out": "*fp64", "n": "i64"},
    "prepare.prepare_kernel": {
        **{"hypers": "*fp64", "step_addresses": "*i64", "control": "*fp64", "scalars": "*fp32", "k": "i32"}
    },
    "casts.cast_kernel": {"src": "", "dst": "", "n": "i64"},
    "casts.split_kernel": {"master": "*fp32", "high": "*u16", "low": "*i16", "n": "i64"},
    "casts.join_kernel": {"high": "*u16", "low": "*i16", "master": "*fp32", "n": "i64"},
}


@dataclass(frozen=True)
class Request:
    """A kernel ("file.function") as the launcher specializes it: constants, and pointers aligned to 16 bytes."""

    kernel: str
    arch: int
    constants: Mapping[str, int | bool | None] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)  # of arguments that may have several
    aligned: Sequence[str] = ()


@dataclass(frozen=True)
class Compiled:
    """What Triton made of a request, and what ptxas says about it (-v)."""

    name: str
    ptx: str
    cubin_bytes: int
    shared_bytes: int
    threads: int
    fused: bool  # Triton's enable_fp_fusion, which also decides about ptxas --fmad
    ptxas: str


def adam_request(kinds: Iterable[int], arch: int, aligned: bool = True) -> Request:
    return Request("adam.adam_kernel", arch, {"KINDS": sum(1 << k for k in kinds), "ALIGNED": aligned})


def cast_request(src: str, dst: str, arch: int, aligned: bool = True) -> Request:
    codes, types = {"fp32": 0, "bf16": 1, "fp16": 2}, {"fp32": "*fp32", "bf16": "*u16", "fp16": "*u16"}
    constants = {"FROM": codes[src], "TO": codes[dst]}
    pointers = ("src", "dst") if aligned else ()
    return Request("casts.cast_kernel", arch, constants, {"src": types[src], "dst": types[dst]}, pointers)


def other_requests(arch: int) -> dict[str, Request]:
    """Everything but the step, by name."""
    halves, prepare = ("master", "high", "low"), "prepare.prepare_kernel"
    return {
        "square_sum": Request("norm.square_sum_kernel", arch),
        "sum": Request("norm.sum_kernel", arch, aligned=("values", "out")),
        "prepare": Request(prepare, arch, {"step_addresses": None}),
        "prepare, counting": Request(prepare, arch),
        "split": Request("casts.split_kernel", arch, aligned=halves),
        "join": Request("casts.join_kernel", arch, aligned=halves),
        **{f"cast {src} {dst}": cast_request(src, dst, arch) for src, dst in CASTS},
    }


def compile_all(requests: Mapping[str, Request]) -> dict[str, Compiled]:
    """All requests, in as many processes as there are cores, at most 4. Raises RuntimeError if one fails."""
    names, jobs = list(requests), min(4, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(jobs) as pool:
        parts = pool.map(_compile_apart, ([requests[name] for name in names[i::jobs]] for i in range(jobs)))
    return {name: made for i, part in enumerate(parts) for name, made in zip(names[i::jobs], part)}


def _compile_apart(requests: Sequence[Request]) -> list[Compiled]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([asdict(r) for r in requests]),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(f"compiling the Triton kernels failed:\n{done.stdout}\n{done.stderr}")
    return [Compiled(**item) for item in json.loads(done.stdout.splitlines()[-1])]


def _import_kernels(file: str) -> ModuleType:
    """A file of triton_kernels/ without pyshard around it, which would import torch."""
    if "kernels" not in sys.modules:
        folder = Path(__file__).parents[1] / "triton_kernels"
        spec = importlib.util.spec_from_file_location("kernels", folder / "__init__.py")
        if spec is None:
            raise ImportError(f"no package in {folder}")
        sys.modules["kernels"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"kernels.{file}")


def _compile(request: Request) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
    from triton.compiler import ASTSource

    file, function = request.kernel.split(".")
    module = _import_kernels(file)
    constants = dict(request.constants)
    if hasattr(module, "BLOCK") and file != "norm":
        constants["BLOCK"] = module.BLOCK
    signature = _SIGNATURES[request.kernel] | dict(request.types) | dict.fromkeys(constants, "constexpr")
    names = list(signature)
    source = ASTSource(
        fn=getattr(module, function),
        signature=signature,
        constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs={(names.index(k),): [["tt.divisibility", 16]] for k in request.aligned},
    )
    options = {"num_warps": module.NUM_WARPS, "enable_fp_fusion": False}
    kernel = triton.compile(source, target=GPUTarget("cuda", request.arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(kernel.asm["ptx"])
        command = [get_ptxas(request.arch).path, "-v", "--fmad=false"]
        command += [f"--gpu-name={sm_arch_from_capability(request.arch)}", str(path), "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    meta = kernel.metadata
    return Compiled(
        name=meta.name,
        ptx=kernel.asm["ptx"],
        cubin_bytes=len(kernel.asm["cubin"]),
        shared_bytes=meta.shared,
        threads=32 * meta.num_warps,
        fused=meta.enable_fp_fusion,
        ptxas=done.stderr + done.stdout,
    )


if __name__ == "__main__":
    # The folder of this file would otherwise stand first on the path.
    sys.path.pop(0)
    print(json.dumps([asdict(_compile(Request(**r))) for r in json.load(sys.stdin)]))
