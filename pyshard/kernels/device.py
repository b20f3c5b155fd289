"""A step whose kernels run on a GPU: what is laid out in its memory, and the order of launches.

One copy brings the table of a step (addresses, sizes, hyperparameters) to the device; then: the square sum of the
gradients where it is needed, one small kernel for the scalars of all rows, one launch for all parameters. With
capturable nothing of a step is read on the host: step counts, lr, the gradient scale, the norm and the decision to
skip stay on the device, and a CUDA graph can hold the step.

The same code drives the Triton kernels in the interpreter and the CUDA bodies on the host, on CPU tensors.
"""

import importlib
import math
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .formats import Format, kind_of
from .launch import Entry, HostLaunch, Launch
from .reference import NORM_BLOCK, clip_coefficient
from .registry import BACKENDS

if TYPE_CHECKING:
    from ..optim.adam import Adam

ADAM_BLOCK = 1024  # elements of one block: 128 threads of 4 neighbours twice (CUDA), or 256 of 4 (Triton)


_CAPTURE = (
    "pyshard.{}: a CUDA graph is capturing step(), whose step counts are on the host, where a replay does not count "
    "them; expected all parameters on CUDA devices, in groups with capturable=True. Set capturable=True and take a "
    "step before the capture, or leave step() out of the graph. Nothing was changed."
)


class Control(IntEnum):
    """Places in the control tensor, float64 [8]: what decides about a step, on the device."""

    GRAD_SCALE = 0  # in: factor on the gradients
    MAX_NORM = 1  # in: inf for no clipping
    SQUARE_SUM = 2  # in: of the gradients as they are, 0 if not computed
    FOUND_INF = 3  # in: not 0 to skip the step
    SKIP_NONFINITE = 4  # in: not 0 to skip the step if SQUARE_SUM is inf or NaN
    SKIP = 5  # out: 1 if the step is skipped
    NORM = 6  # out: sqrt(SQUARE_SUM) * GRAD_SCALE
    SKIPPED = 7  # in and out: number of steps skipped so far


class DeviceLaunch(Launch):
    """A launch of the CUDA or Triton kernels.

    The optimizer keeps what outlives a launch: `control`, because it counts skipped steps, and `captured`, all memory
    whose addresses a CUDA graph holds, because a graph may be replayed after the launch has been replaced.
    """

    def __init__(
        self,
        backend: str,
        device: torch.device,
        entries: list[Entry],
        idle: list[Tensor],
        capturable: bool,
        control: Tensor,
        captured: list[Tensor],
    ):
        super().__init__(backend, device, entries, idle)
        self.capturable = capturable
        self.control = control
        self.kernels: Any = importlib.import_module(BACKENDS[backend].module)
        self.captured = captured
        self._host = torch.empty(0, dtype=torch.int64)  # what `_device` holds, except for lr that stays on the device
        self._device = torch.empty(0, dtype=torch.int64)
        self._now = self._device  # the table of this step
        self._inputs: dict[Control, float] = {}  # what the control tensor is known to hold

    def upload(self, groups: list[list[float]]) -> None:
        """Brings the table of this step to the device, if it differs from what is there.

        A step that a CUDA graph captures gets a table of its own, on the host and on the device: each replay copies
        the one to the other, and eager steps in between must neither see nor change that.
        """
        self.table.prepare(groups, self.capturable)
        size = self.table.packed_size()
        host = torch.empty(size, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        self.table.pack(host.data_ptr(), ADAM_BLOCK, NORM_BLOCK)
        if _capturing(self.device):
            self._now = torch.empty(size, dtype=torch.int64, device=self.device)
            self._now.copy_(host, non_blocking=True)
            buffers = [buffer for e in self.copied for buffer in (e.param_buffer, e.grad_buffer) if buffer is not None]
            self.captured += [host, self._now, self.control, *buffers]
            return
        if not torch.equal(host, self._host):
            if self._device.numel() != size:
                self._device = torch.empty(size, dtype=torch.int64, device=self.device)
            self._device.copy_(host, non_blocking=True)
            self._host = host
        self._now = self._device

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Rows, first Adam blocks, first norm blocks, step addresses, hyperparameters: views of the device's table."""
        n, k = self.table.count(), self.table.hypers_count()
        rows, adam_first, norm_first, steps, hypers = self._now.split([8 * n, n + 1, n + 1, n, 8 * k])
        return rows.view(n, 8), adam_first, norm_first, steps, hypers.view(torch.float64).view(k, 8)

    def square_sum(self) -> Tensor:
        """Sum of squares of the gradients on this rank in the fixed order of blocks: a 0-d double on the device."""
        rows, _, norm_first, _, _ = self._parts()
        return _square_sum(self.kernels, rows, norm_first, self.table.blocks(NORM_BLOCK))

    def block_sums(self, groups: list[list[float]], sources: Sequence[int] = (0,)) -> Tensor:
        """Sums of squares of the blocks of the gradients, doubles, in the order of the active rows.

        `sources`: as in adam().
        """
        self.upload(groups)
        rows, _, norm_first, _, _ = self._parts()
        values = torch.empty(self.table.blocks(NORM_BLOCK), dtype=torch.float64, device=rows.device)
        if values.numel() and tuple(sources) == (0,):
            self.kernels.square_sum(rows, norm_first, values)
        elif values.numel():
            from . import triton_sharded

            triton_sharded.square_sum(rows, norm_first, values, self._aligned(sources), self._distances(sources))
        return values

    def _distances(self, distances: Sequence[int]) -> Tensor:
        return torch.tensor(list(distances), dtype=torch.int64).to(self.device)

    def _aligned(self, distances: Sequence[int]) -> bool:
        return self.table.aligned() and all(distance % 16 == 0 for distance in distances)

    def set_inputs(
        self,
        grad_scale: float | Tensor,
        max_norm: float,
        square_sum: Tensor | None,
        found_inf: Tensor | None,
        skip_nonfinite: bool,
    ) -> None:
        """Writes what decides about this step into the control tensor.

        `grad_scale` as a number is the factor on the gradients; as a tensor it is GradScaler's scale, to be undone.
        Numbers go as arguments of kernels, since a CUDA graph refuses copies from ordinary host memory, and only if
        they have changed. Once a graph has captured a step, its replays change them unseen: then always.
        """
        inputs: dict[Control, float | Tensor] = {
            Control.GRAD_SCALE: grad_scale.double().reciprocal() if isinstance(grad_scale, Tensor) else grad_scale,
            Control.MAX_NORM: max_norm,
            Control.SQUARE_SUM: 0.0 if square_sum is None else square_sum,
            Control.FOUND_INF: 0.0 if found_inf is None else found_inf,
            Control.SKIP_NONFINITE: float(skip_nonfinite),
        }
        for place, value in inputs.items():
            if isinstance(value, Tensor):
                self._inputs.pop(place, None)
                self.control[place].copy_(value.reshape(()), non_blocking=True)
            elif self.captured or self._inputs.get(place) != value:
                self._inputs[place] = value
                self.control[place].fill_(value)

    def adam(self, group_lr: dict[int, Tensor], sources: Sequence[int] = (0,), targets: Sequence[int] = ()) -> None:
        """One step with the scalars computed on the device; `group_lr` are lr tensors that stay there.

        `sources`, `targets`: as in HostLaunch.adam(); other than default ones: Triton only.
        """
        rows, adam_first, _, steps, hypers = self._parts()
        for group, lr in group_lr.items():
            members = [i for i, e in enumerate(self.active()) if e.group == group]
            if members:
                hypers[members[0] : members[-1] + 1, 0].copy_(lr.reshape(()))
        scalars = torch.empty(hypers.shape[0], 9, dtype=torch.float32, device=self.device)
        self.kernels.prepare(hypers, steps if self.capturable else None, self.control, scalars)
        if not self.capturable:
            self.table.count_step()
        blocks = self.table.blocks(ADAM_BLOCK)
        if blocks:  # without any, prepare() has still written the norm
            kinds = tuple(self.table.kinds())
            if tuple(sources) == (0,) and not targets:
                self.kernels.adam(rows, adam_first, blocks, scalars, self.control, kinds, self.table.aligned())
                return
            from . import triton_sharded

            places = self._distances(sources), self._distances(targets)
            aligned = self._aligned([*sources, *targets])
            triton_sharded.adam(rows, adam_first, blocks, scalars, self.control, kinds, aligned, *places)


def _capturing(device: torch.device) -> bool:
    """True while a CUDA graph records what is launched."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def new_control(device: torch.device) -> Tensor:
    """A control tensor that has counted nothing yet."""
    return torch.zeros(len(Control), dtype=torch.float64, device=device)


def step_on_device(optimizer: "Adam", launches: list[Launch], groups: list[list[float]]) -> None:
    """One step of an optimizer that has at least one DeviceLaunch; host launches in it take part.

    Without capturable, nonfinite="skip" or "raise" and a GradScaler make the host wait for the gradients' norm, as
    torch's own optimizers wait for GradScaler.
    """
    options = optimizer.options
    devices = [launch for launch in launches if isinstance(launch, DeviceLaunch)]
    hosts = [launch for launch in launches if isinstance(launch, HostLaunch)]
    capturable = bool(devices) and not hosts and all(launch.capturable for launch in devices)
    grad_scale = getattr(optimizer, "grad_scale", None)
    found_inf = getattr(optimizer, "found_inf", None)
    scale: float | Tensor = 1.0 if grad_scale is None else grad_scale
    skip = False
    if not capturable:
        if any(_capturing(launch.device) for launch in devices):
            raise RuntimeError(_CAPTURE.format(type(optimizer).__name__))
        scale, skip = optimizer._amp_scale()
        found_inf = None
    if not skip:
        for launch in launches:
            launch.gather()
        for launch in devices:
            launch.upload(groups)

    total, skip = _over_ranks(optimizer, launches, skip)
    if skip:
        optimizer._skipped += 1
        return
    total_on_host = math.nan
    if total is not None and (hosts or (options.nonfinite != "propagate" and not capturable)):
        total_on_host = float(total)
        if not math.isfinite(total_on_host):
            if options.nonfinite == "raise":
                raise FloatingPointError(optimizer._nonfinite_message(launches))
            if options.nonfinite == "skip":
                optimizer._grad_norm = total_on_host  # inf or NaN, and so is its root
                optimizer._skipped += 1
                return

    max_norm = math.inf if options.max_grad_norm is None else options.max_grad_norm
    for launch in devices:
        launch.set_inputs(scale, max_norm, total, found_inf, capturable and options.nonfinite == "skip")
        launch.adam(_lr_tensors(optimizer, launch))
        launch.scatter()
        if total is not None:
            optimizer._grad_norm = launch.control[Control.NORM]
    if hosts and isinstance(scale, float):
        coefficient = 1.0
        if total is not None and max_norm != math.inf:
            coefficient = clip_coefficient(math.sqrt(total_on_host) * scale, max_norm)
        if total is not None and not devices:  # a pipeline stage without gradients, beside others on devices
            optimizer._grad_norm = math.sqrt(total_on_host) * scale
        for host in hosts:
            host.adam(groups, scale * coefficient)
            host.scatter()


def _over_ranks(optimizer: "Adam", launches: list[Launch], skip: bool) -> tuple[Tensor | None, bool]:
    """The sum of squares of all gradients on all ranks, 0-d, if it is asked for; and whether a GradScaler skips.

    Ranks that wait on the host anyway hear each other there (Peers.hear), others on the device alone.
    """
    peers, asked, device = optimizer._peers, optimizer.options.needs_norm(), launches[0].device
    if not asked and (peers is None or peers.said):
        return None, skip
    parts: dict[int, Tensor] = {}  # by mask
    zero = torch.zeros((), dtype=torch.float64, device=device)
    for launch in launches if asked and not skip else []:
        if launch.mask is not None:
            part = torch.as_tensor(launch.square_sum(), dtype=torch.float64)  # type: ignore[attr-defined]
            parts[launch.mask] = parts.get(launch.mask, zero) + part.to(device, non_blocking=True)
    if peers is None:
        return parts.get(0, zero), skip
    sums = torch.stack([parts.get(mask, zero) for mask in range(1 << len(peers.levels))])
    if not peers.said:
        heard = peers.hear(optimizer, optimizer._present(), sums.tolist(), skip)
        return (torch.full_like(zero, heard.square_sum) if asked else None), heard.found_inf
    return (peers.sum_on_device(sums) if asked else None), skip


def _lr_tensors(optimizer: "Adam", launch: DeviceLaunch) -> dict[int, Tensor]:
    """Learning rates that live on the device and are not to be read on the host, by group."""
    if not launch.capturable:
        return {}
    rates = {i: g["lr"] for i, g in enumerate(optimizer.param_groups)}
    return {i: lr for i, lr in rates.items() if isinstance(lr, Tensor) and lr.device.type != "cpu"}


def _square_sum(kernels: Any, rows: Tensor, first_block: Tensor, blocks: int) -> Tensor:
    """Blocks of gradients, then blocks of their sums, until one value is left."""
    if blocks == 0:
        return torch.zeros((), dtype=torch.float64, device=rows.device)
    values = torch.empty(blocks, dtype=torch.float64, device=rows.device)
    kernels.square_sum(rows, first_block, values)
    while values.numel() > 1:
        sums = torch.empty(-(-values.numel() // NORM_BLOCK), dtype=torch.float64, device=rows.device)
        kernels.sum(values, sums)
        values = sums
    return values[0]


def square_sum(backend: str, tensors: list[Tensor]) -> Tensor:
    """Sum of squares of dense fp32, bf16 or fp16 tensors on one device, in the fixed order of blocks; a 0-d double."""
    formats = {torch.float32: Format.F32, torch.bfloat16: Format.BF16_NONE, torch.float16: Format.FP16_NONE}
    rows = [[0, 0, t.data_ptr(), 0, 0, 0, t.numel(), kind_of(formats[t.dtype], t.dtype, False, False)] for t in tensors]
    ends = _ends(rows, NORM_BLOCK)
    where = tensors[0].device
    kernels = importlib.import_module(BACKENDS[backend].module)
    return _square_sum(kernels, torch.tensor(rows).to(where), ends.to(where), int(ends[-1]))


def _ends(rows: list[list[int]], block: int) -> Tensor:
    """First block of each row, and the number of all blocks."""
    return torch.tensor([0, *(-(-row[6] // block) for row in rows)], dtype=torch.int64).cumsum(0)


def adam_rows(backend: str, device: torch.device, table: list[list[int]], hyper: list[float], scale: float) -> None:
    """One step over rows (seven words of AdamRow, kind, hyper index) with one set of hyperparameters."""
    kernels: Any = importlib.import_module(BACKENDS[backend].module)
    words = [[*row[:7], row[7] | row[8] << 32] for row in table]
    rows = torch.tensor(words, dtype=torch.int64).to(device)
    ends = _ends(table, ADAM_BLOCK)
    control = new_control(device)
    control[: Control.SQUARE_SUM] = torch.tensor([scale, math.inf], dtype=torch.float64)
    scalars = torch.empty(1, 9, dtype=torch.float32, device=device)
    kernels.prepare(torch.tensor([hyper], dtype=torch.float64).to(device), None, control, scalars)
    aligned = all(word % 16 == 0 for row in table for word in row[:6])
    kinds = tuple(sorted({row[7] for row in table if row[6]}))
    if kinds:
        kernels.adam(rows, ends.to(device), int(ends[-1]), scalars, control, kinds, aligned)
