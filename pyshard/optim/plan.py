"""From param_groups to launches: every tensor is checked, state is completed, backends are chosen.

A plan is made at the first step and again whenever a launch's table says that something has changed. Until the last
check has passed nothing is changed, so that an error leaves the optimizer as it was.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels import checks
from ..kernels.formats import LOW_DTYPE, LOW_KEY, Format, format_of, kind_of
from ..kernels.launch import Entry, HostLaunch, Launch, local_tensor
from ..kernels.registry import Backend, choose
from . import state as states

if TYPE_CHECKING:
    from .adam import Adam


def switches(group: dict[str, Any]) -> tuple[bool, bool, bool]:
    """What of a group decides about kernels and state: coupled weight decay, amsgrad, capturable."""
    coupled = not group["decoupled_weight_decay"] and group["weight_decay"] != 0
    return coupled, bool(group["amsgrad"]), bool(group["capturable"])


class Plan:
    """The launches of an optimizer, and whether they still fit it."""

    def __init__(self, launches: list[Launch], group_switches: list[tuple[bool, bool, bool]]):
        self.launches = launches
        self.group_switches = group_switches

    def refresh(self, optimizer: "Adam") -> bool:
        """Takes over the gradients of this step; False if the plan must be made again."""
        groups = optimizer.param_groups
        if len(groups) != len(self.group_switches):
            return False
        for group, known in zip(groups, self.group_switches, strict=True):
            if switches(group) != known:
                return False
        state = optimizer.state
        return all(launch.table.refresh(groups, state) for launch in self.launches)


@torch.no_grad()
def make_plan(optimizer: "Adam") -> Plan:
    """Checks everything, completes the state and builds the launches of an optimizer as it is now."""
    who = f"pyshard.{type(optimizer).__name__}"
    found: list[tuple[int, str, Tensor, Format | None, Backend]] = []
    idle: list[Tensor] = []
    index = 0
    for group_index, group in enumerate(optimizer.param_groups):
        names = group.get("param_names")
        for position, param in enumerate(group["params"]):
            name = f"parameter {index}" + (f" ({names[position]})" if names else "")
            index += 1
            if param.grad is None and not optimizer.state.get(param):
                idle.append(param)
                continue
            found.append((group_index, name, param, *_check(optimizer, who, name, param, group)))
    for group_index, name, param, fmt, _ in found:
        _check_loaded(who, name, param, optimizer.state.get(param) or {}, fmt)
    regions = [checks.Region(name, local_tensor(param), True) for _, name, param, *_ in found]
    regions += [
        checks.Region(f"the gradient of {name}", local_tensor(param.grad), False)
        for _, name, param, *_ in found
        if param.grad is not None
    ]
    for _, name, param, *_ in found:
        for key, value in (optimizer.state.get(param) or {}).items():
            if isinstance(value, Tensor) and value.dim() == param.dim() and key != "step":
                regions.append(checks.Region(f"state {key!r} of {name}", local_tensor(value), True))
    checks.check_overlap(who, regions)

    by_launch: dict[tuple[Backend, torch.device, bool], list[Entry]] = {}
    for group_index, name, param, fmt, backend in found:
        group = optimizer.param_groups[group_index]
        capturable = bool(group["capturable"]) and backend.on_device
        entry = _entry(optimizer, name, param, group_index, group, fmt, capturable)
        by_launch.setdefault((backend, entry.local.device, capturable), []).append(entry)
    launches: list[Launch] = []
    for (backend, device, capturable), entries in by_launch.items():
        launches.append(_launch(optimizer, backend, device, capturable, entries, [] if launches else idle))
    if not launches:
        launches.append(HostLaunch("cpu", torch.device("cpu"), [], idle))
    for launch in launches:
        launch.table.seal(optimizer.param_groups, optimizer.state)
    return Plan(launches, [switches(group) for group in optimizer.param_groups])


def _launch(
    optimizer: "Adam",
    backend: Backend,
    device: torch.device,
    capturable: bool,
    entries: list[Entry],
    idle: list[Tensor],
) -> Launch:
    if not backend.on_device:
        return HostLaunch(backend.name, device, entries, idle)
    from ..kernels.device import DeviceLaunch, new_control

    key = (backend.name, device, capturable)
    if key not in optimizer._controls:
        optimizer._controls[key] = new_control(device)
    return DeviceLaunch(backend.name, device, entries, idle, capturable, optimizer._controls[key])


def _check(
    optimizer: "Adam", who: str, name: str, param: Tensor, group: dict[str, Any]
) -> tuple[Format | None, Backend]:
    checks.check_param(who, name, local_tensor(param))
    if param.grad is not None:
        if (local_tensor(param) is param) != (local_tensor(param.grad) is param.grad):
            raise TypeError(
                f"{who}: {name} is a {type(param).__name__} and its gradient a {type(param.grad).__name__}; expected "
                "both or neither to be a DTensor. Let backward of the sharded model make the gradient."
            )
        checks.check_grad(who, name, local_tensor(param), local_tensor(param.grad))
    choice = optimizer.options.master_weights
    try:
        fmt = format_of(param.dtype, choice)
    except KeyError:
        raise ValueError(
            f"{who}: {name} is {str(param.dtype).removeprefix('torch.')} and master_weights={choice!r}; split weights "
            "complete bfloat16 only. Use master_weights='auto' or 'fp32' for this model."
        ) from None
    backend = choose(optimizer.options.backend, local_tensor(param).device, param.dtype)
    if group["capturable"] and backend.name == "reference" and local_tensor(param).device.type != "cpu":
        raise RuntimeError(
            f"{who}: {name} is {param.dtype} on {param.device}: only the reference backend serves it, which reads the "
            "step count on the host. Use capturable=False, or a backend='cuda' or 'triton' with fp32 or 16-bit weights."
        )
    return fmt, backend


def _check_loaded(who: str, name: str, param: Tensor, state: dict[str, Any], fmt: Format | None) -> None:
    """State that is already there, before anything is completed."""
    dtype = torch.float64 if fmt is None else torch.float32
    for key in states.MOMENTS:
        if key in state:
            checks.check_state(who, name, param, key, state[key], dtype)
    if fmt in LOW_KEY:
        for key, low_dtype in LOW_DTYPE.items():
            if key in state:
                checks.check_state(who, name, param, key, state[key], low_dtype)


def _entry(
    optimizer: "Adam",
    name: str,
    param: Tensor,
    group_index: int,
    group: dict[str, Any],
    fmt: Format | None,
    capturable: bool,
) -> Entry:
    coupled, amsgrad, _ = switches(group)
    local = local_tensor(param)
    state = optimizer.state[param]
    states.fill(param, state, fmt, amsgrad, capturable)
    low_key = None if fmt is None else LOW_KEY.get(fmt)
    keys = [
        "exp_avg",
        "exp_avg_sq",
        *(["max_exp_avg_sq"] if amsgrad else []),
        *([low_key] if low_key else []),
    ]
    tensors = {key: local_tensor(state[key]) for key in keys}
    grad = None if param.grad is None else local_tensor(param.grad)
    grad_dtype = param.dtype if grad is None else grad.dtype
    exp_avg = tensors["exp_avg"]
    copied = not states.same_layout(local, exp_avg) or (
        grad is not None and not states.same_layout(grad, exp_avg)
    )
    return Entry(
        name=name,
        param=param,
        local=local,
        state=state,
        held=[(key, state[key]) for key in ("step", *keys)],
        group=group_index,
        fmt=fmt,
        kind=-1 if fmt is None else kind_of(fmt, grad_dtype, coupled, amsgrad),
        grad_dtype=grad_dtype,
        stride=None if exp_avg.is_contiguous() else tuple(exp_avg.stride()),
        low=tensors[low_key] if low_key else None,
        exp_avg=exp_avg,
        exp_avg_sq=tensors["exp_avg_sq"],
        max_exp_avg_sq=tensors.get("max_exp_avg_sq"),
        step=state["step"],
        coupled=coupled,
        param_buffer=torch.empty_like(exp_avg, dtype=local.dtype) if copied else None,
        grad_buffer=torch.empty_like(exp_avg, dtype=grad_dtype) if copied else None,
    )
