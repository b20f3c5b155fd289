"""Hugging Face safetensors: the weights of models of any layout as transformers writes them.

    path/config.json, generation_config.json
    path/model.safetensors                                       or, if that is larger than a part may be,
    path/model-00001-of-00002.safetensors ... and model.safetensors.index.json, which says what is where

Export goes through a checkpoint beside the target, which all ranks write together and the first one turns into files
of whole tensors, one tensor at a time.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from ..placement import pipeline_share
from . import files, naming
from .contents import Contents
from .loading import _find
from .ranks import ranks_of
from .saving import agreed_path, save_checkpoint

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# Names of dtypes in the files.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def export_safetensors(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
    config: Any = None,
) -> None:
    """Writes a model's weights as a directory that transformers' from_pretrained(path) loads.

    All ranks of the model call it, whatever holds its parts: tensor-parallel layers, DTensors, the stages of a
    pipeline. Names and bits are those of the unsharded model. A tied weight is written once, under the first of its
    names. Where a class of transformers renames weights of older files when it loads them, the names are the new ones,
    as save_pretrained(save_original_format=False) writes them. The files are written under another name, which becomes
    `path` at the very end: a process that is killed leaves no `path`. One export at a time writes to a target: what
    it finds of others to the same one is of dead ones, and removed.

    The first rank's peak memory is one whole tensor. Disk space: the weights twice for the time of the export, unless
    a checkpoint is given.

    Args:
        path: a new directory, or an empty one, on a file system that all ranks share.
        model: as it is trained. With `checkpoint` it says which names are tied and gives the config, and may be on the
            meta device; without a model, a tied weight is written under all its names.
        checkpoint: one that save_checkpoint has made, in place of the model's present weights.
        max_shard_size: of one file, in bytes or such as "5GB"; a larger tensor gets a file of its own.
        dtype: to which floating-point weights are rounded; None: as they are.
        config: of transformers, in place of model.config.

    Raises:
        ValueError, TypeError: on all ranks; nothing is written.
        FileNotFoundError, CheckpointError: there is no such checkpoint, it is damaged, or a rank could not write.
        pyshard.comm.PeerError: another rank is lost.
    """
    who = "pyshard.export_safetensors"
    if model is None and checkpoint is None:
        raise ValueError(f"{who}: neither a model nor a checkpoint is given; expected one of them.")
    ranks = ranks_of(who, nn.Module() if model is None else model, None)
    ranks.hint = "Nothing was written."
    target = agreed_path(ranks, path)
    given = None if checkpoint is None else agreed_path(ranks, checkpoint)

    def look() -> tuple[Path, dict[str, str]]:
        _size(max_shard_size)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in _DTYPES and dtype.is_floating_point):
            raise ValueError(f"dtype={dtype!r}; expected a floating-point torch.dtype, or None.")
        if ranks.first and target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(
                f"{target} exists and is not empty; expected a new directory. Choose another, or remove it."
            )
        return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"), owners_of(model)

    def join(found: list[tuple[Path, dict[str, str]]]) -> list[tuple[Path, dict[str, str]]]:
        owners = {name: owner for _, each in found for name, owner in each.items()}
        return [(found[0][0], owners)] * ranks.world

    answer: Any = ranks.agree("looking at the model", look, join)
    temporary, owners = answer
    try:
        ranks.by_first("making a directory", lambda: _make_temporary(temporary, target))
        if given is None and model is not None:
            save_checkpoint(temporary / "weights", model, None)

        def write() -> None:
            source, manifest, _ = _find(given or temporary / "weights")
            if given is not None:
                files.verify(source, manifest["files"], manifest["block"], 0, 1)
            ready = temporary / "ready"
            files.make_directory(ready)
            converter = _Export(
                Contents(source), owners, getattr(of_transformers(model), "_keys_to_ignore_on_save", None), dtype
            )
            _write_config(ready, model, config, converter.dtype)
            converter.write(ready, _size(max_shard_size))
            files.sync_directory(ready)
            files.make_directory(target.parent)
            os.rename(ready, target)
            files.sync_directory(target.parent)

        ranks.hint = f"{target} was not written."
        ranks.by_first("writing", write)
    finally:
        if ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)


def _make_temporary(temporary: Path, target: Path) -> None:
    """Makes the hidden directory of an export, and removes those that killed ones to the same target have left."""
    if target.parent.is_dir():
        name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
        for left in target.parent.iterdir():
            if name.fullmatch(left.name):
                shutil.rmtree(left, ignore_errors=True)
    files.make_directory(temporary)


def owners_of(model: nn.Module | None) -> dict[str, str]:
    """For each name in the model's state_dict, the first of the names of the same tensor in the whole model."""
    if model is None:
        return {}
    inner = naming.unwrapped(model)
    first = {id(p): naming.plain(name) for name, p in (*inner.named_parameters(), *inner.named_buffers())}
    owners = {}
    for name, value in inner.state_dict(keep_vars=True).items():
        share = pipeline_share(value) if isinstance(value, Tensor) else None
        own = naming.plain(name)
        owners[own] = naming.plain(share.name) if share is not None else first.get(id(value), own)
    return owners


def of_transformers(model: nn.Module | None) -> nn.Module | None:
    """The module that has the config: the model itself, or what a stage of a pipeline is made of."""
    modules = () if model is None else naming.unwrapped(model).modules()
    return next((module for module in modules if hasattr(getattr(module, "config", None), "save_pretrained")), None)


def _size(text: int | str) -> int:
    """Bytes, of a number or such as "5GB"."""
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)", text.upper()) if isinstance(text, str) else None
    if found is None or not float(found[1]):
        raise ValueError(f"max_shard_size={text!r}; expected a number of bytes, or such as '5GB', '200MB' or '2GiB'.")
    return int(float(found[1]) * _UNITS[found[2]])


class _Tensor(NamedTuple):
    """One that goes into a file."""

    name: str
    key: str  # in the checkpoint
    stored: torch.dtype
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class _Export:
    """The weights of a checkpoint as files of whole tensors.

    Args:
        owners: for each name the first of the same tensor; names that are not there stand for themselves.
        ignored: patterns of names that are not saved.
        dtype: of floating-point weights; None: as stored.
    """

    def __init__(
        self, contents: Contents, owners: dict[str, str], ignored: Iterable[str] | None, dtype: torch.dtype | None
    ):
        self.contents, self.tensors = contents, list[_Tensor]()
        found = {".".join(map(str, path)): item for path, item in contents.below("model").items()}
        order = [name for name in owners if name in found] + [name for name in found if name not in owners]
        for name in order:
            owner, item = owners.get(name, name), found[name]
            if (owner != name and owner in found) or any(re.search(pattern, name) for pattern in ignored or ()):
                continue
            if item.tensor is None:
                raise ValueError(f"{name} of the model is no tensor; expected tensors only, all that safetensors hold.")
            stored = item.tensor.properties.dtype
            made = dtype if dtype is not None and stored.is_floating_point else stored
            if made not in _DTYPES:
                raise ValueError(f"{name} is {made}; expected one of {', '.join(map(str, _DTYPES))}.")
            self.tensors.append(_Tensor(name, item.key, stored, made, tuple(item.tensor.size)))
        floating = (tensor.dtype for tensor in self.tensors if tensor.dtype.is_floating_point)
        self.dtype = next(floating, None)

    def write(self, folder: Path, limit: int) -> None:
        """The files; an index if they are several."""
        parts = self._parts(limit)
        names = [SINGLE]
        if len(parts) > 1:
            names = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
        for name, part in zip(names, parts, strict=True):
            with open(folder / name, "wb") as file:
                self._write_part(file, part)
                files.sync_file(file)
        if len(parts) > 1:
            where = {tensor.name: name for name, part in zip(names, parts, strict=True) for tensor in part}
            total = {
                "total_parameters": sum(torch.Size(t.shape).numel() for t in self.tensors),
                "total_size": sum(t.nbytes for t in self.tensors),
            }
            with open(folder / INDEX, "wb") as file:
                index = {"metadata": total, "weight_map": where}
                file.write(json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")
                files.sync_file(file)

    def _parts(self, limit: int) -> list[list[_Tensor]]:
        """In the model's order, as many tensors to a file as fit; what is too large for any gets one of its own."""
        parts: list[list[_Tensor]] = []
        here: list[_Tensor] = []
        for tensor in self.tensors:
            if tensor.nbytes > limit:
                parts.append([tensor])
                continue
            if sum(t.nbytes for t in here) + tensor.nbytes > limit:
                parts.append(here)
                here = []
            here.append(tensor)
        return [*parts, here] if here or not parts else parts

    def _write_part(self, file: BinaryIO, part: Sequence[_Tensor]) -> None:
        """Length of the header, header, bytes of the tensors; the largest dtypes first, so that all are aligned."""
        part = sorted(part, key=lambda t: (-t.dtype.itemsize, str(t.dtype), t.name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in part:
            begin, end = end, end + tensor.nbytes
            header[tensor.name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in part:
            value = torch.empty(tensor.shape, dtype=tensor.stored)
            self.contents.read({tensor.key: value})
            if tensor.nbytes:
                file.write(value.to(tensor.dtype).reshape(-1).view(torch.uint8).numpy().data)


def _write_config(folder: Path, model: nn.Module | None, config: Any, dtype: torch.dtype | None) -> None:
    """config.json and generation_config.json, of a model of transformers."""
    inner = of_transformers(model)
    config = config if config is not None else getattr(inner, "config", None)
    if not hasattr(config, "save_pretrained"):
        return
    config = copy.deepcopy(config)
    if dtype is not None:
        config.dtype = str(dtype).removeprefix("torch.")
    if inner is not None:
        config.architectures = [type(inner).__name__.removeprefix("FSDP")]  # torch's fully_shard makes such a class
    config.save_pretrained(folder)
    generation = getattr(inner, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
