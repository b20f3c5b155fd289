"""Hugging Face safetensors into models of any layout: each rank reads of the files what it holds."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.launch import local_tensor
from ..optim.flat_shard import FlatShard
from . import naming
from .contents import memory_of
from .ranks import ranks_of
from .safetensors import INDEX, SINGLE, of_transformers, owners_of
from .saving import agreed_path


def load_safetensors(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Loads weights that transformers' save_pretrained or export_safetensors has written, in place.

    All ranks of the model call it, whatever holds its parts, as for export_safetensors; each reads what it holds.
    Values are rounded to the model's dtype where the files' is another. A tied weight may be there under any or all of
    its names. Names may lack the prefix that transformers puts before those of the base model ("transformer."), and
    what the model's class says that it ignores (`_keys_to_ignore_on_load_unexpected`) is left out.

    An optimizer that keeps masters in higher precision counts these weights as new at its next step; its moments stay.
    Pass a model whose parameters are not on their way from other ranks: call the optimizer's synchronize() first.

    Args:
        path: a directory with model.safetensors, or with model.safetensors.index.json and its parts; or one file.
        model: to load into.

    Raises:
        ImportError: the package safetensors is missing.
        FileNotFoundError: there are no such files.
        ValueError: names are missing or unknown, shapes differ, or a file is damaged.
        pyshard.checkpoint.CheckpointError: a rank could not read.
        pyshard.comm.PeerError: another rank is lost.
        All of them on all ranks, and before anything is changed, unless reading itself fails.
    """
    who = "pyshard.load_safetensors"
    ranks = ranks_of(who, model, None)
    ranks.hint = "Nothing was changed."
    root = agreed_path(ranks, path)
    with ExitStack() as stack:

        def look() -> tuple[list[str], dict[str, str]]:
            source.append(_Source(root, stack))
            held.update(_held(model))
            return list(source[0].files), owners_of(model)

        def choose(found: list[tuple[list[str], dict[str, str]]]) -> list[dict[str, str]]:
            owners = {name: owner for _, each in found for name, owner in each.items()}
            inner = of_transformers(model)
            prefix = str(getattr(inner, "base_model_prefix", "") or "")
            ignored = getattr(inner, "_keys_to_ignore_on_load_unexpected", None) or ()
            return [_sources(found[0][0], owners, prefix, ignored)] * ranks.world

        source: list[_Source] = []
        held: dict[str, Tensor] = {}
        answer: Any = ranks.agree("looking at the files", look, choose)
        names: dict[str, str] = answer
        ranks.each("comparing them with the model", lambda: source[0].check(held, names))
        ranks.hint = "The model is partly loaded: load it again before you use it."
        ranks.each("loading", lambda: _load(source[0], model, held, names))


def _held(model: nn.Module) -> dict[str, Tensor]:
    """What this rank holds, by name: tensors that know which parts of whole ones they are."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.device.type == "meta":
            raise ValueError(
                f"{name} of the model is on the meta device; expected one with memory. Materialize the model first: "
                "model.to_empty(device=...)."
            )
    return naming.to_save(model, None)["model"]


class _Source:
    """Files of safetensors.

    Attributes:
        files: for each name the open file that has it.
    """

    def __init__(self, root: Path, stack: ExitStack):
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise ImportError(
                "the package safetensors cannot be imported; expected it beside pyshard. pip install safetensors"
            ) from error
        self.files: dict[str, Any] = {}
        opened: dict[Path, Any] = {}
        for path, names in self._paths(root):
            try:
                file = opened[path] = stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged or no file of safetensors ({error}).") from error
            inside = set(file.keys())
            missing = [name for name in names or () if name not in inside]
            if missing:
                raise ValueError(f"{path} has no {_some(missing)}; expected it, as {INDEX} says.")
            self.files |= dict.fromkeys(names or file.keys(), file)

    @staticmethod
    def _paths(root: Path) -> list[tuple[Path, list[str] | None]]:
        """Files, and which names of them count; None: all."""
        if root.is_file():
            return [(root, None)]
        if (root / SINGLE).is_file():
            return [(root / SINGLE, None)]
        try:
            where: dict[str, str] = json.loads((root / INDEX).read_text())["weight_map"]
        except FileNotFoundError:
            raise FileNotFoundError(f"{root} has neither {SINGLE} nor {INDEX}; expected one of them.") from None
        parts: dict[str, list[str]] = {}
        for name, part in where.items():
            parts.setdefault(part, []).append(name)
        for part in parts:
            if not (root / part).is_file():
                raise FileNotFoundError(f"{root / part} is missing, which {INDEX} names.")
        return [(root / part, names) for part, names in parts.items()]

    def check(self, held: dict[str, Tensor], names: dict[str, str]) -> None:
        for name, value in held.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} of the model is no tensor; expected tensors only, all that safetensors hold.")
            shape = tuple(self.files[names[name]].get_slice(names[name]).get_shape())
            if shape != tuple(value.shape):
                raise ValueError(f"{name} has shape {shape} in the files; expected {tuple(value.shape)}.")
            if name in self.files and names[name] != name:  # a tied weight that is there twice
                for offsets, part in memory_of(name, value):
                    one, other = (self.read(n, offsets, part.shape) for n in (name, names[name]))
                    if not torch.equal(one, other):
                        raise ValueError(
                            f"{name} and {names[name]} are one tensor in the model and have different values in the "
                            "files; expected the same. Load them into a model whose weights are not tied."
                        )

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A rectangle of a tensor."""
        file = self.files[name]
        if not offsets or not all(sizes):
            return file.get_tensor(name).reshape(tuple(sizes))
        part = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        return file.get_slice(name)[part]


def _sources(present: list[str], owners: dict[str, str], prefix: str, ignored: Iterable[str]) -> dict[str, str]:
    """For each name of the whole model, the name in the files under which its values are."""
    known = {name: name for name in present}
    if prefix and not any(name.startswith(f"{prefix}.") for name in present):
        known = {name if name in owners else f"{prefix}.{name}": name for name in present}
    same: dict[str, list[str]] = {}
    for name, owner in owners.items():
        same.setdefault(owner, []).append(name)
    found = {}
    for name, owner in owners.items():
        source = next((other for other in (owner, name, *same[owner]) if other in known), None)
        if source is not None:
            found[name] = known[source]
    missing = [name for name in owners if name not in found]
    unknown = [
        known[name] for name in known if name not in owners and not any(re.search(p, known[name]) for p in ignored)
    ]
    if missing or unknown:
        said = [f"no {_some(missing)}"] * bool(missing) + [f"{_some(unknown)}, which the model does not have"] * bool(
            unknown
        )
        raise ValueError(f"the files have {' and '.join(said)}; expected the names of the model they are loaded into.")
    return found


@torch.no_grad()
def _load(source: _Source, model: nn.Module, held: dict[str, Tensor], names: dict[str, str]) -> None:
    own = naming.state_of(model)
    for name, value in held.items():
        for offsets, part in memory_of(name, value):
            if part.numel():
                part.copy_(source.read(names[name], offsets, part.shape))
        if isinstance(value, FlatShard) and value.local.numel():
            kept = local_tensor(own[name])
            if value.local.data_ptr() != kept.data_ptr():  # not dense: it was read into a copy
                kept.copy_(value.as_part())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" (and {len(names) - 3} more)" if len(names) > 3 else "")
