"""The demo, run as a user runs it: examples/train_gpt.py in processes of its own, on a small text, for few steps.

In bf16 in one process, and in fp32 on two ranks under torchrun, where one of the runs is torch's in one process.
"""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import demo_runs
import pytest
import ranks
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "train_gpt.py"
STEPS, STOP = 6, 3
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Bounds on the difference of two runs in the loss of a step. fp32: sums over a batch or over ranks, and a few
# operations of the updates, are rounded in another order, so weights differ in their last bits; seen in 12 steps of two
# seeds: 5e-7, one unit in the last place of a loss of 5. bf16: such a bit now and then moves a weight over the middle
# between two bf16 values, a change of 2^-8 of that weight; seen: 3e-4.
BOUND = {"fp32": 5e-6, "bf16": 2e-3}


@dataclass
class Outcome:
    """What a run said, with its files."""

    code: int
    out: str
    err: str
    folder: Path
    losses: dict[str, list[float]]
    weights: dict[str, list[str]]  # of each way to train, a digest for each rank

    @property
    def checkpoint(self) -> str:
        return str(self.folder / "checkpoint")


@dataclass
class Story:
    """An uninterrupted run, one that stopped in the middle, and the one that went on from there."""

    dtype: str
    flags: list[str]
    whole: Outcome
    stopped: Outcome
    resumed: Outcome


def files(folder: Path) -> list[str]:
    """The flags for the files that a run writes, in a new folder."""
    folder.mkdir()
    names = {"--out": "out.png", "--record": "record.json", "--save": "checkpoint"}
    return [part for flag, name in names.items() for part in (flag, str(folder / name))]


def outcome(folder: Path, code: int, out: str, err: str) -> Outcome:
    record = folder / "record.json"
    runs = json.loads(record.read_text()) if record.exists() else {}
    losses, weights = ({name: run[key] for name, run in runs.items()} for key in ("losses", "weights"))
    return Outcome(code, out, err, folder, losses, weights)


def start(*command: str) -> tuple[int, str, str]:
    """Runs Python, with one thread per rank, since bits must not hang on how many there are. Threads do not spin: the
    machine may be shared."""
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": search},
    )
    try:
        out, err = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its ranks, which it would not if it were killed
        process.wait(60)
        raise
    return process.returncode, out, err


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def demo(folder: Path, *flags: str, launcher: list[str]) -> Outcome:
    """The demo in processes of its own."""
    result = outcome(folder, *start(*launcher, str(SCRIPT), *files(folder), *flags))
    assert result.code == 0, result.err
    return result


def here(folder: Path, *flags: str) -> Outcome:
    """The demo in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = outcome(folder, **demo_runs.run([*files(folder), *flags]))
    finally:
        torch.set_num_threads(threads)
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def flags(folder: Path) -> list[str]:
    """Of all runs: a small text, few steps."""
    text = folder / "counting.txt"
    text.write_text("".join(f"{i} and {i} make {2 * i}.\n" for i in range(300)))
    return ["--text", str(text), "--steps", str(STEPS), "--seed", "7", "--sample", "20"]


@pytest.fixture(scope="module")
def story(folder: Path, flags: list[str]) -> Story:
    whole = demo(folder / "whole", *flags, "--dtype", "bf16", launcher=[])
    stopped = here(folder / "stopped", *flags, "--dtype", "bf16", "--stop-at", str(STOP), "--no-compare")
    resumed = here(folder / "resumed", *flags, "--resume", stopped.checkpoint)
    return Story("bf16", flags, whole, stopped, resumed)


@dataclass
class TwoRanks(Story):
    from_file: Outcome  # went on from the checkpoint of one process
    cut: Outcome  # tensor parallel, and stopped
    cut_resumed: Outcome  # tensor parallel, from the checkpoint of the data-parallel run
    uncut: Outcome  # data parallel, from the checkpoint of the tensor-parallel run
    stages: Outcome  # a pipeline, stopped
    stages_resumed: Outcome  # a pipeline, from the checkpoint of the tensor-parallel run
    full: Outcome  # fully sharded, stopped
    full_resumed: Outcome  # fully sharded, from the checkpoint of the pipeline
    refused: Outcome


@pytest.fixture(scope="module")
def two(folder: Path, flags: list[str], story: Story) -> TwoRanks:
    whole = demo(folder / "whole 2", *flags, "--dtype", "fp32", launcher=TORCHRUN)
    names = ("stopped 2", "resumed 2", "from file", "cut", "cut resumed", "uncut")
    names += ("stages", "stages resumed", "full", "full resumed", "refused")
    folders = [folder / name for name in names]
    more = [
        ["--dtype", "fp32", "--stop-at", str(STOP), "--no-compare"],
        ["--resume", str(folders[0] / "checkpoint")],
        ["--resume", story.stopped.checkpoint],
        ["--tp", "2", "--dtype", "fp32", "--stop-at", str(STOP)],
        ["--tp", "2", "--resume", str(folders[0] / "checkpoint"), "--no-compare"],
        ["--resume", str(folders[3] / "checkpoint"), "--no-compare"],
        ["--pp", "2", "--stop-at", str(STOP), "--no-compare"],
        ["--pp", "2", "--resume", str(folders[3] / "checkpoint"), "--no-compare"],
        ["--full-shard", "--stop-at", str(STOP), "--no-compare"],
        ["--full-shard", "--resume", str(folders[6] / "checkpoint"), "--no-compare"],
        ["--steps", "0"],
    ]
    runs = [[*files(f), *flags, *own] for f, own in zip(folders, more, strict=True)]
    code, _, err = start(*TORCHRUN, demo_runs.__file__, json.dumps(runs), str(folder / "runs.json"))
    assert code == 0, err
    results = json.loads((folder / "runs.json").read_text())
    outcomes = [outcome(f, **result) for f, result in zip(folders, results, strict=True)]
    assert [o.code for o in outcomes] == [0] * 10 + [2], [o.err for o in outcomes]
    return TwoRanks("fp32", flags, whole, *outcomes)


def largest_gap(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


# ---- one process ----


def test_losses_fall_from_those_of_a_guess(story: Story) -> None:
    losses = story.whole.losses["pyshard"]
    assert len(losses) == STEPS
    # The initial weights give nearly equal odds to all 256 bytes: logits of standard deviation about
    # 0.02 * sqrt(256) = 0.32 add their variance / 2 = 0.05 to ln 256, and one batch its own spread.
    assert losses[0] == pytest.approx(math.log(256), abs=0.3)
    assert losses[-1] < losses[0] - 0.5


def test_pyshard_and_torch_have_the_same_losses(story: Story) -> None:
    ours, theirs = story.whole.losses["pyshard"], story.whole.losses["torch"]
    assert ours[0] == theirs[0], "the same weights and batch before any update"
    assert largest_gap(ours, theirs) <= BOUND[story.dtype], (ours, theirs)


def test_a_resumed_run_repeats_the_losses_bit_for_bit(story: Story) -> None:
    whole = story.whole.losses["pyshard"]
    assert story.stopped.losses == {"pyshard": whole[:STOP]}
    assert story.resumed.losses["pyshard"] == whole[STOP:]


def test_torch_goes_on_from_the_checkpoint_of_pyshard(story: Story) -> None:
    theirs, whole = story.resumed.losses["torch"], story.whole.losses["pyshard"]
    assert theirs[0] == whole[STOP], "the same weights and batch before any update"
    assert largest_gap(theirs, whole[STOP:]) <= BOUND[story.dtype], (theirs, whole)


def cells(out: str, label: str) -> list[float]:
    """The numbers in the row of the table that begins with the label."""
    (row,) = re.findall(rf"^ *{re.escape(label)} {{2,}}(.*)$", out, flags=re.MULTILINE)
    return [float(cell.replace(",", "")) for cell in row.split()]


def test_the_table_holds_losses_times_and_bytes(story: Story) -> None:
    out, losses = story.whole.out, story.whole.losses
    ours, theirs = losses["pyshard"], losses["torch"]
    assert cells(out, f"training loss, last {STEPS} steps") == pytest.approx(
        [sum(theirs) / STEPS, sum(ours) / STEPS],
        abs=6e-5,  # printed to 4 places
    )
    assert cells(out, "at most from the first, a step") == pytest.approx([0, largest_gap(ours, theirs)], rel=0.06)
    validation = cells(out, "validation loss")
    assert len(validation) == 2 and all(0 < loss < ours[0] for loss in validation)
    assert all(ms > 0 for row in ("ms per step, median", "optimizer: clip, update, casts") for ms in cells(out, row))

    weights = cells(out, "weights")
    parameters = weights[0] / 2
    assert weights == cells(out, "gradients") == [2 * parameters] * 2
    # Moments are two fp32 numbers per parameter, and a step count per tensor.
    assert cells(out, "moments") == pytest.approx([8 * parameters] * 2, rel=1e-4)
    assert cells(out, "master weights") == [4 * parameters, 2 * parameters]
    assert cells(out, "bytes held") == pytest.approx([16 * parameters, 14 * parameters], rel=1e-4)


def check_picture(outcome: Outcome) -> None:
    data = (outcome.folder / "out.png").read_bytes()
    assert data.startswith(PNG_SIGNATURE) and data.endswith(b"IEND\xaeB`\x82")
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    assert width >= 1000 and height >= 500


def test_bar_sample_and_picture(story: Story) -> None:
    assert re.search(r"torch [\d.]+, \d+ ms \| pyshard [\d.]+, \d+ ms", story.whole.err)
    sample = story.whole.out.split("pyshard.AdamW trained:\n\n")[1].split("\n\nPicture:")[0]
    assert sample.startswith("The ") and len(sample.encode()) >= 24  # a byte that is not UTF-8 prints as three
    for outcome in (story.whole, story.stopped, story.resumed):
        check_picture(outcome)


# ---- two ranks ----

WAYS = ["torch", "ddp", "zero", "stage1", "stage2"]
SHARDED = ["stage1", "stage2"]


def test_two_ranks_have_the_losses_of_one_process(two: TwoRanks) -> None:
    losses = two.whole.losses
    assert list(losses) == WAYS
    assert losses["torch"][-1] < losses["torch"][0] - 0.5
    gaps = {way: largest_gap(losses[way], losses["torch"]) for way in WAYS}
    assert all(gap <= BOUND["fp32"] for gap in gaps.values()), gaps


def test_two_ranks_end_with_the_same_weights(two: TwoRanks) -> None:
    weights = two.whole.weights
    assert [len(weights[way]) for way in WAYS] == [1, 2, 2, 2, 2]
    assert all(len(set(weights[way])) == 1 for way in WAYS), weights
    # Both stages sum gradients in the order of ranks, and update by the same formula. Other ways may round otherwise.
    assert weights["stage1"] == weights["stage2"]
    assert two.whole.losses["stage1"] == two.whole.losses["stage2"]


def test_a_run_resumed_on_two_ranks_repeats_losses_and_weights_bit_for_bit(two: TwoRanks) -> None:
    whole = two.whole.losses["stage2"]
    assert two.stopped.losses == {"stage2": whole[:STOP]}
    for stage in SHARDED:
        assert two.resumed.losses[stage] == whole[STOP:]
        assert two.resumed.weights[stage] == two.whole.weights["stage2"]


def test_all_ways_go_on_from_the_checkpoint_of_two_ranks(two: TwoRanks) -> None:
    whole, losses = two.whole.losses["stage2"], two.resumed.losses
    assert list(losses) == WAYS
    gaps = {way: largest_gap(losses[way], whole[STOP:]) for way in WAYS}
    assert all(gap <= BOUND["fp32"] for gap in gaps.values()), gaps


def test_one_process_goes_on_from_the_checkpoint_of_two_ranks(two: TwoRanks, tmp_path: Path) -> None:
    losses = here(tmp_path / "one", *two.flags, "--resume", two.stopped.checkpoint).losses
    whole = two.whole.losses["stage2"]
    gaps = {way: largest_gap(losses[way], whole[STOP:]) for way in ("torch", "pyshard")}
    assert all(gap <= BOUND["fp32"] for gap in gaps.values()), gaps


def test_two_ranks_go_on_from_the_checkpoint_of_one_process(story: Story, two: TwoRanks) -> None:
    """In bf16: with fp32 master weights, which ZeroRedundancyOptimizer has not."""
    outcome, whole = two.from_file, story.whole.losses["pyshard"]
    assert list(outcome.losses) == ["torch", "ddp", "stage1", "stage2"]
    assert "ZeroRedundancyOptimizer is left out" in outcome.out
    gaps = {way: largest_gap(losses, whole[STOP:]) for way, losses in outcome.losses.items()}
    assert all(gap <= BOUND["bf16"] for gap in gaps.values()), gaps
    assert outcome.weights["stage1"] == outcome.weights["stage2"]
    parameters = cells(outcome.out, "weights")[0] / 2
    masters = cells(outcome.out, "master weights")
    # Each rank owns half of the rest of the masters, to one block of 4096 elements.
    assert masters == pytest.approx([4 * parameters] * 2 + [parameters] * 2, abs=2 * 4096)


def test_layers_cut_over_two_ranks_have_the_losses_of_one_process(two: TwoRanks) -> None:
    losses, whole = two.cut.losses, two.whole.losses["torch"]
    assert list(losses) == ["torch", "pyshard"]
    assert losses["torch"] == whole[:STOP]
    assert largest_gap(losses["pyshard"], whole[:STOP]) <= BOUND["fp32"]
    assert two.cut.weights["pyshard"][0] == two.cut.weights["pyshard"][1]
    uncut, half = cells(two.cut.out, "weights")
    assert 0.5 < half / uncut < 0.52  # all but embedding and norms is cut


def test_checkpoints_go_from_data_to_tensor_parallel_and_back(two: TwoRanks) -> None:
    whole = two.whole.losses["stage2"]
    assert largest_gap(two.cut_resumed.losses["pyshard"], whole[STOP:]) <= BOUND["fp32"]
    assert largest_gap(two.uncut.losses["stage2"], whole[STOP:]) <= BOUND["fp32"]


def test_a_pipeline_of_two_ranks_has_the_losses_of_one_process(two: TwoRanks) -> None:
    whole = two.whole.losses["torch"]
    assert largest_gap(two.stages.losses["pyshard"], whole[:STOP]) <= BOUND["fp32"]
    assert "stage 1 on rank 1: blocks 2 to 3" in two.stages.out
    (weights,), (held,) = cells(two.stages.out, "weights"), cells(two.stages.out, "bytes held per rank")
    embedding, block, norm = 256 * 256, 12 * 256**2 + 2 * 256, 256
    assert weights == 4 * (embedding + 2 * block + norm)  # of the last stage, which holds most
    assert held == pytest.approx(4 * weights, rel=1e-4)  # with gradients and moments, and a step count per tensor


def test_fully_sharded_ranks_have_the_losses_of_one_process(two: TwoRanks) -> None:
    whole = two.whole.losses["torch"]
    assert largest_gap(two.full.losses["pyshard"], whole[:STOP]) <= BOUND["fp32"]
    assert 2 * cells(two.full.out, "weights")[0] == cells(two.whole.out, "weights")[0]  # all sizes are even
    assert "Not counted: layers that fully_shard makes whole" in two.full.out
    assert 2 * cells(two.full.out, "gradients")[0] == cells(two.whole.out, "gradients")[0]


def test_checkpoints_go_from_tensor_parallel_to_a_pipeline_and_from_there_to_full_sharding(two: TwoRanks) -> None:
    whole = two.whole.losses["stage2"]
    assert largest_gap(two.stages_resumed.losses["pyshard"], whole[STOP:]) <= BOUND["fp32"]
    assert largest_gap(two.full_resumed.losses["pyshard"], whole[STOP:]) <= BOUND["fp32"]


def on_ranks(world: int, folder: Path, *flags: str) -> Outcome:
    """The demo on so many ranks; what the first one said. All end with code 0, and the others say nothing."""
    told = [o.value[0] for o in ranks.run(demo_runs.on_ranks, world, [[*files(folder), *flags]], seconds=200)]
    result = outcome(folder, **told[0])
    assert [rank["code"] for rank in told] == [0] * world, result.err
    assert [rank["out"] for rank in told[1:]] == [""] * (world - 1)
    return result


def test_four_and_eight_ranks_in_all_dimensions_have_the_losses_of_one_process(two: TwoRanks, folder: Path) -> None:
    """The eight go on from where the four have stopped."""
    whole = two.whole.losses["torch"]
    flags = [*two.flags, "--no-compare"]
    four = on_ranks(4, folder / "four", *flags, "--dp", "2", "--pp", "-1", "--stop-at", str(STOP))
    assert largest_gap(four.losses["pyshard"], whole[:STOP]) <= BOUND["fp32"]
    assert re.search(r"^ +dp 2, pp 2\n +ShardedAdamW$", four.out, flags=re.MULTILINE)
    layout = ["--dp", "2", "--tp", "2", "--pp", "2", "--full-shard"]
    eight = on_ranks(8, folder / "eight", *flags, *layout, "--resume", four.checkpoint)
    assert largest_gap(eight.losses["pyshard"], whole[STOP:]) <= BOUND["fp32"]
    assert re.search(r"^ +dp 2, tp 2, pp 2\n +fully_shard$", eight.out, flags=re.MULTILINE)
    embedding, matrices, norms = 256 * 256, 12 * 256**2, 2 * 256
    # Of the last stage: half of its two blocks' matrices, and of all that half.
    assert cells(eight.out, "weights") == [4 * (embedding + 2 * (matrices / 2 + norms) + 256) / 2]


def test_the_table_holds_bytes_per_rank(two: TwoRanks) -> None:
    out = two.whole.out
    whole = cells(out, "weights")[0]
    assert cells(out, "weights") == [whole] * 5
    moments = cells(out, "moments")
    assert moments[:2] == pytest.approx([2 * whole] * 2, rel=1e-4)
    assert whole <= moments[2] <= 1.1 * whole, "whole parameters, not cut to be equal"
    # Half of the moments, to one block of 4096 elements, and a step count per tensor.
    assert moments[3:] == pytest.approx([whole] * 2, abs=2 * 4 * 4096 + 4 * 100)
    gradients, slots = cells(out, "gradients"), cells(out, "slots")
    assert gradients[:4] == [whole, whole, whole, 0]
    assert gradients[4] == pytest.approx(whole / 2, abs=4 * 4096)
    assert slots == [0, 0, 0, whole, 3 * 2**20], "all gradients; three buckets of 1 MB"
    parts = [cells(out, label) for label in ("weights", "gradients", "slots", "moments")]
    assert cells(out, "bytes held per rank") == [sum(column) for column in zip(*parts, strict=True)]
    assert all(ms > 0 for ms in cells(out, "ms per step, median"))


def test_only_the_first_rank_speaks(two: TwoRanks) -> None:
    for outcome in (two.whole, two.stopped, two.resumed):
        assert outcome.out.count("Picture:") == outcome.out.count("Checkpoint:") == 1
        assert "Transport shm: all 2 ranks run on this host" in outcome.out
        check_picture(outcome)


def test_each_rank_trains_on_its_half_of_a_batch(two: TwoRanks) -> None:
    from text import Text

    text = Text(Path(two.flags[1]), context=128)
    whole, halves = text.batch(7, 3, 4), [text.batch(7, 3, 4, part, 2) for part in (0, 1)]
    for all_rows, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(all_rows, torch.cat([first, second])) and not torch.equal(first, second)
    # The bar shows the losses of the first rank, which are of whole batches in one process alone.
    bar = re.findall(r"torch ([\d.]+), \d+ ms \| ddp ([\d.]+), .* \| stage2 ([\d.]+), \d+ ms", two.whole.err)
    torch_loss, ddp_loss, our_loss = bar[-1]
    assert torch_loss != ddp_loss == our_loss


# ---- bad input ----


def test_bad_input_on_two_ranks_is_one_line_and_code_2(two: TwoRanks) -> None:
    assert (two.refused.code, two.refused.out) == (2, "")
    assert two.refused.err == "train_gpt.py: error: --steps is 0, expected at least 1\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "-3"], "--steps is -3, expected at least 1"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--steps", "5", "--stop-at", "6"], "--stop-at is 6, expected 1 to 5"),
        (["--steps", "5", "--stop-at", "0"], "--stop-at is 0, expected 1 to 5"),
        (["--seed", "-1"], "--seed is -1, expected 0 to"),
        (
            ["--tp", "2"],
            "--tp 2: expected a number that divides 1, the number of ranks; give torchrun --nproc-per-node 2",
        ),
        (["--dp", "2", "--pp", "2"], "--dp 2 --pp 2: expected the product to be 1, the number of ranks"),
        (["--full-shard"], "--full-shard with --dp 1, expected at least 2 ranks to cut weights over"),
        (["--sample", "-1"], "--sample is -1, expected at least 0"),
        (["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
        (["--text", "{tmp}/missing.txt"], "--text {tmp}/missing.txt: No such file or directory"),
        (["--text", "{tmp}"], "--text {tmp}: Is a directory"),
        (["--text", "{tmp}/short.txt"], "--text {tmp}/short.txt: it holds 257 bytes, expected at least 258"),
        (["--out", "{tmp}/nowhere/out.png"], "--out {tmp}/nowhere/out.png: expected a file name in a folder"),
        (["--save", "{tmp}"], "--save {tmp}: expected a file name in a folder"),
        (["--resume", "{tmp}/missing.pt"], "--resume {tmp}/missing.pt: no such file or directory"),
        (["--resume", "{tmp}/short.txt"], "--resume {tmp}/short.txt: not a checkpoint written by --save"),
        (["--resume", "{tmp}"], "--resume {tmp}: not a checkpoint written by --save of this demo (pyshard.load_check"),
    ],
)
def test_each_bad_flag_is_named(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_bytes(b"x" * 257)  # one byte less than two windows of 128 + 1
    error = refusal([flag.format(tmp=tmp_path) for flag in flags], capsys)
    assert message.format(tmp=tmp_path) in error


def refusal(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that refuses the flags, had from this process: starting one for each takes seconds."""
    from options import parse

    with pytest.raises(SystemExit) as stop:
        parse(flags)
    assert stop.value.code == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1, "one line"
    return error


def test_ranks_must_divide_the_batch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(__import__("options"), "WORLD", 3)
    error = refusal([], capsys)
    assert "3 ranks, expected a number that divides the batch of 4 sequences" in error


@pytest.mark.parametrize(
    ("world", "line", "message"),
    [
        (8, "--dp 3", "--dp 3: expected the product to be 8, the number of ranks"),
        (8, "--tp 3", "--tp 3: expected a number that divides 8, the number of ranks"),
        (8, "--dp 2 --tp 3 --pp -1", "--dp 2 --tp 3 --pp -1: expected a number that divides 8"),
        (8, "--tp -1 --pp -1", "--tp -1 --pp -1: expected numbers of at least 1, or one of them -1"),
        (8, "--tp 0", "--tp 0: expected numbers of at least 1"),
        (8, "--tp 8", "--tp is 8, expected at most 4: the model has so many heads"),
        (8, "--pp 8", "--pp is 8, expected at most 4: the model has so many layers"),
        (8, "--dp 2 --pp 4", "--pp is 4 and --dp 2, expected at most 2 stages"),
        (2, "--tp 2 --full-shard", "--full-shard with --dp 1, expected at least 2 ranks"),
        (2, "--pp 2 --resume FILE", "a file, which one process has saved; expected a directory"),
    ],
)
def test_layouts_that_do_not_fit_are_named(
    world: int, line: str, message: str, story: Story, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(__import__("options"), "WORLD", world)
    flags = [story.stopped.checkpoint if flag == "FILE" else flag for flag in line.split()]
    assert message in refusal(flags, capsys)


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--dtype", "other"], "saved by a run with dtype = {dtype}, but here dtype ="),
        (["--seed", "8"], "saved by a run with seed = 7, but here seed = 8"),
        (["--steps", "7"], "saved by a run with steps = 6, but here steps = 7"),
        (["--text", "other"], "saved by a run with text = "),
        (["layers", "5"], "saved by a run with layers = 4, but here layers = 5"),
        (["--stop-at", "3"], "it is at step 3 and this run ends at step 3"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    kind: str, changed: list[str], message: str, story: Story, two: TwoRanks, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    saved = story if kind == "file" else two
    other = tmp_path / "other.txt"
    other.write_bytes(Path(saved.flags[1]).read_bytes()[::-1])
    stand_in = {"--dtype": {"bf16": "fp32", "fp32": "bf16"}[saved.dtype], "--text": str(other)}
    changed = [changed[0], stand_in.get(changed[0], changed[1])]
    flags = [*saved.flags, "--resume", saved.stopped.checkpoint]
    if changed[0] == "layers":
        monkeypatch.setitem(__import__("options").MODEL, "layers", 5)
        changed = []
        if kind == "directory":  # which is compared with the model first
            message = "the checkpoint has no model.blocks.4."
    error = refusal([*flags, *changed], capsys)
    assert message.format(dtype=saved.dtype) in error
