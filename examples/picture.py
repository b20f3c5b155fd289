"""The picture of a training: losses, milliseconds per step, bytes held per parameter."""

from argparse import Namespace
from statistics import fmean, median

import matplotlib
import torch
from group import WORLD
from report import KINDS, Run, furthest

matplotlib.use("Agg")  # draws to files alone, so that no display is needed
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

INK, MUTED, PALE, GRID = "#1f2933", "#66727f", "#c3ccd6", "#e4e8ec"
PYSHARD, TORCH = "#0b4f8a", "#f0a35e"
RINGS = (TORCH, "#c9745b", "#8f9fae", "#6fb1d8")
SHADES = ("#9fb3c8", "#d3dce4", "#e8c9a4", "#6d9bc3", PYSHARD)
STYLE = {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED}
STYLE |= {"xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False}
Part = tuple[str, str, list[float]]  # label, colour, one value per run


def draw(runs: list[Run], options: Namespace) -> None:
    """Writes the picture of the runs, side by side, to `options.out`."""
    count = sum(p.numel() for p in runs[0].whole.parameters())
    records = [run.record for run in runs]
    times: list[Part] = [
        ("forward and backward", SHADES[1], [median(r.compute) for r in records]),
        ("optimizer", PYSHARD, [median(r.update) for r in records]),
    ]
    memory: list[Part] = [
        (kind, shade, [r.memory[kind] / count for r in records])
        for kind, shade in zip(KINDS, SHADES, strict=True)
        if any(r.memory[kind] for r in records)
    ]
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(11.5, 5.8), dpi=140, layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1.2, 1), wspace=0.03)
        if len(runs) > 1:
            losses, lowest = left.subplots(2, 1, sharex=True, height_ratios=(3.5, 1))
            _differences(lowest, runs, options.start)
        else:
            losses = lowest = left.subplots()
        _losses(losses, runs, options.start)
        lowest.set_xlabel("step")
        upper, lower = right.subplots(2, 1)
        _bars(upper, runs, "ms per step (medians)", times, [r.step_ms() for r in records])
        held = [sum(r.memory.values()) / count for r in records]
        _bars(lower, runs, "bytes held per parameter" + (", on each rank" if WORLD > 1 else ""), memory, held)
        dtype = str(options.dtype).removeprefix("torch.")
        threads = runs[-1].threads
        figure.suptitle(
            f"A byte-level GPT of {count / 1e6:.1f} M parameters in {dtype} learns {options.text.name}\n"
            f"torch {torch.__version__} on the CPU, "
            + (f"{WORLD} ranks, threads of each: {threads}" if WORLD > 1 else f"threads: {threads}")
            + f", seed: {options.seed}"
            + (", same initial weights and batches for all" if len(runs) > 1 else ""),
            fontsize=11,
            horizontalalignment="left",
            x=0.01,
        )
        figure.savefig(options.out, format="png")
        plt.close(figure)


def _steps(axes: Axes, start: int, count: int) -> range:
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return range(start + 1, start + 1 + count)


def _colours(runs: list[Run]) -> tuple[str, ...]:
    """One for each run, whatever is left out: the first ones and pyshard's last."""
    return (*RINGS[: len(runs) - 1], PYSHARD)


def _losses(axes: Axes, runs: list[Run], start: int) -> None:
    """The first run wide, each next one narrower on top of it, pyshard thin and dark: all show where they agree."""
    width = max(1, len(runs[0].record.losses) // 50)
    for run, colour, layer in zip(runs, _colours(runs), range(len(runs)), strict=True):
        losses, last = run.record.losses, run is runs[-1]
        steps = _steps(axes, start, len(losses))
        smooth = [fmean(losses[max(0, i - width + 1) : i + 1]) for i in range(len(losses))]
        label = f"{run.label}, on held-out text {run.validation_loss:.3f}"
        axes.plot(steps, smooth, color=colour, linewidth=1.2 + 1.9 * (len(runs) - 1 - layer), label=label)
        if last and width > 1:
            axes.plot(steps, losses, color=PALE, linewidth=0.6, zorder=1, label="the same, each step")
    axes.set_ylabel("training loss, nats per byte" + (f" (mean of {width} steps)" if width > 1 else ""))
    axes.legend(frameon=False, loc="upper right", fontsize=9)


def _differences(axes: Axes, runs: list[Run], start: int) -> None:
    first = runs[0].record.losses
    for run, colour, layer in list(zip(runs, _colours(runs), range(len(runs)), strict=True))[1:]:
        gap = [a - b for a, b in zip(run.record.losses, first, strict=True)]
        axes.plot(_steps(axes, start, len(gap)), gap, color=colour, linewidth=0.8 + 1.2 * (len(runs) - 1 - layer))
    most = max(furthest(run, runs[0]) for run in runs)
    axes.set_ylabel("difference\nfrom the first")
    axes.set_title(f"at most {most:.1e}", loc="right", fontsize=9, color=MUTED, pad=2)


def _bars(axes: Axes, runs: list[Run], label: str, parts: list[Part], totals: list[float]) -> None:
    """One bar per run, cut into parts with their values, and the total after its end."""
    longest = max(totals)
    left = [0.0] * len(runs)
    for name, shade, values in parts:
        axes.barh(range(len(runs)), values, left=left, color=shade, height=0.62, label=name)
        for i, value in enumerate(values):
            if value > 0.05 * longest:
                colour = "white" if shade == PYSHARD else INK
                axes.text(left[i] + value / 2, i, _number(value), ha="center", va="center", color=colour, fontsize=9)
            left[i] += value
    for i, (end, total) in enumerate(zip(left, totals, strict=True)):
        axes.text(end + 0.01 * longest, i, _number(total), va="center", color=INK, fontweight="bold", fontsize=9)
    axes.set_xlim(0, 1.12 * longest)
    axes.set_yticks(range(len(runs)), ["\n".join(filter(None, run.title)) for run in runs], color=INK, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.tick_params(axis="y", length=0)
    axes.legend(
        frameon=False,
        ncols=len(parts),
        loc="lower left",
        bbox_to_anchor=(-0.2, 1),
        fontsize=8,
        columnspacing=1.0,
        handlelength=1.0,
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2g}"
