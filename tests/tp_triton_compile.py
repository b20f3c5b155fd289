"""The kernels of tensor-parallel matmuls, compiled for GPUs that need not be there; as triton_compile.py.

Run as a program it reads requests on stdin and writes what came out on stdout, both as JSON.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import triton_compile
from triton_compile import Compiled

_SIZES = {"M": "i32", "N": "i32", "K": "i32", "stride_n": "i32", "stride_k": "i32", "me": "i32"}
_WORDS = {"buffers": "*i64", "state": "*i64"}
_SIGNATURES = {
    "gather_matmul.gather_matmul_kernel": {
        **{"x": "", "w": "", "bias": "bits", "out": "bits", "table": "*i64", **_WORDS, **_SIZES},
        **{"chunk_rows": "i32", "offset": "i32", "value": "i32", "limit": "i64", "operation": "i32"},
    },
    "gather_matmul.tell_kernel": {"buffers": "*i64", "offset": "i32", "value": "i32", "me": "i32", "peer": "i32"}
    | {"state": "*i64"},
    "matmul_scatter.matmul_scatter_kernel": {
        **{"x": "", "w": "", "table": "*i64", "counters": "*i64", **_WORDS, **_SIZES, "offset": "i32", "value": "i32"},
    },
    "matmul_scatter.sum_kernel": {
        **{"sources": "*i64", "bias": "bits", "out": "bits", "state": "*i64", "n": "i64", "N": "i32"},
    },
}
_CODES = {"fp32": 0, "bf16": 1, "fp16": 2}


@dataclass(frozen=True)
class Request:
    """A kernel as the launcher specializes it for shapes of a kind."""

    kernel: str
    arch: int
    dtype: str
    world: int
    tiles: Mapping[str, int]  # kernels.triton_tp.Tiles
    even: bool = True  # sizes are multiples of the tiles'
    aligned: bool = True  # rows begin at multiples of 16 bytes
    bias: bool = True
    transposed: bool = False  # w is [K, N] in memory


def compile_all(requests: Mapping[str, Request]) -> dict[str, Compiled]:
    """All requests, one after the other in a process of their own. Raises RuntimeError if one fails."""
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([asdict(r) for r in requests.values()]),
        capture_output=True,
        text=True,
        timeout=triton_compile.TIMEOUT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )
    if done.returncode:
        raise RuntimeError(f"compiling the Triton kernels failed:\n{done.stdout}\n{done.stderr}")
    return {name: Compiled(**item) for name, item in zip(requests, json.loads(done.stdout.splitlines()[-1]))}


def _constants(request: Request, names: set[str]) -> dict[str, int | bool | None]:
    """By name, of those that the kernel has."""
    tiles, aligned = request.tiles, request.aligned
    constants: dict[str, int | bool | None] = {
        **{"DTYPE": _CODES[request.dtype], "WORLD": request.world, "SOURCES": request.world},
        **{"EVEN": request.even, "ALIGNED": aligned, "OUT_ALIGNED": aligned, "GROUP": tiles["band"]},
        **{"BLOCK_M": tiles["m"], "BLOCK_N": tiles["n"], "BLOCK_K": tiles["k"], "BLOCK": 1024},
    }
    if not request.bias:
        constants["bias"] = None
    constants["stride_n" if request.transposed else "stride_k"] = 1
    return {name: value for name, value in constants.items() if name in names}


def _compile(request: Request) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
    from triton.compiler import ASTSource

    file, function = request.kernel.split(".")
    fn = getattr(triton_compile._import_kernels(file), function)
    bits = {"fp32": "*fp32", "bf16": "*u16", "fp16": "*u16"}[request.dtype]
    signature = {
        name: {"": f"*{request.dtype}", "bits": bits}.get(kind, kind)
        for name, kind in _SIGNATURES[request.kernel].items()
    }
    names = list(fn.arg_names)
    constants = _constants(request, set(names))
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in names}
    aligned = ["x", "w", "bias", "out", *(["n", "N", "K", "stride_n", "stride_k"] if request.aligned else [])]
    source = ASTSource(
        fn=fn,
        signature=signature,
        constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs={(names.index(k),): [["tt.divisibility", 16]] for k in aligned if k in names and k not in constants},
    )
    tiles = request.tiles
    options = {"num_warps": tiles["warps"], "num_stages": tiles["stages"], "enable_fp_fusion": False}
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
    sys.path.pop(0)  # the folder of this file
    print(json.dumps([asdict(_compile(Request(**r))) for r in json.load(sys.stdin)]))
