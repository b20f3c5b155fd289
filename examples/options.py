"""The command line of train_gpt.py: every flag, and every check that can fail before training starts."""

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from checkpoint import read
from gpt import GPT
from group import FIRST, WORLD, together, wait
from text import Text

# 3.2 million parameters. A step of one run takes 66 ms in fp32 on two idle cores, half of that in bf16.
MODEL = {"layers": 4, "width": 256, "heads": 4, "context": 128}
BATCH = 4  # sequences of all ranks together
STEPS = 350
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DEFAULT_DTYPE = (
    "default: bf16 in one process, fp32 on several ranks, where losses can be compared to their last digits. A CPU "
    "measured to be slower at bf16 matrix products than at fp32 ones gets fp32, and a line says so"
)
SAVE = "write a checkpoint of pyshard's run: a file in one process, a directory on several ranks"
RESUME = (
    "go on from this checkpoint, saved by any number of ranks. With the same number the losses are those of an "
    "uninterrupted run, bit for bit. Runs of torch go on from it, too"
)
# Their product is the number of ranks; -1: what the others leave.
LAYOUT = {
    "dp": "cut the batch over N ranks (data parallel), and the optimizer's state; default: what the others leave",
    "tp": "cut the layers over N ranks (tensor parallel); default: 1",
    "pp": "cut the model into N stages of layers (pipeline parallel); default: 1",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line from all ranks, which leave together: one that left early would end the others unheard."""
        if FIRST:
            self._print_message(f"{self.prog}: error: {message}\n", sys.stderr)
        wait()
        sys.exit(2)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, checked: `dp`, `tp` and `pp` make up the ranks, `cut` says whether ranks hold parts of the weights,
    `text` is loaded, `dtype` a torch dtype, `start` the step to begin with, `saved` what the checkpoint says of its run
    (or None), and `config` what a run must share with the one that it resumes.

    All ranks call it together. Bad input ends the process with one line and exit code 2.
    """
    parser = _Parser(
        description="Trains a byte-level GPT with pyshard and, beside it, from the same weights and on the same "
        "batches, with torch: with AdamW in one process, and under torchrun with ShardedAdamW on several ranks beside "
        "DistributedDataParallel and ZeroRedundancyOptimizer, or with the model cut over ranks. Prints a table and a "
        "sample of text, and draws a PNG.",
    )
    flag = parser.add_argument
    flag(
        "--text",
        type=Path,
        metavar="FILE",
        help="text to train on; default: the language reference of Python",
    )
    flag("--dtype", choices=DTYPES, help=f"dtype of weights and gradients; {DEFAULT_DTYPE}")
    flag("--steps", type=int, default=STEPS, metavar="N", help="length of the training; default: %(default)s")
    flag("--stop-at", type=int, metavar="N", help="end early, after step N of --steps, as if interrupted")
    flag("--seed", type=int, default=0, metavar="N", help="seed of weights, batches and sample; default: 0")
    for name, does in LAYOUT.items():
        flag(f"--{name}", type=int, metavar="N", help=does)
    flag("--full-shard", action="store_true", help="cut weights and gradients over the --dp ranks, too (FSDP2)")
    flag("--save", type=Path, metavar="PATH", help=SAVE)
    flag("--resume", type=Path, metavar="PATH", help=RESUME)
    flag("--no-compare", action="store_true", help="leave out all runs but the one that is saved")
    flag("--out", type=Path, default=Path("train_gpt.png"), metavar="PNG", help="picture; default: %(default)s")
    flag("--sample", type=int, default=400, metavar="N", help="bytes of text to sample; default: %(default)s")
    flag(
        "--record",
        type=Path,
        metavar="JSON",
        help="write the losses of all steps and runs, and a digest of their final weights, to this file",
    )
    options = parser.parse_args(arguments)
    try:
        together(lambda: _check(options))
        _check_resume(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _check(options: argparse.Namespace) -> None:
    _check_layout(options)
    if options.steps <= 0:
        raise ValueError(f"--steps is {options.steps}, expected at least 1")
    if options.stop_at is None:
        options.stop_at = options.steps
    if not 0 < options.stop_at <= options.steps:
        raise ValueError(f"--stop-at is {options.stop_at}, expected 1 to {options.steps} (the --steps)")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed is {options.seed}, expected 0 to 2^63 - 1")
    if options.sample < 0:
        raise ValueError(f"--sample is {options.sample}, expected at least 0")
    for flag in ("out", "save", "record"):
        path = getattr(options, flag)
        if path is None:
            continue
        folder = flag == "save" and WORLD > 1
        if (path.is_file() if folder else path.is_dir()) or not os.access(path.parent, os.W_OK):
            kind = "a directory, there already or new," if folder else "a file name"
            raise ValueError(f"--{flag} {path}: expected {kind} in a folder that exists and can be written")
    if options.resume is not None and not options.resume.exists():
        raise ValueError(f"--resume {options.resume}: no such file or directory; expected one written by --save")
    try:
        options.text = Text(options.text, MODEL["context"])
    except OSError as error:
        raise ValueError(f"--text {options.text}: {error.strerror}; expected a file to read") from error


def _check_layout(options: argparse.Namespace) -> None:
    """Settles dp, tp and pp."""
    given = {name: getattr(options, name) for name in LAYOUT}
    said = " ".join(f"--{name} {size}" for name, size in given.items() if size is not None)
    open_ones = [name for name, size in given.items() if size == -1]
    if any(size is not None and size < 1 and size != -1 for size in given.values()) or len(open_ones) > 1:
        raise ValueError(f"{said}: expected numbers of at least 1, or one of them -1 for what the others leave")
    if not open_ones and options.dp is None:
        open_ones = ["dp"]
    sizes = {name: 1 if size is None or name in open_ones else size for name, size in given.items()}
    known = math.prod(sizes.values())
    if open_ones and WORLD % known == 0:
        sizes[open_ones[0]] = WORLD // known
    if math.prod(sizes.values()) != WORLD:
        wanted = f"{'a number that divides' if open_ones else 'the product to be'} {WORLD}, the number of ranks"
        raise ValueError(f"{said}: expected {wanted}; give torchrun --nproc-per-node {known}, or other sizes")
    options.dp, options.tp, options.pp = (sizes[name] for name in LAYOUT)
    options.cut = options.full_shard or options.tp * options.pp > 1
    if BATCH % options.dp:
        raise ValueError(
            f"{options.dp} ranks, expected a number that divides the batch of {BATCH} sequences; give torchrun "
            "--nproc-per-node 2"
        )
    for name, what in (("tp", "heads"), ("pp", "layers")):
        if sizes[name] > MODEL[what]:
            raise ValueError(f"--{name} is {sizes[name]}, expected at most {MODEL[what]}: the model has so many {what}")
    if options.pp > BATCH // options.dp:
        raise ValueError(
            f"--pp is {options.pp} and --dp {options.dp}, expected at most {BATCH // options.dp} stages: each of the "
            f"{options.dp} pipelines has so many of the {BATCH} sequences of a batch to keep its stages at work"
        )
    if options.full_shard and options.dp == 1:
        raise ValueError("--full-shard with --dp 1, expected at least 2 ranks to cut weights over; leave it out")


def _check_resume(options: argparse.Namespace) -> None:
    """Reads the checkpoint, settles the dtype, and compares the settings of both runs. The same on all ranks."""
    options.saved, options.start = None, 0
    if options.resume is not None:
        options.saved = _saved(options.resume)
        if options.cut and options.resume.is_file():
            raise ValueError(
                f"--resume {options.resume}: a file, which one process has saved; expected a directory, where ranks "
                "hold parts of the model; resume it on several ranks without --tp, --pp, --full-shard, and save there"
            )
        options.start = options.saved["step"]
    name = options.dtype or (options.saved["config"]["dtype"] if options.saved else _default_dtype())
    options.dtype = DTYPES[name]
    config = {"steps": options.steps, "seed": options.seed, "dtype": name, "text": options.text.digest}
    options.config = config | {"batch": BATCH, **MODEL}
    if options.saved is None:
        return
    for name, here in options.config.items():
        saved = options.saved["config"].get(name)
        if saved != here:
            raise ValueError(
                f"--resume {options.resume}: saved by a run with {name} = {saved}, but here {name} = {here}; "
                f"expected the same, so give the settings of that run, or start afresh without --resume"
            )
    if options.start >= options.stop_at:
        raise ValueError(
            f"--resume {options.resume}: it is at step {options.start} and this run ends at step "
            f"{options.stop_at}, so nothing is left to do; resume what was saved with --stop-at"
        )


def _saved(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its run."""
    try:
        saved = read(path, GPT(**MODEL))
        saved["config"]["dtype"], saved["step"], saved["scheduler"]
    except Exception as error:  # torch.load names no set of errors for a file that is not its own
        # pyshard.load_checkpoint, which reads a directory, says what is wrong; torch.load says it in a page.
        reason = str(error) if path.is_dir() else type(error).__name__
        raise ValueError(f"--resume {path}: not a checkpoint written by --save of this demo ({reason})") from error
    return saved


def _default_dtype() -> str:
    return "fp32" if WORLD > 1 else _measured_dtype()


def _measured_dtype() -> str:
    """bf16, except on a CPU without instructions for it: with them switched off, a step in bf16 took 1.5 times
    as long as one in fp32 (AVX-512) or 3.6 times (AVX2)."""

    def best_ms(dtype: torch.dtype) -> float:
        a, times = torch.ones(512, 512, dtype=dtype), []
        for _ in range(20):
            begin = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - begin)
        return min(times) * 1e3

    bf16, fp32 = best_ms(torch.bfloat16), best_ms(torch.float32)
    if bf16 <= fp32:
        return "bf16"
    print(f"Training in fp32: a bf16 matrix product takes {bf16:.1f} ms here, an fp32 one {fp32:.1f} ms.")
    return "fp32"
