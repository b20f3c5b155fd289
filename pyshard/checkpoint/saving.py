"""pyshard.save_checkpoint: a new directory, written by all ranks, then one switch of a pointer."""

import io
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.optim import Optimizer

from .._version import __version__
from ..comm import PeerError
from . import files, naming
from .ranks import Ranks, ranks_of


def save_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, opt: Optimizer | None, *, keep: int = 2, **extra: Any
) -> None:
    """Saves model, optimizer and extra values under `path`; all ranks of the optimizer's process group call it.

    With a tensor-parallel model: the ranks of the process groups of all tensor-parallel ranks. The checkpoint gets a
    directory of its own, in the format of torch.distributed.checkpoint, which does not depend on the number of ranks,
    data-parallel or tensor-parallel: it holds whole parameters. Each rank writes its part of them and of the
    optimizer's state, and a share of what all have. When all files are on disk, `path`/latest is replaced in one
    operation. A process that dies before that leaves the previous checkpoint in force, one that dies later the new
    one. The next save removes what dead ones have left.

    Args:
        path: a directory, on a file system that all ranks share; made if it is not there. One training run at a time
            saves into it.
        model: as it is trained; names are those without the wrappers of DDP and torch.compile.
        opt: the optimizer of its parameters; None saves the model alone.
        keep: how many complete checkpoints stay, the new one included.
        extra: other values, by name: what torch.load(weights_only=True) can load. Those of the group's first rank are
            saved. (The state of random number generators is saved if you pass it.)

    Raises:
        ValueError, TypeError: on all ranks, before anything is written.
        pyshard.checkpoint.CheckpointError: on all ranks; one could not write. Older checkpoints are as they were.
        pyshard.comm.PeerError: another rank is lost; names it and what this one was doing.
    """
    ranks = ranks_of("pyshard.save_checkpoint", model, opt)
    root = agreed_path(ranks, path)
    ranks.hint = "Nothing was written."

    def prepare() -> dict[str, Any]:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep={keep!r}; expected a whole number, at least 1.")
        if ranks.first:
            payload.append(_packed(extra))
        return naming.to_save(model, opt)

    payload: list[bytes] = []
    with torch.no_grad():
        saved = ranks.each("looking at model and optimizer", prepare)
        ranks.hint = f"Complete checkpoints in {root} are as they were."
        directory, previous = ranks.by_first("making a directory", lambda: files.begin(root))
        switched: list[bool] = []
        try:
            _write(ranks, directory, previous, saved, payload, switched)
        except PeerError:
            raise  # the others may still be writing; the next save cleans up
        except BaseException:
            if ranks.first and not switched:
                try:
                    files.remove(directory)
                except OSError:
                    pass  # as above
            raise
    if ranks.first:
        try:
            files.prune(directory, keep)
        except OSError as error:
            warnings.warn(
                f"pyshard.save_checkpoint: the new checkpoint is complete, but an old one could not be removed: "
                f"{error}. The next save will try again.",
                stacklevel=2,
            )


def _write(
    ranks: Ranks,
    directory: Path,
    previous: Path | None,
    saved: dict[str, Any],
    payload: list[bytes],
    switched: list[bool],
) -> None:
    folder = files.Folder()
    writer = FileSystemWriter(directory, sync_files=False)  # the folder does, after flushing
    writer.fs = folder
    planner = DefaultSavePlanner()

    def plan() -> SavePlan:
        if not directory.is_dir():
            raise FileNotFoundError(
                f"{directory}, which the first rank has made for this save, is not there. Save to a path on a file "
                "system that all ranks share, into which no other run saves."
            )
        planner.set_up_planner(saved, writer.storage_meta(), ranks.first)
        writer.set_up_storage_writer(ranks.first, rank=ranks.rank, use_collectives=True)
        return writer.prepare_local_plan(planner.create_local_plan())

    def share(plans: list[SavePlan]) -> list[SavePlan]:
        _check_same(ranks, plans)
        return writer.prepare_global_plan(planner.create_global_plan(plans)[0])

    mine = ranks.agree("planning who writes what", plan, share)

    def write() -> tuple[list[WriteResult], dict[str, files.Entry]]:
        results = writer.write_data(planner.finish_plan(mine), planner).wait()
        for data in payload:
            with folder.create_stream(directory / files.EXTRA, "wb") as stream:
                stream.write(data)
        files.sync_directory(directory)  # on each host
        return results, dict(folder.entries)

    def finish(written: list[tuple[list[WriteResult], dict[str, files.Entry]]]) -> list[None]:
        writer.finish(planner.metadata, [results for results, _ in written])
        entries = {name: entry for _, found in written for name, entry in found.items()} | folder.entries
        made_by = {"pyshard": __version__, "torch": torch.__version__, "ranks": ranks.world}
        manifest = {"format": files.FORMAT, **made_by, "block": files.BLOCK, "files": entries}
        files.write_sealed(directory / files.MANIFEST, manifest)
        files.make_ready(directory, previous)
        switched.append(True)  # whatever happens from here on, the directory must not be removed
        files.switch(directory)
        return [None] * ranks.world

    ranks.agree("writing", write, finish)


def _check_same(ranks: Ranks, plans: list[SavePlan]) -> None:
    """Whole tensors that several ranks have are written by one of them, so they must be the same on all, and whole."""
    seen: dict[str, tuple[int, WriteItemType, TensorWriteData]] = {}
    for rank, plan in zip(ranks.ranks, plans, strict=True):
        for item in plan.items:
            if item.type != WriteItemType.BYTE_IO and item.tensor_data is not None:
                other, kind, known = seen.setdefault(item.index.fqn, (rank, item.type, item.tensor_data))
                mine = item.tensor_data
                if kind != item.type:
                    raise ValueError(
                        f"{item.index.fqn} is a part of a tensor on one of the ranks {other} and {rank}, and a whole "
                        "one on the other; expected a model that is cut alike on all ranks."
                    )
                if (known.size, known.properties.dtype) != (mine.size, mine.properties.dtype):
                    raise ValueError(
                        f"{item.index.fqn} is {known.properties.dtype} {tuple(known.size)} on rank {other} and "
                        f"{mine.properties.dtype} {tuple(mine.size)} on rank {rank}; expected the same model on all "
                        "ranks. Save different models to different paths, each over a process group of its own."
                    )


def agreed_path(ranks: Ranks, path: str | os.PathLike[str]) -> Path:
    """The path as an absolute one, the same on all ranks."""

    def same(paths: list[str]) -> list[str]:
        for rank, other in zip(ranks.ranks, paths, strict=True):
            if other != paths[0]:
                raise ValueError(
                    f"path is {other!r} on rank {rank} and {paths[0]!r} on rank {ranks.ranks[0]}; expected the same on "
                    "all ranks, which write one checkpoint together."
                )
        return paths

    return Path(ranks.agree("comparing paths", lambda: os.path.abspath(os.fspath(path)), same))


def _packed(extra: dict[str, Any]) -> bytes:
    """The extra values as torch.save writes them; tried whether they can be loaded."""
    for name, value in extra.items():
        data = io.BytesIO()
        try:
            torch.save(value, data)
            data.seek(0)
            torch.load(data, weights_only=True)
        except (pickle.UnpicklingError, pickle.PicklingError, AttributeError, RuntimeError, TypeError) as error:
            raise TypeError(
                f"the extra value {name} ({type(value).__name__}) cannot be loaded again by "
                f"torch.load(weights_only=True): {str(error).splitlines()[0]}. Expected tensors, numbers, strings, and "
                "lists, tuples and dicts of them. Pass its state_dict(), or a plain form of it."
            ) from error
    data = io.BytesIO()
    torch.save(extra, data)
    return data.getvalue()
