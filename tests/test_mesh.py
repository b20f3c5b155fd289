"""init_mesh, and clip_grad_norm_ over tensor-parallel, data-parallel and pipeline ranks, against one process."""

import math
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from reference import assert_same_bits
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import pyshard
from pyshard.placement import TensorShard, set_tensor_shard
from pyshard.tp.splits import split_sizes

# Our sums are in double and rounded to fp32 once; torch's own are in fp32, whose vectorised sums of the sizes here (at
# most 2,000 elements) pass each element through fewer than 200 additions, and sums of positive numbers err by less
# than roundings times 2^-24.
TORCH_BOUND = 200 * 2.0**-24
DTENSORS = 3  # last of the parameters of cut()
NORMS = (2.0, 1.0, 3.5, math.inf)


def _mesh(rank: int, world: int) -> None:
    for sizes, shape in (
        ({"dp": 2, "tp": 2}, (1, 2, 2)),
        ({"tp": 2, "pp": 2}, (2, 1, 2)),
        ({"dp": -1}, (1, 4, 1)),
        ({"dp": -1, "tp": 2}, (1, 2, 2)),
        ({"tp": 4, "dp": -1}, (1, 1, 4)),
        ({"pp": -1, "dp": 1, "tp": 2}, (2, 1, 2)),
    ):
        mesh = pyshard.init_mesh(**sizes)
        assert mesh.mesh_dim_names == ("pp", "dp", "tp") and tuple(mesh.shape) == shape and mesh.device_type == "cpu"
        assert mesh.mesh.flatten().tolist() == [0, 1, 2, 3]
        dp, tp = shape[1:]
        assert tuple(mesh.get_coordinate()) == (rank // (dp * tp), rank // tp % dp, rank % tp)
        for name, size in zip(("pp", "dp", "tp"), shape, strict=True):
            assert dist.get_world_size(mesh.get_group(name)) == size
    dist.barrier()  # a rank that ends now would close connections that others are still making
    for sizes, match in (
        ({}, r"pp=1, dp=1, tp=1 make 1; expected the 4 ranks there are"),
        ({"dp": 2, "tp": 3}, r"pp=1, dp=2, tp=3 make 6; expected the 4 ranks"),
        ({"dp": -1, "tp": 3}, r"pp=1, dp=-1, tp=3 make 3; expected a divisor of the 4 ranks"),
        ({"dp": -1, "tp": 8}, r"make 8; expected a divisor of the 4 ranks"),
        ({"dp": -1, "tp": -1}, r"pp=1, dp=-1, tp=-1; expected sizes of 1 or more, at most one of them -1"),
        ({"dp": 0, "tp": 4}, r"dp=0, tp=4; expected sizes of 1 or more"),
        ({"dp": -2, "tp": 4}, r"dp=-2, tp=4; expected sizes of 1 or more"),
    ):
        with pytest.raises(ValueError, match=match):
            pyshard.init_mesh(**sizes)


def test_init_mesh() -> None:
    ranks.run(_mesh, 4)


def test_a_mesh_needs_a_process_group() -> None:
    assert not dist.is_initialized()
    with pytest.raises(
        RuntimeError, match=r"not initialised; expected a default process group\. Call torch\.distributed"
    ):
        pyshard.init_mesh(dp=2)


def parameters(seed: int, *dtypes: torch.dtype, empty: bool = True) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    result = []
    for dtype in dtypes:
        for shape in ((13, 7), (40, 50), (11,), (), *([(0, 3)] if empty else [])):
            param = nn.Parameter(torch.zeros(shape, dtype=dtype))
            param.grad = torch.randn(shape, generator=generator).to(dtype)
            result.append(param)
    return result


def grads(params: list[nn.Parameter]) -> list[Tensor]:
    return [param.grad.clone() for param in params if param.grad is not None]


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("max_norm", [0.0, 1e-3, 1.0, 1e6, math.inf])
def test_one_process_is_as_torch(norm_type: float, max_norm: float, seed: int) -> None:
    ours, theirs = parameters(seed, torch.float32), parameters(seed, torch.float32, empty=False)  # torch refuses it
    ours.append(nn.Parameter(torch.ones(2)))  # without a gradient
    before = grads(ours)
    exact = torch.linalg.vector_norm(torch.cat([g.flatten() for g in before]).double(), norm_type)
    norm = pyshard.clip_grad_norm_(iter([*ours, ours[0]]), max_norm, norm_type=norm_type)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm, norm_type=norm_type)
    assert norm.dtype == torch.float32 and norm.shape == ()
    torch.testing.assert_close(
        norm.double(), exact, rtol=TORCH_BOUND if norm_type not in (2.0, math.inf) else 2**-24, atol=0
    )
    torch.testing.assert_close(norm, expected, rtol=TORCH_BOUND, atol=0)
    for got, want in zip(grads(ours), grads(theirs), strict=False):
        torch.testing.assert_close(got, want, rtol=TORCH_BOUND, atol=0)
    if max_norm >= 1e6:
        for got, want in zip(grads(ours), before, strict=True):
            assert_same_bits(got, want)


def test_mixed_dtypes_one_tensor_and_none(seed: int) -> None:
    params = parameters(seed, torch.bfloat16, torch.float32, torch.float64, torch.float16)
    before = grads(params)
    norm = pyshard.clip_grad_norm_(params, 0.5)
    torch.testing.assert_close(
        norm.double(), torch.cat([g.double().flatten() for g in before]).norm(), rtol=2**-23, atol=0
    )
    for got, was in zip(grads(params), before, strict=True):
        # one rounding of the factor to fp32, and one of the product to the gradient's dtype
        bound = 2**-23 + torch.finfo(got.dtype).eps
        torch.testing.assert_close(got.double(), was.double() * (0.5 / norm.double()), rtol=bound, atol=2.0**-24)
        assert got.dtype == was.dtype
    assert float(pyshard.clip_grad_norm_(params[0], 1e-2)) > 0
    for nothing in ([], [nn.Parameter(torch.ones(3))]):
        assert_same_bits(pyshard.clip_grad_norm_(nothing, 1.0), torch.tensor(0.0))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("norm_type", NORMS)
def test_a_norm_that_is_not_finite(bad: float, norm_type: float, seed: int) -> None:
    params, theirs = parameters(seed, torch.float32), parameters(seed, torch.float32, empty=False)
    for group in (params, theirs):
        group[1].grad[3, 4] = bad
    before = grads(params)
    with pytest.raises(RuntimeError, match=rf"the norm of all gradients is {bad}; expected a finite one.*Nothing was"):
        pyshard.clip_grad_norm_(params, 1.0, norm_type=norm_type, error_if_nonfinite=True)
    for got, want in zip(grads(params), before, strict=True):
        assert_same_bits(got, want)
    norm = pyshard.clip_grad_norm_(params, 1.0, norm_type=norm_type)
    assert_same_bits(norm, nn.utils.clip_grad_norm_(theirs, 1.0, norm_type=norm_type))
    for got, want in zip(grads(params), grads(theirs), strict=False):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_clipping_errors() -> None:
    for norm_type in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=rf"norm_type={norm_type}; expected a positive number or inf"):
            pyshard.clip_grad_norm_([], 1.0, norm_type=norm_type)
    param = nn.Parameter(torch.ones(3, 2))
    param.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(TypeError, match=r"gradient of parameter 0 is torch\.sparse_coo; expected a dense one"):
        pyshard.clip_grad_norm_(param, 1.0)


def cut(whole: list[nn.Parameter], group: dist.ProcessGroup, mesh: Any) -> list[nn.Parameter]:
    """The same parameters as this rank has them: rows cut, columns cut, marked whole, ordinary, DTensor."""
    world = dist.get_world_size(group)
    result = []
    for i, param in enumerate(whole):
        shape, dim = tuple(param.shape), i % 3
        if dim < param.dim() and param.numel():
            shard = TensorShard.even(group, shape, dim, split_sizes(shape[dim], world))
        else:
            shard = TensorShard(group, shape)
        marked = i != 2
        part = nn.Parameter(torch.zeros_like(shard.cut(param.detach()) if marked else param))
        part.grad = (shard.cut(param.grad) if marked else param.grad).clone()
        if marked:
            set_tensor_shard(part, shard)
        result.append(part)
    # Of torch's own layers on the same ranks; the last gradient is not cut as its parameter.
    for placement, grads_placement in ((Shard(0), Shard(0)), (Replicate(), Replicate()), (Shard(0), Shard(1))):
        param = nn.Parameter(distribute_tensor(torch.ones(5, 3), mesh, [placement]))
        param.grad = distribute_tensor(torch.arange(15.0).view(5, 3), mesh, [grads_placement])
        result.append(param)
    return result


def _ranks(rank: int, world: int, seed: int, sizes: dict[str, int]) -> None:
    mesh = pyshard.init_mesh(**sizes)
    pp, _, tp = (mesh.get_local_rank(name) for name in ("pp", "dp", "tp"))
    stages = []
    for stage in range(sizes.get("pp", 1)):
        extra = [nn.Parameter(torch.ones(5, 3)) for _ in range(DTENSORS)]
        for param in extra:
            param.grad = torch.arange(15.0).view(5, 3)
        stages.append([*parameters(seed + stage, torch.float32), *extra])
    whole = [param for stage in stages for param in stage]
    for norm_type in NORMS:
        before = grads(stages[pp])
        own = cut(stages[pp][:-DTENSORS], mesh.get_group("tp"), mesh["tp"])
        norm = pyshard.clip_grad_norm_(own, 2.0, mesh, norm_type)
        exact = torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in grads(whole)]), norm_type)
        # The 2-norm and the maximum are exact but for the last rounding; a p-norm is that of norms in fp32.
        torch.testing.assert_close(
            norm.double(), exact, rtol=2**-24 if norm_type in (2, math.inf) else TORCH_BOUND, atol=0
        )
        parts = [torch.empty_like(norm) for _ in range(world)]
        dist.all_gather(parts, norm)
        for part in parts:
            assert_same_bits(part, parts[0])
        scale = 2.0 / (float(norm) + 1e-6)
        for i, (param, was) in enumerate(zip(own, before, strict=True)):
            shard = getattr(param, "tensor_shard", None)
            got = param.grad.full_tensor() if i >= len(own) - DTENSORS else param.grad
            want = was if shard is None else shard.cut(was)
            torch.testing.assert_close(got, want * scale, rtol=2**-22, atol=0)
    if "pp" in sizes:  # a stage without parameters takes part
        own = cut(stages[pp][:-DTENSORS], mesh.get_group("tp"), mesh["tp"])
        norm = pyshard.clip_grad_norm_(own if pp == 0 else [], math.inf, mesh)
        exact = torch.cat([g.double().flatten() for g in grads(stages[0])]).norm()
        torch.testing.assert_close(norm.double(), exact, rtol=2**-24, atol=0)
    # One rank has no gradient of a cut parameter, and one a NaN: all still agree.
    own = cut(stages[pp][:-DTENSORS], mesh.get_group("tp"), mesh["tp"])
    if tp == 0:
        own[0].grad = None
    assert pyshard.clip_grad_norm_(own, 2.0, mesh).isfinite()
    if rank == world - 1:
        own[1].grad[0, 0] = math.nan
    alone = (
        sizes.get("dp", 1) > 1 and mesh.get_local_rank("dp") == 0
    )  # dp ranks are equal by contract, so none is asked
    if not alone:
        with pytest.raises(RuntimeError, match="is nan; expected a finite one"):
            pyshard.clip_grad_norm_(own, 2.0, mesh, error_if_nonfinite=True)


@pytest.mark.parametrize(
    "sizes", [{"tp": 1}, {"tp": 2}, {"tp": 3}, {"tp": 2, "dp": 2}, {"tp": 2, "pp": 2}, {"tp": 4}], ids=str
)
def test_norm_over_ranks_is_that_of_the_whole(sizes: dict[str, int], seed: int) -> None:
    ranks.run(_ranks, math.prod(sizes.values()), seed, sizes)


def test_names_are_there_when_asked_for() -> None:
    import pyshard.tp as tp

    assert pyshard.tp is tp
    for name in ("init_mesh", "clip_grad_norm_", "tp"):
        assert name in pyshard.__all__ and getattr(pyshard, name) is not None
    assert callable(pyshard.tp.vocab_parallel_cross_entropy) and issubclass(
        pyshard.tp.VocabParallelEmbedding, nn.Module
    )
