"""Hugging Face safetensors: weights out of and into models of any layout, as transformers writes and reads them.

    path/config.json, generation_config.json
    path/model.safetensors                                       or, if that is larger than a part may be,
    path/model-00001-of-00002.safetensors ... and model.safetensors.index.json, which says what is where

Export goes through a checkpoint beside the target, which all ranks write together and the first one turns into files
of whole tensors, one tensor at a time. A load reads of each file what a rank holds.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.launch import local_tensor
from ..optim.flat_shard import FlatShard
from ..placement import pipeline_share
from . import files, naming
from .contents import Contents, memory_of
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


# ---- export ----


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
    `path` at the very end: a process that is killed leaves no `path`.

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
        return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"), _owners(model)

    def join(found: list[tuple[Path, dict[str, str]]]) -> list[tuple[Path, dict[str, str]]]:
        owners = {name: owner for _, each in found for name, owner in each.items()}
        return [(found[0][0], owners)] * ranks.world

    answer: Any = ranks.agree("looking at the model", look, join)
    temporary, owners = answer
    try:
        if given is None and model is not None:
            ranks.by_first("making a directory", lambda: files.make_directory(temporary))
            save_checkpoint(temporary / "weights", model, None)

        def write() -> None:
            source, manifest, _ = _find(given or temporary / "weights")
            if given is not None:
                files.verify(source, manifest["files"], manifest["block"], 0, 1)
            ready = temporary / "ready"
            files.make_directory(ready)
            converter = _Export(
                Contents(source), owners, getattr(_of_transformers(model), "_keys_to_ignore_on_save", None), dtype
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


def _owners(model: nn.Module | None) -> dict[str, str]:
    """For each name in the model's state_dict, the first of the names of the same tensor in the whole model."""
    if model is None:
        return {}
    inner = naming.unwrapped(model)
    first = {id(p): naming.plain(name) for name, p in (*inner.named_parameters(), *inner.named_buffers())}
    owners = {}
    for name, value in inner.state_dict(keep_vars=True).items():
        share = pipeline_share(value) if isinstance(value, Tensor) else None
        own = naming.plain(name)
        owners[own] = share.name if share is not None else first.get(id(value), own)
    return owners


def _of_transformers(model: nn.Module | None) -> nn.Module | None:
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
    inner = _of_transformers(model)
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


# ---- load ----


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
            return list(source[0].files), _owners(model)

        def choose(found: list[tuple[list[str], dict[str, str]]]) -> list[dict[str, str]]:
            owners = {name: owner for _, each in found for name, owner in each.items()}
            inner = _of_transformers(model)
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
