"""The CUDA kernels: the launches that a step on a device consists of, as thin calls into pyshard._C.

The functions of this module enqueue on the current stream of the tensors' device and return. HostRun has the
same functions for CPU tensors: it runs the bodies of the same kernels on the host, block by block and thread
by thread, for tests. Tensors are checked by the caller (checks.py).
"""

import torch
from torch import Tensor

from .. import _C
from .formats import DTYPE_CODES


def unavailable(device_type: str) -> str | None:
    """Why the CUDA kernels cannot run on the current device; None if they can."""
    if not _C.cuda_built():
        return "this build has no CUDA part. Install the CUDA toolkit (nvcc) and build pyshard again"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA. Install a CUDA build of torch"
    if not torch.cuda.is_available():
        return _C.cuda_refusal(0) or "torch.cuda.is_available() is False although a CUDA device is there"
    return _C.cuda_refusal(torch.cuda.current_device()) or None


class Launches:
    """The launches; a subclass says how a kernel runs. Each writes into tensors that it is given."""

    def _run(self, kernel: str, device: torch.device, *arguments: int) -> None:
        raise NotImplementedError

    def square_sum(self, rows: Tensor, first_block: Tensor, partials: Tensor) -> None:
        """partials[b] = sum of squares of the gradients in block b of 4,096 elements, in the order of lanes.

        Args:
            rows: int64 [n, 8], AdamRow of csrc/adam.h; their gradients and kinds are read.
            first_block: int64 [n + 1], prefix sums of the rows' numbers of blocks.
            partials: float64 [first_block[n]], written.
        """
        table = (rows.data_ptr(), first_block.data_ptr(), rows.shape[0])
        self._run("square_sum", rows.device, *table, partials.data_ptr(), partials.numel())

    def sum(self, values: Tensor, out: Tensor) -> None:
        """out[b] = sum of values[4096 * b : 4096 * (b + 1)] in the order of lanes.

        Args:
            values: float64 [n]. out: float64 [ceil(n / 4096)], written.
        """
        self._run("sum", values.device, values.data_ptr(), values.numel(), out.data_ptr())

    def prepare(self, hypers: Tensor, step_addresses: Tensor | None, control: Tensor, scalars: Tensor) -> None:
        """Decides whether the step is skipped, counts it, and computes its scalars in double.

        Args:
            hypers: float64 [k, 8], AdamHyper of csrc/adam.h.
            step_addresses: int64 [k] of float32 step counts, each counted up unless the step is skipped,
                and used instead of the step in its AdamHyper. None: the steps in `hypers` are used.
            control: float64 [8], Control of csrc/cuda/adam.cuh; places 5 to 7 are written.
            scalars: float32 [k, 9], AdamScalars of csrc/adam.h, written.
        """
        steps = 0 if step_addresses is None else step_addresses.data_ptr()
        pointers = (hypers.data_ptr(), steps, control.data_ptr(), scalars.data_ptr())
        self._run("prepare", hypers.device, *pointers, hypers.shape[0])

    def adam(
        self,
        rows: Tensor,
        first_block: Tensor,
        n_blocks: int,
        scalars: Tensor,
        control: Tensor,
        kinds: tuple[int, ...] = (),
        aligned: bool = False,
    ) -> None:
        """One Adam step of all rows, whatever their kinds; nothing if control says that the step is skipped.

        Args:
            rows: int64 [n, 8], AdamRow of csrc/adam.h; weights and moments behind them are updated in place.
            first_block: int64 [n + 1], prefix sums of the rows' numbers of blocks of 1,024 elements.
            n_blocks: first_block[n].
            scalars: float32 [k, 9], by the rows' index of hyperparameters. control: float64 [8].
            kinds, aligned: not used, since this kernel looks at each row itself.
        """
        table = (rows.data_ptr(), first_block.data_ptr(), rows.shape[0], n_blocks)
        self._run("adam", rows.device, *table, scalars.data_ptr(), control.data_ptr())

    def cast(self, src: Tensor, dst: Tensor) -> None:
        """dst = src, from fp32 to bf16 or fp16 (nearest even) or back; contiguous tensors of equal numel."""
        source = (src.data_ptr(), DTYPE_CODES[src.dtype])
        self._run("cast", src.device, *source, dst.data_ptr(), DTYPE_CODES[dst.dtype], src.numel())

    def split(self, master: Tensor, high: Tensor, low: Tensor) -> None:
        """high, low = halves of the fp32 master; contiguous tensors of equal numel."""
        pointers = (master.data_ptr(), high.data_ptr(), low.data_ptr())
        self._run("split", master.device, *pointers, master.numel())

    def join(self, high: Tensor, low: Tensor, master: Tensor) -> None:
        """master = the fp32 weight whose halves are high and low; contiguous tensors of equal numel."""
        pointers = (high.data_ptr(), low.data_ptr(), master.data_ptr())
        self._run("join", high.device, *pointers, high.numel())


class Cuda(Launches):
    """On the tensors' GPU. Raises RuntimeError with CUDA's own words if a launch is refused."""

    def _run(self, kernel: str, device: torch.device, *arguments: int) -> None:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            getattr(_C, f"cuda_{kernel}")(*arguments, torch.cuda.current_device(), stream)


class HostRun(Launches):
    """On CPU tensors, by the host run of the kernel bodies: for tests."""

    def _run(self, kernel: str, device: torch.device, *arguments: int) -> None:
        blocks = getattr(_C, f"grid_{kernel}")(*arguments)
        getattr(_C, f"host_{kernel}")(*arguments, 0, blocks)


_CUDA = Cuda()
square_sum, sum, prepare, adam = _CUDA.square_sum, _CUDA.sum, _CUDA.prepare, _CUDA.adam
cast, split, join = _CUDA.cast, _CUDA.split, _CUDA.join
