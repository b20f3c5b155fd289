"""Trains a small GPT on real text with pyshard, and beside it, step by step, in the ways that torch has.

    python examples/train_gpt.py                                               # in one process; --help lists the flags
    python -m torch.distributed.run --standalone --nproc-per-node 2 examples/train_gpt.py              # on two ranks

The loop in `train` is an ordinary torch loop. In one process pyshard changes the import of AdamW in it. On several
ranks each one trains on its part of each batch, ShardedAdamW averages the gradients and keeps one part of the
optimizer's state on each: no wrapper around the model. baseline.py is what torch needs for the same. --tp, --pp and
--full-shard cut the model itself over ranks (ways.py says how), in any combination; of a pipeline the loop calls step()
where it calls forward and backward of another model.
"""

import json
import math
import time
from argparse import Namespace
from collections.abc import Iterator

import group
import torch
from checkpoint import load, save
from gpt import GPT, cross_entropy
from options import BATCH, MODEL, parse
from picture import draw
from report import Run, table
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from ways import ways

from pyshard import ShardedAdamW, pp

WARM_UP = 40  # steps
SPIN = 0.01  # seconds: a thread that has nothing more to do was seen to keep a core busy for up to 0.008
EXPLANATION = """
In each run all ranks ended with the same weights, bit for bit. Times are those of the slowest rank at each step; bytes
are those of tensors after a step. Slots: memory in which gradients travel between ranks, all of them at stage 1, three
buckets of them at stage 2, where each rank then keeps the sum of its part; what waits for a slot during backward comes
on top. Transport {}: {}."""


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: a linear rise over the first steps, then a cosine down to a tenth."""
    progress = min(step / steps, 1.0)
    return min((step + 1) / WARM_UP, 1.0) * (0.55 + 0.45 * math.cos(math.pi * progress))


def prepare(run: Run, options: Namespace) -> None:
    """Model, optimizer and scheduler of a run, as new or as a checkpoint has them; all ranks call it."""
    torch.manual_seed(options.seed)
    run.whole = model = GPT(**MODEL).to(options.dtype)
    run.network, run.optimizer = run.build(model)
    run.model = run.network if isinstance(run.network, pp.Pipeline) else model
    if run.shared:
        run.whole = GPT(**MODEL).to(options.dtype)
    run.scheduler = LambdaLR(run.optimizer, lambda step: schedule(step, options.steps))
    if options.resume:
        load(options.resume, options.saved, run)


def train(run: Run, options: Namespace) -> Iterator[None]:
    """One training run on this rank; yields after each step, so that runs can take turns on the same machine."""
    network, optimizer, scheduler = run.network, run.optimizer, run.scheduler
    for step in range(options.start, options.stop_at):
        inputs, targets = options.text.batch(options.seed, step, BATCH, *run.part)
        begin = time.perf_counter()
        optimizer.zero_grad()
        if isinstance(network, pp.Pipeline):
            loss = network.step(inputs, target=targets).loss
        else:
            loss = cross_entropy(network(inputs), targets)
            loss.backward()
        middle = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        scheduler.step()
        run.add(loss.item(), begin, middle, end)
        yield


def take_turns(runs: list[Run], options: Namespace) -> None:
    """A step of each run in turn, so that whatever else the machine does slows all of them alike."""
    trainings = [train(run, options) for run in runs]
    rounds = range(options.start, options.stop_at)
    with tqdm(rounds, initial=options.start, total=options.stop_at, unit="step", disable=not group.FIRST) as bar:
        for _ in bar:
            for run, training in zip(runs, trainings, strict=True):
                if run.here:
                    torch.set_num_threads(run.threads)
                    next(training)
                if run.alone:
                    time.sleep(SPIN)
                group.wait()
            bar.set_postfix_str(" | ".join(run.progress() for run in runs if run.here), refresh=False)
    for run in runs:
        run.gather()


def finish(runs: list[Run], options: Namespace) -> str:
    """Validates all runs, and samples text from the last one, by their whole weights."""
    for run in runs:
        torch.set_num_threads(run.threads)
        run.validate(*options.text.validation_batch(size=64))
    return runs[-1].whole.generate(b"The ", length=options.sample, seed=options.seed)


def show(runs: list[Run], sample: str, options: Namespace) -> None:
    """Table, sample, picture."""
    print(table(runs))
    ours = runs[-1]
    if isinstance(ours.optimizer, ShardedAdamW):
        print(EXPLANATION.format(ours.optimizer.transport().name, ours.optimizer.transport().why))
    if options.full_shard:
        print("\nNot counted: layers that fully_shard makes whole while they compute; docs/memory.md has the formulas.")
    if isinstance(ours.network, pp.Pipeline):
        print(f"\nThe pipeline: {ours.network.explain()}")
    print(f"\nA sample of the model that {ours.label} trained:\n")
    print(sample)
    if options.record:
        records = {run.name: {"losses": run.record.losses, "weights": run.record.weights} for run in runs}
        options.record.write_text(json.dumps(records))
    draw(runs, options)
    print(f"\nPicture: {options.out}")


def main() -> None:
    group.join()
    options = parse()
    runs = ways(options)
    for run in runs:
        prepare(run, options)
    take_turns(runs, options)
    if options.save:
        save(options.save, runs[-1], config=options.config, step=options.stop_at)
        print(f"\nCheckpoint: {options.save}")
    if group.FIRST:
        show(runs, finish(runs, options), options)
    group.wait()
    group.leave()


if __name__ == "__main__":
    main()
