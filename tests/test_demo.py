"""The demo, run as a user runs it: examples/train_gpt.py in a process of its own, on a small text, for few steps."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "train_gpt.py"
STEPS, STOP = 6, 3
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Bounds on |loss of pyshard - loss of torch| at each step. fp32: a few operations of the two updates are rounded in
# another order, so weights differ in their last bit; seen in 12 steps of two seeds: 5e-7, one unit in the last place
# of a loss of 5. bf16: such a bit now and then moves a weight over the middle between two bf16 values, a change of
# 2^-8 of that weight; seen: 3e-4.
BOUND = {"fp32": 5e-6, "bf16": 2e-3}


@dataclass
class Outcome:
    code: int
    out: str
    err: str
    losses: dict[str, list[float]]
    picture: Path
    checkpoint: Path


def demo(folder: Path, *flags: str) -> Outcome:
    """Runs the script with its files in `folder`. One thread: the machine may be shared, and bits must not hang
    on how many there are."""
    folder.mkdir()
    picture, losses, checkpoint = folder / "out.png", folder / "losses.json", folder / "checkpoint.pt"
    files = ["--out", str(picture), "--losses", str(losses), "--save", str(checkpoint)]
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *files, *flags],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search},
    )
    recorded = json.loads(losses.read_text()) if losses.exists() else {}
    return Outcome(done.returncode, done.stdout, done.stderr, recorded, picture, checkpoint)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "counting.txt"
    path.write_text("".join(f"{i} and {i} make {2 * i}.\n" for i in range(300)))
    return path


@dataclass
class Story:
    """An uninterrupted run, one that stopped in the middle, and the one that went on from there."""

    dtype: str
    whole: Outcome
    stopped: Outcome
    resumed: Outcome


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Story:
    folder = tmp_path_factory.mktemp(request.param)
    flags = ["--text", str(text), "--dtype", request.param, "--steps", str(STEPS), "--seed", "7", "--sample", "20"]
    whole = demo(folder / "whole", *flags)
    stopped = demo(folder / "stopped", *flags, "--stop-at", str(STOP), "--no-compare")
    resumed = demo(folder / "resumed", *flags, "--resume", str(stopped.checkpoint))
    for outcome in (whole, stopped, resumed):
        assert outcome.code == 0, outcome.err
    return Story(request.param, whole, stopped, resumed)


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
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= BOUND[story.dtype], (ours, theirs)


def test_a_resumed_run_repeats_the_losses_bit_for_bit(story: Story) -> None:
    whole = story.whole.losses["pyshard"]
    assert story.stopped.losses == {"pyshard": whole[:STOP]}
    assert story.resumed.losses["pyshard"] == whole[STOP:]


def test_torch_goes_on_from_the_checkpoint_of_pyshard(story: Story) -> None:
    theirs, whole = story.resumed.losses["torch"], story.whole.losses["pyshard"]
    assert theirs[0] == whole[STOP], "the same weights and batch before any update"
    assert max(abs(a - b) for a, b in zip(theirs, whole[STOP:], strict=True)) <= BOUND[story.dtype], (theirs, whole)


def cells(out: str, label: str) -> list[float]:
    """The numbers in the row of the table that begins with the label; the ratio at its end is left out."""
    (row,) = re.findall(rf"^ *{re.escape(label)} {{2,}}(.*)$", out, flags=re.MULTILINE)
    return [float(cell.replace(",", "")) for cell in row.split() if not cell.endswith("x")]


def test_the_table_holds_losses_times_and_bytes(story: Story) -> None:
    out, losses = story.whole.out, story.whole.losses
    means = [sum(losses[name]) / STEPS for name in ("pyshard", "torch")]
    assert cells(out, f"training loss, last {STEPS} steps") == pytest.approx(means, abs=6e-5)  # printed to 4 places
    validation = cells(out, "validation loss")
    assert len(validation) == 2 and all(0 < loss < losses["pyshard"][0] for loss in validation)
    assert all(
        ms > 0 for label in ("ms per step, median", "optimizer: clip, update, casts") for ms in cells(out, label)
    )

    ours, theirs = cells(out, "weights")
    assert ours == theirs
    parameters = ours / {"bf16": 2, "fp32": 4}[story.dtype]
    # Moments are two fp32 numbers per parameter, and a step count per tensor.
    assert cells(out, "moments") == pytest.approx([8 * parameters, 8 * parameters], rel=1e-4)
    if story.dtype == "bf16":
        assert cells(out, "master weights") == [2 * parameters, 4 * parameters]
        assert cells(out, "gradients") == [2 * parameters, 2 * parameters]
    else:
        assert cells(out, "master weights") == [0, 0]
        assert cells(out, "gradients") == [4 * parameters, 4 * parameters]


def test_bar_sample_and_picture(story: Story) -> None:
    assert re.search(r"pyshard loss [\d.]+, [\d,]+ tokens/s, optimizer [\d.]+ ms \| torch loss", story.whole.err)
    sample = story.whole.out.split("pyshard.AdamW trained:\n\n")[1].split("\n\nCheckpoint:")[0]
    assert sample.startswith("The ") and len(sample.encode()) >= 24  # a byte that is not UTF-8 prints as three
    for outcome in (story.whole, story.stopped, story.resumed):
        data = outcome.picture.read_bytes()
        assert data.startswith(PNG_SIGNATURE) and data.endswith(b"IEND\xaeB`\x82")
        width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
        assert width >= 1000 and height >= 500


def test_bad_input_ends_the_script_with_one_line_and_code_2(tmp_path: Path) -> None:
    outcome = demo(tmp_path / "run", "--steps", "0")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "train_gpt.py: error: --steps is 0, expected at least 1\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "-3"], "--steps is -3, expected at least 1"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--steps", "5", "--stop-at", "6"], "--stop-at is 6, expected 1 to 5"),
        (["--steps", "5", "--stop-at", "0"], "--stop-at is 0, expected 1 to 5"),
        (["--seed", "-1"], "--seed is -1, expected 0 to"),
        (["--sample", "-1"], "--sample is -1, expected at least 0"),
        (["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
        (["--text", "{tmp}/missing.txt"], "--text {tmp}/missing.txt: No such file or directory"),
        (["--text", "{tmp}"], "--text {tmp}: Is a directory"),
        (["--text", "{tmp}/short.txt"], "--text {tmp}/short.txt: it holds 257 bytes, expected at least 258"),
        (["--out", "{tmp}/nowhere/out.png"], "--out {tmp}/nowhere/out.png: expected a file name in a folder"),
        (["--save", "{tmp}"], "--save {tmp}: expected a file name in a folder"),
        (["--resume", "{tmp}/missing.pt"], "--resume {tmp}/missing.pt: no such file"),
        (["--resume", "{tmp}/short.txt"], "--resume {tmp}/short.txt: not a checkpoint written by --save"),
    ],
)
def test_each_bad_flag_is_named(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_bytes(b"x" * 257)  # one byte less than two windows of 128 + 1
    error = refusal([flag.format(tmp=tmp_path) for flag in flags], monkeypatch, capsys)
    assert message.format(tmp=tmp_path) in error


def refusal(flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The line that refuses the flags, had from this process: starting one for each takes seconds."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from options import parse

    with pytest.raises(SystemExit) as stop:
        parse(flags)
    assert stop.value.code == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1, "one line"
    return error


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
    changed: list[str], message: str, story: Story, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = tmp_path / "other.txt"
    other.write_bytes(text.read_bytes()[::-1])
    stand_in = {"--dtype": {"bf16": "fp32", "fp32": "bf16"}[story.dtype], "--text": str(other)}
    changed = [changed[0], stand_in.get(changed[0], changed[1])]
    flags = ["--resume", str(story.stopped.checkpoint), "--text", str(text), "--steps", str(STEPS), "--seed", "7"]
    if changed[0] == "layers":
        monkeypatch.syspath_prepend(SCRIPT.parent)
        monkeypatch.setitem(__import__("options").MODEL, "layers", 5)
        changed = []
    error = refusal([*flags, *changed], monkeypatch, capsys)
    assert message.format(dtype=story.dtype) in error
