"""pyshard.fully_shard: torch's FSDP2 with units found by the model's structure."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.fsdp import fully_shard as _fully_shard

from ..blocks import find_blocks
from ..optim.arguments import GATHERED
from ..placement import carry_over, said_again
from .checks import WHO as _WHO
from .checks import agree, check_model, check_options, check_units, inner_model
from .collectives import name_collectives

_WRAPPED = "._checkpoint_wrapped_module"

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
        mesh: one dimension; two named ones for HSDP: cut over the second, replicated over the first; or init_mesh's,
            "pp", "dp" and "tp", of which "dp" counts.
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
            that is sharded already or not the same on all ranks, other options on another rank, a unit whose trained
            parameters have several dtypes, tied weights in different units, a parameter without dimensions.
        pyshard.comm.PeerError: a rank of the mesh does not call this.

    Warns of buffers on the meta device that no checkpoint holds: to_empty() leaves them with whatever is in memory.
    """
    error: Exception | None = None
    plans: list[tuple[nn.Module, list[tuple[str, nn.Module]], str]] = []
    options: dict[str, Any] = {}
    ignored: set[nn.Parameter] = set()
    ours = _data_parallel(mesh)
    try:
        _check_mesh(mesh)
        check_model(model)
        wanted = _wanted(units)
        stages = _stages(model)
        if reshard_after_forward is None and stages is not None:
            reshard_after_forward = False
        ignored, named = _ignored(model, ignored_params)
        options = {"units": units if wanted is None else [_spelled(unit) for unit in wanted]}
        options |= {"param_dtype": param_dtype, "reduce_dtype": reduce_dtype, "output_dtype": output_dtype}
        options |= {"reshard_after_forward": reshard_after_forward, "cpu_offload": cpu_offload, "ignored_params": named}
        check_options(options, ours.size(ours.ndim - 1))
        for root in [model] if stages is None else stages:
            found = _units(root, wanted)
            check_units(root, found, ignored)
            plans.append((root, found, _rest(root, found, ignored)))
        if wanted and not any(found for _, found, _ in plans):
            raise ValueError(
                f"{_WHO}: units={wanted} fit no module of {type(model).__name__}; expected names of classes, classes, "
                f"or patterns of module names. Its classes: {_classes(model)}."
            )
    except (ValueError, TypeError) as failure:
        error = failure
        if not isinstance(ours, DeviceMesh):
            raise
    agree(model, ours, error, options)
    _warn_of_buffers(model)

    policy = MixedPrecisionPolicy(param_dtype, reduce_dtype, output_dtype)
    inner = MixedPrecisionPolicy(param_dtype, reduce_dtype)
    options_of_all: dict[str, Any] = {"mesh": ours, "offload_policy": _offload(cpu_offload), "ignored_params": ignored}
    index = 0
    for root, found, rest in plans:
        said = _Said(root)
        reshard = True if reshard_after_forward is None else reshard_after_forward
        for name, unit in found:
            _fully_shard(unit, mp_policy=inner, reshard_after_forward=reshard, **options_of_all)
            name_collectives(unit, name, index)
            index += 1
        _fully_shard(root, mp_policy=policy, reshard_after_forward=reshard_after_forward, **options_of_all)
        name_collectives(root, rest, index)
        index += 1
        said.again()
        for unit in [root, *(unit for _, unit in found)]:
            _keep_said(unit)
            _mark_gathered(unit, root)
    return model


# ---- what is asked for ----


def _data_parallel(mesh: DeviceMesh) -> DeviceMesh:
    """What is cut over: the mesh, or its "dp" if the other dimensions are those of other ways to split a model."""
    names = (isinstance(mesh, DeviceMesh) and mesh.mesh_dim_names) or ()
    if "dp" in names and len(names) > 1:
        others = [name for i, name in enumerate(names) if name not in ("pp", "dp", "tp") and mesh.size(i) > 1]
        return mesh if others else mesh["dp"]
    return mesh


def _check_mesh(mesh: DeviceMesh) -> None:
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"{_WHO}: mesh is a {type(mesh).__name__}; expected a DeviceMesh, as pyshard.init_mesh(dp=-1) or "
            "torch.distributed.device_mesh.init_device_mesh make."
        )
    ours, names = _data_parallel(mesh), mesh.mesh_dim_names or ()
    split = [name for i, name in enumerate(names) if name in ("pp", "tp") and mesh.size(i) > 1]
    if ours.ndim > 2 or (ours.ndim == 2 and (len(names) != 2 or split)):
        raise ValueError(
            f"{_WHO}: the mesh has {mesh.ndim} dimensions {names} of sizes {tuple(mesh.shape)}; expected one, two with "
            'names (replicated, cut), or "dp" beside "pp" and "tp". Pass the dimensions of data-parallel ranks, such '
            'as mesh["dp"] or mesh["replicate", "shard"].'
        )


def _wanted(units: Any) -> list[str | type[nn.Module]] | None:
    """What is asked for as units; a generator is read here, once."""
    if units is None:
        return None
    wanted = None if isinstance(units, str) or not isinstance(units, Iterable) else list(units)
    odd = units if wanted is None else next((unit for unit in wanted if not isinstance(unit, str | type)), None)
    if wanted is None or odd is not None:
        one = f" Pass units=[{odd!r}] for one." if isinstance(odd, str) else ""
        raise TypeError(
            f"{_WHO}: units {'is' if wanted is None else 'has'} {odd!r}; expected a list of names of classes, classes, "
            f"or patterns of module names.{one}"
        )
    return wanted


def _spelled(unit: str | type[nn.Module]) -> str:
    return unit if isinstance(unit, str) else f"{unit.__module__}.{unit.__qualname__}"


def _ignored(model: nn.Module, given: Any) -> tuple[set[nn.Parameter], list[str]]:
    """Parameters that stay as they are: those that are given, with their names, and those without elements."""
    params = list(given) if isinstance(given, Iterable) and not isinstance(given, str | Tensor) else None
    names: dict[nn.Parameter, str] = {param: name for name, param in reversed(list(model.named_parameters()))}
    if params is None or not all(isinstance(param, Tensor) and param in names for param in params):
        odd = given if params is None else next(p for p in params if not isinstance(p, Tensor) or p not in names)
        got = f"a tensor of shape {tuple(odd.shape)}" if isinstance(odd, Tensor) else repr(odd)
        raise (ValueError if params is not None and isinstance(odd, Tensor) else TypeError)(
            f"{_WHO}: ignored_params {'is' if params is None else 'has'} {got}; expected a list of parameters of the "
            "model, such as [model.get_parameter(name)]."
        )
    # FSDP2 cannot reduce a gradient without elements, and there is nothing to cut.
    return {*params, *(param for param in names if not param.numel())}, sorted(names[param] for param in params)


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
    whole = inner_model(root)
    if wanted is None:
        chosen = {id(block) for _, blocks in find_blocks(whole) for block in blocks}
        found = [(name, module) for name, module in whole.named_modules() if id(module) in chosen]
    else:
        names = [name for name, module in whole.named_modules() if name and _fits(name, module, wanted)]
        # A block that is computed again in backward comes with what does that: its weights are gathered around both.
        names = list(dict.fromkeys(name.removesuffix(_WRAPPED) for name in names))
        found = [(name, whole.get_submodule(name)) for name in names]
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


def _rest(root: nn.Module, units: list[tuple[str, nn.Module]], ignored: set[nn.Parameter]) -> str:
    """What to call the parameters of the root."""
    whole = inner_model(root)
    inside = tuple(f"{name}." for name, _ in units)
    kept = [name for name, param in whole.named_parameters() if param not in ignored]
    outside = [name for name in kept if not name.startswith(inside)] if inside else []
    if not outside:
        return "the model"
    return f"{outside[0]} and {len(outside) - 1} others outside of the units" if len(outside) > 1 else outside[0]


# ---- what outlives the call ----


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
        """Says it of the parameters that have these names now."""
        for module, kept in self._kept:
            for name, holder in kept.items():
                if (param := module._parameters.get(name)) is not None:
                    carry_over(holder, param)


# Methods of single modules, as FSDP2 gives them a class of their own.


def _keep_said(module: nn.Module) -> None:
    """Moves and load_state_dict(assign=True) make new parameters, of which the same is said."""
    module._apply = MethodType(_apply, module)  # type: ignore[method-assign]
    module.load_state_dict = MethodType(_load_state_dict, module)  # type: ignore[method-assign]


def _apply(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with _said_of_shards(self):
        return type(self)._apply(self, *args, **kwargs)


def _load_state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with _said_of_shards(self):
        return type(self).load_state_dict(self, *args, **kwargs)


def _said_of_shards(module: nn.Module) -> Any:
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
    return said_again(module)


def _mark_gathered(unit: nn.Module, root: nn.Module) -> None:
    """Whole weights are told apart from parameters, for optimizers to refuse: they would train copies that go."""
    module: Any = unit
    names = {id(owner): name for name, owner in root.named_modules()}
    for params in module._get_fsdp_state()._fsdp_param_groups:
        for param in params.fsdp_params:
            info = param._module_info
            name = f"{names[id(info.module)]}.{info.param_name}".lstrip(".")
            param._setattr_on_modules = partial(_set, param, name)


def _set(param: Any, name: str, value: nn.Parameter) -> None:
    """FSDPParam._setattr_on_modules, by which weights take the places of shards and back."""
    if value is not param.sharded_param:
        setattr(value, GATHERED, name)
    type(param)._setattr_on_modules(param, value)


def _warn_of_buffers(model: nn.Module) -> None:
    """Of those on the meta device that no checkpoint holds."""
    names = [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in sorted(module._non_persistent_buffers_set)
        if (buffer := module._buffers.get(name)) is not None and buffer.is_meta
    ]
    if names:
        warnings.warn(
            f"{_WHO}: {', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)} of the model on the "
            "meta device will not be in any checkpoint (persistent=False), and to_empty() leaves in them what is in "
            "memory. Fill them after to_empty(), from a module of the same class that is made on the device.",
            stacklevel=3,
        )
