"""All checks of tensors before their addresses go to a kernel. The kernels themselves take everything on trust.

Each function raises before anything has been changed. Messages say what, what was got, what was expected, and the
remedy; `who` opens them and names the caller.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .launch import is_dtensor, local_tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_memory(who: str, name: str, tensor: Tensor) -> None:
    """A tensor's values lie at its data_ptr(). Not so for DTensors, other wrappers, fake, meta and freed tensors."""
    if is_dtensor(tensor):
        raise TypeError(
            f"{who}: {name} is a {type(tensor).__name__}; expected a plain tensor. "
            "Use .to_local() for this rank's part, or .full_tensor() for the whole."
        )
    if isinstance(tensor, FakeTensor) or isinstance(torch.empty(0, device="cpu"), FakeTensor):
        raise ValueError(
            f"{who}: {name} came under a FakeTensorMode, where tensors have no values; expected a tensor of values. "
            "Use torch.ops.pyshard.*, which know the shapes of their results."
        )
    if tensor.numel() and not _has_memory(tensor):
        raise ValueError(
            f"{who}: {name} is a {type(tensor).__name__} on {tensor.device} without memory of its own; expected a "
            "tensor of values. Use .clone() for one that torch makes up, or the plain tensors of which it is a wrapper."
        )


def _has_memory(tensor: Tensor) -> bool:
    try:  # both: a view into a freed storage has an address all the same
        return bool(tensor.data_ptr() and tensor.untyped_storage().data_ptr())
    except RuntimeError:
        return False


def _check_sign(who: str, name: str, tensor: Tensor) -> None:
    if tensor.is_neg():
        raise ValueError(
            f"{who}: {name} is a view that negates what is in memory; expected plain memory. Use .resolve_neg()."
        )


def check_param(who: str, name: str, param: Tensor) -> None:
    """A parameter's dtype, layout and memory."""
    if param.is_complex():
        raise TypeError(
            f"{who}: {name} is complex ({param.dtype}); expected a real floating-point parameter. "
            "Hold its real and imaginary parts as two parameters (torch.view_as_real)."
        )
    if param.dtype not in _FLOATS:
        raise TypeError(
            f"{who}: {name} has dtype {param.dtype}; expected float32, bfloat16, float16 or float64. "
            "Convert the parameter, or leave it out of the optimizer."
        )
    if param.layout != torch.strided:
        raise TypeError(
            f"{who}: {name} has layout {param.layout}; expected a dense (strided) parameter. Use param.to_dense()."
        )
    if param.device.type == "meta":
        raise ValueError(
            f"{who}: {name} is on the meta device; expected one with memory. Materialize the model first: "
            "model.to_empty(device=...), then initialize it."
        )
    check_memory(who, name, param)
    _check_sign(who, name, param)
    if param.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{who}: {name} was made under torch.inference_mode() and is updated outside of it; expected a normal "
            "tensor. Use .clone() outside of inference mode, or torch.no_grad() to make it."
        )
    if overlaps_itself(param):
        raise ValueError(
            f"{who}: {name} has shape {tuple(param.shape)} and stride {param.stride()}: several of its elements share "
            "memory; expected an address for each. Use param.contiguous() or .clone()."
        )


def check_grad(who: str, name: str, param: Tensor, grad: Tensor) -> None:
    """A gradient against its parameter."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{who}: {name} has a sparse gradient (layout {grad.layout}); expected a dense one. "
            "Use sparse=False in the embedding, or torch.optim.SparseAdam for this parameter."
        )
    check_memory(who, f"the gradient of {name}", grad)
    _check_sign(who, f"the gradient of {name}", grad)
    if grad.dtype not in (param.dtype, torch.float32):
        expected = {str(param.dtype).removeprefix("torch."), "float32"}
        raise ValueError(
            f"{who}: {name} has a {str(grad.dtype).removeprefix('torch.')} gradient for a "
            f"{str(param.dtype).removeprefix('torch.')} parameter; expected {' or '.join(sorted(expected))}. "
            "Convert the gradient."
        )
    if grad.shape != param.shape:
        raise ValueError(
            f"{who}: {name} has shape {tuple(param.shape)} and a gradient of shape {tuple(grad.shape)}; "
            "expected equal shapes. Clear the gradient (zero_grad) and run backward again."
        )
    if grad.device != param.device:
        raise ValueError(
            f"{who}: {name} is on {param.device} and its gradient on {grad.device}; expected one device. "
            "Move the model before backward, or the gradient with .to()."
        )


def check_state(who: str, name: str, param: Tensor, key: str, value: object, dtype: torch.dtype | None) -> None:
    """A state tensor (moment, remainder, master) against its parameter; dtype None: any floating-point one."""
    wanted = "a floating-point tensor" if dtype is None else str(dtype)
    fits = isinstance(value, Tensor) and value.shape == param.shape and value.layout == torch.strided
    if isinstance(value, Tensor):
        fits = fits and (value.is_floating_point() if dtype is None else value.dtype == dtype)
    if not isinstance(value, Tensor) or not fits:
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{who}: state {key!r} of {name} is {got}; expected {wanted} {tuple(param.shape)}. "
            "Load a state_dict that belongs to this model, or delete the parameter's state to start afresh."
        )
    cut, param_cut = getattr(value, "placements", None), getattr(param, "placements", None)
    if cut != param_cut:
        raise ValueError(
            f"{who}: state {key!r} of {name} has placements {cut} and the parameter {param_cut}; expected the same. "
            "Load through torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which distributes it."
        )
    if dtype is not None and value.device != param.device:
        raise ValueError(
            f"{who}: state {key!r} of {name} is on {value.device} and the parameter on {param.device}; expected one "
            "device. Move the state back before step()."
        )
    if param.device.type != "meta":
        local = local_tensor(value)  # as the parameter's, by its placements
        check_memory(who, f"state {key!r} of {name}", local)
        if dtype is not None:
            _check_sign(who, f"state {key!r} of {name}", local)


def check_step(who: str, name: str, value: object) -> None:
    """A step count: a whole number, at least 0."""
    one = isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
    if one and isinstance(value, Tensor) and value.device.type != "cpu":
        return  # looking at it would wait for the device
    if not one or not (float(value) >= 0 and float(value).is_integer()):  # type: ignore[arg-type]
        raise ValueError(
            f"{who}: the step count of {name} is {value!r}; expected one whole number, at least 0. "
            "Load a state_dict that belongs to this optimizer, or delete the parameter's state to start afresh."
        )


class Region(NamedTuple):
    """A tensor that a kernel touches, and what it is called in messages."""

    name: str
    tensor: Tensor
    written: bool


def check_overlap(who: str, regions: Iterable[Region]) -> None:
    """No written tensor may share memory with another tensor of the step."""
    spans = []
    for region in regions:
        if region.tensor.numel():
            start = region.tensor.data_ptr()
            spans.append((region.tensor.device, start, start + _extent(region.tensor), region))
    spans.sort(key=lambda s: (str(s[0]), s[1], s[2]))
    open_spans: list[tuple[torch.device, int, int, Region]] = []
    for span in spans:
        open_spans = [s for s in open_spans if s[0] == span[0] and s[2] > span[1]]
        for other in open_spans:
            if (span[3].written or other[3].written) and _share_memory(span[3].tensor, other[3].tensor):
                raise ValueError(
                    f"{who}: {other[3].name} and {span[3].name} share memory; expected tensors of their own. "
                    "Pass a tied parameter once, and clone() views of one another."
                )
        open_spans.append(span)


def overlaps_itself(tensor: Tensor) -> bool:
    """True if two elements of a strided tensor may share an address (expanded or interleaved views)."""
    if tensor.is_contiguous() or tensor.numel() < 2:
        return False
    reach = 0  # in elements, of the dimensions seen so far
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to the last element."""
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return (last + 1) * tensor.element_size()


def _is_dense(tensor: Tensor) -> bool:
    return _extent(tensor) == tensor.numel() * tensor.element_size()


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Exact for two tensors whose address ranges meet."""
    if _is_dense(a) and _is_dense(b):
        return True
    base = min(a.data_ptr(), b.data_ptr())
    unit = math.gcd(a.element_size(), b.element_size(), a.data_ptr() - base, b.data_ptr() - base)
    size = max(a.data_ptr() + _extent(a), b.data_ptr() + _extent(b)) - base
    used = torch.zeros(size // unit, dtype=torch.bool)

    def elements(tensor: Tensor) -> Tensor:
        width = tensor.element_size() // unit
        strides = [stride * width for stride in tensor.stride()]
        return used.as_strided((*tensor.shape, width), (*strides, 1), (tensor.data_ptr() - base) // unit)

    elements(a).fill_(True)
    return bool(elements(b).any())
