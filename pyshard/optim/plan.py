"""From param_groups to launches: every tensor is checked, state is completed, backends are chosen.

A plan is made at the first step and again whenever a launch's table says that something has changed. Until the last
check has passed nothing is changed, so that an error leaves the optimizer as it was.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..comm.notes import suspect
from ..kernels import checks
from ..kernels.formats import LOW_KEY, Format, format_of, kind_of
from ..kernels.launch import Entry, HostLaunch, Launch, local_tensor
from ..kernels.registry import Backend, choose
from . import distributed
from . import state as states
from .levels import counts
from .peers import device_of, stays_on_device

if TYPE_CHECKING:
    from .adam import Adam


def switches(group: dict[str, Any]) -> tuple[bool, bool, bool]:
    """What of a group decides about kernels and state: coupled weight decay, amsgrad, capturable."""
    coupled = not group["decoupled_weight_decay"] and group["weight_decay"] != 0
    return coupled, bool(group["amsgrad"]), bool(group["capturable"])


def named_params(groups: list[dict[str, Any]]) -> Iterator[tuple[int, str, Tensor]]:
    """(index of its group, name for messages, parameter) of every parameter."""
    index = 0
    for group_index, group in enumerate(groups):
        names = group.get("param_names")
        for position, param in enumerate(group["params"]):
            yield group_index, f"parameter {index}" + (f" ({names[position]})" if names else ""), param
            index += 1


def some(who: str, params: ParamsT) -> ParamsT:
    """What an optimizer is made of, as a list. Raises ValueError if there is nothing."""
    if isinstance(params, Tensor):
        return params  # torch says that it is not a list
    listed: Any = list(params)  # one of its kinds
    if not listed:
        error = ValueError(
            f"{who}: optimizer got an empty parameter list; expected at least one parameter. Freeze those that are not "
            "trained by requires_grad=False instead of leaving them out: pass all parameters of a pipeline stage. If "
            "it has none, use fewer stages."
        )
        suspect(f"the construction of {who}", error)  # other stages have parameters, and will wait for this one
        raise error
    return listed


class Plan:
    """The launches of an optimizer, and whether they still fit it."""

    def __init__(self, launches: list[Launch], group_switches: list[tuple[bool, bool, bool]]):
        self.launches = launches
        self.group_switches = group_switches

    def refresh(self, optimizer: "Adam") -> bool:
        """Takes over the gradients of this step; False if the plan must be made again."""
        groups = optimizer.param_groups
        if [switches(group) for group in groups] != self.group_switches:
            return False
        state = optimizer.state
        return all(launch.table.refresh(groups, state) for launch in self.launches)


class _Found(NamedTuple):
    """A parameter that takes part, checked."""

    name: str
    param: Tensor
    group: int
    fmt: Format | None
    backend: Backend


def make_plan(optimizer: "Adam") -> Plan:
    """Checks everything, completes the state and builds the launches of an optimizer as it is now."""
    who = f"pyshard.{type(optimizer).__name__}"
    groups, state = optimizer.param_groups, optimizer.state
    found: list[_Found] = []
    idle: list[Tensor] = []
    for group_index, name, param in named_params(groups):
        if param.grad is None and not state.get(param):
            idle.append(param)
        else:
            fmt, backend = check(optimizer, who, name, param, groups[group_index])
            states.check(who, name, param, state.get(param) or {}, fmt)
            found.append(_Found(name, param, group_index, fmt, backend))
    checks.check_overlap(who, _regions(found, state))
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        if any(not state.get(item.param) for item in found):
            raise RuntimeError(
                f"{who}: the first step is inside a CUDA graph's capture; expected the state to exist, since each "
                "replay would make it anew. Take one step before the capture."
            )

    peers = optimizer._peers
    by_launch: dict[tuple[Any, ...], list[Entry]] = {}
    for item in found:
        group = groups[item.group]
        capturable = bool(group["capturable"]) and item.backend.on_device
        entry = _entry(optimizer, item, group, capturable)
        mask = None if not counts(item.param) else 0 if peers is None else peers.mask(item.param)
        key = item.backend, entry.local.device, capturable, mask
        by_launch.setdefault(key, []).append(entry)
    launches: list[Launch] = []
    for key, entries in by_launch.items():
        launches.append(launch(optimizer, key, entries, [] if launches else idle))
    if not launches:  # where others need to hear of this rank on a device, they do on its own
        device = torch.device("cpu") if peers is None or not stays_on_device(optimizer) else device_of(optimizer)
        launches.append(HostLaunch("cpu", device, [], idle))
    for each in launches:
        each.table.seal(groups, state)
    return Plan(launches, [switches(group) for group in groups])


def launch(optimizer: "Adam", key: tuple[Any, ...], entries: list[Entry], idle: list[Tensor]) -> Launch:
    backend, device, capturable, mask = key
    made: Launch
    if backend.on_device:
        from ..kernels.device import DeviceLaunch, new_control

        if key not in optimizer._controls:
            optimizer._controls[key] = new_control(device)
        control, captured = optimizer._controls[key], optimizer._captured
        made = DeviceLaunch(backend.name, device, entries, idle, capturable, control, captured)
    else:
        made = HostLaunch(backend.name, device, entries, idle)
    made.mask = mask
    return made


def check(
    optimizer: "Adam", who: str, name: str, param: Tensor, group: dict[str, Any]
) -> tuple[Format | None, Backend]:
    """Everything about a parameter and its gradient that does not concern others."""
    local = local_tensor(param)
    checks.check_param(who, name, local)
    if param.grad is not None:
        distributed.check_grad(who, name, param, param.grad)
        if optimizer.options.needs_norm():
            distributed.check_norm(who, name, param)
        if distributed.same_placements(param, param.grad):
            checks.check_grad(who, name, local, local_tensor(param.grad))
    choice = optimizer.options.master_weights
    try:
        fmt = format_of(param.dtype, choice)
    except KeyError:
        raise ValueError(
            f"{who}: {name} is {str(param.dtype).removeprefix('torch.')} and master_weights={choice!r}, which "
            "completes bfloat16 only; expected 'auto', 'fp32' or 'none'. Use 'auto' for a model of several dtypes."
        ) from None
    backend = choose(optimizer.options.backend, local.device, param.dtype)
    if group["capturable"] and optimizer.options.nonfinite == "raise" and backend.on_device:
        raise ValueError(
            f"{who}: nonfinite='raise' with capturable=True for {name} on {param.device}; expected one of the two, "
            "since raising waits for the device, which a capturable step never does. Use nonfinite='skip'."
        )
    if group["capturable"] and backend.name == "reference" and local.device.type != "cpu":
        raise RuntimeError(
            f"{who}: {name} is {param.dtype} on {param.device}: only the reference backend serves it, which reads the "
            "step count on the host. Use capturable=False, or a backend='cuda' or 'triton' with fp32 or 16-bit weights."
        )
    return fmt, backend


def _regions(found: list[_Found], state: dict[Tensor, dict[str, Any]]) -> Iterator[checks.Region]:
    """All memory that a step touches and that is there already."""
    for item in found:
        yield checks.Region(item.name, local_tensor(item.param), True)
        if item.param.grad is not None:
            yield checks.Region(f"the gradient of {item.name}", local_tensor(item.param.grad), False)
        for key, value in (state.get(item.param) or {}).items():
            if key in states.KEYS and isinstance(value, Tensor):
                yield checks.Region(f"state {key!r} of {item.name}", local_tensor(value), True)


def _entry(optimizer: "Adam", item: _Found, group: dict[str, Any], capturable: bool) -> Entry:
    param, fmt = item.param, item.fmt
    coupled, amsgrad, _ = switches(group)
    state = optimizer.state[param]
    states.fill(param, state, fmt, amsgrad, capturable)
    local, exp_avg = local_tensor(param), local_tensor(state["exp_avg"])
    grad_dtype = param.dtype if param.grad is None else param.grad.dtype
    copied = not states.same_layout(local, exp_avg)
    if param.grad is not None:
        copied = copied or not distributed.same_placements(param, param.grad)
        copied = copied or not states.same_layout(local_tensor(param.grad), exp_avg)
    return Entry(
        name=item.name,
        param=param,
        states=optimizer.state,
        group=item.group,
        fmt=fmt,
        kind=-1 if fmt is None else kind_of(fmt, grad_dtype, coupled, amsgrad),
        grad_dtype=grad_dtype,
        low_key=None if fmt is None else LOW_KEY.get(fmt),
        amsgrad=amsgrad,
        coupled=coupled,
        param_buffer=torch.empty_like(exp_avg, dtype=param.dtype) if copied else None,
        grad_buffer=torch.empty_like(exp_avg, dtype=grad_dtype) if copied else None,
    )
