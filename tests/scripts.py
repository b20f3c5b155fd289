"""Runs an example on several ranks, as torchrun would, but in processes that have imported torch already."""

import contextlib
import io
import os
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import ranks

EXAMPLES = Path(__file__).parents[1] / "examples"
Look = Callable[[dict[str, Any]], Any]


def _run(rank: int, world: int, port: int, path: str, arguments: tuple[str, ...], look: Look | None) -> tuple[str, Any]:
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = [path, *arguments]
    seen: list[Any] = []
    leave = dist.destroy_process_group

    def look_and_leave() -> None:
        if look is not None:
            seen.append(look(sys._getframe(1).f_locals))
        leave()

    dist.destroy_process_group = look_and_leave
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(path, run_name="__main__")
    return output.getvalue(), seen[0] if seen else None


def run(
    path: Path, world: int, *arguments: str, look: Look | None = None, seconds: float = 90
) -> list[tuple[str, Any]]:
    """What each rank has printed, and what look() finds in its variables where it leaves the process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outcomes = ranks.run(_run, world, port, str(path), arguments, look, group=False, seconds=seconds)
    return [outcome.value for outcome in outcomes]
