"""One rank of what bench_checkpoint_load.py measures: saving, loading, and reading the same bytes."""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.distributed_training import nbytes, tensors_of

WIDTH, LAYERS = 768, 12  # 124 M parameters


def model_of(width: int, layers: int) -> nn.Module:
    """Parameters of the shapes of GPT-2's, in a module for each layer."""
    inner = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    outer = [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]

    def module(shapes: list[tuple[int, ...]]) -> nn.Module:
        made = nn.Module()
        for index, shape in enumerate(shapes):
            made.register_parameter(f"p{index}", nn.Parameter(torch.zeros(shape)))
        return made

    ends = [(65 * width, width), (width, width), (width,), (width,)]
    return nn.ModuleList([module(ends), *(module(inner + outer) for _ in range(layers))])


def counter(key: str) -> int:
    """Bytes: VmRSS, memory in use now, or VmHWM, the most that was."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) << 10


def save(path: str, width: int, layers: int) -> int:
    """A checkpoint by all ranks of ShardedAdamW; the bytes of its files."""
    pyshard = importlib.import_module("pyshard")
    torch.manual_seed(0)
    model = model_of(width, layers)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_()
    optimizer = pyshard.ShardedAdamW(model.parameters(), lr=0.01)
    torch.stack([(param * param).sum() for param in model.parameters()]).sum().backward()
    optimizer.step()
    pyshard.save_checkpoint(path, model, optimizer)
    optimizer.close()
    return sum(file.stat().st_size for file in data_files(path))


class Save:
    """save() as an object, which the ranks can be told to make."""

    def __init__(self, path: str, width: int, layers: int):
        self.size = save(path, width, layers)

    def bytes(self) -> int:
        return self.size


class Remove:
    def __init__(self, path: str):
        if dist.get_rank() == 0:
            shutil.rmtree(path, ignore_errors=True)


def data_files(path: str) -> list[Path]:
    return sorted(Path(path).glob("0*/*.distcp"))


def timed(work: Callable[[], Any], threads: int) -> float:
    """Seconds, of all ranks from the same moment on."""
    torch.set_num_threads(threads)
    dist.barrier()
    begin = time.perf_counter()
    work()
    seconds = time.perf_counter() - begin
    torch.set_num_threads(1)
    return seconds


class Load:
    """A model and pyshard.AdamW, whole in one process or over all ranks by FSDP2, which load the checkpoint."""

    def __init__(self, path: str, way: str, width: int, layers: int):
        self.path, self.way = path, way
        self.model = model_of(width, layers)
        if dist.get_world_size() > 1:
            fully_shard = importlib.import_module("torch.distributed.fsdp").fully_shard
            for part in self.model.children():
                fully_shard(part)
        pyshard = importlib.import_module("pyshard")
        self.optimizer = pyshard.AdamW(self.model.parameters(), lr=0.01)
        self.run = getattr(self, way)

    def sample(self, threads: int = 1, fresh: bool = False) -> dict[str, float]:
        if fresh:
            self.optimizer.state.clear()
            ctypes.CDLL(None).malloc_trim(0)  # or the next state gets the pages of this one
        return {"seconds": timed(self.run, threads)}

    def pyshard(self) -> None:
        importlib.import_module("pyshard").load_checkpoint(self.path, self.model, self.optimizer)

    def dcp(self) -> None:
        """Into the tensors that are there, without checking them, and without what torch does to put them there."""
        checkpoint = importlib.import_module("torch.distributed.checkpoint")
        names = {param: name for name, param in self.model.named_parameters()}
        if not self.optimizer.state:
            self.pyshard()
        state = {
            names[param]: {key: items[key] for key in ("exp_avg", "exp_avg_sq")}
            for param, items in self.optimizer.state.items()
        }
        wanted = {"model": self.model.state_dict(), "optimizer": {"state": state}}
        directory = data_files(self.path)[0].parent
        checkpoint.load(wanted, checkpoint_id=directory)

    def peak(self) -> dict[str, float]:
        """Growth of this process's memory during a load that makes the optimizer's state, and what that takes."""
        self.optimizer.state.clear()
        for param in self.model.parameters():  # weights that were never written have no memory yet
            param.detach().zero_()
        before = counter("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
        self.pyshard()
        held = tensors_of({key: dict(value) for key, value in self.optimizer.state.items()})
        return {"grown": counter("VmHWM") - before, "state": nbytes([local(tensor) for tensor in held])}


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Read:
    """Reading the bytes of the checkpoint's data files, this rank's share of each, into memory.

    With `fresh` into new memory as far as a load that makes the optimizer's state does: two thirds of it.
    """

    def __init__(self, path: str):
        rank, world = dist.get_rank(), dist.get_world_size()
        self.parts: list[tuple[int, int, int]] = []  # file, begin, size
        for file in data_files(path):
            size = file.stat().st_size
            begin, end = size * rank // world, size * (rank + 1) // world
            opened, third = os.open(file, os.O_RDONLY), begin + (end - begin) // 3
            self.parts += [(opened, begin, third - begin), (opened, third, end - third)]
        self.memory = [torch.empty(size, dtype=torch.uint8) for _, _, size in self.parts]

    def sample(self, threads: int = 1, fresh: bool = False) -> dict[str, float]:
        def read(index: int, thread: int, memory: Tensor) -> None:
            file, begin, size = self.parts[index]
            low, high = size * thread // threads, size * (thread + 1) // threads
            view = memory.numpy().data[low:high]
            while view:
                count = os.preadv(file, [view], begin + low)
                view, low = view[count:], low + count

        def work() -> None:
            into = [torch.empty_like(m) if fresh and index % 2 else m for index, m in enumerate(self.memory)]
            jobs = [(i, t, memory) for i, memory in enumerate(into) for t in range(threads)]
            if threads == 1:
                for job in jobs:
                    read(*job)
                return
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda job: read(*job), jobs))

        return {"seconds": timed(work, 1)}
