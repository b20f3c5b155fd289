"""Training with a sharded optimizer on several ranks, and the same training in one process, for the tests.

The "model" is a list of parameters of awkward shapes and dtypes; the loss pulls each towards random targets that
differ by rank and step. In one process the gradients of all ranks are summed up in rank order in fp32.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """One training run."""

    seed: int
    dtypes: tuple[torch.dtype, ...] = (F32,)  # of the parameters, in turn
    steps: int = 3
    stage: int = 2
    transport: str = "auto"
    bucket_mb: float = 0.05  # several buckets
    micro: int = 1  # backwards per step, all but the last one in no_sync
    absent: str = "nothing"  # which gradients are missing, see uses()
    options: dict[str, Any] = field(default_factory=dict)
    reduce_dtype: torch.dtype | None = None
    coupled: bool = False  # ShardedAdam and Adam


SHAPES = [(70, 130), (13,), (), (4097,), (0,), (3, 64, 64), (4096,), (1,), (5, 7, 11, 13), (8192,)]


def parameters(case: Case, salt: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(case.seed + salt)
    made = []
    for i, shape in enumerate(SHAPES):
        value = torch.randn(shape, generator=generator).to(case.dtypes[i % len(case.dtypes)])
        if len(shape) == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        made.append(nn.Parameter(value))
    made[6].requires_grad_(case.absent != "frozen")
    return made


def uses(case: Case, i: int, rank: int, step: int) -> bool:
    """Whether a rank's loss depends on parameter i at a step."""
    if case.absent == "some":
        return (i + rank + step) % 3 != 0
    if case.absent == "everywhere":
        return i not in (1, 5) or step > 1
    return True


def loss(case: Case, params: list[nn.Parameter], rank: int, step: int, micro: int) -> Tensor:
    total = torch.zeros(())
    for i, param in enumerate(params):
        if uses(case, i, rank, step) and param.requires_grad:
            generator = torch.Generator().manual_seed(((case.seed * 31 + rank) * 31 + step) * 31 + micro * 1009 + i)
            target = torch.randn(param.shape, generator=generator)
            total = total + ((param.float() - target) ** 2).sum() * (1 + rank)
    return total


def groups(case: Case, params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:4]}, {"params": params[4:], "lr": 3e-2, "weight_decay": 0.3, "betas": (0.8, 0.99)}]


@dataclass
class Result:
    params: list[Tensor]
    state: list[dict[str, Tensor]]  # whole tensors by parameter
    norms: list[float]
    skipped: int


def _result(opt: Any, params: list[nn.Parameter], norms: list[float]) -> Result:
    whole = opt.full_state_dict() if hasattr(opt, "full_state_dict") else opt.state_dict()
    state = [{k: v.clone() for k, v in whole["state"].get(i, {}).items()} for i in range(len(params))]
    return Result([p.detach().clone() for p in params], state, norms, opt.skipped_steps)


def train(rank: int, world: int, case: Case, after: Callable[[Any], Any] | None = None) -> Any:
    """On each rank: the run with a sharded optimizer."""
    import pyshard

    params = parameters(case, salt=rank)  # different at first: the optimizer makes them equal
    opt = (pyshard.ShardedAdam if case.coupled else pyshard.ShardedAdamW)(
        groups(case, params),
        lr=1e-2,
        stage=case.stage,
        transport=case.transport,
        bucket_mb=case.bucket_mb,
        timeout=30,
        reduce_dtype=case.reduce_dtype,
        **case.options,
    )
    norms = []
    for step in range(case.steps):
        for micro in range(case.micro):
            if micro < case.micro - 1:
                with opt.no_sync():
                    loss(case, params, rank, step, micro).backward()
            else:
                loss(case, params, rank, step, micro).backward()
        opt.step()
        opt.zero_grad()
        if opt.options.needs_norm():
            norms.append(float(opt.grad_norm))
    result = _result(opt, params, norms)
    extra = after(opt) if after is not None else None
    opt.close()
    return (result, extra) if after is not None else result


def expected(case: Case, world: int) -> Result:
    """The same in one process with pyshard.AdamW."""
    import pyshard

    params = parameters(case)
    for param in params:
        if param.dtype != F32:
            param.grad_dtype = F32
    opt = (pyshard.Adam if case.coupled else pyshard.AdamW)(groups(case, params), lr=1e-2, **case.options)
    norms = []
    for step in range(case.steps):
        sums: list[Tensor | None] = [None] * len(params)
        for rank in range(world):
            grads: list[Tensor | None] = [None] * len(params)
            copies = [nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in params]
            for micro in range(case.micro):
                total = loss(case, copies, rank, step, micro)
                if total.requires_grad:
                    total.backward()
            grads = [c.grad for c in copies]
            if case.reduce_dtype is not None:
                grads = [None if g is None else g.to(case.reduce_dtype) for g in grads]
            for i, grad in enumerate(grads):
                there = any(uses(case, i, r, step) for r in range(world)) and params[i].requires_grad
                if there:
                    part = torch.zeros_like(params[i], dtype=F32) if grad is None else grad.float()
                    before = sums[i]
                    sums[i] = part if before is None else before + part
        for param, total_grad in zip(params, sums, strict=True):
            param.grad = total_grad
        opt.grad_scale = torch.tensor(float(world))  # the mean over ranks
        opt.step()
        if opt.options.needs_norm():
            norms.append(float(opt.grad_norm))
    return _result(opt, params, norms)


def assert_same_bits(a: Result, b: Result) -> None:
    assert a.norms == b.norms
    assert a.skipped == b.skipped
    for i, (x, y) in enumerate(zip(a.params, b.params, strict=True)):
        assert torch.equal(x, y), f"parameter {i}: {(x != y).sum()} of {x.numel()} elements differ"
    for i, (s, t) in enumerate(zip(a.state, b.state, strict=True)):
        assert s.keys() == t.keys(), f"parameter {i}"
        for key in s:
            assert s[key].dtype == t[key].dtype and s[key].shape == t[key].shape, f"{key} of parameter {i}"
            assert torch.equal(s[key], t[key]), f"{key} of parameter {i}"
