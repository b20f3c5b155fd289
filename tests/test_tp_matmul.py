"""all_gather_matmul, matmul_reduce_scatter, matmul_all_reduce and copied_matmul: values, gradients and bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import ranks, tp_cases

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _every_case(seed: int) -> dict[str, list[torch.Tensor]]:
    found: dict[str, list[torch.Tensor]] = {}
    for dtype in FLOATS:
        name = str(dtype)
        found[f"{name} column"] = tp_cases.column(seed, (), 37, 19, [12, 5], -2, dtype, True)
        found[f"{name} column batch"] = tp_cases.column(seed + 1, (3,), 10, 8, [6], 1, dtype, False)
        found[f"{name} row"] = tp_cases.row(seed + 2, (), 37, 24, 11, -2, dtype, True, True)
        found[f"{name} row batch"] = tp_cases.row(seed + 3, (2,), 9, 13, 7, 1, dtype, False, True)
        found[f"{name} all-reduce"] = tp_cases.row(seed + 4, (2,), 9, 13, 7, 1, dtype, True, False)
        found[f"{name} copied"] = tp_cases.copied(seed + 5, (2, 9), 13, [7, 4], dtype)
    # Rows first, as in a layout [sequence, batch, features]; fewer rows than ranks; more rows than a slot's smallest.
    found["first"] = tp_cases.column(seed + 6, (3,), 11, 8, [6], 0, torch.float32, True)
    found["row first"] = tp_cases.row(seed + 7, (3,), 11, 8, 6, 0, torch.float32, True, True)
    found["few"] = tp_cases.column(seed + 8, (), 2, 8, [6], -2, torch.float32, True)
    found["row few"] = tp_cases.row(seed + 9, (), 1, 8, 6, -2, torch.float32, True, True)
    found["large"] = tp_cases.column(seed + 10, (2,), 300, 130, [70], 1, torch.float32, True)
    found["row large"] = tp_cases.row(seed + 11, (2,), 300, 130, 150, 1, torch.float32, True, True)
    return found


def _transport(
    rank: int, world: int, transport: str, chunks: int | None, form: str, seed: int
) -> dict[str, list[torch.Tensor]]:
    from pyshard import tp
    from pyshard.tp import choose, engine

    engine.even = getattr(choose, form)  # what chunks= cuts into
    tp.configure(dist.group.WORLD, transport=transport, timeout=30, chunks=chunks)
    first = _every_case(seed)
    again = _every_case(seed)  # now with what the first calls have chosen
    for name in first:
        for a, b in zip(first[name], again[name], strict=True):
            tp_cases.close(f"{name}, again", b, a, a.dtype, 64.0 * world)
    return again


WAYS = [(name, chunks, "even") for name in ("shm", "ring") for chunks in (None, 0, 1, 3)]
WAYS += [("ring", 5, "shrinking"), ("ring", 4, "growing"), ("blocking", None, "even")]


def test_one_rank(seed: int) -> None:
    ranks.run(_transport, 1, "auto", None, "even", seed)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(("transport", "chunks", "form"), WAYS)
def test_values_and_gradients(world: int, transport: str, chunks: int | None, form: str, seed: int) -> None:
    ranks.run(_transport, world, transport, chunks, form, seed)


def _in_triton(rank: int, world: int, chunks: int, seed: int) -> None:
    """Small ones: the interpreter is slow. One chunk is the fused kernel, none the copies between signals."""
    from pyshard import tp
    from pyshard.tp import engine

    group = dist.group.WORLD
    tp.configure(group, transport="symm_mem", timeout=60, chunks=chunks)
    fused, calls = engine.workspace(group, torch.device("cpu")).fused, set()

    def counted(name: str) -> Any:
        method = getattr(fused, name)
        return lambda *arguments: calls.add(name) or method(*arguments)

    for name in ("all_gather_matmul", "matmul_reduce_scatter"):
        setattr(fused, name, counted(name))
    for dtype in (torch.float32, torch.bfloat16):
        tp_cases.column(seed, (), 7, 16, [5, 8], -2, dtype, True)
        tp_cases.column(seed + 1, (), 6, 16, [8], -2, dtype, False)
        tp_cases.row(seed + 2, (), 7, 24, 8, -2, dtype, True, True)
        tp_cases.row(seed + 3, (2,), 3, 24, 8, 1, dtype, False, True)
        tp_cases.row(seed + 4, (2,), 3, 24, 8, 1, dtype, True, False)
        tp_cases.copied(seed + 5, (2, 3), 16, [8, 5], dtype)
    assert calls == ({"all_gather_matmul", "matmul_reduce_scatter"} if chunks else set())


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("chunks", [0, 1])
def test_values_and_gradients_in_triton(world: int, chunks: int, seed: int) -> None:
    ranks.run(_in_triton, world, chunks, seed, seconds=200)


def _whole_numbers(rank: int, world: int, seed: int) -> dict[str, Any]:
    """Products of whole numbers are exact, so that the bits of results are those of the sums over ranks."""
    from pyshard import tp

    group = dist.group.WORLD
    found: dict[str, Any] = {}
    for transport, chunks in [
        ("shm", 1),
        ("shm", 2),
        ("ring", 1),
        ("ring", 2),
        ("ring", 7),
        ("symm_mem", 1),
        ("blocking", None),
    ]:
        tp.configure(group, transport=transport, timeout=30, chunks=chunks)
        for dtype in (torch.float32, torch.bfloat16):
            g = torch.Generator().manual_seed(seed + rank)
            # Partial sums of very different size: another order of the sums would give other bits.
            scale = [1.0, 4097.0 * 4096, 3.0, 2.0**-9][rank]
            x = torch.randint(-3, 4, (29, 8), generator=g).to(dtype)
            w = (torch.randint(-3, 4, (17, 8), generator=g) * scale).to(dtype)
            bias = torch.full((17,), 0.3, dtype=dtype)
            key = f"{transport} {chunks} {dtype}"
            found[key] = [
                tp.matmul_reduce_scatter(x, w, bias, group=group),
                tp.matmul_all_reduce(x, w, bias, group=group),
            ]
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
def test_bits_of_sums_depend_on_neither_chunks_nor_transport(world: int, seed: int) -> None:
    outcomes = [outcome.value for outcome in ranks.run(_whole_numbers, world, seed)]
    for found in outcomes:
        for dtype in ("torch.float32", "torch.bfloat16"):
            want = found[f"blocking None {dtype}"]
            for key, got in found.items():
                if key.endswith(dtype):
                    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), key
            assert torch.equal(want[1], outcomes[0][f"blocking None {dtype}"][1])
