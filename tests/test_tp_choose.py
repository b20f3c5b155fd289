"""Whether and how matmuls are overlapped: the choice from given measurements, and what explain() says of it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pyshard.tp.choose import Ends, Times, choose, even, growing, shrinking
from tests import ranks


def _chosen(kind: str, most: int, *times: tuple[float, float, float, float]) -> Ends:
    return choose(kind, len(times), most, [Times(*one).pack() for one in times]).ends


def test_ends() -> None:
    assert even(4) == (0.25, 0.5, 0.75, 1.0)
    assert growing(4) == (0.125, 0.25, 0.5, 1.0)
    assert shrinking(4) == (0.5, 0.75, 0.875, 1.0)
    assert even(1) == growing(1) == shrinking(1) == (1.0,)


def test_the_slowest_rank_decides() -> None:
    # By rank 0 alone overlap would pay, by rank 1 alone it would not.
    assert _chosen("gather", 1, (1.0, 0.1, 1.5, 1.1), (1.0, 0.1, 1.2, 1.3)) == (1.0,)
    assert _chosen("gather", 1, (1.0, 0.1, 1.1, 1.1), (1.0, 0.1, 1.2, 1.3)) == ()


def test_what_costs_more_than_it_hides_is_left_alone() -> None:
    # Little to transfer, and a matmul that is slower in parts, as one of few rows is.
    assert _chosen("gather", 8, *[(100e-6, 90e-6, 130e-6, 210e-6)] * 2) == ()


def test_equal_times_are_worth_few_unequal_chunks() -> None:
    """Two ranks, a transfer as long as the matmul, matmuls that cost 0.02 more in each part."""
    for kind, one, form in (("gather", 1.5, shrinking), ("scatter", 1.5, growing)):
        found = choose(kind, 2, 8, [Times(1.0, 1 / 16 + 0.02, 2.0, one).pack()] * 2)
        assert found.ends in [form(chunks) for chunks in (3, 4, 5)], (kind, found.ends)
        best = min(time for _, time in found.predicted)
        assert 1.0 < best < 1.15, kind
        assert "chunks, the best of" in found.why


def test_what_was_set_is_said() -> None:
    from pyshard.tp.choose import Choice

    assert Choice(even(3)).why == "as set by chunks="
    assert Choice(even(3)).how == "overlapped in 3 equal chunks"
    found = choose("gather", 2, 1, [Times(0.01, 0.002, 0.02, 0.015).pack()] * 2)
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
        assert lines[2].startswith(
            "    column forward, all-gather and matmul, up to 8 rows x 8 x 12 / 2, torch.float32: "
        )
        row = next(i for i, line in enumerate(lines) if line.startswith("  1: row; forward reduce-scatters"))
        beneath = "\n".join(lines[row + 1 : row + 3])
        assert "    row forward, reduce-scatter and matmul, up to 8 rows x 8 x 12 / 2, torch.float32: " in beneath
        assert "    row backward, all-gather and matmul, up to 8 rows x 8 x 12 / 2, torch.float32: " in beneath
        assert any(line.startswith("  2: row; forward all-reduces the output") for line in lines)
        assert group.count("matmul") >= 4
    with pytest.raises(TypeError, match="expected a model or a process group"):
        from pyshard import tp

        tp.explain(3)  # type: ignore[arg-type]
