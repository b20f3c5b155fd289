"""One rank of a distributed benchmark: a process on one core that builds what its parent names, and calls it.

    python -m benchmarks.distributed_worker '{"rank": 0, ...}'      (started by distributed_ranks.py)

Commands come over a Unix socket, which reaches into a network namespace too, and each is answered with ("done", value)
or ("failed", text). The process ends with its parent.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from multiprocessing.connection import Client, Connection
from typing import Any


def prepare(spec: dict[str, Any]) -> None:
    """The core, the number of threads and torchrun's variables; all before torch is imported."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[spec["rank"] % len(cores)]})  # gloo's own threads stay on it, too
    variables = {
        "RANK": spec["rank"],
        "LOCAL_RANK": spec["rank"],
        "WORLD_SIZE": spec["world"],
        "MASTER_ADDR": spec["master"],
        "MASTER_PORT": spec["port"],
        "OMP_NUM_THREADS": 1,
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": 1,
        "GLOO_SOCKET_IFNAME": spec["interface"],
    }
    os.environ.update({name: str(value) for name, value in variables.items() if value != ""})


def serve(connection: Connection) -> None:
    """Carries out commands (key, "module:function" or method, arguments) until the parent hangs up."""
    made: dict[str, Any] = {}
    while True:
        try:
            key, what, arguments = connection.recv()
        except EOFError:
            return
        try:
            value = None
            if what == "drop":
                made.pop(key, None)
            elif ":" in what:
                module, function = what.split(":")
                made[key] = getattr(importlib.import_module(module), function)(**arguments)
            else:
                value = getattr(made[key], what)(**arguments)
            connection.send(("done", value))
        except Exception as error:
            traceback.print_exc()  # into the log of this rank
            sys.stderr.flush()
            connection.send(("failed", f"{type(error).__name__}: {error}"))


def main() -> None:
    spec = json.loads(sys.argv[1])
    prepare(spec)
    connection = Client(spec["socket"], "AF_UNIX")
    connection.send(spec["rank"])

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    serve(connection)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # peers may have gone already, and some libraries abort when they say goodbye to them


if __name__ == "__main__":
    main()
