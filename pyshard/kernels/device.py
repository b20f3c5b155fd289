"""A step whose kernels run on a GPU: what is laid out in its memory, and the order of launches.

One copy brings the table of a step (addresses, sizes, hyperparameters) to the device; then: the square sum of the
gradients where it is needed, one small kernel for the scalars of all rows, one launch for all parameters. With
capturable nothing of a step is read on the host: step counts, lr, the gradient scale, the norm and the decision to
skip stay on the device, and a CUDA graph can hold the step.

The same code drives the Triton kernels in the interpreter and the CUDA bodies on the host, on CPU tensors.
"""

import importlib
import math
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
    """A launch of the CUDA or Triton kernels. `control` is kept by the optimizer, because it counts skipped steps."""

    def __init__(
        self,
        backend: str,
        device: torch.device,
        entries: list[Entry],
        idle: list[Tensor],
        capturable: bool,
        control: Tensor,
    ):
        super().__init__(backend, device, entries, idle)
        self.capturable = capturable
        self.control = control
        self.kernels: Any = importlib.import_module(BACKENDS[backend].module)
        self._host = torch.empty(0, dtype=torch.int64)
        self._device = torch.empty(0, dtype=torch.int64)
        self._captured: list[Tensor] = []  # host memory that a CUDA graph copies from at each replay
        self._inputs: tuple[float, ...] = ()

    def upload(self, groups: list[list[float]]) -> None:
        """Brings the table of this step to the device, if it differs from what is there."""
        self.table.prepare(groups, self.capturable)
        size = self.table.packed_size()
        host = torch.empty(size, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        self.table.pack(host.data_ptr(), ADAM_BLOCK, NORM_BLOCK)
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not capturing and torch.equal(host, self._host):
            return
        if self._device.numel() != size:
            self._device = torch.empty(size, dtype=torch.int64, device=self.device)
        self._device.copy_(host, non_blocking=True)
        self._host = host
        if capturing:
            self._captured.append(host)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Rows, first Adam blocks, first norm blocks, step addresses, hyperparameters: views of the device's table."""
        n, k = self.table.count(), self.table.hypers_count()
        rows, adam_first, norm_first, steps, hypers = self._device.split([8 * n, n + 1, n + 1, n, 8 * k])
        return rows.view(n, 8), adam_first, norm_first, steps, hypers.view(torch.float64).view(k, 8)

    def square_sum(self) -> Tensor:
        """Sum of squares of the gradients in the fixed order of blocks, over all ranks: a 0-d double on the device."""
        rows, _, norm_first, _, _ = self._parts()
        blocks = self.table.blocks(NORM_BLOCK)
        return self.over_ranks(_square_sum(self.kernels, rows, norm_first, blocks))

    def set_inputs(self, grad_scale: float | Tensor, max_norm: float, square_sum: Tensor | None, skip: bool) -> None:
        """Writes what decides about this step into the control tensor."""
        tensors = isinstance(grad_scale, Tensor)
        inputs = (1.0 if isinstance(grad_scale, Tensor) else grad_scale, max_norm, 0.0, 0.0, float(skip))
        if inputs != self._inputs or tensors:
            self.control[: Control.SKIP].copy_(torch.tensor(inputs, dtype=torch.float64), non_blocking=True)
            self._inputs = () if tensors else inputs
        if isinstance(grad_scale, Tensor):
            self.control[Control.GRAD_SCALE].copy_(grad_scale.double().reciprocal().reshape(()))
        if square_sum is not None:
            self.control[Control.SQUARE_SUM].copy_(square_sum)

    def set_found_inf(self, found_inf: Tensor) -> None:
        """Leaves this step out if GradScaler's flag is not 0."""
        self.control[Control.FOUND_INF].copy_(found_inf.reshape(()))
        self._inputs = ()

    def adam(self, group_lr: dict[int, Tensor]) -> None:
        """One step with the scalars computed on the device; `group_lr` are lr tensors that stay there."""
        rows, adam_first, _, steps, hypers = self._parts()
        n = rows.shape[0]
        if n == 0:
            return
        for group, lr in group_lr.items():
            members = [i for i, e in enumerate(self.active()) if e.group == group]
            if members:
                hypers[members[0] : members[-1] + 1, 0].copy_(lr.reshape(()))
        scalars = torch.empty(hypers.shape[0], 9, dtype=torch.float32, device=self.device)
        self.kernels.prepare(hypers, steps if self.capturable else None, self.control, scalars)
        if not self.capturable:
            self.table.count_step()
        blocks = self.table.blocks(ADAM_BLOCK)
        if blocks:
            kinds = tuple(self.table.kinds())
            self.kernels.adam(rows, adam_first, blocks, scalars, self.control, kinds, self.table.aligned())


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
    if not capturable:
        scale, skip = optimizer._amp_scale()
        found_inf = None
        if skip:
            optimizer._skipped += 1
            return
    for launch in launches:
        launch.gather()
    for launch in devices:
        launch.upload(groups)

    total: Tensor | None = None
    if options.max_grad_norm is not None or options.nonfinite != "propagate":
        total = torch.zeros((), dtype=torch.float64, device=launches[0].device)
        for launch in launches:
            part = launch.square_sum()  # type: ignore[attr-defined]
            total = total + torch.as_tensor(part, dtype=torch.float64).to(total.device, non_blocking=True)
    total_on_host = math.nan
    if total is not None and (hosts or (options.nonfinite != "propagate" and not capturable)):
        total_on_host = float(total)
        if not math.isfinite(total_on_host):
            if options.nonfinite == "raise":
                raise FloatingPointError(optimizer._nonfinite_message(launches))
            if options.nonfinite == "skip":
                optimizer._skipped += 1
                return

    max_norm = math.inf if options.max_grad_norm is None else options.max_grad_norm
    for launch in devices:
        part = None if total is None else total.to(launch.device, non_blocking=True)
        launch.set_inputs(scale, max_norm, part, capturable and options.nonfinite == "skip")
        if found_inf is not None:
            launch.set_found_inf(found_inf)
        launch.adam(_lr_tensors(optimizer, launch))
        launch.scatter()
        if total is not None:
            optimizer._grad_norm = launch.control[Control.NORM]
    if hosts and isinstance(scale, float):
        coefficient = 1.0
        if total is not None and max_norm != math.inf:
            coefficient = clip_coefficient(math.sqrt(total_on_host) * scale, max_norm)
        for host in hosts:
            host.adam(groups, scale * coefficient)
            host.scatter()


def _lr_tensors(optimizer: "Adam", launch: DeviceLaunch) -> dict[int, Tensor]:
    """Learning rates that live on the device and are not to be read on the host, by group."""
    if not launch.capturable:
        return {}
    return {i: g["lr"] for i, g in enumerate(optimizer.param_groups) if isinstance(g["lr"], Tensor)}


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
