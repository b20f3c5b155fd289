"""What the tensors of a rank hold after a training step of a GPT-2, in one of the layouts of layout_memory.py.

Memory is counted by storages, each once: what a tensor keeps from being freed, be it padding or another tensor's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

import pyshard
from benchmarks.distributed_model import Work
from benchmarks.layout_memory import KINDS, Layout
from benchmarks.peers import HYPER
from pyshard.kernels.launch import local_tensor
from pyshard.optim.sharded_explain import held_bytes

STEPS = 3  # over which every bucket that may get into a slot has been there


class Holding:
    """One rank. All ranks of the default group make it; those beyond the layout's have nothing.

    Attributes:
        rank: in the layout; None: not in it.
        loss: of the step that it has trained.
    """

    def __init__(self, layout: dict[str, Any], work: dict[str, Any]):
        wanted = Layout(**layout)
        mesh, data = _mesh(wanted)
        coordinate = mesh.get_coordinate()
        self.rank = None if coordinate is None else torch.distributed.get_rank()
        self.held: dict[str, int] = {}
        self.loss = math.nan
        if self.rank is not None:
            self._train(wanted, Work(**work), mesh, data)

    def answer(self) -> dict[str, int] | None:
        """Bytes by kind."""
        return None if self.rank is None else self.held

    def _train(self, layout: Layout, work: Work, mesh: DeviceMesh, data: DeviceMesh) -> None:
        model, _, loss_of = work.model()
        if layout.tp > 1:
            pyshard.tp.parallelize(model, mesh)
        if layout.pp > 1:
            model = pyshard.pp.pipeline(model, mesh, n_microbatches=layout.pp)
        if layout.way == "full":
            dtype = getattr(torch, layout.compute or work.dtype)
            pyshard.fully_shard(model, data, param_dtype=dtype, reduce_dtype=torch.float32)
        if layout.way.startswith("stage"):
            options = {"stage": int(layout.way[-1]), "transport": layout.transport, "bucket_mb": layout.bucket_mb}
            optimizer: Any = pyshard.ShardedAdamW(
                model.parameters(), process_group=data.get_group(), **options, **HYPER
            )
        else:
            optimizer = pyshard.AdamW(model.parameters(), **HYPER)
        assert self.rank is not None
        generator = torch.Generator().manual_seed(layout.place(self.rank)[1])
        tokens = torch.randint(work.vocabulary, (work.batch, work.length), generator=generator)
        watch = Watch(model)
        for _ in range(STEPS if layout.transport == "collective" else 1):
            optimizer.zero_grad()
            with watch:
                if layout.pp > 1:
                    loss = model.step(tokens, target=tokens).loss  # type: ignore[operator]
                else:
                    loss = loss_of(model, tokens)
                    loss.backward()
            optimizer.step()
        self.loss = float(loss)
        self.held = held(model, optimizer) | {"gathered": watch.most}
        if hasattr(optimizer, "close"):
            optimizer.close()


def _mesh(layout: Layout) -> tuple[DeviceMesh, DeviceMesh]:
    """The mesh of the first ranks, and what of it the weights or the optimizer's state are cut over."""
    if layout.replicas > 1:
        shape = layout.replicas, layout.dp // layout.replicas
        mesh = DeviceMesh("cpu", torch.arange(layout.dp).view(shape), mesh_dim_names=("replicate", "shard"))
        return mesh, mesh
    ranks = torch.arange(layout.ranks).view(layout.pp, layout.dp, layout.tp)
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("pp", "dp", "tp"))
    return mesh, mesh if mesh.get_coordinate() is None else mesh["dp"]


def held(model: nn.Module, optimizer: Any) -> dict[str, int]:
    """Bytes by kind, without what is gathered for a while."""
    params = list(model.parameters())
    found = dict.fromkeys(KINDS, 0)
    found["weights"] = storage_bytes(params)
    if isinstance(optimizer, pyshard.ShardedAdamW):
        counted = held_bytes(optimizer)
        found["gradients"], found["slots"] = counted["gradients"], counted["gradients on their way"]
    else:
        found["gradients"] = storage_bytes(param.grad for param in params if param.grad is not None)
    state = [(key, value) for items in optimizer.state.values() for key, value in items.items()]
    lower = ("master", "remainder")
    found["moments"] = storage_bytes(value for key, value in state if key not in lower)
    found["masters"] = storage_bytes(value for key, value in state if key in lower)
    return found


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = [local_tensor(tensor).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}.values())


class Watch(TorchDispatchMode):
    """The most bytes that whole weights and gradients of FSDP2's units took, looked at after every operation."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.most = 0
        self._params = [
            param
            for module in model.modules()
            if isinstance(module, FSDPModule)
            for group in module._get_fsdp_state()._fsdp_param_groups  # type: ignore[attr-defined]
            for param in group.fsdp_params
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._params:
            self.most = max(self.most, sum(map(_whole_bytes, self._params)))
        return result


def _whole_bytes(param: Any) -> int:
    whole = [tensor.untyped_storage().nbytes() for tensor in param.all_gather_outputs]
    own = getattr(param, "_unsharded_param", None)
    grads = [None if own is None else own.grad, param.unsharded_accumulated_grad]
    return sum(whole) + sum(grad.untyped_storage().nbytes() for grad in grads if grad is not None)
