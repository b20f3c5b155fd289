"""Elastic restart: examples/elastic.py under torchrun, with workers that are really killed, goes on from the last
complete checkpoint and loses no more than the steps since then.

Only processes of the run itself are killed: a worker by itself, at a chosen call, and in one case the agent that
started it. Whole runs have a time limit, after which their process group is killed.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import pyshard
from tests import scripts

EXAMPLE = scripts.EXAMPLES / "elastic.py"
STEPS, EVERY = 40, 5  # as in the example
LIMIT = 150  # seconds of a run, which takes about 15 on an idle machine
# Sums over 32 rows are rounded in another order at another number of ranks: 30 steps of training made of that a
# relative difference of the loss of 6e-7 at most.
ANOTHER_WORLD = 1e-5

# A worker with faults: {(restart, rank or "host"): (what dies, at which call)}. It runs the example as torchrun would.
# "host": of a host that is to be lost.
WORKER = """
import itertools, os, runpy, signal, sys
import pyshard
from pyshard.checkpoint import files

FAULTS = {faults!r}

def die():
    if host:
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)

def arm(owner, name, call):
    inner, calls = getattr(owner, name), itertools.count(1)
    def wrapped(*args, **kwargs):
        if next(calls) == call:
            die()
        return inner(*args, **kwargs)
    setattr(owner, name, wrapped)

where = {{"step": (pyshard.ShardedAdamW, "step"), "switch": (files, "switch")}}
host = "LOST_HOST" in os.environ
me = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), "host" if host else int(os.environ["RANK"])
if me in FAULTS:
    name, call = FAULTS[me]
    arm(*where[name], call)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass
class Line:
    """One step, as rank 0 has printed it."""

    step: int
    loss: float
    ranks: int


def _lines(output: str) -> list[Line]:
    found = re.findall(r"step (\d+) loss (\S+) ranks (\d+)", output)
    return [Line(int(step), float(loss), int(ranks)) for step, loss, ranks in found]


def _environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "PYTEST"))}
    path = os.pathsep.join(filter(None, [str(EXAMPLE.parents[1]), os.environ.get("PYTHONPATH")]))
    # Without it all restarts share a store, where gloo may find the address of a worker that is gone (torch 2.13).
    alone = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | alone | more


@contextlib.contextmanager
def _started(*arguments: str, log: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """torchrun, in a process group of its own of which nothing is left afterwards."""
    command = [sys.executable, "-m", "torch.distributed.run", "--monitor-interval", "0.1", *arguments]
    with log.open("w") as file:
        agent = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            env=_environment(**environment),
            start_new_session=True,
        )
        try:
            yield agent
        finally:
            agent.poll()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()


def _train(path: Path, script: list[str]) -> str:
    """One run over two workers on this machine, to its end; what it has printed."""
    log = path.with_suffix(".log")
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    with _started(*options, *script, str(path), log=log) as agent:
        assert agent.wait(LIMIT) == 0, log.read_text()
    return log.read_text()


def _worker(folder: Path, faults: dict[tuple[int, int | str], tuple[str, int]]) -> list[str]:
    file = folder / "worker.py"
    file.write_text(WORKER.format(faults=faults))
    return [str(file), str(EXAMPLE)]


def _end(path: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of the last checkpoint."""
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
    opt = pyshard.AdamW(model.parameters())
    assert pyshard.load_checkpoint(path, model, opt)["step"] == STEPS
    found = dict(model.state_dict())
    for index, state in opt.state_dict()["state"].items():
        found |= {f"{index}.{name}": value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Line], dict[str, torch.Tensor]]:
    """A run that nothing disturbs: its steps, and its end."""
    path = tmp_path_factory.mktemp("whole") / "run"
    lines = _lines(scripts.run(EXAMPLE, 2, str(path))[0][0])
    assert [line.step for line in lines] == list(range(STEPS))
    assert lines[-1].loss < 0.5 * lines[0].loss
    return lines, _end(path)


def test_killed_workers_cost_no_more_than_an_interval(
    whole: tuple[list[Line], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Killed in the middle of an interval, and during a save, whose files are there but not yet in force: each time all
    start again from the last complete checkpoint, with the same bits as if nothing had happened."""
    lines, end = whole
    faults: dict[tuple[int, int | str], tuple[str, int]] = {
        (0, 1): ("step", 13),  # step 12, two after the checkpoint at 10
        (1, 0): ("switch", 2),  # of the checkpoint at 20: the one at 15 is loaded
    }
    path = tmp_path / "run"
    before = set(os.listdir("/dev/shm"))
    output = _train(path, _worker(tmp_path, faults))
    got = _lines(output)
    expected = [*range(12), *range(10, 20), *range(15, STEPS)]
    assert [line.step for line in got] == expected, output
    assert got == [lines[step] for step in expected]  # nine digits tell every fp32 number from its neighbours
    assert {line.ranks for line in got} == {2}
    ours = _end(path)
    assert ours.keys() == end.keys()
    assert all(torch.equal(ours[name], end[name]) for name in end)
    assert output.count("failed (exitcode: -9)") == 2, output
    left = {name for name in set(os.listdir("/dev/shm")) - before if "pyshard" in name}
    assert not left


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_lost_host_leaves_a_smaller_world(whole: tuple[list[Line], dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """Two agents with a worker each; one is killed with its worker, and the other one goes on alone."""
    lines, _ = whole
    path, port = tmp_path / "run", _free_port()
    script = _worker(tmp_path, {(0, "host"): ("step", 13)})
    # Seconds for which the first agent waits for the second one, and after which one is missed: more than the machine
    # may be busy.
    waits = "last_call_timeout=8,keep_alive_interval=1,keep_alive_max_attempt=6,join_timeout=60"
    common = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--local-addr", "127.0.0.1"]
    common += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    stays, goes = ([*common, "--rdzv-conf", f"{waits},is_host={is_host}", *script, str(path)] for is_host in (1, 0))
    logs = [tmp_path / "stays.log", tmp_path / "goes.log"]
    with _started(*stays, log=logs[0]) as left, _started(*goes, log=logs[1], LOST_HOST="yes") as lost:
        assert left.wait(LIMIT) == 0, logs[0].read_text()
        assert lost.wait(0) == -signal.SIGKILL
    both, alone = ([line for log in logs for line in _lines(log.read_text()) if line.ranks == n] for n in (2, 1))
    assert [line.step for line in both] == list(range(12))
    assert [line.step for line in alone] == list(range(10, STEPS))
    assert both == lines[:12]
    for line in alone:
        assert line.loss == pytest.approx(lines[line.step].loss, rel=ANOTHER_WORLD)
