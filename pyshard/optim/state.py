"""The state of a parameter: made at its first gradient, kept as kernels need it, saved as torch.optim saves it.

In memory: step (fp32, on the host unless capturable), exp_avg, exp_avg_sq, max_exp_avg_sq (amsgrad) in fp32 (fp64
for fp64 parameters), and beside a 16-bit parameter either `remainder` (int16, split weights) or `master` (fp32).
In a state_dict: the same, with the remainder joined to a plain fp32 `master`, so that a checkpoint does not depend
on the format and torch.optim.AdamW can load it.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels import casts, checks
from ..kernels.formats import LOW_DTYPE, LOW_KEY, Format
from ..kernels.launch import is_dtensor, local_tensor
from ..kernels.reference import in_memory_order
from .flat_shard import FlatShard, check_takes, take
from .rectangles import cut_of, rows_of

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
KEYS = ("step", *MOMENTS, *LOW_DTYPE)


class Boxed:
    """A loaded tensor on its way through Optimizer.load_state_dict, which would cast it to the parameter's dtype."""

    def __init__(self, value: Tensor):
        self.value = value


def box(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A copy of a state_dict whose tensors of state are boxed."""

    def boxed(state: Any) -> Any:
        if not isinstance(state, dict):
            return state
        return {key: Boxed(value) if isinstance(value, Tensor) else value for key, value in state.items()}

    return {**state_dict, "state": {key: boxed(state) for key, state in state_dict["state"].items()}}


def check(who: str, name: str, param: Tensor, state: Mapping[str, Any], fmt: Format | None) -> None:
    """State that is there before a step, against its parameter: what a kernel would read."""
    _check_complete(who, name, state)
    dtype = torch.float64 if fmt is None else torch.float32
    for key in MOMENTS:
        if key in state:
            checks.check_state(who, name, param, key, state[key], dtype)
    if fmt in LOW_KEY:
        for key, low_dtype in LOW_DTYPE.items():
            if key in state:
                checks.check_state(who, name, param, key, state[key], low_dtype)


def check_loaded(who: str, name: str, param: Tensor, state: Mapping[str, Any]) -> None:
    """State of a state_dict, against the parameter it is for: it will be cast and moved."""
    if not state:
        return
    if "remainder" in state and not isinstance(state["remainder"], Tensor):  # torch's way to say it did not find it
        raise ValueError(
            f"{who}: the state of {name} came through flatten_optimizer_state_dict=True, which looks for what is in "
            "memory, 'remainder', and leaves out what was saved, 'master'; expected the fp32 master. Leave that option "
            "out, or use master_weights='fp32'."
        )
    _check_complete(who, name, state)
    for key in (*MOMENTS, "master"):
        if key in state and cut_of(param) is None:
            checks.check_state(who, name, param, key, state[key], None)
        elif key in state:
            try:
                check_takes(state[key], param, *rows_of(param))
            except (TypeError, ValueError) as error:
                raise type(error)(f"{who}: state {key!r} of {name}: {error}") from error
    if "exp_avg" not in state:
        raise ValueError(
            f"{who}: the loaded state of {name} has the items {sorted(state)}; expected step, exp_avg and exp_avg_sq. "
            "Load the state_dict of an Adam or AdamW."
        )


def _check_complete(who: str, name: str, state: Mapping[str, Any]) -> None:
    here = [key for key in ("step", "exp_avg", "exp_avg_sq") if key in state]
    if len(here) not in (0, 3):
        raise ValueError(
            f"{who}: the state of {name} has {' and '.join(here)} only; expected step, exp_avg and exp_avg_sq. "
            "Restore what is missing, or delete the parameter's state to start afresh."
        )
    if "step" in state:
        checks.check_step(who, name, state["step"])


def unbox(param: Tensor, state: dict[str, Any], capturable: bool) -> dict[str, Any]:
    """Loaded state as it is kept: moments and master in full precision on the parameter's device."""
    kept: dict[str, Any] = {}
    for key, boxed in state.items():
        value = boxed.value if isinstance(boxed, Boxed) else boxed
        if key == "step" and isinstance(value, (Tensor, int, float)):
            value = step_count(float(value), param, capturable)
        elif key in (*MOMENTS, "master") and isinstance(boxed, Boxed):
            dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
            # A copy of its own: the checkpoint must not change when training goes on.
            if cut_of(param) is None:
                value = value.detach().to(device=param.device, dtype=dtype, copy=True)
            elif is_dtensor(param):
                rows = take(value, param, *rows_of(param), dtype)
                value = _like(param, rows.view(local_tensor(param).shape))
            else:
                value = FlatShard(take(value, param, 0, param.numel(), dtype), param, 0).as_part()
        kept[key] = value
    return kept


def snapshot(state: dict[Any, Any]) -> dict[Any, tuple[Any, dict[str, Any]]]:
    """Which items the state of each parameter has; for restore()."""
    return {param: (items, dict(items)) for param, items in state.items() if isinstance(items, dict)}


def restore(state: dict[Any, Any], taken: dict[Any, tuple[Any, dict[str, Any]]]) -> None:
    """Takes back what fill() has done since the snapshot."""
    for param in [param for param in state if param not in taken]:
        del state[param]
    for items, before in taken.values():
        items.clear()
        items.update(before)


def step_count(value: float, param: Tensor, capturable: bool) -> Tensor:
    """A step count as torch.optim keeps it: fp32, on the host, or with capturable on the parameter's device."""
    return torch.tensor(value, dtype=torch.float32, device=param.device if capturable else "cpu")


def fill(param: Tensor, state: dict[str, Any], fmt: Format | None, amsgrad: bool, capturable: bool) -> None:
    """Completes the state of a parameter in place; does nothing where all is there already."""
    dtype = torch.float64 if fmt is None else torch.float32
    step, place = state.get("step", 0.0), param.device if capturable else torch.device("cpu")
    if not isinstance(step, Tensor) or step.dtype != torch.float32 or step.device != place:
        state["step"] = step_count(float(step), param, capturable)
    for key in MOMENTS if amsgrad else MOMENTS[:2]:
        if key not in state:
            state[key] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    low_key = None if fmt is None else LOW_KEY.get(fmt)
    if low_key == "remainder":
        master = state.pop("master", None)
        if "remainder" not in state:
            state["remainder"] = torch.zeros_like(param, dtype=torch.int16, memory_format=torch.preserve_format)
            if master is not None:
                local_tensor(state["remainder"]).copy_(_remainder(local_tensor(param), local_tensor(master)))
    elif low_key == "master":
        if "master" not in state:
            state["master"] = param.detach().to(torch.float32)
        elif fmt == Format.BF16_MASTER:
            _settle_ties(local_tensor(param), local_tensor(state["master"]))
    elif state.pop("master", None) is not None:
        warnings.warn(
            f"pyshard: the loaded state has fp32 master weights, which a {param.dtype} parameter without a master "
            "cannot use: they are dropped. Use master_weights='auto' and 16-bit parameters to keep them.",
            stacklevel=2,
        )
    for key in (*MOMENTS, *LOW_DTYPE):
        if key in state:
            state[key] = _laid_out(param, state[key])


def saved(param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """The state as a state_dict holds it: a new dictionary, the remainder joined to an fp32 master.

    Of a parameter that is a part of a whole one, tensors look like the whole.
    """
    out = {key: value for key, value in state.items() if key != "remainder"}
    if "remainder" in state:
        out["master"] = _like(param, casts.join(local_tensor(param).detach(), local_tensor(state["remainder"])))
    if cut_of(param) is not None:
        out |= {key: as_whole(value, param) for key, value in out.items() if key in (*MOMENTS, "master")}
    return out


def as_whole(value: Tensor, param: Tensor) -> FlatShard:
    """A tensor of the shape of a parameter that is a part of a whole one, as a part of the whole; not copied if dense.

    Counted in the order of its own memory, which need not be the parameter's. Of a DTensor: this rank's rows of the
    part.
    """
    if is_dtensor(value):
        part = torch.empty(value.shape, device="meta")
        return FlatShard(local_tensor(value).detach().reshape(-1), part, rows_of(value)[0], cut_of(param))
    return FlatShard(in_memory_order(value.detach()), value, 0, cut_of(param))


def put_back(shown: FlatShard, value: Tensor) -> None:
    """Writes what was read into as_whole(value, ...) to the value, if that is a copy of it."""
    local = local_tensor(value).detach()
    if shown.local.numel() and shown.local.data_ptr() != local.data_ptr():
        local.copy_(shown.local.view(local.shape) if is_dtensor(value) else shown.as_part())


def _distance(param: Tensor, master: Tensor) -> Tensor:
    """How far an fp32 master lies above its bf16 parameter, in steps of fp32, away from zero; int32 of their shape."""
    return master.contiguous().view(torch.int32) - (param.contiguous().view(torch.int16).to(torch.int32) << 16)


def _remainder(param: Tensor, master: Tensor) -> Tensor:
    """The remainder of a master loaded from a checkpoint, where the parameter is its rounding; else zero.

    The model's weights count: they may have been loaded after the optimizer, or changed on purpose. A master half-way
    between two bf16 numbers that was rounded to even (master_weights="fp32") moves by one step of fp32.
    """
    distance, half = _distance(param, master), 1 << 15
    return torch.where((distance >= -half) & (distance <= half), distance.clamp(max=half - 1), 0)


def _settle_ties(param: Tensor, master: Tensor) -> None:
    """Moves masters half-way between two bf16 numbers that split weights have rounded up by one step of fp32.

    Rounded to even they would not be the parameter, and count as weights that the user has written.
    """
    tie = (_distance(param, master) == -(1 << 15)) & (master.to(torch.bfloat16) != param)
    if tie.any():
        master.view(torch.int32).add_(tie)


def same_layout(a: Tensor, b: Tensor) -> bool:
    """True if the elements of two tensors of one shape lie in memory in the same order, with the same gaps."""
    steps = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.numel() == 0 or all(size == 1 or x == y for size, x, y in steps)


def _laid_out(param: Tensor, value: Tensor) -> Tensor:
    """The tensor with the strides that a fresh state of the parameter would have."""
    fresh = torch.empty_like(local_tensor(param), device="meta", memory_format=torch.preserve_format)
    if same_layout(local_tensor(value), fresh):
        return value
    out = torch.empty_like(param, dtype=value.dtype, memory_format=torch.preserve_format)
    return out.copy_(value)


def _like(param: Tensor, local: Tensor) -> Tensor:
    """A local tensor as what the parameter is: itself, or a DTensor of the same mesh and placements."""
    if not is_dtensor(param):
        return local
    from torch.distributed.tensor import DTensor

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=param.shape, stride=param.stride())
