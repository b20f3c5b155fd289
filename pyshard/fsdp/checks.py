"""What full sharding asks of a model, its options and the ranks of a mesh, before anything is changed."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, OffloadPolicy

from ..comm import agree as agreements

WHO = "pyshard.fully_shard"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def inner_model(root: nn.Module) -> nn.Module:
    """What the stage of a pipeline is made of; another module itself."""
    found = getattr(root, "model", root) if type(root).__module__.startswith("pyshard.pp") else root
    return found if isinstance(found, nn.Module) else root


def check_model(model: nn.Module) -> None:
    """A module that is not sharded yet."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{WHO}: model is a {type(model).__name__}; expected an nn.Module.")
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            raise ValueError(f"{WHO}: {name or 'the model'} is sharded already; expected a model that is not.")


def check_options(options: dict[str, Any], ranks: int) -> None:
    """Arguments by name, for a mesh that cuts over so many ranks; words in the place of the offload policy."""
    for name in ("param_dtype", "reduce_dtype", "output_dtype"):
        if options[name] is not None and not isinstance(options[name], torch.dtype):
            raise TypeError(f"{WHO}: {name}={options[name]!r}; expected a torch.dtype, or None.")
    reshard, offload = options["reshard_after_forward"], options["cpu_offload"]
    if reshard is not None and not isinstance(reshard, bool | int):
        raise TypeError(f"{WHO}: reshard_after_forward={reshard!r}; expected True, False, a number of ranks, or None.")
    if isinstance(reshard, int) and not isinstance(reshard, bool) and (reshard < 1 or ranks % reshard):
        raise ValueError(
            f"{WHO}: reshard_after_forward={reshard}; expected a divisor of the {ranks} ranks of the mesh."
        )
    if not isinstance(offload, bool | OffloadPolicy):
        raise TypeError(
            f"{WHO}: cpu_offload={offload!r}; expected True, False, or a torch.distributed.fsdp.CPUOffloadPolicy."
        )


def check_units(root: nn.Module, units: list[tuple[str, nn.Module]], ignored: set[nn.Parameter]) -> None:
    """Every parameter can be cut and has one unit; those that a unit trains have one dtype; units can be called."""
    for name, module in [*units, ("the model", root)]:
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and type(module).forward is nn.Module.forward:
            raise ValueError(
                f"{WHO}: {name} is a {type(module).__name__}, which is not called itself, so nothing would gather its "
                "parameters; expected modules with a forward. Choose those inside of it, or the model around it."
            )
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
            _check_param(full, param)
            known = taken.setdefault(id(param), (param, name))[1]
            if known != name:
                raise ValueError(
                    f"{WHO}: {full}, in {name or 'no unit'}, is tied to a weight in {known or 'no unit'}; expected "
                    "tied weights in one unit. Choose units that hold both or none."
                )
            if param.requires_grad:
                dtypes.setdefault(name, {}).setdefault(param.dtype, full)
    for name, found in dtypes.items():
        if len(found) > 1:
            told = " and ".join(f"{full} ({dtype})" for dtype, full in list(found.items())[:2])
            raise ValueError(
                f"{WHO}: the unit {name or 'of what is outside of the blocks'} trains parameters of several dtypes: "
                f"{told}; expected one. Use model.to(dtype), or units that hold one dtype each."
            )


def _check_param(name: str, param: nn.Parameter) -> None:
    if getattr(param, "main_grad", False):
        raise ValueError(
            f"{WHO}: {name} keeps its own fp32 gradient (main_grad=True), which full sharding would drop; gradients "
            "are summed in reduce_dtype here. Call tp.parallelize without main_grad."
        )
    if not param.dim():
        raise ValueError(
            f"{WHO}: {name} has no dimensions; expected one at least, to cut along. Give it the shape (1,), or name it "
            "in ignored_params."
        )
    if not param.is_contiguous():
        raise ValueError(
            f"{WHO}: {name}, of shape {tuple(param.shape)} and strides {tuple(param.stride())}, is not contiguous; "
            "expected rows one after another. Use param.data = param.data.contiguous()."
        )


def agree(model: nn.Module, mesh: DeviceMesh, error: Exception | None, options: dict[str, Any]) -> None:
    """Raises on all ranks of the mesh if one of them has an error, another model or other options."""
    message = None if error is None else f"{type(error).__name__}: {error}"
    words = {name: _words(value) for name, value in options.items()}
    known: list[Any] = [(torch.distributed.get_rank(), message, words, {} if error else _fingerprint(model))]
    for group in mesh.get_all_groups():
        gathered = agreements.objects(WHO, group, "the comparison of models, in fully_shard", known)
        known = [entry for part in gathered for entry in part]
    if error is not None:
        raise error
    for rank, its_message, its_words, prints in known:
        if its_message is not None:
            raise RuntimeError(f"{WHO}: rank {rank} stopped with {its_message}")
        for name, word in words.items():
            if its_words[name] != word:
                raise ValueError(
                    f"{WHO}: rank {rank} was called with {name}={its_words[name]}, this rank with {word}; expected the "
                    "same on all ranks."
                )
        first = known[0][3]
        differing = [key for key in {**first, **prints} if first.get(key) != prints.get(key)]
        if differing:
            raise ValueError(
                f"{WHO}: {len(differing)} parameters of rank {rank} differ from rank {known[0][0]}'s, the first "
                f"{differing[0]}; expected the same model on all ranks, of which each keeps its part. Load the same "
                "weights, or seed all ranks alike before building it."
            )


def _words(value: Any) -> str:
    if isinstance(value, OffloadPolicy):
        return f"{type(value).__name__}({vars(value) or ''})"
    return repr(value)


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
