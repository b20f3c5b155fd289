"""The benchmarks of tensor parallelism: that they run with torch as the only peer, that contestants agree, and that
links, bytes and saved memory are counted right. Nothing here looks at how fast anything is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import ranks as rank_processes
import torch
from torch import nn

from benchmarks import bench_tp_llama, bench_tp_matmul, tp_entries, tp_llama, tp_matmul, two_hosts
from benchmarks.bench_tp_two_hosts import LEAST_MBIT, hidden_within, link_rate, travelling
from benchmarks.distributed_entries import Way
from benchmarks.tp_matmul import ALL_GATHER, REDUCE_SCATTER

ROOT = Path(__file__).resolve().parent.parent
GATHER, SCATTER = f"tp {ALL_GATHER}, 1024x1024x4096 fp32", f"tp {REDUCE_SCATTER}, 1024x1024x4096 bf16"
HOSTS = f"tp two hosts, {REDUCE_SCATTER}, 1024x1024x4096 fp32"
LAYERS = "tp layers, 1024 rows, 1024 -> 4096 -> 1024, bf16"
BENCHES = [
    f"benchmarks/bench_tp_{name}"
    for name in (
        f"matmul.py::bench_tp_matmul[1024-1024-4096-float32-{ALL_GATHER}]",
        f"matmul.py::bench_tp_matmul[1024-1024-4096-bfloat16-{REDUCE_SCATTER}]",
        "backward.py::bench_tp_backward[1024-1024-4096-bfloat16]",
        f"two_hosts.py::bench_tp_two_hosts[{REDUCE_SCATTER}]",
        "llama.py",
    )
]
TARGETS = {
    GATHER: ["pyshard: ≤ 1.03x matmul alone", "all results the same, within 0.0001"],
    SCATTER: ["pyshard: ≤ 1.06x matmul alone", "all results the same, within 0.1"],
    LAYERS: ["≥ 1x torch collectives with gradients"],
    HOSTS: ["pyshard ring: ≤ 1.1x max(matmul, communication)"],
    "tp llama": [
        "pyshard: ≤ 0.85x torch parallelize_module",
        "pyshard: activations MB ≤ 1x torch parallelize_module",
    ],
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The result of some of the benchmarks in their quick form, and what pytest printed."""
    path = tmp_path_factory.mktemp("benchmarks") / "result.json"
    command = [sys.executable, "-m", "pytest", *BENCHES, "-p", "no:cacheprovider"]
    command += ["--quick", "--peers", "torch", "--result", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=270)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return json.loads((path.parent / "result-distributed.json").read_text()) | {"output": done.stdout}


def case(quick: dict, name: str) -> dict:
    if name not in quick["cases"]:
        if name == HOSTS:
            pytest.skip(two_hosts.unavailable() or "two hosts were not measured")
        if name == "tp llama":
            pytest.importorskip("transformers", reason="its model comes from there (requirements/bench.txt)")
    return quick["cases"][name]


@pytest.mark.parametrize("name", TARGETS)
def test_case_ran(quick: dict, name: str) -> None:
    summary = case(quick, name)
    assert summary["title"] in quick["output"] and summary["rounds"] == 3 and not summary["absent"]
    assert [row["role"] for row in summary["contestants"]].count("subject") == 1
    assert set(TARGETS[name]) <= {target["text"] for target in summary["targets"]}
    assert all(target["measured"] is not None for target in summary["targets"])
    assert quick["environment"]["machine"]["threads"] == 1


@pytest.mark.parametrize("name", TARGETS)
def test_contestants_agree(quick: dict, name: str) -> None:
    """By the benchmark's own tolerance; all but the rows that have no sums over ranks."""
    summary = case(quick, name)
    (same,) = (target for target in summary["targets"] if target["text"].startswith("all results"))
    assert same["met"], same
    compared = {row["name"] for row in summary["contestants"] if "difference" in row}
    without = set() if name in (GATHER, "tp llama") else {bench_tp_matmul.ALONE}
    assert compared == {row["name"] for row in summary["contestants"]} - without


def test_bytes_on_the_link(quick: dict) -> None:
    """Counted by the namespaces' own devices. Rows of 80 floats for 32 of 64 positions; the rest is headers."""
    summary = case(quick, HOSTS)
    sent = {row["name"]: row["notes"]["sent MB"] * 1e6 for row in summary["contestants"]}
    assert summary["facts"]["bytes"] == 32 * 80 * 4
    assert sent[bench_tp_matmul.ALONE] < 1000  # the barrier
    assert 32 * 80 * 4 <= sent["pyshard ring"] <= 2 * 32 * 80 * 4
    assert summary["facts"]["mbit_per_s"] >= LEAST_MBIT


def test_memory_of_the_llama(quick: dict) -> None:
    """Weights are halved, all but the norms' (and, in one row, those of the embedding and the output layer)."""
    rows = {row["name"]: row["notes"] for row in case(quick, "tp llama")["contestants"]}
    model = tp_llama.TINY.model()
    whole = sum(p.numel() for p in model.parameters())
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    ends = model.lm_head.weight.numel() + model.model.embed_tokens.weight.numel()
    expected = dict.fromkeys(rows, (whole - norms) / 2 + norms)
    expected[bench_tp_llama.UNSHARDED] = whole
    expected[bench_tp_llama.MODULE_LAYERS] += ends / 2
    for name, elements in expected.items():
        assert rows[name]["params MB"] == pytest.approx(4e-6 * elements, rel=1e-3), name
        assert 0 < rows[name]["activations MB"] <= rows[bench_tp_llama.UNSHARDED]["activations MB"], name


# ---- what is counted and compared ----


def test_saved_bytes_of_known_layers() -> None:
    linear = nn.Linear(6, 5)
    x = torch.randn(7, 6)
    # The input of the layer, and the output of exp; a view of the input is no memory, and a weight no activation.
    assert tp_llama.saved_bytes(lambda: linear(x.view(7, 6)).exp().sum(), linear) == 4 * (7 * 6 + 7 * 5)


def ways_on_a_rank(rank: int, world: int) -> None:
    """Every way against fp64, with each rank's operands known to all."""
    rows, inputs, outputs = 4 * world, 12, 10
    for collective in (ALL_GATHER, REDUCE_SCATTER):
        gathers = collective == ALL_GATHER
        work = tp_matmul.operands(collective, rows, inputs, outputs, "float32")
        weights = [tp_matmul.random(100 + r, outputs, inputs, "float32", inputs**-0.5) for r in range(world)]
        assert torch.equal(work.weight, weights[rank])
        seeds = [0 if gathers else 1 + r for r in range(world)]
        xs = [tp_matmul.random(seed, rows, inputs, "float32").double() for seed in seeds]
        products = [x @ weight.double().t() for x, weight in zip(xs, weights, strict=True)]
        expected = products[rank] if gathers else sum(products).chunk(world)[rank]
        for way, make in tp_matmul.WAYS.items():
            out = make(work)()
            wanted = products[rank] if way == "alone" else expected
            # sums of 12 * world products of about 0.3: some units in the last place of fp32
            torch.testing.assert_close(out.double(), wanted, rtol=0, atol=1e-5, msg=way)


@pytest.mark.parametrize("world", [2, 3])
def test_ways_compute_the_same(world: int) -> None:
    rank_processes.run(ways_on_a_rank, world)


def test_newest_function() -> None:
    assert tp_matmul.newest(torch, "no_such_function", "add") is torch.add
    with pytest.raises(AttributeError, match="torch has none of no_such_function, neither_this"):
        tp_matmul.newest(torch, "no_such_function", "neither_this")


def test_link_as_fast_as_the_matmul() -> None:
    assert travelling(ALL_GATHER, 1024, 1000, 4000) == 512 * 1000 * 4
    assert travelling(REDUCE_SCATTER, 1024, 1000, 4000) == 512 * 4000 * 4
    assert link_rate(2_000_000, 0.1) == pytest.approx(160)  # 16 Mbit in a tenth of a second
    assert link_rate(1, 100) == LEAST_MBIT


@pytest.mark.parametrize("matmul, communication, measured, met", [(10, 8, 1.05, True), (5, 8.4, 1.25, False)])
def test_hidden_communication(matmul: float, communication: float, measured: float, met: bool) -> None:
    rows = [{"name": "ours", "median": 10.5}, {"name": bench_tp_matmul.ALONE, "median": matmul}]
    target = hidden_within(1.1, "ours")
    judged = target.judge({"contestants": rows, "facts": {"communication ms": communication}})
    assert judged["measured"] == measured and judged["met"] == met
    assert target.judge({"contestants": rows[:1], "facts": {"communication ms": 1}})["met"] is None


def test_targets_of_results_and_notes() -> None:
    rows = [{"name": "a", "notes": {"MB": 3.0}, "difference": 0.25}, {"name": "b", "notes": {"MB": 4.0}}]
    assert tp_entries.alike(0.2).judge({"contestants": rows})["met"] is False
    assert tp_entries.alike(0.2).judge({"contestants": rows[1:]})["met"] is None
    share = tp_entries.note_share(0.75, "MB", "b", "a")
    assert share.judge({"contestants": rows})["measured"] == 0.75 and share.judge({"contestants": rows})["met"]
    assert share.judge({"contestants": rows[:1]})["met"] is None


def test_why_a_way_is_missing() -> None:
    field = tp_entries.Field(None, ["deepspeed"], "", {}, "alone", 1)  # type: ignore[arg-type]  # no ranks are asked
    assert field.entry(Way("a", "alone")).reason == "not asked for (--peers)"
    assert field.entry(tp_entries.ours("b", transport="ring")).role == "ours"
