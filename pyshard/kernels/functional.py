"""adam_: one Adam step over lists of tensors, without an optimizer object."""

import math
from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor

from . import checks, reference
from .formats import Format, kind_of
from .registry import choose

_FORMATS = {
    (torch.float32, None): Format.F32,
    (torch.float64, None): None,
    (torch.bfloat16, torch.int16): Format.BF16_SPLIT,
    (torch.bfloat16, torch.float32): Format.BF16_MASTER,
    (torch.float16, torch.float32): Format.FP16_MASTER,
    (torch.bfloat16, None): Format.BF16_NONE,
    (torch.float16, None): Format.FP16_NONE,
}
_WHO = "pyshard.adam_"
_LIMITS = {  # from, below
    "lr": (0.0, math.inf),
    "beta1": (0.0, 1.0),
    "beta2": (0.0, 1.0),
    "eps": (0.0, math.inf),
    "weight_decay": (0.0, math.inf),
    "step": (1.0, 2.0**53),
}


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    lows: list[Tensor],
    step: Tensor | float,
    lr: Tensor | float,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    maximize: bool = False,
    grad_scale: float = 1.0,
    backend: str = "auto",
) -> None:
    """One Adam(W) step in place: params, moments and lows change. The formula is pyshard.Adam's.

    Args:
        params: fp32, bf16, fp16 or fp64 tensors on one device, contiguous.
        grads: of the shapes of params; fp32, or the dtype of the parameter; read only.
        exp_avgs, exp_avg_sqs: moments, fp32 (fp64 for fp64 parameters).
        max_exp_avg_sqs: amsgrad's maxima likewise, or an empty list.
        lows: what completes 16-bit parameters to fp32 masters: int16 remainders (split weights) or fp32 masters,
            one for each parameter; or an empty list: no masters.
        step: the count of this step, from 1. lr: the learning rate. Both numbers, or tensors of one element, which are
            read on the host.
        decoupled: AdamW's weight decay, else Adam's. grad_scale: factor on the gradients.
    Raises:
        TypeError, ValueError, RuntimeError: before anything is changed.
    """
    rows = _checked(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, lows)
    named = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay, "step": step}
    hyper = _numbers(named)
    grad_scale = _number("grad_scale", grad_scale)
    if math.isnan(grad_scale):
        raise ValueError(f"{_WHO}: grad_scale is NaN; expected a number. Leave the step out instead.")
    weight_decay = hyper[4]
    hyper += [-1.0 if maximize else 1.0, 1.0 if decoupled else 0.0]
    if not params:
        return
    names = {choose(backend, p.device, p.dtype).name for p in params}
    if len(names) > 1:
        raise ValueError(
            f"{_WHO}: got parameters for several backends ({', '.join(sorted(names))}); expected one. "
            "Call it once for each dtype, or use backend='reference'."
        )
    coupled = not decoupled and weight_decay != 0.0
    name = names.pop()
    if name == "reference":
        scalars = reference.adam_scalars(hyper, grad_scale)
        for fmt, p, low, g, m, v, vmax in rows:
            reference.adam_(fmt, p.detach(), low, g, m, v, vmax, scalars, coupled)
        return  # torch's own operations have told autograd
    table = []
    for fmt, p, low, g, m, v, vmax in rows:
        if fmt is None:
            continue  # fp64 is the reference's, and was refused by choose()
        optional = [0 if t is None else t.data_ptr() for t in (low, vmax)]
        kind = kind_of(fmt, g.dtype, coupled, vmax is not None)
        moments = [m.data_ptr(), v.data_ptr(), optional[1]]
        table.append([p.data_ptr(), optional[0], g.data_ptr(), *moments, p.numel(), kind, 0])
    if name == "cpu":
        from .. import _C

        _C.cpu_adam(table, [hyper], grad_scale, torch.get_num_threads())
    else:
        from .device import adam_rows

        adam_rows(name, params[0].device, table, hyper, grad_scale)
    # Or a backward of what was computed before would use the new values in silence.
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs, *lows])


_Row = tuple[Format | None, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None]


def _checked(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    lows: list[Tensor],
) -> list[_Row]:
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    lists |= {"max_exp_avg_sqs": max_exp_avg_sqs, "lows": lows}
    for name, tensors in lists.items():
        _check_list(name, tensors)
        if len(tensors) != len(params) and (tensors or name not in ("max_exp_avg_sqs", "lows")):
            raise ValueError(
                f"{_WHO}: got {len(params)} params and {len(tensors)} {name}; expected as many of each. "
                "Pass one for each parameter; max_exp_avg_sqs and lows may be empty."
            )
    rows: list[_Row] = []
    regions: list[checks.Region] = []
    for i, p in enumerate(params):
        who = f"parameter {i}"
        checks.check_param(_WHO, who, p)
        checks.check_grad(_WHO, who, p, grads[i])
        low = lows[i] if lows else None
        try:
            fmt = _FORMATS[p.dtype, None if low is None else low.dtype]
        except KeyError:
            raise TypeError(
                f"{_WHO}: {who} is {p.dtype} and its low {low.dtype if low is not None else None}; expected int16 or "
                "float32 beside bfloat16, float32 beside float16, and none beside float32 and float64. "
                "Call it once for each kind of parameter."
            ) from None
        moment = torch.float64 if fmt is None else torch.float32
        vmax = max_exp_avg_sqs[i] if max_exp_avg_sqs else None
        for key, value in (
            ("exp_avgs", exp_avgs[i]),
            ("exp_avg_sqs", exp_avg_sqs[i]),
            ("max_exp_avg_sqs", vmax),
        ):
            if value is not None:
                checks.check_state(_WHO, who, p, key, value, moment)
        if low is not None:
            checks.check_state(_WHO, who, p, "lows", low, low.dtype)
        named = {
            "param": p,
            "low": low,
            "grad": grads[i],
            "exp_avg": exp_avgs[i],
            "exp_avg_sq": exp_avg_sqs[i],
            "max": vmax,
        }
        for key, tensor in named.items():
            if tensor is None:
                continue
            if not tensor.is_contiguous() or tensor.device != params[0].device:
                raise ValueError(
                    f"{_WHO}: {key} {i} has stride {tensor.stride()} on {tensor.device}; expected a contiguous tensor "
                    f"on {params[0].device}. Use .contiguous(), or pyshard.AdamW, which takes any layout."
                )
            regions.append(checks.Region(f"{key} {i}", tensor, key != "grad"))
        rows.append((fmt, p, low, grads[i], exp_avgs[i], exp_avg_sqs[i], vmax))
    checks.check_overlap(_WHO, regions)
    return rows


def _check_list(name: str, tensors: object) -> None:
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(
            f"{_WHO}: {name} is {type(tensors).__name__}; expected a list of tensors. Put one tensor into a list: "
            "[tensor]; pass [] for none."
        )
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{_WHO}: item {i} of {name} is {type(tensor).__name__}; expected a tensor. Use torch.as_tensor, or "
                "leave out parameters that have none."
            )


def _number(name: str, value: object) -> float:
    """A number, or a real tensor of one element, as a float."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if isinstance(value, Tensor) and name in ("lr", "step"):
        number = value.numel() == 1 and value.layout == torch.strided and not value.is_complex()
        if number:
            checks.check_memory(_WHO, name, value)
    if not number:
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        kinds = "a number or a tensor of one" if name in ("lr", "step") else "a number"
        raise TypeError(f"{_WHO}: {name}={got}; expected {kinds}. Convert it, with float() for example.")
    return float(value)  # type: ignore[arg-type]


def _numbers(named: Mapping[str, object]) -> list[float]:
    """The hyperparameters, checked, in the order of AdamHyper."""
    values = []
    for name, given in named.items():
        value = _number(name, given)
        low, high = _LIMITS[name]
        if not low <= value < high:
            raise ValueError(
                f"{_WHO}: {name}={value!r}; expected a number in [{low:g}, {high:g}). Pass one of that range."
            )
        values.append(value)
    if not values[-1].is_integer():
        raise ValueError(
            f"{_WHO}: step={values[-1]!r}; expected a whole number. Pass the count of this step: 1 for the first."
        )
    return values
