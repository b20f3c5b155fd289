"""A program for test_checkpoint_kills.py: saves that are killed at each of their calls, and what a load finds then.

    LD_PRELOAD=kills.so python checkpoint_kills.py RANKS FOLDER FIRST STEP HOW

One process imports torch and forks all others, which takes milliseconds. In FOLDER/base there are two checkpoints and
what a dead save has left. For call number FIRST, FIRST + STEP, ... a save is killed there on one rank (on each in
turn); HOW "half": only at writes, in the middle; "background": by async_save=True. Prints one JSON object per line.
"""

import ctypes
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import pyshard
from pyshard.checkpoint import load_checkpoint, save_checkpoint

LIMIT = 60  # seconds for one process

shim = ctypes.CDLL(os.environ["LD_PRELOAD"])


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)).to(torch.bfloat16)


def train(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 5, dtype=torch.bfloat16)).float().square().mean().backward()
        optimizer.step()


def digest(model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any]) -> str:
    """All that a checkpoint holds, bit for bit."""
    found = hashlib.sha256(repr(sorted(extra.items())).encode())
    held = optimizer.state_dict()
    groups = [sorted((k, str(v)) for k, v in group.items()) for group in held["param_groups"]]
    found.update(repr(groups).encode())
    for name, value in model.state_dict().items():
        found.update(name.encode() + value.view(torch.int16).numpy().tobytes())
    for index, items in held["state"].items():
        for key in sorted(items):
            found.update(f"{index}{key}{items[key].dtype}".encode() + items[key].numpy().tobytes())
    return found.hexdigest()


def child(function: Callable[[], Any]) -> tuple[int, int]:
    """Starts a process that writes what function() returns; its id and the end of the pipe."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    signal.alarm(LIMIT)
    try:
        result = {"value": function()}
    except BaseException as error:
        kind = type(error).__name__
        result = {"error": str(error), "kind": kind, "rank": getattr(error, "rank", None)}
        result["operation"] = getattr(error, "operation", None)
    shim.kills_arm(b"", -1, 0, -1)
    os.write(writing, json.dumps(result).encode())
    os._exit(0)


def outcome(process: tuple[int, int]) -> dict[str, Any]:
    pid, reading = process
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    status = os.waitpid(pid, 0)[1]
    return json.loads(said) if said else {"killed": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None}


def load(root: Path) -> str:
    model = network()
    optimizer = pyshard.AdamW(model.parameters(), lr=0.5)
    extra = load_checkpoint(root, model, optimizer)
    return digest(model, optimizer, extra)


def main(world: int, folder: Path, first: int, step: int, how: str) -> None:
    half = how == "half"
    torch.set_num_threads(1)
    base = folder / "base"
    model = network()
    optimizer = pyshard.AdamW(model.parameters(), lr=0.01)
    digests = {}
    for name in ("oldest", "previous"):
        train(model, optimizer, 2)
        save_checkpoint(base, model, optimizer, name=name)
        digests[digest(model, optimizer, {"name": name})] = name
    shutil.copytree(max(base.glob("0*")), base / "000003-deadbeef")
    (base / "000003-deadbeef" / "__0_0.distcp").write_bytes(b"half")
    train(model, optimizer, 2)
    digests[digest(model, optimizer, {"name": "new"})] = "new"

    def save(rank: int, root: Path, call: int, log: int = -1) -> int:
        if world > 1:
            store = f"file://{root.with_suffix('.store')}"
            dist.init_process_group("gloo", store, timedelta(seconds=30), world, rank)
            dist.barrier()
        shim.kills_arm(os.fsencode(root), call, half, log)
        if how == "background":
            save_checkpoint(root, model, optimizer, async_save=True, name="new").wait()
        else:
            save_checkpoint(root, model, optimizer, name="new")
        return int(shim.kills_calls())

    def trial(victim: int, call: int, log: int = -1) -> dict[str, Any]:
        root = folder / f"{victim}-{call}"
        shutil.copytree(base, root)
        armed = [(call, log) if rank == victim else (-1, -1) for rank in range(world)]
        processes = [child(partial(save, rank, root, *armed[rank])) for rank in range(world)]
        found: dict[str, Any] = {"victim": victim, "call": call, "saves": [outcome(p) for p in processes]}
        loaded = outcome(child(lambda: load(root)))
        found["loaded"] = digests.get(loaded.get("value", ""), loaded)
        # The next save, by one process: it works, and clears up.
        again = outcome(child(lambda: save_checkpoint(root, model, optimizer, name="again")))
        left = sorted(str(path.relative_to(root)) for path in root.glob("*"))
        found["again"] = [again, len(left), [name for name in left if name.endswith(".tmp")]]
        shutil.rmtree(root)
        root.with_suffix(".store").unlink(missing_ok=True)
        return found

    for victim in range(world):
        with open(folder / f"calls{victim}", "wb") as log:
            complete = trial(victim, 10**6, log.fileno())
        print(json.dumps(complete), flush=True)
        calls = (folder / f"calls{victim}").read_text().splitlines()
        for call in range(first, len(calls) + 1, step):
            if not half or calls[call - 1].startswith("write\t"):
                print(json.dumps(trial(victim, call)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
