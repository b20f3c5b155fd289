"""The processes that train together: one rank each under torchrun, or this one alone without it."""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

RANK = int(os.environ.get("RANK", "0"))
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
FIRST = RANK == 0


def join() -> None:
    """Connects the ranks. Only the first one prints from here on; errors of all of them are seen."""
    if WORLD > 1:
        dist.init_process_group("gloo")
    if not FIRST:
        sys.stdout = open(os.devnull, "w")


def leave() -> None:
    if WORLD > 1:
        dist.destroy_process_group()


def wait() -> None:
    """Returns when all ranks have come here."""
    if WORLD > 1:
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """The value of every rank, on all of them."""
    if WORLD == 1:
        return [value]
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


def together(check: Callable[[], None]) -> None:
    """Runs a check on each rank. A ValueError of one of them is raised on all, so that none waits for it."""
    try:
        check()
        problem = None
    except ValueError as error:
        problem = str(error)
    for found in gather(problem):
        if found is not None:
            raise ValueError(found)
