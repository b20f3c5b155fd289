"""Trains a small GPT on real text with pyshard.AdamW, and beside it, step by step, with torch.optim.AdamW.

    python examples/train_gpt.py            # one to two minutes on two cores; --help lists the flags

The loop in `train` is an ordinary torch loop, and the import of AdamW is all that pyshard changes in it.
Clipping and the fp32 precision behind 16-bit weights happen in step(); baseline.py does both with torch alone.
"""

import json
import math
import time
from argparse import Namespace
from collections.abc import Iterator

import torch
from baseline import TorchAdamW
from gpt import GPT
from options import BATCH, MODEL, parse
from picture import draw
from report import Run, table
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from pyshard import AdamW

LEARNING_RATE, WARM_UP = 1e-3, 40


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: a linear rise over the first steps, then a cosine down to a tenth."""
    progress = min(step / steps, 1.0)
    return min((step + 1) / WARM_UP, 1.0) * (0.55 + 0.45 * math.cos(math.pi * progress))


def train(run: Run, options: Namespace) -> Iterator[None]:
    """One training run; yields after each step, so that two runs can take turns on the same machine."""
    torch.manual_seed(options.seed)
    model = GPT(**MODEL).to(options.dtype)
    optimizer = run.optimizer_class(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=1.0
    )
    scheduler = LambdaLR(optimizer, lambda step: schedule(step, options.steps))
    run.model, run.optimizer, run.scheduler = model, optimizer, scheduler
    if options.resume:
        model.load_state_dict(options.resume["model"])
        optimizer.load_state_dict(options.resume["optimizer"])
        scheduler.load_state_dict(options.resume["scheduler"])

    for step in range(options.start, options.stop_at):
        inputs, targets = options.text.batch(options.seed, step, BATCH)
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss = model.loss(inputs, targets)
        loss.backward()
        middle = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        scheduler.step()
        run.record(loss.item(), begin, middle, end)
        yield


def save(run: Run, options: Namespace) -> None:
    """Writes what --resume reads. The optimizer's part has torch's layout, for torch.optim.AdamW to load."""
    states = {name: getattr(run, name).state_dict() for name in ("model", "optimizer", "scheduler")}
    torch.save({"config": options.config, "step": options.stop_at, **states}, options.save)


def main() -> None:
    options = parse()
    runs = [Run("pyshard", "pyshard.AdamW", AdamW)]
    if not options.no_compare:
        runs.append(Run("torch", "torch.optim.AdamW", TorchAdamW))  # in bf16 with fp32 masters: baseline.py

    tokens = BATCH * MODEL["context"]
    with tqdm(total=options.stop_at, initial=options.start, unit="step") as bar:
        for _ in zip(*(train(run, options) for run in runs), strict=True):
            bar.set_postfix_str(" | ".join(run.progress(tokens) for run in runs), refresh=False)
            bar.update()

    for run in runs:
        run.validate(*options.text.validation_batch(size=64))
    print(table(runs))
    print(f"\nA sample of the model that {runs[0].title} trained:\n")
    print(runs[0].model.generate(b"The ", length=options.sample, seed=options.seed))
    if options.losses:
        options.losses.write_text(json.dumps({run.name: run.losses for run in runs}))
    if options.save:
        save(runs[0], options)
        print(f"\nCheckpoint: {options.save}")
    draw(runs, options)
    print(f"\nPicture: {options.out}")


if __name__ == "__main__":
    main()
