"""Ranks that differ, and bad input on one of them: an error on every rank, and nothing changed."""

from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
from torch import nn


def _params(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]


def _build(rank: int, world: int, how: str) -> None:
    import pyshard

    odd = rank == 1
    shapes = [(3, 4), (5,)]
    options: dict[str, Any] = {"lr": 0.1}
    if how == "count" and odd:
        shapes.append((2,))
    if how == "shape" and odd:
        shapes[1] = (6,)
    params = _params(*shapes, dtype=torch.bfloat16 if how == "dtype" and odd else torch.float32)
    if how == "frozen" and odd:
        params[1].requires_grad_(False)
    if how == "lr":
        options["lr"] = 0.2 if odd else 0.1
    if how == "stage":
        options["stage"] = 1 if odd else 2
    if how == "clip":
        options["max_grad_norm"] = 2.0 if odd else 1.0
    if how == "bucket":
        options["bucket_mb"] = 7 if odd else 25
    if how == "names":
        named = [("a", params[0]), ("c" if odd else "b", params[1])]
        pyshard.ShardedAdamW(named, **options)
        return
    if how == "groups" and odd:
        pyshard.ShardedAdamW([{"params": params[:1]}, {"params": params[1:]}], **options)
        return
    if how == "class" and odd:
        pyshard.ShardedAdam(params, **options)
        return
    if how == "torch" and odd:
        torch.__version__ = "2.12.0"  # as a rank with another installation would say
    if how == "float64" and odd:
        params = _params(*shapes, dtype=torch.float64)
    pyshard.ShardedAdamW(params, **options)


DIFFERENCES = {
    "count": "the number of parameters of group 0 is 2 on rank 0 and 3 on rank 1",
    "shape": r"parameter 1 is 'float32 \(5,\) cpu, trained' on rank 0 and 'float32 \(6,\) cpu, trained' on rank 1",
    "dtype": "parameter 0 is 'float32 .* on rank 0 and 'bfloat16 .* on rank 1",
    "frozen": "parameter 1 is '.*trained' on rank 0 and '.*frozen' on rank 1",
    "lr": "lr of group 0 is 0.1 on rank 0 and 0.2 on rank 1",
    "stage": "the argument stage is 2 on rank 0 and 1 on rank 1",
    "clip": "the argument options is .*max_grad_norm=1.0.* on rank 0 and .*max_grad_norm=2.0.* on rank 1",
    "bucket": "the argument bucket_mb is 25.0 on rank 0 and 7.0 on rank 1",
    "names": "the parameter names of group 0 is .*'b'.* on rank 0 and .*'c'.* on rank 1",
    "groups": "the number of parameter groups is 1 on rank 0 and 2 on rank 1",
    "class": "the optimizer is 'pyshard.ShardedAdamW' on rank 0 and 'pyshard.ShardedAdam' on rank 1",
    "torch": "the version of torch is '.*' on rank 0 and '2.12.0' on rank 1",
    "float64": "parameter 0 is float64|on rank 1: .*parameter 0 is float64",
}


@pytest.mark.parametrize("how", DIFFERENCES)
def test_ranks_that_differ(how: str) -> None:
    import re

    for outcome in ranks.run(_build, 3, how, quiet=True):
        assert outcome.error is not None
        assert re.search(DIFFERENCES[how], outcome.error), outcome.error


def _later_difference(rank: int, world: int, how: str) -> dict[str, Any]:
    """A difference that arises in training: an error at the next step, on every rank, and nothing has changed."""
    import pyshard

    params = _params((70, 70), (5,))
    opt = pyshard.ShardedAdamW(params, lr=0.1, timeout=20)
    for _ in range(2):
        sum((p**2).sum() for p in params).backward()
        opt.step()
    before = [p.detach().clone() for p in params]
    if rank == 1 and how == "lr":
        opt.param_groups[0]["lr"] = 0.3
    if rank == 1 and how == "bad lr":
        opt.param_groups[0]["lr"] = -1.0
    for p in params:
        p.grad = torch.ones_like(p)
    if rank == 1 and how == "sparse":
        params[1].grad = torch.ones(5).to_sparse()
    message = ""
    try:
        opt.step()
    except (ValueError, RuntimeError) as error:
        message = f"{type(error).__name__}: {error}"
    unchanged = all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    # And training goes on once the cause is gone.
    opt.param_groups[0]["lr"] = 0.1
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    moved = all(not torch.equal(a, b) for a, b in zip(before, params, strict=True))
    return {"message": message, "unchanged": unchanged, "moved": moved, "weights": [p.detach().clone() for p in params]}


@pytest.mark.parametrize(
    ("how", "first", "second"),
    [
        ("lr", "lr of group 0 is 0.1 on rank 0 and 0.3 on rank 1", "lr of group 0 is 0.1 on rank 0 and 0.3 on rank 1"),
        ("bad lr", "PeerError: .*rank 1 could not take the step.*lr=-1.0", "ValueError: .*lr=-1.0"),
        ("sparse", "PeerError: .*rank 1 could not take the step.*sparse gradient", "RuntimeError: .*sparse gradient"),
    ],
)
def test_differences_that_arise_later(how: str, first: str, second: str) -> None:
    import re

    values = [outcome.value for outcome in ranks.run(_later_difference, 2, how)]
    assert re.search(first, values[0]["message"]), values[0]["message"]
    assert re.search(second, values[1]["message"]), values[1]["message"]
    assert all(value["unchanged"] and value["moved"] for value in values)
    for a, b in zip(values[0]["weights"], values[1]["weights"], strict=True):
        assert torch.equal(a, b)


def _arguments(rank: int, world: int) -> list[str]:
    import copy

    import pyshard

    params = _params((3,))
    bad: list[Callable[[], Any]] = [
        lambda: pyshard.ShardedAdamW(params, stage=3),
        lambda: pyshard.ShardedAdamW(params, transport="smoke"),
        lambda: pyshard.ShardedAdamW(params, bucket_mb=0),
        lambda: pyshard.ShardedAdamW(params, timeout=-1),
        lambda: pyshard.ShardedAdamW(params, reduce_dtype=torch.int8),
        lambda: pyshard.ShardedAdamW(params, capturable=True),
        lambda: pyshard.ShardedAdamW(params, lr=-1.0),
        lambda: copy.deepcopy(pyshard.ShardedAdamW(params)),
    ]
    messages = []
    for call in bad:
        try:
            call()
            messages.append("no error")
        except (ValueError, TypeError, RuntimeError) as error:
            messages.append(str(error))
    return messages


def test_arguments() -> None:
    wanted = [
        "stage=3; expected 1 or 2",
        "transport='smoke'; expected one of",
        "bucket_mb=0; expected a positive number",
        "timeout=-1; expected a positive number",
        "reduce_dtype=torch.int8; expected None",
        "capturable=True; expected False",
        "lr=-1.0; expected",
        "cannot be copied or pickled",
    ]
    for outcome in ranks.run(_arguments, 2):
        for text, message in zip(wanted, outcome.value, strict=True):
            assert text in message
