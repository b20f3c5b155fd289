"""The kernels of the symm_mem transport, compiled for GPUs that need not be there; as triton_compile.py.

Run as a program it reads requests on stdin and writes what came out on stdout, both as JSON.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict

import triton_compile
from triton_compile import TABLE, Compiled, Request

_WAIT = {"buffers": "*i64", "offset": "i64", "value": "i64", "me": "i32", "world": "i32"}
_STATE = {"state": "*i64", "limit": "i64", "operation": "i32"}
_FLAGS = dict.fromkeys(("ready", "ready_value", "read", "read_value", "written", "written_value"), "i32")
triton_compile._SIGNATURES |= {
    "signals.signal_kernel": {**_WAIT, "state": "*i64"},
    "signals.wait_kernel": {**_WAIT, **_STATE},
    "signals.barrier_kernel": {**_WAIT, **_STATE},
    "signals.abort_kernel": {**_WAIT, "value": "i32"},
    "sharded.sharded_adam_kernel": {
        **{**TABLE, "n_blocks": "i32", "scalars": "*fp32", "control": "*fp64"},
        **{"source_deltas": "*i64", "target_deltas": "*i64", "state": "*i64", "buffers": "*i64"},
        **{"me": "i32", "world": "i32", **_FLAGS, "limit": "i64", "operation": "i32"},
    },
    "sharded_norm.sharded_square_sum_kernel": {**TABLE, "source_deltas": "*i64", "partials": "*fp64"},
    "reduce.reduce_kernel": {"sources": "*i64", "out": "*fp32", "n": "i64"},
}
SIGNALS = ("signal", "wait", "barrier", "abort")


def adam_request(kinds: Iterable[int], arch: int, world: int, aligned: bool = True, fused: bool = True) -> Request:
    """The step over the memory of `world` ranks; `fused` with the flags, else as between arrive() and publish()."""
    constants: dict[str, int | bool | None] = {
        **{"KINDS": sum(1 << k for k in kinds), "ALIGNED": aligned, "SOURCES": world, "TARGETS": world - 1},
        **{"READY": fused, "WRITTEN": fused},
    }
    if not fused:
        constants["buffers"] = None
    return Request("sharded.sharded_adam_kernel", arch, constants)


def reduce_request(dtype: str, arch: int, world: int, accumulate: bool, aligned: bool = True) -> Request:
    codes = {"fp32": 0, "bf16": 1, "fp16": 2}
    constants = {"DTYPE": codes[dtype], "ALIGNED": aligned, "SOURCES": world, "ACCUMULATE": accumulate}
    return Request("reduce.reduce_kernel", arch, constants, aligned=("out",) if aligned else ())


def norm_request(arch: int, world: int, aligned: bool = True) -> Request:
    return Request("sharded_norm.sharded_square_sum_kernel", arch, {"ALIGNED": aligned, "SOURCES": world})


def signal_requests(arch: int, value: str = "i64") -> dict[str, Request]:
    """`value`: type of what flags are raised to; 32 bits until a flag has been raised 2^31 times."""
    types = {"offset": "i32", "value": value}
    return {name: Request(f"signals.{name}_kernel", arch, types=types) for name in SIGNALS}


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


if __name__ == "__main__":
    made = [asdict(triton_compile._compile(Request(**r))) for r in json.load(sys.stdin)]
    print(json.dumps(made))
