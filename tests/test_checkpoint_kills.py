"""A save that is killed, with SIGKILL, at each of the calls by which it changes files: what can be loaded then.

The calls are counted and the process killed by a library that is preloaded (checkpoint_kills.cpp); the processes come
from one that has imported torch (checkpoint_kills.py).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyshard

HERE = Path(__file__).parent
SECONDS = 240  # for one run of the program; it takes a few on an idle machine


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler for the library that counts calls")
    library = tmp_path_factory.mktemp("shim") / "kills.so"
    source = HERE / "checkpoint_kills.cpp"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", str(source), "-o", str(library), "-ldl"], check=True)
    return library


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory if possible: a SIGKILL, unlike a loss of power, loses nothing that was written; fsync costs time."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as name:
        yield Path(name)


def run(shim: Path, folder: Path, ranks: int, first: int, step: int, how: str) -> list[dict[str, Any]]:
    """What the program has printed; its first line per victim is of a save that was not killed."""
    command = [sys.executable, str(HERE / "checkpoint_kills.py"), str(ranks), str(folder), str(first), str(step), how]
    package = str(Path(pyshard.__file__).parents[1])  # the one under test, whatever is installed
    environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "PYTHONPATH": package}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for trial in found:
        assert trial["loaded"] in ("previous", "new"), trial
        # The save after it, which leaves two checkpoints and the pointer, and nothing unfinished.
        assert trial["again"] == [{"value": None}, 3, []], trial
    return found


def calls(folder: Path, victim: int = 0) -> list[list[str]]:
    """[name, path, new path] of each call of the save that was not killed."""
    root = f"{folder}/{victim}-{10**6}"
    lines = (folder / f"calls{victim}").read_text().splitlines()
    return [line.replace(root, "root").split("\t") for line in lines]


@pytest.mark.timeout(SECONDS + 60)
def test_killed_at_every_call(shim: Path, folder: Path) -> None:
    """The previous checkpoint until the pointer is replaced, the new one from then on; bit for bit, nothing else."""
    complete, *killed = run(shim, folder, 1, 1, 1, "whole")
    made = calls(folder)
    assert complete["saves"] == [{"value": len(made)}] and complete["loaded"] == "new"
    kinds = {name for name, *_ in made}
    assert kinds == {"mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir"}
    assert [trial["call"] for trial in killed] == list(range(1, len(made) + 1))
    assert all(trial["saves"] == [{"killed": 9}] for trial in killed)
    switch = [i for i, (name, _, to) in enumerate(made) if (name, to) == ("rename", "root/latest")]
    assert len(switch) == 1
    # A process killed at call n (from 1) has made the n - 1 before it.
    expected = ["previous"] * (switch[0] + 1) + ["new"] * (len(made) - switch[0] - 1)
    assert [trial["loaded"] for trial in killed] == expected


@pytest.mark.timeout(SECONDS + 60)
def test_killed_in_the_background(shim: Path, folder: Path) -> None:
    """The same calls in the same order, and the same checkpoints."""
    _, *killed = run(shim, folder, 1, 1, 3, "background")
    made = calls(folder)
    switch = next(i for i, (name, _, to) in enumerate(made, 1) if (name, to) == ("rename", "root/latest"))
    assert [trial["call"] for trial in killed] == list(range(1, len(made) + 1, 3)) and len(killed) > 20
    for trial in killed:
        assert trial["saves"] == [{"killed": 9}]
        assert trial["loaded"] == ("previous" if trial["call"] <= switch else "new")


@pytest.mark.timeout(SECONDS + 60)
def test_killed_in_the_middle_of_every_write(shim: Path, folder: Path) -> None:
    _, *killed = run(shim, folder, 1, 1, 1, "half")
    writes = [i for i, (name, *_) in enumerate(calls(folder), start=1) if name == "write"]
    assert [trial["call"] for trial in killed] == writes and len(writes) > 20
    assert all(trial["saves"] == [{"killed": 9}] and trial["loaded"] == "previous" for trial in killed)


@pytest.mark.timeout(SECONDS + 60)
def test_one_of_two_ranks_is_killed(shim: Path, folder: Path) -> None:
    """The other one says who, and doing what; it does not hang."""
    found = run(shim, folder, 2, 2, 7, "whole")
    lost = 0
    for trial in found:
        victim, survivor = trial["saves"][trial["victim"]], trial["saves"][1 - trial["victim"]]
        if trial["call"] == 10**6:
            assert "value" in victim and "value" in survivor and trial["loaded"] == "new", trial
            continue
        assert victim == {"killed": 9}, trial
        if "value" in survivor:  # all was done but for removing old files
            assert trial["victim"] == 0 and trial["loaded"] == "new", trial
            continue
        lost += 1
        assert (survivor["kind"], survivor["rank"]) == ("PeerError", trial["victim"]), trial
        assert survivor["operation"] in ("making a directory", "planning who writes what", "writing"), trial
        assert f"rank {trial['victim']} is lost" in survivor["error"], trial
        if trial["victim"] == 1:
            assert trial["loaded"] == "previous", trial
    assert lost >= 6


@pytest.mark.timeout(SECONDS + 60)
def test_what_is_on_disk_when_the_pointer_is_replaced(shim: Path, folder: Path) -> None:
    """A loss of power, too, leaves a complete checkpoint: before the switch all files and directories are synced."""
    run(shim, folder, 1, 10**6, 1, "whole")
    dirty: set[str] = set()  # files with data, and directories with entries, that are not on disk
    switched = False
    for name, path, to in calls(folder):
        parent = str(Path(path).parent)
        if name == "fsync":
            dirty.discard(path)
        elif name == "write":
            dirty.add(path)
        elif name in ("open", "mkdir", "unlink", "rmdir"):
            if path == "root/latest.tmp":
                assert not dirty, f"the pointer is written before {dirty} are on disk"
            dirty.add(parent)
            if name == "rmdir":
                dirty.discard(path)
        elif name == "rename":
            assert path not in dirty, f"{path} is renamed before its data is on disk"
            switched = switched or to == "root/latest"
            dirty.add(parent)
        if switched and name == "fsync":
            break
    assert switched and not dirty, "the new pointer is not on disk before old checkpoints are removed"
