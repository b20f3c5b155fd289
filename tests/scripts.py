"""Runs an example on several ranks, as torchrun would, but in processes that have imported torch already."""

import contextlib
import io
import os
import runpy
import socket
import sys
from pathlib import Path

from tests import ranks

EXAMPLES = Path(__file__).parents[1] / "examples"


def _run(rank: int, world: int, port: int, path: str, arguments: tuple[str, ...], keep: tuple[str, ...]) -> object:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = [path, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        left = runpy.run_path(path, run_name="__main__")
    return output.getvalue(), {name: left[name] for name in keep}


def run(path: Path, world: int, *arguments: str, keep: tuple[str, ...] = (), seconds: float = 60) -> list[tuple]:
    """What each rank has printed, and these of its global variables at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outcomes = ranks.run(_run, world, port, str(path), arguments, keep, group=False, seconds=seconds)
    return [outcome.value for outcome in outcomes]
