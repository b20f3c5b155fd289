"""Runs a function on several ranks: real processes with a gloo process group on this machine.

Processes are forked from a server that has imported torch and pyshard already, so that starting one takes
milliseconds. Every run has a time limit, after which its own processes are killed.
"""

import multiprocessing as mp
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_CONTEXT = mp.get_context("forkserver")
_MODELS = ["transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama"]
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "pyshard", *_MODELS])


@dataclass
class Outcome:
    """What became of one rank."""

    value: Any = None
    error: str | None = None  # "Type: message" of what it raised
    trace: str = ""
    exitcode: int | None = None  # -9: killed


def _main(
    fn: Callable[..., Any], rank: int, world: int, store: str, pipe: Connection, args: tuple[Any, ...], group: bool
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        if group:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=60),
            )
            dist.barrier()  # a rank that ends at once would close connections that others are still making
        outcome = Outcome(fn(rank, world, *args))
    except BaseException as error:
        outcome = Outcome(None, f"{type(error).__name__}: {error}", traceback.format_exc())
    pipe.send_bytes(pickle.dumps(outcome))  # by value: the process ends, and torch would share its tensors
    pipe.poll(0.5)  # until all ranks are done: some may still be making connections to this one
    pipe.close()
    os._exit(0)  # without waiting for the threads of a process group whose peers may be gone


def run(
    fn: Callable[..., Any], world: int, *args: Any, seconds: float = 120, group: bool = True, quiet: bool = False
) -> list[Outcome]:
    """fn(rank, world, *args) on each rank. Unless `quiet`, an error on any rank is an error here."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        pipes, processes = [], []
        for rank in range(world):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_main, args=(fn, rank, world, store, theirs, args, group))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        outcomes: list[Outcome] = [Outcome(error="TimeoutError: it was still running") for _ in range(world)]
        left = {pipe: rank for rank, pipe in enumerate(pipes)}
        end = time.monotonic() + seconds
        while left and time.monotonic() < end:
            for pipe in wait(list(left), timeout=max(end - time.monotonic(), 0)):
                rank = left.pop(pipe)  # type: ignore[call-overload]
                try:
                    outcomes[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    outcomes[rank] = Outcome(error="it died")
        for pipe in pipes:
            pipe.close()
        for process, outcome in zip(processes, outcomes, strict=True):
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
            outcome.exitcode = process.exitcode
    if not quiet:
        bad = [f"rank {rank}: {o.error}\n{o.trace}" for rank, o in enumerate(outcomes) if o.error]
        if bad:
            raise AssertionError("\n".join(bad))
    return outcomes
