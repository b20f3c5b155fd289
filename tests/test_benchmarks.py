"""The benchmarks themselves: that they run with what is installed, that contestants do the same work, and that the
numbers they compute follow from the samples. No test here looks at how fast anything is."""

import ctypes
import json
import os
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import peers, report, results, roofline
from benchmarks.harness import SUBJECT_CLOCK, Absent, Contestant, Race, Run
from benchmarks.results import Case

ROOT = Path(__file__).resolve().parent.parent
ELEMENTS = 4096  # of the large tensor in a quick run

# case -> bytes per element of some of its contestants, in a quick run against torch alone
BYTES = {
    "fp32 step": {"pyshard": 28, "torch fused": 28},
    "bf16 step, no clipping": {"pyshard": 26, "pyshard, fp32 master": 28, "torch fused on fp32 master": 40},
    "bf16 step, clipping": {"pyshard": 28, "pyshard, fp32 master": 30, "torch fused on fp32 master": 52},
    "many small, same gradients": {"pyshard": 28, "torch foreach": 28},
    "many small, fresh gradients": {"pyshard": 28, "torch foreach": 28},
    "cast float32 to bfloat16": {"pyshard": 6, "torch copy_": 6},
    "cast float16 to float32": {"pyshard": 6, "torch copy_": 6},
    "split weights": {"pyshard": 8, "torch integer operations": 8},
    "join weights": {"pyshard": 8, "torch integer operations": 8},
    "norm, fp32, one tensor": {"pyshard": 4, "torch clip_grad_norm_": 12},
    "norm, bf16, many tensors": {"pyshard": 2, "torch get_total_norm": 2},
}

# case -> largest difference from the reference contestant's result after the four steps of a quick run.
# fp32: weights near 1, and torch contracts multiply-adds where pyshard rounds each: a few ulp, 1.2e-7 each.
# bf16: masters agree to the same ulp, so a weight differs by one bf16 step (2^-6 for |w| in 2..4) only where the
# master lies at a rounding boundary, which half away from zero and half to even also decide differently.
TOLERANCES = {
    "fp32 step": 2e-6,
    "many small, same gradients": 2e-6,
    "many small, fresh gradients": 2e-6,
    "tiny": 2e-6,
    "bf16 step, no clipping": 2**-6,
    "bf16 step, clipping": 2**-6,
    "cast float32 to bfloat16": 0,
    "cast bfloat16 to float32": 0,
    "cast float32 to float16": 0,
    "cast float16 to float32": 0,
    "split weights": 0,
    "join weights": 0,
    "norm, fp32, one tensor": 1e-6,  # a norm of 0.08, which torch sums in fp32
    "norm, fp32, many tensors": 1e-6,
    "norm, bf16, one tensor": 1e-3,  # torch returns it as bf16: 2^-9 of 0.08 and of 0.36
    "norm, bf16, many tensors": 2e-3,
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The result of all benchmarks in their quick form, torch as the only peer, and what pytest printed. Those of
    several processes have tests of their own (test_benchmarks_distributed.py)."""
    path = tmp_path_factory.mktemp("benchmarks") / "result.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider"]
    command += ["--quick", "--peers", "torch", "--result", str(path), "--ignore-glob=*/bench_sharded_*"]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return json.loads(path.read_text()) | {"output": done.stdout}


def rows(summary: dict) -> dict[str, dict]:
    return {row["name"]: row for row in summary["contestants"]}


def test_every_case_ran(quick: dict) -> None:
    assert set(TOLERANCES) <= set(quick["cases"])
    assert {"import", "interleaved, fp32", "interleaved, bf16"} <= set(quick["cases"])
    for name, summary in quick["cases"].items():
        assert summary["title"] in quick["output"], name
        assert summary["rounds"] == 3, name
        subjects = [row["name"] for row in summary["contestants"] if row["role"] == "subject"]
        assert len(subjects) == 1 and subjects[0].startswith("pyshard"), name


@pytest.mark.parametrize("case", BYTES)
def test_bytes(quick: dict, case: str) -> None:
    summary = quick["cases"][case]
    for name, each in BYTES[case].items():
        row = rows(summary)[name]
        assert row["bytes"] == each * summary["facts"]["elements"]


@pytest.mark.parametrize("case", TOLERANCES)
def test_contestants_do_the_same_work(quick: dict, case: str) -> None:
    summary = quick["cases"][case]
    compared = [row for row in summary["contestants"] if "difference" in row]
    assert {"pyshard", summary["reference"]} <= {row["name"] for row in compared}
    for row in compared:
        assert row["difference"] <= TOLERANCES[case], row["name"]


def test_derived_numbers(quick: dict) -> None:
    close = pytest.approx  # stored with five significant digits: relative error up to 5e-5 each
    for summary in quick["cases"].values():
        seconds = results.UNITS[summary["unit"]]
        subject = next(row for row in summary["contestants"] if row["role"] == "subject")
        sweeps = [row["gb_per_s"] for row in summary["contestants"] if row["role"] == "sweep"]
        for row in summary["contestants"]:
            assert row["min"] <= row["median"] <= row["max"]
            if row["role"] != "sweep":
                assert row["ratio"] == close(row["median"] / subject["median"], rel=2e-4)
            if "bytes" in row:
                assert row["gb_per_s"] == close(row["bytes"] / row["median"] * seconds / 1e9, rel=2e-4)
                assert row["roofline"] == close(row["gb_per_s"] / max(sweeps), rel=2e-4)
        if sweeps:
            assert summary["roofline"]["gb_per_s"] == max(sweeps)


def test_targets_follow_from_the_numbers(quick: dict) -> None:
    summary = quick["cases"]["fp32 step"]
    found = rows(summary)
    fused, deepspeed, bandwidth = summary["targets"]
    ratio = found["torch fused"]["median"] / found["pyshard"]["median"]
    assert fused["at_least"] == 1.2 and fused["measured"] == pytest.approx(ratio, rel=1e-3, abs=1e-4)
    assert fused["met"] == (ratio >= 1.2)
    assert deepspeed["measured"] is None and deepspeed["met"] is None
    assert bandwidth["measured"] == pytest.approx(found["pyshard"]["roofline"], abs=1e-4)
    assert {"name": "DeepSpeedCPUAdam", "reason": "not asked for (--peers)"} in summary["absent"]

    wanted = {name: [target["text"] for target in summary["targets"]] for name, summary in quick["cases"].items()}
    assert wanted["bf16 step, clipping"] == ["≥ 2.6x torch fused on fp32 master", "≥ 0.92 of roofline"]
    assert wanted["bf16 step, no clipping"] == ["≥ 2x torch fused on fp32 master", "≥ 0.92 of roofline"]
    assert wanted["many small, fresh gradients"] == ["≥ 8x torch fused", "≥ 6x DeepSpeedCPUAdam"]
    assert wanted["tiny"] == ["≥ 1x torch fused"]
    assert wanted["import"] == ["≤ 50 ms"]


def test_quick_run_writes_no_result_unasked() -> None:
    before = sorted(results.RESULTS.glob("*")) if results.RESULTS.exists() else []
    command = [sys.executable, "-m", "pytest", "benchmarks", "--quick", "--peers", "torch", "-k", "tiny"]
    done = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "no result written" in done.stdout
    assert before == (sorted(results.RESULTS.glob("*")) if results.RESULTS.exists() else [])


def contestant(name: str, log: list[str], role: str = "peer", calls: int = 1) -> Contestant:
    return Contestant(name, "1", lambda: Run(lambda: log.append(name)), 8, "", role, calls)


def test_rounds_interleave_and_change_order() -> None:
    log: list[str] = []
    race = Race([contestant(name, log) for name in "abcd"])
    race.set_up(warmup=0)
    for _ in range(8):
        race.round()
    orders = ["".join(log[i : i + 4]) for i in range(0, 32, 4)]
    assert all(sorted(order) == list("abcd") for order in orders)  # everyone once in every round
    assert len(set(orders)) == 8  # four rotations, each second one backwards, then the others
    for place in range(4):
        assert set(Counter(order[place] for order in orders).values()) == {2}  # nobody favoured by its place
    assert all(len(samples) == 8 for samples in race.samples.values())


def test_several_calls_per_sample() -> None:
    log: list[str] = []
    race = Race([contestant("a", log, calls=5), Absent("b", "no such library")])
    race.set_up(warmup=2)
    race.round()
    assert log == ["a"] * 15
    assert race.absent == [Absent("b", "no such library")]


def test_untimed_preparation_runs_before_every_sample() -> None:
    log: list[str] = []
    run = Run(lambda: log.append("step"), before=lambda: log.append("before"))
    race = Race([Contestant("a", "1", lambda: run, calls=2)])
    race.set_up(warmup=0)
    race.round()
    race.round()
    assert log == ["before", "step", "step"] * 2


def test_subject_clock_advances_by_the_subject_alone() -> None:
    subject = Contestant("ours", "1", lambda: Run(lambda: 0.25, times_itself=True), role="subject")
    peer = Contestant("theirs", "1", lambda: Run(lambda: 2.0, times_itself=True))
    race = Race([subject, peer])
    race.set_up(warmup=1)
    start = SUBJECT_CLOCK()
    race.round()
    race.round()
    assert SUBJECT_CLOCK() - start == 0.5
    assert race.samples == {"ours": [0.25, 0.25], "theirs": [2.0, 2.0]}


def failing(role: str) -> Contestant:
    def step() -> None:
        raise RuntimeError("no kernel\nfor this machine")

    return Contestant(role, "1", lambda: Run(step), role=role)


def test_failing_peer_is_listed_and_failing_subject_raises() -> None:
    race = Race([failing("peer")])
    race.set_up(warmup=1)
    assert race.absent == [Absent("peer", "RuntimeError: no kernel")] and race.present == []
    with pytest.raises(RuntimeError, match="no kernel"):
        Race([failing("subject")]).set_up(warmup=1)


def timed(name: str, seconds: list[float], nbytes: int = 0, role: str = "peer") -> Contestant:
    """A contestant whose samples are these."""
    left = list(seconds)
    return Contestant(name, "1", lambda: Run(lambda: left.pop(0), times_itself=True), nbytes, "", role)


def summary_of(case: Case, rounds: int) -> dict:
    race = Race(list(case.entries))
    race.set_up(warmup=0)
    for _ in range(rounds):
        race.round()
    return results.summarise(case, race)


def test_summary_of_known_samples() -> None:
    entries = [
        timed("pyshard", [0.010, 0.012, 0.050], nbytes=900_000_000, role="subject"),
        timed("theirs", [0.024, 0.030, 0.018], nbytes=900_000_000),
        timed("sweep", [0.009, 0.009, 0.009], nbytes=900_000_000, role="sweep"),
        timed("slow sweep", [0.018, 0.018, 0.018], nbytes=900_000_000, role="sweep"),
    ]
    targets = [
        results.faster_than("theirs", 2.0),
        results.faster_than("theirs", 2.1),
        results.faster_than("nobody", 1.0),
        results.of_roofline(0.75),
        results.within(12.0, "ms"),
        results.no_slower_than("theirs", 0.4, subject="pyshard"),
    ]
    summary = summary_of(Case("case", "A case", entries, targets), rounds=3)
    found = rows(summary)
    assert [found["pyshard"][key] for key in ("min", "median", "max")] == [10.0, 12.0, 50.0]
    assert found["pyshard"]["gb_per_s"] == 75.0 and found["pyshard"]["roofline"] == 0.75
    assert found["theirs"]["ratio"] == 2.0
    assert summary["roofline"] == {"sweep": "sweep", "gb_per_s": 100.0}
    assert [target["met"] for target in summary["targets"]] == [True, False, None, True, True, False]
    text = results.table(summary)
    assert "target ≥ 2.1x theirs: MISSED (2)" in text
    assert "target ≥ 1x nobody: not measured" in text
    line = next(line for line in text.splitlines() if line.strip().startswith("theirs"))
    assert line.split() == ["theirs", "24", "18", "-", "30", "37.5", "0.38", "2.00x"]


def test_result_file_keeps_cases_of_the_same_machine(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "result.json"
    results.save(path, {"cpu": "a"}, {"one": {"x": 1}, "two": {"x": 1}})
    results.save(path, {"cpu": "a"}, {"two": {"x": 2}})
    assert json.loads(path.read_text())["cases"] == {"one": {"x": 1}, "two": {"x": 2}}
    results.save(path, {"cpu": "b"}, {"two": {"x": 3}})
    assert json.loads(path.read_text()) == {"environment": {"cpu": "b"}, "cases": {"two": {"x": 3}}}


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 1000, 4099])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sweeps_touch_every_element_once(n: int, threads: int) -> None:
    library = roofline._library()
    assert not isinstance(library, str), library
    # One element more at the end, which must stay as it is.
    arrays = [torch.arange(n + 1, dtype=torch.float32) + 100 * i for i in range(4)]
    a, b, c, g = (ctypes.c_void_p(array.data_ptr()) for array in arrays)
    before = [array.clone() for array in arrays]
    size = ctypes.c_long(n)

    library.sweep_update(a, b, c, g, size, threads)
    for array, old in zip(arrays[:3], before[:3], strict=True):
        assert torch.equal(array[:n], (old + before[3])[:n]) and array[n] == old[n]
    assert torch.equal(arrays[3], before[3])

    before = [array.clone() for array in arrays]
    library.sweep_inplace(a, size, threads)
    assert torch.equal(arrays[0][:n], before[0][:n] + 1) and arrays[0][n] == before[0][n]

    library.sweep_copy(b, g, size, threads)
    assert torch.equal(arrays[1][:n], before[3][:n]) and arrays[1][n] == before[1][n]

    library.sweep_read.restype = ctypes.c_float
    ones = torch.ones(n + 1)  # sums of at most 4099 ones are exact in fp32
    assert library.sweep_read(ctypes.c_void_p(ones.data_ptr()), size, threads) == n


def test_mixed_step_follows_torch_in_fp64() -> None:
    """The loop that stands for torch in the bf16 cases trains as fp64 does, to the rounding of its bf16 weights."""
    tensors = peers.Tensors(2, 300, torch.bfloat16)
    entry = peers.mixed(peers.TORCH_FUSED, tensors, ["torch"], max_norm=0.05)
    assert isinstance(entry, Contestant)
    run = entry.make()
    exact = [torch.nn.Parameter(p.detach().double()) for p in tensors.parameters()]
    grads = [p.grad.double() for p in tensors.parameters() if p.grad is not None]
    norm = torch.cat(grads).norm()
    assert norm > 0.2  # clipping really scales
    for master, grad in zip(exact, grads, strict=True):
        master.grad = grad * (0.05 / (norm + 1e-6))
    optimizer = torch.optim.AdamW(exact, **peers.HYPER)
    for _ in range(5):
        run.step()
        optimizer.step()
    assert run.result is not None
    expected = exact[0].detach()
    # half a bf16 step of the weight, 2^-8 relative
    assert ((run.result().double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6).all()


def test_fresh_gradients_are_new_tensors_with_the_same_values() -> None:
    tensors = peers.Tensors(3, 50)
    entry = peers.plain(peers.TORCH_FUSED, tensors, ["torch"], 28, fresh_grads=True)
    kept = peers.plain(peers.TORCH_FUSED, tensors, ["torch"], 28)
    assert isinstance(entry, Contestant) and isinstance(kept, Contestant)
    assert entry.nbytes == 28 * 150
    fresh, same = entry.make(), kept.make()
    assert fresh.before is not None and fresh.result is not None and same.result is not None
    for _ in range(3):
        fresh.before()
        fresh.step()
        same.step()
    assert torch.equal(fresh.result(), same.result())


def test_report_draws_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib, which the demo extra brings")
    entries = [
        timed("pyshard", [0.012], 900_000_000, "subject"),
        timed("torch fused", [0.020], 900_000_000),
        timed("sweep", [0.011], 900_000_000, "sweep"),
    ]
    summary = summary_of(Case("fp32 step", "A step", entries), rounds=1)
    environment = {
        "machine": {"cpu": "A CPU", "isa": "X", "cores": 2, "threads": 2, "memory_gib": 1.0},
        "python": "3",
        "versions": {"torch": "2"},
        "compiler": "g++",
    }
    out = tmp_path / "docs" / "picture.png"
    report.draw({"environment": environment, "cases": {"fp32 step": summary}}, out)
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="make bench"):
        report.draw({"environment": environment, "cases": {}}, out)


def test_committed_results_are_consistent() -> None:
    """Medians and targets in benchmarks/results/ agree with each other: nobody edits a number by hand."""
    for path in results.RESULTS.glob("*.json"):
        for name, summary in json.loads(path.read_text())["cases"].items():
            found = rows(summary)
            for target in summary["targets"]:
                value, least, most = target["measured"], target.get("at_least"), target.get("at_most")
                expected = None if value is None else (value >= least if most is None else value <= most)
                assert target["met"] == expected, f"{path.name}: {name}: {target['text']}"
            subject = next(row for row in found.values() if row["role"] == "subject")
            ratios = [row["ratio"] * subject["median"] / row["median"] for row in found.values() if "ratio" in row]
            assert statistics.fmean(ratios) == pytest.approx(1, rel=1e-3), f"{path.name}: {name}"
