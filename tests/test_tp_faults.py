"""Tensor-parallel matmuls with lost, silent and confused ranks: an error that says who and what, and never a hang."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import ranks

SECONDS = 60.0  # of a run that is to end by itself long before


def _call(kind: str, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    from pyshard import tp

    group = dist.group.WORLD
    if kind == "gather":
        return tp.all_gather_matmul(x, w, group=group)
    if kind == "scatter":
        return tp.matmul_reduce_scatter(x, w, group=group)
    return tp.matmul_all_reduce(x, w, group=group)


def _dies(rank: int, world: int, transport: str, kind: str, chunks: int) -> None:
    from pyshard import tp

    tp.configure(dist.group.WORLD, transport=transport, timeout=20, chunks=chunks)
    x, w = torch.ones(64, 8), torch.ones(5, 8)
    _call(kind, x, w)
    if rank == world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(3):
        _call(kind, x, w)


@pytest.mark.parametrize("transport", ["shm", "ring"])
@pytest.mark.parametrize("kind", ["gather", "scatter", "total"])
def test_a_killed_rank_is_named(transport: str, kind: str) -> None:
    for world, chunks in ((2, 1), (3, 2)):
        outcomes = ranks.run(_dies, world, transport, kind, chunks, seconds=SECONDS, quiet=True)
        assert outcomes[-1].exitcode == -signal.SIGKILL
        for outcome in outcomes[:-1]:
            assert outcome.error is not None
            assert outcome.error.startswith("PeerError"), outcome.error
            assert f"rank {world - 1}" in outcome.error, outcome.error


def _silent(rank: int, world: int, transport: str, kind: str) -> None:
    from pyshard import tp

    tp.configure(dist.group.WORLD, transport=transport, timeout=2, chunks=1)
    x, w = torch.ones(8, 8), torch.ones(5, 8)
    _call(kind, x, w)
    if rank == 1:
        time.sleep(8)
        return
    _call(kind, x, w)


@pytest.mark.parametrize("transport", ["shm", "ring"])
@pytest.mark.parametrize("kind", ["gather", "scatter", "total"])
def test_a_silent_rank_is_an_error_after_the_timeout(transport: str, kind: str) -> None:
    outcomes = ranks.run(_silent, 2, transport, kind, seconds=SECONDS, quiet=True)
    assert outcomes[0].error is not None
    assert outcomes[0].error.startswith("PeerError"), outcomes[0].error
    assert "rank 1" in outcomes[0].error
    name = {"gather": "all-gather and matmul", "scatter": "matmul and reduce-scatter", "total": "matmul and all-reduce"}
    assert name[kind] in outcomes[0].error


def _confused(rank: int, world: int, transport: str, how: str) -> None:
    from pyshard import tp

    tp.configure(dist.group.WORLD, transport=transport, timeout=5, chunks=1)
    x, w = torch.ones(6, 8), torch.ones(5, 8)
    if how == "rows":
        _call("gather", x[: 6 - rank], w)
    elif how == "operation":
        _call("gather" if rank else "total", x, w)
    elif how == "dtype":
        _call(
            "gather", x.to(torch.float16 if rank else torch.bfloat16), w.to(torch.float16 if rank else torch.bfloat16)
        )
    else:
        _call("scatter", x, w[: 5 - rank])


@pytest.mark.parametrize("how", ["rows", "operation", "dtype", "columns"])
def test_ranks_that_differ_find_an_error_over_shm(how: str) -> None:
    outcomes = ranks.run(_confused, 2, "shm", how, seconds=SECONDS, quiet=True)
    errors = [outcome.error or "" for outcome in outcomes]
    assert all(errors), errors
    text = {
        "rows": "pass sizes=",
        "operation": "same calls in the same order",
        "dtype": "dtype",
        "columns": "rows of",
    }[how]
    assert any(text in error for error in errors), errors


@pytest.mark.parametrize("how", ["rows", "operation", "dtype", "columns"])
def test_ranks_that_differ_do_not_hang_over_ring(how: str) -> None:
    outcomes = ranks.run(_confused, 2, "ring", how, seconds=SECONDS, quiet=True)
    assert all(outcome.error for outcome in outcomes), [outcome.error for outcome in outcomes]


def _fails_inside(rank: int, world: int, transport: str) -> None:
    """One rank runs out of memory, say, in the middle of a call."""
    from pyshard import tp
    from pyshard.tp import engine

    tp.configure(dist.group.WORLD, transport=transport, timeout=30, chunks=1)
    x, w = torch.ones(8, 8), torch.ones(5, 8)
    _call("gather", x, w)
    if rank == 1:

        def broken(*arguments: Any) -> None:
            raise MemoryError("no memory for the output")

        engine.matmul_into = broken
    _call("gather", x, w)
    _call("gather", x, w)


@pytest.mark.parametrize("transport", ["shm", "ring"])
def test_a_rank_that_fails_inside_a_call_ends_the_others_at_once(transport: str) -> None:
    outcomes = ranks.run(_fails_inside, 2, transport, seconds=SECONDS, quiet=True)
    assert outcomes[1].error == "MemoryError: no memory for the output"
    assert outcomes[0].error is not None
    assert outcomes[0].error.startswith("PeerError"), outcomes[0].error
    assert "no memory for the output" in outcomes[0].error  # and not that it waited in vain


def _fails_in_backward(rank: int, world: int, transport: str) -> None:
    from pyshard import tp
    from pyshard.tp import engine

    tp.configure(dist.group.WORLD, transport=transport, timeout=30, chunks=1)
    x, w = torch.ones(8, 8, requires_grad=True), torch.ones(5, 8, requires_grad=True)
    if rank == 1:

        def broken(*arguments: Any) -> None:
            raise MemoryError("no memory for a gradient")

        engine.weight_gradient = broken
    for _ in range(2):
        _call("gather", x, w).sum().backward()
        _call("scatter", x, w).sum().backward()


@pytest.mark.parametrize("transport", ["shm", "ring"])
def test_a_rank_that_fails_in_backward_ends_the_others_at_once(transport: str) -> None:
    outcomes = ranks.run(_fails_in_backward, 2, transport, seconds=SECONDS, quiet=True)
    assert outcomes[1].error == "MemoryError: no memory for a gradient"
    assert outcomes[0].error is not None
    assert "no memory for a gradient" in outcomes[0].error


def _two_groups(rank: int, world: int) -> None:
    """Two threads, each with a group of its own, that come to their first calls in different orders on the ranks."""
    import threading

    groups = [dist.new_group([0, 1]) for _ in range(2)]
    x, w = torch.arange(12.0).view(3, 4), torch.ones(5, 4)
    found: list[torch.Tensor | None] = [None, None]

    def work(i: int) -> None:
        from pyshard import tp

        if i == rank:
            time.sleep(0.3)
        for _ in range(5):
            found[i] = tp.all_gather_matmul(x + rank, w, group=groups[i])

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS / 2)
        assert not thread.is_alive()
    for one in found:
        assert one is not None
        assert torch.equal(one, torch.cat([x, x + 1]) @ w.t())


def test_two_groups_in_two_threads() -> None:
    ranks.run(_two_groups, 2, seconds=SECONDS)


def _many_groups(rank: int, world: int) -> list[int]:
    from pyshard import tp

    x, w, open_files = torch.ones(3, 4), torch.ones(5, 4), []
    for turn in range(6):
        group = dist.new_group([0, 1])
        tp.all_gather_matmul(x, w, group=group)
        if turn % 2:
            tp.close(group)
        dist.destroy_process_group(group)
        open_files.append(len(os.listdir("/proc/self/fd")))
    return open_files


def test_groups_that_are_gone_hold_nothing() -> None:
    for outcome in ranks.run(_many_groups, 2):
        assert outcome.value[5] <= outcome.value[1] + 2  # one workspace more, whose group went last


BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("all_gather_matmul", "two dimensions or more", {"x": torch.ones(4)}),
    ("all_gather_matmul", "expected \\[out, 4\\]", {"weight": torch.ones(5, 3)}),
    ("all_gather_matmul", "any but the last", {"dim": -1}),
    ("all_gather_matmul", "any but the last", {"dim": 5}),
    ("all_gather_matmul", "expected the rows of each of 1 ranks", {"sizes": [1, 2]}),
    ("all_gather_matmul", "expected sizes\\[0\\] = 5", {"sizes": [5]}),
    ("all_gather_matmul", "expected the same. Convert", {"weight": torch.ones(5, 4, dtype=torch.float64)}),
    ("all_gather_matmul", "the bias of weight", {"bias": torch.ones(4)}),
    ("all_gather_matmul", "expected one of torch.float32", {"x": torch.ones(3, 4, dtype=torch.int64)}),
    ("all_gather_matmul", "expected as many", {"weight": [torch.ones(5, 4)], "bias": [None, None]}),
    ("all_gather_matmul", "one tensor for 1 weights", {"weight": [torch.ones(5, 4)], "bias": torch.ones(5)}),
    ("matmul_reduce_scatter", "add up to 5", {"sizes": [5]}),
    ("matmul_reduce_scatter", "expected a process group", {"group": 3}),
    ("copied_matmul", "expected \\[out, 4\\]", {"weight": torch.ones(5, 3)}),
    ("matmul_all_reduce", "expected \\[out, 4\\]", {"weight": torch.ones(5)}),
    ("configure", "expected a process group", {"group": "tp"}),
    ("configure", "expected one of auto", {"transport": "carrier pigeon"}),
    ("configure", "seconds above 0", {"timeout": 0}),
    ("configure", "a number from 0 on", {"chunks": -1}),
]


def _bad(rank: int, world: int) -> None:
    from pyshard import tp

    for name, text, changed in BAD:
        arguments: dict[str, Any] = {"group": dist.group.WORLD}
        if name != "configure":
            arguments |= {"x": torch.ones(3, 4), "weight": torch.ones(5, 4)}
        arguments |= changed
        with pytest.raises((ValueError, TypeError), match=text):
            group = (arguments.pop("group"),) if name == "configure" else ()
            getattr(tp, name)(*group, **arguments)


def test_bad_arguments_are_told() -> None:
    ranks.run(_bad, 1)
