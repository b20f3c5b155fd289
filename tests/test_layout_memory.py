"""Memory of a rank in each layout: what is predicted from shapes is what real ranks hold, byte for byte.

The model's sizes divide by nothing: 3 heads, 33 features, 67 words, 3 blocks.
"""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import ranks
import torch

from benchmarks import layout_memory as memory
from benchmarks import results
from benchmarks.distributed_model import GPT2, Work
from benchmarks.layout_memory import LAYOUTS, Layout

pytest.importorskip("transformers", reason="the model comes from there (requirements/bench.txt)")

ROOT = Path(__file__).resolve().parent.parent
WORK = Work(layers=3, width=33, heads=3, vocabulary=67, positions=10, batch=2, length=9)
# Parts of tensor-parallel ranks, 2 heads and 1, for which the best stages would not be the same blocks.
APART = Work(layers=6, width=18, heads=3, vocabulary=175, positions=224, batch=3, length=9)
# In several buckets, of which some have parts of one parameter, and with one parameter larger than a bucket.
CUT_FINE = tuple(
    Layout(f"{way} in buckets, {transport}, dp {dp}", dp=dp, way=way, transport=transport, bucket_mb=0.012)
    for way, transport, dp in [
        ("stage1", "shm", 3),
        ("stage2", "shm", 3),
        ("stage1", "collective", 2),
        ("stage2", "collective", 3),
    ]
)
UNEVEN = (Layout("fully_shard, dp 3", dp=3, way="full"), Layout("HSDP, 2 x 3", dp=6, way="full", replicas=2))
UNEVEN += (Layout("fully_shard, dp 2, pp 2, computes in bf16", dp=2, pp=2, way="full", compute="bfloat16"),)
UNEVEN += (Layout("tp 3, dp 2", tp=3, dp=2, way="stage1"),)
ALL = (*LAYOUTS, *CUT_FINE, *UNEVEN)
DTYPES = ("float32", "bfloat16")
EXACT = [kind for kind in memory.KINDS if kind != "gathered"]


def measure(rank: int, world: int, layouts: list[Layout]) -> list[dict]:
    import transformers

    from benchmarks.layout_run import Holding

    transformers.logging.set_verbosity_error()
    found = []
    for layout in layouts:
        for dtype in DTYPES:
            one = Holding(asdict(layout), asdict(replace(WORK, dtype=dtype)))
            found.append({"held": one.answer(), "loss": one.loss})
    return found


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], list[dict]]:
    """By layout and dtype, what each of its ranks has found."""
    outcomes = ranks.run(measure, max(layout.ranks for layout in ALL), list(ALL), seconds=200)
    keys = [(layout.name, dtype) for layout in ALL for dtype in DTYPES]
    return {key: [o.value[i] for o in outcomes if o.value[i]["held"] is not None] for i, key in enumerate(keys)}


def one(rank: int, world: int, layout: Layout) -> dict:
    from benchmarks.layout_run import Holding

    found = Holding(asdict(layout), asdict(APART)).answer()
    assert found is not None
    return found


def test_tensor_parallel_ranks_of_unequal_parts_have_the_same_stages() -> None:
    layout = Layout("tp 2, pp 3", tp=2, pp=3)
    with torch.device("meta"):
        model = APART.model()[0]
    found = [outcome.value for outcome in ranks.run(one, layout.ranks, layout, seconds=100)]
    assert found == [memory.predict(model, layout, rank, torch.float32) for rank in range(layout.ranks)]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    with torch.device("meta"):
        return WORK.model()[0]


@pytest.mark.parametrize(
    "layout",
    [layout for layout in ALL if layout.transport == "shm" and not layout.compute],
    ids=lambda layout: layout.name,
)
def test_every_layout_trains_the_same_model(measured: dict, layout: Layout) -> None:
    """Or it would not matter what it holds. The loss of the first dp rank's batch, in another order of sums."""
    alone = measured["one process", "float32"][0]["loss"]
    losses = [o["loss"] for rank, o in enumerate(measured[layout.name, "float32"]) if layout.place(rank)[1] == 0]
    assert losses == pytest.approx([alone] * len(losses), abs=1e-5)


def test_predictions_by_hand(model: torch.nn.Module) -> None:
    w, layers = WORK.width, WORK.layers
    block, tensors = 12 * w * w + 13 * w, 4 + 12 * layers
    n = (WORK.vocabulary + WORK.positions) * w + layers * block + 2 * w
    fp32, bf16 = (memory.predict(model, Layout("alone"), 0, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert memory.total(fp32) == 16 * n + 4 * tensors
    assert memory.total(bf16) == (2 + 2 + 8 + 2) * n + 4 * tensors
    for layout in CUT_FINE:
        assert len(memory._buckets(layout, [tuple(p.shape) for p in model.parameters()], torch.float32)) > 3 * layers
    # Rows of which one of two ranks has one more; the other has as much memory, and less state.
    full = [memory.predict(model, Layout("full", dp=2, way="full"), rank, torch.float32) for rank in (0, 1)]
    assert full[0]["weights"] == full[1]["weights"]
    odd = sum(p.numel() // p.shape[0] for p in model.parameters() if p.shape[0] % 2)
    assert full[0]["moments"] - full[1]["moments"] == 8 * odd > 0
    assert 2 * full[0]["weights"] == 4 * (n + odd)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ALL, ids=lambda layout: layout.name)
def test_every_rank_holds_what_is_predicted(measured: dict, model: torch.nn.Module, layout: Layout, dtype: str) -> None:
    found = measured[layout.name, dtype]
    assert len(found) == layout.ranks
    for rank, one in enumerate(found):
        predicted = memory.predict(model, layout, rank, getattr(torch, dtype))
        assert {k: one["held"][k] for k in EXACT} == {k: predicted[k] for k in EXACT}, rank
        whole, bound = one["held"]["gathered"], predicted["gathered"]
        if layout.pp > 1 and "bfloat16" in (
            dtype,
            layout.compute,
        ):  # how many gradients there are in both dtypes depends on the order
            assert 0.8 * bound <= whole <= bound, rank
        else:
            assert whole == bound, rank


def test_the_tables_of_the_documentation_are_those_of_a_result() -> None:
    """And this one of what is predicted now, for the model that was measured."""
    page = (ROOT / "docs" / "memory.md").read_text()
    cases = {}
    for path in results.RESULTS.glob(f"*{results.DISTRIBUTED}.json"):
        cases |= {
            name: case for name, case in json.loads(path.read_text())["cases"].items() if "memory per rank" in name
        }
    assert sorted(cases) == [f"layouts, memory per rank, {short}" for short in ("bf16", "fp32")]
    with torch.device("meta"):
        whole = GPT2.model()[0]
    for short, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        measured = {row["name"]: row for row in cases[f"layouts, memory per rank, {short}"]["contestants"]}
        _, _, rows = page.split(f"\n{short}")[-1].partition("---:|\n")
        table = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in rows.split("\n\n")[0].splitlines()]
        assert {row[0] for row in table} == set(measured)
        for name, *cells, together, predicted in table:
            notes = measured[name]["notes"]
            assert cells == [f"{notes[f'{kind} MB']:.1f}" if notes[f"{kind} MB"] else "" for kind in memory.KINDS]
            assert (together, predicted) == (f"{measured[name]['median']:.1f}", f"{notes['predicted MB']:.1f}")
            layout = next(layout for layout in LAYOUTS if layout.name == name)
            every = [memory.total(memory.predict(whole, layout, rank, dtype)) / 1e6 for rank in range(layout.ranks)]
            # Of the rank that held most; stored with five digits.
            assert min(abs(notes["predicted MB"] / one - 1) for one in every) < 1e-4
            assert measured[name]["median"] <= max(every) * (1 + 1e-4)


def test_the_benchmark_writes_predicted_beside_measured(tmp_path: Path) -> None:
    """In its quick form, which has the layouts of at most two ranks."""
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_layout_memory.py", "-p", "no:cacheprovider"]
    command += ["--quick", "--result", str(tmp_path / "result.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    cases = json.loads((tmp_path / "result-distributed.json").read_text())["cases"]
    assert len(cases) == 2
    for case in cases.values():
        assert case["unit"] == "MB" and not case["absent"]
        assert [target["measured"] for target in case["targets"]] == [1.0]
        for row in case["contestants"]:
            parts = sum(row["notes"][f"{kind} MB"] for kind in memory.KINDS)
            assert (
                row["median"] == pytest.approx(parts, rel=1e-4) == pytest.approx(row["notes"]["predicted MB"], rel=1e-4)
            )
