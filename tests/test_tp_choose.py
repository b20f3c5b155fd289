"""Whether and how matmuls are overlapped: the choice from given measurements, and what explain() says of it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pyshard.tp.choose import Times, choose
from tests import ranks


def _chosen(kind: str, most: int, *times: tuple[float, float, float]) -> int:
    return choose(kind, len(times), most, [Times(*one).pack() for one in times]).chunks


def test_the_slowest_rank_decides() -> None:
    # By rank 0 alone overlap would pay, by rank 1 alone it would not.
    assert _chosen("gather", 1, (1.0, 1.5, 1.1), (1.0, 1.2, 1.3)) == 1
    assert _chosen("gather", 1, (1.0, 1.1, 1.1), (1.0, 1.2, 1.3)) == 0


def test_what_costs_more_than_it_hides_is_left_alone() -> None:
    # Little to transfer, and a matmul that is slower in parts, as one of few rows is.
    assert _chosen("gather", 8, *[(100e-6, 130e-6, 210e-6)] * 2) == 0


def test_equal_times_are_worth_many_chunks() -> None:
    """Two ranks, a transfer as long as the matmul: in c chunks a gather ends after about 1 + 1 / (2 c)."""
    for kind, one in (("gather", 1.5), ("scatter", 1.5), ("total", 2.0)):
        assert _chosen(kind, 8, *[(1.0, 2.0, one)] * 2) == 8, kind
        found = choose(kind, 2, 8, [Times(1.0, 2.0, one).pack()] * 2)
        best = dict(found.predicted)[8]
        assert best == pytest.approx({"gather": 1.0625, "scatter": 1.0625, "total": 1.125}[kind], abs=2e-3)


def test_what_was_set_is_said() -> None:
    from pyshard.tp.choose import Choice

    assert Choice(3).why == "as set by chunks="
    found = choose("gather", 2, 2, [Times(0.01, 0.02, 0.015).pack()] * 2)
    assert "10.00 ms for the matmul, 20.00 with the communication" in found.why


def _explained(rank: int, world: int) -> tuple[str, str, str, str]:
    from pyshard import tp

    group = dist.group.WORLD
    before = tp.explain(group)
    model = nn.Sequential(
        tp.ColumnParallelLinear(8, 12, group=group, sequence_parallel=True),
        tp.RowParallelLinear(12, 8, group=group, sequence_parallel=True),
        tp.RowParallelLinear(8, 4, group=group, input_is_parallel=False),
    )
    plain = tp.explain(nn.Linear(2, 2))
    model[1](model[0](torch.ones(4, 8))).sum().backward()
    model[2](torch.ones(3, 8))
    return before, plain, tp.explain(model), tp.explain(group)


def test_explain() -> None:
    for before, plain, model, group in (outcome.value for outcome in ranks.run(_explained, 2)):
        assert "no call yet" in before
        assert plain.startswith("no tensor-parallel layers")
        lines = model.splitlines()
        assert lines[0].startswith("ranks [0, 1], transport shm: all 2 ranks run on this host")
        assert lines[1].startswith("  0: column; forward gathers the rows")
        assert lines[2].startswith("    column forward, all-gather and matmul, 8 rows x 8 x 12 / 2, torch.float32: ")
        row = next(i for i, line in enumerate(lines) if line.startswith("  1: row; forward reduce-scatters"))
        beneath = "\n".join(lines[row + 1 : row + 3])
        assert "    row forward, reduce-scatter and matmul, 8 rows x 8 x 12 / 2, torch.float32: " in beneath
        assert "    row backward, all-gather and matmul, 8 rows x 8 x 12 / 2, torch.float32: " in beneath
        assert any(line.startswith("  2: row; forward all-reduces the output") for line in lines)
        assert group.count("matmul") >= 4
    with pytest.raises(TypeError, match="expected a model or a process group"):
        from pyshard import tp

        tp.explain(3)  # type: ignore[arg-type]
