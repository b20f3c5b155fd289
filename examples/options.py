"""The command line of train_gpt.py: every flag, and every check that can fail before training starts."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from text import Text

# 3.2 million parameters. On two idle cores both runs together took 1.1 minutes in bf16 and 2.2 in fp32.
MODEL = {"layers": 4, "width": 256, "heads": 4, "context": 128}
BATCH = 4
STEPS = 1000
WITHOUT_BF16 = "A CPU measured to be slower at bf16 matrix products than at fp32 ones gets fp32, and a line says so"
RESUME = "The losses are those of an uninterrupted run, bit for bit; the torch run goes on from the same file"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, checked: `text` is loaded, `dtype` a torch dtype, `resume` the checkpoint or None, `start`
    its step, and `config` holds what a run must share with the one that it resumes.

    Bad input ends the process with one line and exit code 2.
    """
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # so that an error is one line, without a page of usage before it
        description="Trains a byte-level GPT with pyshard.AdamW and, beside it, from the same weights and on "
        "the same batches, with torch.optim.AdamW. Prints a table and a sample of text, and draws a PNG.",
    )
    flag = parser.add_argument
    flag(
        "--text",
        type=Path,
        metavar="FILE",
        help="text to train on; default: the language reference of Python",
    )
    flag("--dtype", choices=DTYPES, help=f"dtype of weights and gradients; default: bf16. {WITHOUT_BF16}")
    flag("--steps", type=int, default=STEPS, metavar="N", help="length of the training; default: %(default)s")
    flag("--stop-at", type=int, metavar="N", help="end early, after step N of --steps, as if interrupted")
    flag("--seed", type=int, default=0, metavar="N", help="seed of weights, batches and sample; default: 0")
    flag("--save", type=Path, metavar="PATH", help="write a checkpoint of the pyshard run when it ends")
    flag("--resume", type=Path, metavar="PATH", help=f"go on from this checkpoint. {RESUME}")
    flag("--no-compare", action="store_true", help="leave out the torch run")
    flag("--out", type=Path, default=Path("train_gpt.png"), metavar="PNG", help="picture; default: %(default)s")
    flag("--sample", type=int, default=400, metavar="N", help="bytes of text to sample; default: %(default)s")
    flag("--losses", type=Path, metavar="JSON", help="write the losses of all steps and runs to this file")
    options = parser.parse_args(arguments)
    try:
        _check(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _check(options: argparse.Namespace) -> None:
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
    for flag in ("out", "save", "losses"):
        path = getattr(options, flag)
        if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            raise ValueError(f"--{flag} {path}: expected a file name in a folder that exists and can be written")
    try:
        options.text = Text(options.text, MODEL["context"])
    except OSError as error:
        raise ValueError(f"--text {options.text}: {error.strerror}; expected a file to read") from error
    checkpoint = None if options.resume is None else _checkpoint(options.resume)
    name = options.dtype or (checkpoint["config"]["dtype"] if checkpoint else _measured_dtype())
    options.dtype = DTYPES[name]
    options.config = {
        "steps": options.steps,
        "seed": options.seed,
        "dtype": name,
        "text": options.text.digest,
    }
    options.config |= {"batch": BATCH, **MODEL}
    options.start = 0
    if checkpoint:
        _check_resume(options, checkpoint)
        options.start = checkpoint["step"]
    options.resume = checkpoint


def _check_resume(options: argparse.Namespace, checkpoint: dict[str, Any]) -> None:
    for name, here in options.config.items():
        saved = checkpoint["config"].get(name)
        if saved != here:
            raise ValueError(
                f"--resume {options.resume}: saved by a run with {name} = {saved}, but here {name} = {here}; "
                f"expected the same, so give the settings of that run, or start afresh without --resume"
            )
    if checkpoint["step"] >= options.stop_at:
        raise ValueError(
            f"--resume {options.resume}: it is at step {checkpoint['step']} and this run ends at step "
            f"{options.stop_at}, so nothing is left to do; resume what was saved with --stop-at"
        )


def _checkpoint(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--resume {path}: no such file; expected one written by --save")
    try:
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["config"]["dtype"], checkpoint["step"], checkpoint["optimizer"]
    except Exception as error:  # torch.load names no set of errors for a file that is not its own
        raise ValueError(f"--resume {path}: not a checkpoint written by --save ({type(error).__name__})") from error
    return checkpoint


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
