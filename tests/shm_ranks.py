"""Runs a test's function as the ranks of a group: real processes over gloo, with a hard time limit.

run_ranks() asks a server, a process that has imported torch once, to fork the ranks of one run. A killed rank stays
unreaped until all ranks of its run have ended, as it would under a launcher that is busy. A rank's function takes a
Rank and returns what can be pickled; what it raises comes back too.
"""

import atexit
import ctypes
import faulthandler
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pyshard.comm import PeerError
from pyshard.comm.shm import ShmTransport

TESTS = Path(__file__).parent
KILLED = -signal.SIGKILL


@dataclass
class Result:
    """How a rank has ended: what its function returned, and its exit code (negative: the signal)."""

    value: object
    exit: int


class Rank:
    """What a rank's function gets: who it is, and a folder that all ranks share."""

    def __init__(self, rank: int, world: int, folder: Path):
        self.rank, self.world, self.folder = rank, world, folder

    def transport(self, timeout: float = 30) -> ShmTransport:
        transport = ShmTransport.create(None, timeout)
        assert not isinstance(transport, str), transport
        return transport

    def die(self) -> None:
        """Ends this process as the kernel's out-of-memory killer would, and notes when."""
        (self.folder / "died").write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)

    def die_in(self, seconds: float) -> None:
        later(seconds, self.die)

    def died(self) -> float:
        return float((self.folder / "died").read_text())

    def lost(self, call: Callable[[], object]) -> dict:
        """The PeerError that a call raises, and when."""
        with pytest.raises(PeerError) as caught:
            call()
        error = caught.value
        return {"rank": error.rank, "operation": error.operation, "text": str(error), "at": time.monotonic()}

    def wait_for(self, name: str) -> str:
        """The text of a file that another rank writes with tell()."""
        path = self.folder / name
        while not path.exists():
            time.sleep(0.005)
        return path.read_text()

    def tell(self, name: str, text: object = "") -> None:
        aside = self.folder / f"{name}.{self.rank}"
        aside.write_text(str(text))
        aside.rename(self.folder / name)


def later(seconds: float, call: Callable[[], object]) -> None:
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()


def run_ranks(function: Callable, world: int, *arguments: object, limit: float = 60) -> list[Result]:
    """Runs function(Rank, *arguments) on each rank; fails the test if a rank raises or outlives the limit (seconds)."""
    with tempfile.TemporaryDirectory(prefix="pyshard-ranks-") as folder:
        order = {
            **{"module": function.__module__, "function": function.__name__, "arguments": arguments},
            **{"world": world, "limit": limit, "folder": folder},
        }
        exits = _server().ask(order, limit + 30)
        results, problems = [], []
        for rank, exit in enumerate(exits):
            value, error = None, ""
            path = Path(folder, f"result.{rank}")
            if path.exists():
                value, error = pickle.loads(path.read_bytes())
            results.append(Result(value, exit))
            if exit != 0 and exit != KILLED:
                log = Path(folder, f"log.{rank}").read_text()
                problems.append(f"rank {rank} ended with {exit}\n{error}{log}")
        assert not problems, "\n".join(problems)
        return results


class Server:
    """The process that forks ranks, as the test session sees it."""

    def __init__(self) -> None:
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, sys.path)), OMP_NUM_THREADS="1")
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def ask(self, order: dict, limit: float) -> list[int]:
        killer = threading.Timer(limit, self.process.kill)  # its children die with it
        killer.start()
        try:
            print(json.dumps(order), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        finally:
            killer.cancel()
        assert answer, f"the server of the ranks has ended ({self.process.wait()})"
        return json.loads(answer)


_servers: list[Server] = []


def _server() -> Server:
    if not _servers or _servers[0].process.poll() is not None:
        _servers[:] = [Server()]
        atexit.register(_servers[0].process.kill)
    return _servers[0]


def _serve() -> None:
    _die_with_parent()
    for line in sys.stdin:
        exits = _run(json.loads(line))
        print(json.dumps(exits), flush=True)


def _run(order: dict) -> list[int]:
    """Forks the ranks, waits for them (killing those that outlive the limit), and returns their exit codes."""
    pids = []
    for rank in range(order["world"]):
        pid = os.fork()
        if pid == 0:
            _be_rank(rank, order)
        pids.append(pid)
    deadline = time.monotonic() + order["limit"]
    running = set(pids)
    while running:
        for pid in list(running):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                running.discard(pid)
        if time.monotonic() > deadline:
            for rank, pid in enumerate(pids):
                if pid in running:
                    with open(f"{order['folder']}/log.{rank}", "a") as log:
                        print(f"was still running after {order['limit']} s", file=log)
                    os.kill(pid, signal.SIGABRT)  # faulthandler writes where it was
                    os.kill(pid, signal.SIGCONT)
            break
        time.sleep(0.002)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _be_rank(rank: int, order: dict) -> None:
    code = 1
    folder = Path(order["folder"])
    try:
        log = open(folder / f"log.{rank}", "a")
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        _die_with_parent()
        faulthandler.enable(log)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=order["world"])
        function = getattr(importlib.import_module(order["module"]), order["function"])
        result = (function(Rank(rank, order["world"], folder), *order["arguments"]), "")
        code = 0
    except BaseException:
        result = (None, traceback.format_exc())
    finally:
        (folder / f"result.{rank}").write_bytes(pickle.dumps(result))
        sys.stdout.flush()
        os._exit(code)


def _die_with_parent() -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.modules["shm_ranks"] = sys.modules["__main__"]
    _serve()
