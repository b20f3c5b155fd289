"""The state of a parameter: made at its first gradient, kept as kernels need it, saved as torch.optim saves it.

In memory: step (fp32, on the host unless capturable), exp_avg, exp_avg_sq, max_exp_avg_sq (amsgrad) in fp32 (fp64
for fp64 parameters), and beside a 16-bit parameter either `remainder` (int16, split weights) or `master` (fp32).
In a state_dict: the same, with the remainder joined to a plain fp32 `master`, so that a checkpoint does not depend
on the format and torch.optim.AdamW can load it.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from ..kernels import casts
from ..kernels.formats import LOW_DTYPE, LOW_KEY, Format
from ..kernels.launch import local_tensor

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class Boxed:
    """A loaded tensor on its way through Optimizer.load_state_dict, which would cast it to the parameter's dtype."""

    def __init__(self, value: Tensor):
        self.value = value


def box(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A copy of a state_dict whose tensors of state are boxed."""
    state = {
        key: {k: Boxed(v) if isinstance(v, Tensor) else v for k, v in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


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
            value = value.detach().to(device=param.device, dtype=dtype, copy=True)
        kept[key] = value
    return kept


def step_count(value: float, param: Tensor, capturable: bool) -> Tensor:
    """A step count as torch.optim keeps it: fp32, on the host, or with capturable on the parameter's device."""
    return torch.tensor(value, dtype=torch.float32, device=param.device if capturable else "cpu")


def fill(param: Tensor, state: dict[str, Any], fmt: Format | None, amsgrad: bool, capturable: bool) -> None:
    """Completes the state of a parameter in place; does nothing where all is there already."""
    dtype = torch.float64 if fmt is None else torch.float32
    step = state.get("step")
    if (
        not isinstance(step, Tensor)
        or step.dtype != torch.float32
        or (capturable and step.device != param.device)
    ):
        state["step"] = step_count(0.0 if step is None else float(step), param, capturable)
    for key in MOMENTS if amsgrad else MOMENTS[:2]:
        if key not in state:
            state[key] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        else:
            state[key] = _laid_out(param, state[key])
    low_key = None if fmt is None else LOW_KEY.get(fmt)
    if low_key == "remainder" and "remainder" not in state:
        state["remainder"] = _remainder(param, state.get("master"))
    if low_key == "remainder":
        state.pop("master", None)
    elif low_key == "master" and "master" not in state:
        state["master"] = _laid_out(param, param.detach().to(torch.float32))
    if low_key is not None:
        state[low_key] = _laid_out(param, state[low_key])
    elif state.pop("master", None) is not None and param.dtype != torch.float32:
        warnings.warn(
            f"pyshard: the loaded state has fp32 master weights, and master_weights='none' drops them for a "
            f"{param.dtype} parameter. Use master_weights='auto' to keep them.",
            stacklevel=2,
        )


def saved(param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """The state as a state_dict holds it: a new dictionary, the remainder joined to an fp32 master."""
    if "remainder" not in state:
        return dict(state)
    out = {key: value for key, value in state.items() if key != "remainder"}
    out["master"] = _like(param, casts.join(local_tensor(param).detach(), local_tensor(state["remainder"])))
    return out


def _remainder(param: Tensor, master: Any) -> Tensor:
    """The remainder of a master loaded from a checkpoint, where the parameter is its upper half; else zero.

    The model's weights count: they may have been loaded after the optimizer, or changed on purpose.
    """
    zeros = torch.zeros_like(param, dtype=LOW_DTYPE["remainder"], memory_format=torch.preserve_format)
    if not isinstance(master, Tensor) or master.shape != param.shape:
        return zeros
    weight = local_tensor(param).detach()
    high, low = casts.split(local_tensor(master))
    local_tensor(zeros).copy_(
        torch.where(high.view(torch.int16) == weight.contiguous().view(torch.int16), low, 0)
    )
    return zeros


def same_layout(a: Tensor, b: Tensor) -> bool:
    """True if the elements of two tensors of one shape lie in the same order, without gaps in the second."""
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def _laid_out(param: Tensor, value: Tensor) -> Tensor:
    """The tensor with the strides that a fresh state of the parameter would have."""
    if not isinstance(value, Tensor) or value.shape != param.shape:
        return value  # the check that follows names it
    fresh = torch.empty_like(local_tensor(param), device="meta", memory_format=torch.preserve_format)
    if same_layout(local_tensor(value), fresh):
        return value
    out = torch.empty_like(param, dtype=value.dtype, memory_format=torch.preserve_format)
    return out.copy_(value)


def _like(param: Tensor, local: Tensor) -> Tensor:
    """A local tensor as what the parameter is: itself, or a DTensor of the same mesh and placements."""
    if local_tensor(param) is param:
        return local
    from torch.distributed.tensor import DTensor

    if not isinstance(param, DTensor):
        return local
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )
