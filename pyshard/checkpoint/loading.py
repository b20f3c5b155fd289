"""pyshard.load_checkpoint: all checks first, then in place, at any number of ranks."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from . import files, naming, stages, state
from .contents import Contents
from .ranks import Ranks, ranks_of
from .saving import agreed_path


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module, opt: Optimizer | None) -> dict[str, Any]:
    """Loads what save_checkpoint has saved, in place; all ranks that hold a part call it, as they call save_checkpoint.

    The number of ranks (data-parallel, tensor-parallel, pipeline), how parameters are cut over them, the optimizer's
    class (pyshard.AdamW, ShardedAdamW, torch.optim.AdamW), its cut, the layout of tensors in memory and the kind of
    master weights may differ from those of the save. State goes into the tensors that are there, or into new ones, one
    parameter at a time: besides the state, memory is needed for one or two of the pieces in which tensors were saved,
    and for the fp32 master of one parameter where weights are split.

    Args:
        path: where save_checkpoint has saved, for the newest checkpoint; or one of the directories there.
        model, opt: those to load into; None for the optimizer loads the model alone.

    Returns:
        the extra values that were passed to save_checkpoint; tensors on the CPU.

    Raises:
        FileNotFoundError: there is no complete checkpoint; a save may have begun.
        pyshard.checkpoint.CheckpointError: a file is missing or damaged (every byte is checked); names it, and the
            other complete checkpoints. `path`/latest, too, is one that must not be missing where checkpoints are.
        ValueError: the checkpoint is of another model or optimizer, or was made by a newer pyshard.
        pyshard.comm.PeerError: another rank is lost.
        All of them on all ranks, and before anything is changed.

    Load only what you trust: torch.distributed.checkpoint keeps a pickle in its files.
    """
    ranks = ranks_of("pyshard.load_checkpoint", model, opt)
    ranks.hint = "Nothing was changed."
    root = agreed_path(ranks, path)
    directory, manifest, others = ranks.by_first("looking for the checkpoint", lambda: _find(root))
    if others:
        ranks.hint += f" {files.in_words(others)}."
    listed, block = manifest["files"], manifest["block"]
    ranks.each("checking its files", lambda: files.verify(directory, listed, block, ranks.rank, ranks.world))
    ranks.hint = "Nothing was changed."

    whole = ranks.agree("comparing names", lambda: stages.held(model, opt), lambda found: _union(ranks, found))

    def look() -> tuple[state.ModelLoad, state.OptimizerLoad | None, dict[str, Any]]:
        contents = Contents(directory)
        extra = torch.load(directory / files.EXTRA, map_location="cpu", weights_only=True)
        weights = state.ModelLoad(model, contents, whole)
        return weights, None if opt is None else state.OptimizerLoad(model, opt, contents, whole), extra

    of_model, of_optimizer, extra = ranks.each("comparing it with model and optimizer", look)
    ranks.hint = "Model and optimizer are partly loaded: load a checkpoint before you use them."

    def load() -> str:
        naming.settle(opt)
        of_model.run()
        return "" if of_optimizer is None else of_optimizer.run()

    warning = ranks.each("loading", load)
    if warning:
        warnings.warn(f"pyshard.load_checkpoint: {warning}", stacklevel=2)
    return extra


def _union(ranks: Ranks, found: list[stages.Held]) -> list[stages.Held]:
    """What all stages have together. Without a pipeline each rank compares what it has with the checkpoint."""
    if all(held.stages == 1 for held in found):
        return found
    return [stages.together(ranks.ranks, [held._replace(settings=[]) for held in found])] * ranks.world


def _find(root: Path) -> tuple[Path, dict[str, Any], list[Path]]:
    """The directory of the checkpoint, its manifest, and the other checkpoints there are."""
    directory = root
    if not (root / files.MANIFEST).exists() and not (files.number(root) and root.is_dir()):
        newest = files.newest(root)
        complete = [] if (root / files.POINTER).exists() else files.complete(root)
        if newest is None and complete:
            raise RuntimeError(
                f"{root / files.POINTER}, which names the newest complete checkpoint, is missing. "
                f"{files.in_words(complete)}. The next save makes that file anew"
            )
        if newest is None:
            raise FileNotFoundError(
                f"{root} has no complete checkpoint; expected a path where save_checkpoint has saved, with a file "
                f"{files.POINTER!r}, or one of the directories there."
            )
        directory = newest
    others = files.others(directory)
    try:
        return directory, files.unseal(directory / files.MANIFEST), others
    except FileNotFoundError:
        raise RuntimeError(f"{directory / files.MANIFEST} is missing. {files.in_words(others)}") from None
    except RuntimeError as error:
        raise RuntimeError(f"{error}. {files.in_words(others)}") from None
