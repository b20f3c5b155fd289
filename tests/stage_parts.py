"""A model of several pipeline stages, made by hand, for the tests of optimizers: in one process and as a rank has it.

Each stage has the parameters of tp_parts.py, with other values; the last one has a copy of the first one's embedding,
which is tied to it. Parts are plain, or DTensors over the data-parallel ranks, each perhaps of a tensor-parallel part.
"""

from typing import Any

import torch
import torch.distributed as dist
import tp_parts
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from tp_parts import F32, SPECS

import pyshard
from pyshard.kernels.launch import local_tensor
from pyshard.placement import PipelineShare, carry_over, pipeline_share, set_pipeline_share

TIED, COPY = "embedding", "head"


class Stages:
    """What this rank holds, and what one process would.

    Attributes:
        model: this rank's parameters.
        names: of the whole model's parameters, in the order of `whole`.
    """

    def __init__(self, mesh: DeviceMesh, seed: int, form: str = "plain", dtypes: tuple[torch.dtype, ...] = (F32,)):
        self.mesh, self.seed, self.dtypes = mesh, seed, dtypes
        self.form = form  # plain; dtensor: over "dp"
        self.dp, self.tp, self.pp = (mesh[name].size() for name in ("dp", "tp", "pp"))
        self.stage, self.dp_rank = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
        self.last = self.stage == self.pp - 1
        group = mesh.get_group("tp") if self.tp > 1 else None
        made = tp_parts.model_of(seed + self.stage, group, dtypes)
        params = dict(made.items())
        if self.pp > 1 and self.last:
            params[COPY] = tp_parts.model_of(seed, group, dtypes)[TIED]
        self.names = []
        for name, param in list(params.items()):
            whole = f"0.{TIED}" if name == COPY else f"{self.stage}.{name}"
            self.names.append(whole)
            if form == "dtensor":
                cut = [Shard(0) if param.dim() else Replicate()]
                params[name] = nn.Parameter(distribute_tensor(param.detach().contiguous(), mesh["dp"], cut))
                carry_over(param, params[name])
            if self.pp > 1:
                set_pipeline_share(params[name], PipelineShare(mesh.get_group("pp"), whole, counted=name != COPY))
        self.model = nn.ParameterDict(list(params.items()))

    def whole(self) -> nn.ParameterDict:
        """The model in one process."""
        stages = [tp_parts.model_of(self.seed + stage, None, self.dtypes) for stage in range(self.pp)]
        return nn.ParameterDict([(f"{s}_{n}", p) for s, params in enumerate(stages) for n, p in params.items()])

    def optimizer(self, sharded: int = 0, **options: Any) -> Any:
        """pyshard.AdamW, or ShardedAdamW of a stage."""
        options = {"lr": 0.01, "weight_decay": 0.1, **options}
        if sharded:
            group = self.mesh.get_group("dp")
            options = {"stage": sharded, "process_group": group, "timeout": 30, "bucket_mb": 0.05, **options}
            return pyshard.ShardedAdamW(self.model.parameters(), **options)
        return pyshard.AdamW(self.model.parameters(), **options)

    def gradients(self, step: int, summed: bool) -> list[Tensor]:
        """Of the whole parameters that this stage has: of this data-parallel rank, or the sum over all."""
        known = {}
        for stage in {0, self.stage}:
            where = self.seed + 100 * step + stage
            known[stage] = (
                tp_parts.summed(where, self.dp, self.dtypes)
                if summed
                else tp_parts.gradients(where, self.dp_rank, self.dtypes)
            )
        place = [name for name, _, _ in SPECS].index(TIED)
        return [*known[self.stage], *([known[0][place]] if COPY in self.model else [])]

    def whole_gradients(self, step: int) -> list[Tensor]:
        return [g for s in range(self.pp) for g in tp_parts.summed(self.seed + 100 * step + s, self.dp, self.dtypes)]

    def set_gradients(self, step: int, summed: bool, factor: float = 1.0) -> None:
        for param, grad in zip(self.model.parameters(), self.gradients(step, summed), strict=True):
            value = tp_parts.part_of(param, grad) * factor
            param.grad_dtype = value.dtype
            if self.form == "dtensor":
                param.grad = distribute_tensor(value.contiguous(), self.mesh["dp"], param.placements)
            else:
                param.grad = torch.empty_like(param, dtype=value.dtype).copy_(value)

    def train(self, opt: Any, steps: int) -> list[float]:
        """The norms. Gradients are sums over data-parallel ranks, unless the optimizer sums them up itself."""
        alone = getattr(opt, "world", 1) == 1
        norms = []
        for step in range(steps):
            if alone:
                opt.grad_scale = torch.tensor(float(self.dp))
            self.set_gradients(step, alone)
            opt.step()
            opt.zero_grad()
            if opt.options.needs_norm():
                norms.append(float(opt.grad_norm))
        return norms

    def expected(self, steps: int, **options: Any) -> tuple[dict[str, Tensor], list[float]]:
        """The same in one process: the parameters by their names, and the norms."""
        model = self.whole()
        opt = pyshard.AdamW(model.parameters(), **{"lr": 0.01, "weight_decay": 0.1, **options})
        norms = []
        for step in range(steps):
            tp_parts.set_gradients(model, self.whole_gradients(step))
            opt.grad_scale = torch.tensor(float(self.dp))
            opt.step()
            if opt.options.needs_norm():
                norms.append(float(opt.grad_norm))
        return {name.replace("_", ".", 1): p.detach() for name, p in model.items()}, norms

    def local(self) -> dict[str, Tensor]:
        """Copies of what this rank has in memory."""
        return {name: local_tensor(param).detach().clone() for name, param in self.model.items()}

    def pairs(self, whole: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
        """(name, what this rank has, what it should have) of each parameter, as dense tensors of its part."""
        found = []
        for name, param in zip(self.names, self.model.parameters(), strict=True):
            have = param.detach()
            if self.form == "dtensor":
                have = have.full_tensor()  # type: ignore[attr-defined]
            found.append((name, have.contiguous(), tp_parts.part_of(param, whole[name]).contiguous()))
        return found


def same_everywhere(value: Any) -> bool:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return all(one == every[0] for one in every)


def shares(model: nn.Module) -> list[PipelineShare]:
    return [share for p in model.parameters() if (share := pipeline_share(p)) is not None]
