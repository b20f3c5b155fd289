"""The mesh of a training run, and clipping by the norm of gradients that are spread over it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .kernels import grad_norm
from .kernels.launch import local_tensor
from .optim.distributed import same_placements
from .optim.levels import PIPELINE, Level, counts, find, mask_of, over_levels

DIMENSIONS = ("pp", "dp", "tp")  # outermost first: tensor-parallel ranks talk most, so they are neighbours


def init_mesh(*, dp: int = 1, tp: int = 1, pp: int = 1, device_type: str | None = None) -> DeviceMesh:
    """All ranks as a mesh with the dimensions "pp", "dp" and "tp", each there even if its size is 1.

    Rank r has the coordinates (r // (dp * tp), r // tp % dp, r % tp). `mesh.get_group("tp")` is what the layers of
    pyshard.tp take, and `mesh["dp"]` what torch's data-parallel wrappers take. All ranks must call it.

    Args:
        dp, tp, pp: sizes whose product is the number of ranks; one of them may be -1: what the others leave.
        device_type: of the tensors that are exchanged. None: the accelerator's, if the process group has a backend
            for it that is made for accelerators (NCCL and the like); else "cpu".
    Raises:
        RuntimeError: torch.distributed is not initialised. ValueError: sizes that do not make up the number of ranks.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "pyshard.init_mesh: torch.distributed is not initialised; expected a default process group. Call "
            "torch.distributed.init_process_group() first, and start the ranks with torchrun."
        )
    sizes = {"pp": pp, "dp": dp, "tp": tp}
    world = dist.get_world_size()
    said = ", ".join(f"{name}={size}" for name, size in sizes.items())
    open_ones = [name for name, size in sizes.items() if size == -1]
    if any(size < 1 and size != -1 for size in sizes.values()) or len(open_ones) > 1:
        raise ValueError(f"pyshard.init_mesh: {said}; expected sizes of 1 or more, at most one of them -1 (the rest).")
    rest = math.prod(size for size in sizes.values() if size != -1)
    if open_ones and world % rest == 0:
        sizes[open_ones[0]] = world // rest
    if math.prod(sizes.values()) != world:
        what = f"a divisor of the {world} ranks beside the -1" if open_ones else f"the {world} ranks there are"
        raise ValueError(
            f"pyshard.init_mesh: {said} make {rest}; expected {what}. Choose other sizes, or start as many ranks."
        )
    device_type = _device_type() if device_type is None else device_type
    return init_device_mesh(device_type, tuple(sizes[name] for name in DIMENSIONS), mesh_dim_names=DIMENSIONS)


def _device_type() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "cpu"
    backends = dict(entry.split(":") for entry in dist.get_backend_config().split(","))
    return accelerator.type if backends.get(accelerator.type, "gloo") != "gloo" else "cpu"


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    mesh: DeviceMesh | None = None,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scales all gradients in place by min(1, max_norm / (norm + 1e-6)), norm being that of all of them on all ranks.

    What counts how often: of a parameter with a tensor_shard that is cut, the parts of all ranks of its group; of a
    DTensor, the shards of all ranks; of one that is both, the shards of all parts; every other one, replicated or
    ordinary, once. The stages of a pipeline add up, and a weight that several of them share counts once. Along "dp"
    gradients are the same already and count once.

    Sums are in double (the 2-norm's squares exact), over ranks in rank order, so that all ranks scale by the same bits.
    All ranks of the parameters' groups must call it, and with the same parameters, those of pipeline stages excepted; a
    gradient that is None counts as zero.

    Args:
        parameters: with dense gradients; each counts once, however often it is given.
        max_norm: of all gradients together.
        mesh: from init_mesh; needed where a pipeline stage passes no parameters, or some that pyshard.pp has not made
            (they have no pipeline_share): then all that are passed belong to the stage along "pp".
        norm_type: p > 0 of the p-norm, or inf for the largest element.
        error_if_nonfinite: True: a norm of inf or NaN is an error on all ranks, before anything is scaled.
    Returns:
        The norm before clipping, a 0-d fp32 tensor.
    Raises:
        ValueError: norm_type; a wrong tensor_shard. RuntimeError: a norm that is not finite, if asked for. TypeError: a
        sparse gradient. pyshard.comm.PeerError: another rank is lost or in another operation; nothing was scaled.
    """
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise ValueError(f"pyshard.clip_grad_norm_: norm_type={norm_type}; expected a positive number or inf.")
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    params = list({id(param): param for param in params}.values())
    for i, param in enumerate(params):
        if param.grad is not None and param.grad.layout != torch.strided:
            raise TypeError(
                f"pyshard.clip_grad_norm_: the gradient of parameter {i} is {param.grad.layout}; expected a dense one. "
                "Use sparse=False in the embedding."
            )
    grads = [param.grad for param in params if param.grad is not None]
    known = [*grads, *params]
    device = known[0].device if known else torch.device(mesh.device_type if mesh is not None else "cpu")
    norm = _total(params, mesh, norm_type, device)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(
            f"pyshard.clip_grad_norm_: the norm of all gradients is {float(norm)}; expected a finite one. Look for the "
            "gradient that is not finite, or leave error_if_nonfinite out. Nothing was scaled."
        )
    scale = (float(max_norm) / (norm + 1e-6)).clamp(max=1.0)
    locals_ = [local_tensor(grad) for grad in grads]
    for where, wide in {(local.device, local.dtype == torch.float64) for local in locals_}:
        chosen = [x for x in locals_ if x.device == where and (x.dtype == torch.float64) == wide]
        torch._foreach_mul_(chosen, scale.to(where, torch.float64 if wide else torch.float32))
    return norm.float()


def _total(params: list[Tensor], mesh: DeviceMesh | None, norm_type: float, device: torch.device) -> Tensor:
    """The norm of all gradients on all ranks, a 0-d double."""
    # Groups are found by parameters, not by gradients, so that all ranks take part in the same exchanges.
    who = "pyshard.clip_grad_norm_"
    levels, stage = find(who, params), 0
    if mesh is not None and "pp" in (mesh.mesh_dim_names or ()) and mesh["pp"].size() > 1:
        group = mesh.get_group("pp")
        pipeline = Level(PIPELINE, group, tuple(dist.get_process_group_ranks(group)))
        if pipeline not in levels:
            levels.append(pipeline)
        stage = 1 << levels.index(pipeline)
    kinds: dict[int, list[Tensor]] = {}  # local gradients, by the levels over which they are cut
    for param in params:
        if (grad := param.grad) is not None and counts(param):
            if not same_placements(param, grad):
                grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
            kinds.setdefault(mask_of(param, levels) | stage, []).append(local_tensor(grad))
    sums = torch.zeros(1 << len(levels), dtype=torch.float64, device=device)
    for mask, grads in kinds.items():
        sums[mask] = _powers(grads, norm_type, device)
    combine = torch.maximum if norm_type == math.inf else torch.add
    total = over_levels(who, "norm of all gradients in clip_grad_norm_()", levels, sums, combine)
    return total if norm_type == math.inf else total ** (1 / norm_type)


def _combine(values: Iterable[Tensor], norm_type: float) -> Tensor:
    """Sums of |g|^p, or maxima, of different elements: of all of them, from the left."""
    return functools.reduce(torch.maximum if norm_type == math.inf else torch.add, values)


def _powers(grads: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """The sum of |g|^p over the elements of this rank's gradients, or their maximum; a 0-d double on the device."""
    powers = [torch.zeros((), dtype=torch.float64, device=device)]
    grads = [grad for grad in grads if grad.numel()]
    if norm_type == 2:
        for where in dict.fromkeys(grad.device for grad in grads):
            norm, _ = grad_norm([grad for grad in grads if grad.device == where])
            powers.append(norm.to(device).square())
        return _combine(powers, norm_type)
    for grad in grads:
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        norm = torch.linalg.vector_norm(grad, norm_type, dtype=wide).to(device, torch.float64)
        powers.append(norm if norm_type == math.inf else norm**norm_type)
    return _combine(powers, norm_type)
