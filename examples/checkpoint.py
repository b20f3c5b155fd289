"""Checkpoints of the demo: a directory that all ranks write together, or one file of a single process.

Either is resumed by any number of ranks, by pyshard's optimizers and by torch's.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from gpt import GPT
from group import WORLD
from report import Run

from pyshard import Adam, AdamW, load_checkpoint, save_checkpoint


def save(path: Path, run: Run, **extra: Any) -> None:
    """Writes model, optimizer, scheduler and extra values; all ranks call it."""
    extra["scheduler"] = run.scheduler.state_dict()
    if WORLD > 1:
        save_checkpoint(path, run.model, run.optimizer, **extra)
    else:  # in the layout of torch, for torch.optim.AdamW to load
        torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), **extra}, path)


def read(path: Path, model: GPT) -> dict[str, Any]:
    """The extra values that were saved; a file gives all that it has. The model, one like that of the checkpoint, is
    overwritten or left."""
    return load_checkpoint(path, model, None) if path.is_dir() else torch.load(path, weights_only=True)


def load(path: Path, saved: dict[str, Any], run: Run) -> None:
    """Brings a run to where the checkpoint is; all ranks call it. `saved`: what read() gave."""
    if not path.is_dir():
        run.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(deepcopy(saved["optimizer"]))  # torch keeps the tensors that it is given
    elif isinstance(run.optimizer, Adam):
        load_checkpoint(path, run.model, run.optimizer)
    else:  # torch's own sharded optimizer takes whole state, in the layout of torch
        whole = AdamW(run.model.parameters())
        load_checkpoint(path, run.model, whole)
        run.optimizer.load_state_dict(whole.state_dict())
    run.scheduler.load_state_dict(saved["scheduler"])
