"""The parent of a distributed benchmark: starts one process per rank, keeps them, and tells all of them what to do.

The processes hold every contestant at once, so that a round can let each of them train in turn, as harness.py does
for the other benchmarks.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks import machine

START_SECONDS, CALL_SECONDS, GRACE_SECONDS = 120.0, 240.0, 15.0

# A way to start the command of each rank somewhere else than on this host; see Ranks.
Start = Callable[[Sequence[Sequence[str]], Any, Path], list[subprocess.Popen[Any]]]


def start_here(commands: Sequence[Sequence[str]], log: Any, folder: Path) -> list[subprocess.Popen[Any]]:
    """All ranks on this host."""
    return [subprocess.Popen(c, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log) for c in commands]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ranks:
    """`world` processes in one gloo group, each with one thread on one core. A context manager: it ends them.

    Args:
        start: starts the commands (one per rank) in a folder, with their output in the given file.
        master, port, interfaces: where rank 0 listens, and the network device of each rank.
    """

    def __init__(
        self,
        world: int,
        start: Start = start_here,
        master: str = "127.0.0.1",
        port: int = 0,
        interfaces: tuple[str, ...] = (),
    ):
        self.world = world
        self._broken = ""
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        self._processes: list[subprocess.Popen[Any]] = []
        self._connections: list[Connection] = []
        try:
            with Listener(str(Path(self._folder.name) / "socket"), "AF_UNIX", backlog=world) as listener:
                self._start(listener, start, interfaces or ("lo",) * world, master, port or free_port())
        except BaseException:
            self.close()
            raise

    def _start(self, listener: Listener, start: Start, devices: Sequence[str], master: str, port: int) -> None:
        shared = {"world": self.world, "master": master, "port": port, "socket": listener.address}
        specs = [{"rank": rank, "interface": device, **shared} for rank, device in enumerate(devices)]
        commands = [[sys.executable, "-m", "benchmarks.distributed_worker", json.dumps(spec)] for spec in specs]
        with self._log.open("wb") as log:
            self._processes = start(commands, log, machine.ROOT)
        self._accept(listener)

    def _accept(self, listener: Listener) -> None:
        deadline = time.monotonic() + START_SECONDS
        listener._listener._socket.settimeout(1.0)  # type: ignore[attr-defined]  # there is no public time limit
        found: dict[int, Connection] = {}
        while len(found) < self.world:
            try:
                connection = listener.accept()
                found[connection.recv()] = connection
            except (TimeoutError, EOFError):
                if time.monotonic() > deadline or any(p.poll() is not None for p in self._processes):
                    raise RuntimeError(f"ranks did not start; {self._tail()}") from None
        self._connections = [found[rank] for rank in range(self.world)]

    def call(self, key: str, what: str, seconds: float = CALL_SECONDS, **arguments: Any) -> list[Any]:
        """What every rank answers. RuntimeError if one fails; if one does not answer, all are ended."""
        if self._broken:
            raise RuntimeError(f"the ranks were ended: {self._broken}")
        for connection in self._connections:
            connection.send((key, what, arguments))
        deadline, values, failures = time.monotonic() + seconds, [], []
        for rank, connection in enumerate(self._connections):
            try:
                if not connection.poll(max(deadline - time.monotonic(), 0)):
                    raise EOFError
                state, value = connection.recv()
            except (EOFError, ConnectionError):
                self._broken = "; ".join([*failures, f"{what} of {key!r}: rank {rank} does not answer"])
                tail = self._tail()
                self.close()
                raise RuntimeError(f"{self._broken}; {tail}") from None
            if state == "failed":
                failures.append(f"rank {rank}: {value}")
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)  # it may have left its peers waiting
            values.append(value)
        if failures:
            raise RuntimeError("; ".join(failures))
        return values

    def _tail(self) -> str:
        try:
            return "the log ends: " + " | ".join(self._log.read_text(errors="replace").splitlines()[-8:])
        except OSError:
            return "no log"

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self._connections = []
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self._processes:
            try:
                process.wait(0.0 if self._broken else max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes = []
        self._folder.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
