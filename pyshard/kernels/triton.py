"""The Triton kernels: the launches that a step on a device consists of, on CUDA tensors.

The functions of this module enqueue on the current stream of the tensors' device and return. With
TRITON_INTERPRET=1 set before triton is first imported they run in Triton's interpreter, on CPU tensors, for
tests. Triton is imported at the first use, not with pyshard. Tensors are checked by the caller (checks.py).
"""

import contextlib
import importlib
import re
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .formats import DTYPE_CODES

MINIMUM = (3, 6)
_BITS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.uint16}


def unavailable(device_type: str) -> str | None:
    """Why the Triton kernels cannot run on tensors of `device_type` here; None if they can."""
    remedy = "Install it with: pip install 'triton>={}.{}'".format(*MINIMUM)
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}). {remedy}"
    if tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2]) < MINIMUM:
        return f"triton {triton.__version__} is too old. {remedy}"
    interpreted = not isinstance(_file("adam").adam_kernel, triton.JITFunction)
    if device_type == "cpu":
        if interpreted:
            return None
        return "CPU tensors need Triton's interpreter. Set TRITON_INTERPRET=1 before triton is first imported"
    if interpreted:
        return "TRITON_INTERPRET is set, so that Triton serves CPU tensors only. Unset it and start again"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA. Install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "no CUDA device is available (torch.cuda.is_available() is False)"
    return None


@cache
def _file(name: str) -> ModuleType:
    """A file of triton_kernels/."""
    return importlib.import_module(f"pyshard.triton_kernels.{name}")


def _launch(kernel: Any, blocks: int, device: torch.device, *arguments: Any, num_warps: int, **constants: Any) -> None:
    """One launch of `blocks` programs. A fused multiply-add would round once instead of twice."""
    if blocks == 0:
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(blocks,)](*arguments, **constants, num_warps=num_warps, enable_fp_fusion=False)


def square_sum(rows: Tensor, first_block: Tensor, partials: Tensor) -> None:
    """partials[b] = sum of squares of the gradients in block b of 4,096 elements, in the order of lanes.

    Args:
        rows: int64 [n, 8], AdamRow of csrc/adam.h; their gradients and kinds are read.
        first_block: int64 [n + 1], prefix sums of the rows' numbers of blocks.
        partials: float64 [first_block[n]], written.
    """
    norm = _file("norm")
    arguments = (rows, first_block, rows.shape[0], partials)
    _launch(norm.square_sum_kernel, partials.numel(), rows.device, *arguments, num_warps=norm.NUM_WARPS)


def sum(values: Tensor, out: Tensor) -> None:
    """out[b] = sum of values[4096 * b : 4096 * (b + 1)] in the order of lanes.

    Args:
        values: float64 [n]. out: float64 [ceil(n / 4096)], written.
    """
    norm = _file("norm")
    arguments = (values, out, values.numel())
    _launch(norm.sum_kernel, out.numel(), values.device, *arguments, num_warps=norm.NUM_WARPS)


def prepare(hypers: Tensor, step_addresses: Tensor | None, control: Tensor, scalars: Tensor) -> None:
    """Decides whether the step is skipped, counts it, and computes its scalars in double.

    Args:
        hypers: float64 [k, 8], AdamHyper of csrc/adam.h.
        step_addresses: int64 [k] of float32 step counts, each counted up unless the step is skipped,
            and used instead of the step in its AdamHyper. None: the steps in `hypers` are used.
        control: float64 [8], see triton_kernels/prepare.py; places 5 to 7 are written.
        scalars: float32 [k, 9], AdamScalars of csrc/adam.h, written.
    """
    file, k = _file("prepare"), hypers.shape[0]
    arguments = (hypers, step_addresses, control, scalars, k)
    _launch(file.prepare_kernel, max(k, 1), hypers.device, *arguments, num_warps=file.NUM_WARPS)


def adam(
    rows: Tensor,
    first_block: Tensor,
    n_blocks: int,
    scalars: Tensor,
    control: Tensor,
    kinds: tuple[int, ...],
    aligned: bool,
) -> None:
    """One Adam step of all rows, whatever their kinds; nothing if control says that the step is skipped.

    Args:
        rows: int64 [n, 8], AdamRow of csrc/adam.h; weights and moments behind them are updated in place.
        first_block: int64 [n + 1], prefix sums of the rows' numbers of blocks of 1,024 elements.
        n_blocks: first_block[n].
        scalars: float32 [k, 9], AdamScalars of csrc/adam.h, by each row's hyper.
        control: float64 [8], written by prepare().
        kinds: the rows' kinds; code is compiled for these, once per set of kinds.
        aligned: every address in `rows` is a multiple of 16 (code with wide accesses).
    """
    file, mask = _file("adam"), 0
    for kind in kinds:
        mask |= 1 << kind
    arguments = (rows, first_block, rows.shape[0], scalars, control)
    constants = {"KINDS": mask, "ALIGNED": aligned, "BLOCK": file.BLOCK}
    _launch(file.adam_kernel, n_blocks, rows.device, *arguments, num_warps=file.NUM_WARPS, **constants)


def cast(src: Tensor, dst: Tensor) -> None:
    """dst = src, from or to fp32, rounded to nearest even; contiguous tensors of equal numel."""
    constants = {"FROM": DTYPE_CODES[src.dtype], "TO": DTYPE_CODES[dst.dtype]}
    _convert("cast_kernel", src.view(_BITS[src.dtype]), dst.view(_BITS[dst.dtype]), **constants)


def split(master: Tensor, high: Tensor, low: Tensor) -> None:
    """high, low = halves of the fp32 master; contiguous tensors of equal numel."""
    _convert("split_kernel", master, high.view(torch.uint16), low)


def join(high: Tensor, low: Tensor, master: Tensor) -> None:
    """master = the fp32 weight whose halves are high and low; contiguous tensors of equal numel."""
    _convert("join_kernel", high.view(torch.uint16), low, master)


def _convert(kernel: str, *tensors: Tensor, **constants: int) -> None:
    file, n = _file("casts"), tensors[0].numel()
    constants |= {"BLOCK": file.BLOCK}
    launched, blocks, device = getattr(file, kernel), -(-n // file.BLOCK), tensors[0].device
    _launch(launched, blocks, device, *tensors, n, num_warps=file.NUM_WARPS, **constants)
