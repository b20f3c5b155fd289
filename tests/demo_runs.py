"""Runs the demo several times in the same processes: what it imports takes longer than a short run.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/demo_runs.py '[["--steps", "6"], ...]' FILE

writes what the first rank said in each run to FILE.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.append(str(Path(__file__).parent.parent / "examples"))


def run(flags: list[str]) -> dict[str, object]:
    """One run in this process: exit code, stdout and stderr."""
    from train_gpt import main

    before, sys.argv = sys.argv, ["train_gpt.py", *flags]
    out, err, code = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def run_all(runs: list[list[str]]) -> list[dict[str, object]]:
    """Several runs of these ranks, whose process group serves all: a second one would find the addresses of the first
    in torchrun's store."""
    dist.init_process_group = dist.destroy_process_group = lambda *_: None
    return [run(flags) for flags in runs]


def on_ranks(rank: int, world: int, runs: list[list[str]]) -> list[dict[str, object]]:
    """The same for ranks.run(), whose processes start faster than torchrun's."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    return run_all(runs)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    outcomes = run_all(json.loads(sys.argv[1]))
    if os.environ["RANK"] == "0":
        Path(sys.argv[2]).write_text(json.dumps(outcomes))
