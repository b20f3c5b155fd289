"""pyshard.fully_shard: torch's FSDP2 with units found by the model's structure."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.fsdp import fully_shard as _fully_shard

from ..blocks import find_blocks
from ..placement import carry_over
from .collectives import name_collectives

_WHO = "pyshard.fully_shard"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

M = TypeVar("M", bound=nn.Module)


def fully_shard(
    model: M,
    mesh: DeviceMesh,
    *,
    units: Iterable[str | type[nn.Module]] | None = None,
    param_dtype: torch.dtype | None = torch.bfloat16,
    reduce_dtype: torch.dtype | None = torch.float32,
    output_dtype: torch.dtype | None = None,
    reshard_after_forward: bool | int | None = None,
    cpu_offload: bool | OffloadPolicy = False,
    ignored_params: Iterable[nn.Parameter] = (),
) -> M:
    """Cuts parameters, gradients and optimizer state over the ranks of a mesh, in place, and returns the model.

    Each block of the model is a unit, whose parameters come together before it runs and go after it; what is outside
    of the blocks is one more. The parameters become DTensors, cut along dimension 0, that pyshard.AdamW and every
    optimizer of torch take; their dtype stays, so an fp32 model keeps fp32 weights and computes in `param_dtype`, and a
    bf16 model has bf16 ones, which pyshard.AdamW completes to fp32. Parameters that are said to be parts of larger
    ones, or of a pipeline's stage, still are; tied weights stay tied. Gradients are means over the mesh's ranks, summed
    in rank order over gloo. Method: ZeRO-3 (Rajbhandari et al. 2020), by torch.distributed.fsdp.fully_shard, whose
    methods the units have (set_requires_gradient_sync() for accumulation, unshard(), ...).

    All ranks of the mesh call it, with the same weights, which is checked. A rank that is lost or late later on is a
    pyshard.comm.PeerError on the others, which names the operation and the unit.

    Args:
        model: a module, or a pyshard.pp.Pipeline, of which each stage is sharded by itself. It may be on the meta
            device; else its parameters are moved to the mesh's.
        mesh: one dimension; two for HSDP: cut over the second, replicated over the first; or init_mesh's, of which
            "dp" counts.
        units: what is a unit instead of the blocks that are found: names of classes, classes, or patterns of module
            names (as in fnmatch).
        param_dtype: in which units compute and parameters are gathered. None: the parameters' own.
        reduce_dtype: in which gradients are summed. None: in that of the gradients.
        output_dtype: to which floating-point outputs of the model are cast. None: as they come.
        reshard_after_forward: frees gathered parameters after forward and gathers them again for backward; False keeps
            them in between; an int: kept cut over so many ranks. None: True, except for what is outside of the blocks,
            and for a pipeline, whose stages run many times a step.
        cpu_offload: parameters, gradients and optimizer state live in host memory, and pyshard.AdamW steps there; or a
            torch.distributed.fsdp.CPUOffloadPolicy.
        ignored_params: stay as they are; nobody sums their gradients. So do parameters without elements.

    Raises:
        ValueError, TypeError: on all ranks, before anything is changed: no such unit, a mesh of another kind, a model
            that is sharded already or not the same on all ranks, a unit whose trained parameters have several dtypes,
            tied weights in different units.
    """
    mesh = _mesh(mesh)
    stages = _stages(model)
    if reshard_after_forward is None and stages is not None:
        reshard_after_forward = False
    # FSDP2 cannot reduce a gradient without elements, and there is nothing to cut.
    ignored = {*ignored_params, *(param for param in model.parameters() if not param.numel())}
    error: Exception | None = None
    plans: list[tuple[nn.Module, list[tuple[str, nn.Module]]]] = []
    try:
        _check(model, ignored)
        wanted = None if units is None else list(units)
        for root in [model] if stages is None else stages:
            plans.append((root, _units(root, wanted)))
            _check_units(*plans[-1], ignored)
        if wanted and not any(found for _, found in plans):
            raise ValueError(
                f"{_WHO}: units={wanted} fit no module of {type(model).__name__}; expected names of classes, classes, "
                f"or patterns of module names. Its classes: {_classes(model)}."
            )
    except (ValueError, TypeError) as failure:
        error = failure
    options = repr((units and list(map(str, units)), param_dtype, reduce_dtype, output_dtype, reshard_after_forward))
    _agree(model, mesh, error, options)

    policy = MixedPrecisionPolicy(param_dtype, reduce_dtype, output_dtype)
    inner = MixedPrecisionPolicy(param_dtype, reduce_dtype)
    options_of_all: dict[str, Any] = {"mesh": mesh, "offload_policy": _offload(cpu_offload), "ignored_params": ignored}
    index = 0
    for root, found in plans:
        said = _Said(root)
        reshard = True if reshard_after_forward is None else reshard_after_forward
        for name, unit in found:
            _fully_shard(unit, mp_policy=inner, reshard_after_forward=reshard, **options_of_all)
            name_collectives(unit, name, index)
            index += 1
        _fully_shard(root, mp_policy=policy, reshard_after_forward=reshard_after_forward, **options_of_all)
        name_collectives(root, _rest(root, found), index)
        index += 1
        said.again()
    return model


# ---- what is asked for ----


def _mesh(mesh: DeviceMesh) -> DeviceMesh:
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"{_WHO}: mesh is a {type(mesh).__name__}; expected a DeviceMesh, as pyshard.init_mesh(dp=-1) or "
            "torch.distributed.device_mesh.init_device_mesh make."
        )
    names = mesh.mesh_dim_names or ()
    if mesh.ndim > 1 and "dp" in names:
        return mesh["dp"]
    if mesh.ndim > 2 or (mesh.ndim == 2 and len(names) != 2):
        raise ValueError(
            f"{_WHO}: the mesh has {mesh.ndim} dimensions {names}; expected one, two with names (replicated, cut), or "
            'one of them "dp".'
        )
    return mesh


def _stages(model: nn.Module) -> list[nn.Module] | None:
    """The stages of a pyshard.pp.Pipeline, told by its attributes; None for another module."""
    stages = getattr(model, "stages", None)
    if isinstance(stages, nn.ModuleList) and hasattr(model, "step") and hasattr(model, "evaluate"):
        return list(stages)
    return None


def _offload(cpu_offload: bool | OffloadPolicy) -> OffloadPolicy:
    if isinstance(cpu_offload, OffloadPolicy):
        return cpu_offload
    return CPUOffloadPolicy(pin_memory=torch.accelerator.is_available()) if cpu_offload else OffloadPolicy()


def _units(root: nn.Module, wanted: list[str | type[nn.Module]] | None) -> list[tuple[str, nn.Module]]:
    """(name, module) of each unit in a model or stage, inner ones before those around them; not the root itself."""
    whole = getattr(root, "model", root) if type(root).__module__.startswith("pyshard.pp") else root
    if wanted is None:
        chosen = {id(block) for _, blocks in find_blocks(whole) for block in blocks}
        found = [(name, module) for name, module in whole.named_modules() if id(module) in chosen]
    else:
        found = [(name, module) for name, module in whole.named_modules() if name and _fits(name, module, wanted)]
    found = [(name, module) for name, module in found if any(True for _ in module.parameters())]
    return found[::-1] if wanted is not None else found


def _fits(name: str, module: nn.Module, wanted: list[str | type[nn.Module]]) -> bool:
    for unit in wanted:
        if isinstance(unit, str):
            if type(module).__name__ == unit or fnmatch.fnmatchcase(name, unit):
                return True
        elif isinstance(module, unit):
            return True
    return False


def _classes(model: nn.Module) -> str:
    return ", ".join(dict.fromkeys(type(module).__name__ for module in model.modules()))


def _rest(root: nn.Module, units: list[tuple[str, nn.Module]]) -> str:
    """What to call the parameters of the root."""
    whole = getattr(root, "model", root) if type(root).__module__.startswith("pyshard.pp") else root
    inside = tuple(f"{name}." for name, _ in units)
    outside = [name for name, _ in whole.named_parameters() if not name.startswith(inside)] if inside else []
    if not outside:
        return "the model"
    return f"{outside[0]} and {len(outside) - 1} others outside of the units" if len(outside) > 1 else outside[0]


# ---- checks, before anything is changed ----


def _check(model: nn.Module, ignored: set[nn.Parameter]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_WHO}: model is a {type(model).__name__}; expected an nn.Module.")
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            raise ValueError(f"{_WHO}: {name or 'the model'} is sharded already; expected a model that is not.")
    for name, param in model.named_parameters():
        if getattr(param, "main_grad", False) and param not in ignored:
            raise ValueError(
                f"{_WHO}: {name} keeps its own fp32 gradient (main_grad=True), which full sharding would drop; "
                "gradients are summed in reduce_dtype here. Call tp.parallelize without main_grad."
            )


def _check_units(root: nn.Module, units: list[tuple[str, nn.Module]], ignored: set[nn.Parameter]) -> None:
    """Every parameter has one unit, and those that a unit trains have one dtype."""
    owner: dict[int, str] = {}
    taken: dict[int, tuple[nn.Parameter, str]] = {}
    for name, unit in units:  # inner ones first
        for module in unit.modules():
            owner.setdefault(id(module), name)
    dtypes: dict[str, dict[torch.dtype, str]] = {}
    for prefix, module in root.named_modules():
        name = owner.get(id(module), "")
        for key, param in module.named_parameters(recurse=False):
            if param in ignored:
                continue
            full = f"{prefix}.{key}" if prefix else key
            known = taken.setdefault(id(param), (param, name))[1]
            if known != name:
                raise ValueError(
                    f"{_WHO}: {full}, in {name or 'no unit'}, is tied to a weight in {known or 'no unit'}; expected "
                    "tied weights in one unit. Choose units that hold both or none."
                )
            if param.requires_grad:
                dtypes.setdefault(name, {}).setdefault(param.dtype, full)
    for name, found in dtypes.items():
        if len(found) > 1:
            told = " and ".join(f"{full} ({dtype})" for dtype, full in list(found.items())[:2])
            raise ValueError(
                f"{_WHO}: the unit {name or 'of what is outside of the blocks'} trains parameters of several dtypes: "
                f"{told}; expected one. Use model.to(dtype), or units that hold one dtype each."
            )


def _agree(model: nn.Module, mesh: DeviceMesh, error: Exception | None, options: str) -> None:
    """Raises on all ranks of the mesh if one of them has an error, another model or other options."""
    message = None if error is None else f"{type(error).__name__}: {error}"
    known: list[Any] = [(dist.get_rank(), message, options, None if error else _fingerprint(model))]
    for group in mesh.get_all_groups():
        gathered: list[Any] = [None] * group.size()
        dist.all_gather_object(gathered, known, group=group)
        known = [entry for part in gathered for entry in part]
    if error is not None:
        raise error
    for rank, message, its_options, prints in known:
        if message is not None:
            raise RuntimeError(f"{_WHO}: rank {rank} stopped with {message}")
        if its_options != options:
            raise ValueError(
                f"{_WHO}: rank {rank} was called with (units, param_dtype, reduce_dtype, output_dtype, "
                f"reshard_after_forward) = {its_options}, this rank with {options}; expected the same on all ranks."
            )
        first = known[0][3]
        differing = [key for key in {**first, **prints} if first.get(key) != prints.get(key)]
        if differing:
            raise ValueError(
                f"{_WHO}: {len(differing)} parameters of rank {rank} differ from rank {known[0][0]}'s, the first "
                f"{differing[0]}; expected the same model on all ranks, of which each keeps its part. Load the same "
                "weights, or seed all ranks alike before building it."
            )


def _fingerprint(model: nn.Module) -> dict[str, str]:
    """A few digits for each parameter, made of its shape, dtype, whether it is trained, and the sum of its bits."""
    prints = {}
    for name, param in model.named_parameters():
        text = f"{tuple(param.shape)} {param.dtype} {param.requires_grad}"
        local: Tensor = getattr(param, "_local_tensor", param)
        if not param.is_meta and local is param and param.numel():
            bits = param.detach().contiguous().view(-1)
            bits = torch.view_as_real(bits).view(-1) if bits.is_complex() else bits
            text += f" {bits.view(_INTEGERS[bits.element_size()]).sum(dtype=torch.int64).item()}"
        prints[name] = hashlib.sha1(text.encode()).hexdigest()[:16]
    return prints


class _Said:
    """What is said of the parameters of a model (pyshard.placement), without keeping them."""

    def __init__(self, model: nn.Module):
        self._kept: list[tuple[nn.Module, dict[str, Tensor]]] = []
        for module in model.modules():
            kept = {}
            for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
                kept[name] = torch.empty(0)
                carry_over(param, kept[name])
            if any(vars(holder) for holder in kept.values()):
                self._kept.append((module, kept))

    def again(self) -> None:
        """Says it of the parameters that have these names now, and of those that a move of the model makes of them."""
        for module, kept in self._kept:
            _say(module, kept)
            _say_after_moves(module, kept)


def _say(module: nn.Module, kept: dict[str, Tensor]) -> None:
    for name, holder in kept.items():
        if (param := module._parameters.get(name)) is not None:
            carry_over(holder, param)


def _say_after_moves(module: nn.Module, kept: dict[str, Tensor]) -> None:
    """to_empty() of a DTensor on the meta device drops the attributes of the parameter."""
    inner = module._apply

    def apply(*args: Any, **kwargs: Any) -> nn.Module:
        result = inner(*args, **kwargs)
        _say(module, kept)
        return result

    module._apply = apply  # type: ignore[method-assign]
