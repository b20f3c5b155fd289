"""The picture of a training: losses, milliseconds per step, bytes held per parameter."""

from argparse import Namespace
from statistics import fmean, median

import matplotlib
import torch
from report import KINDS, Run

matplotlib.use("Agg")  # draws to files alone, so that no display is needed
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

INK, MUTED, PALE, GRID = "#1f2933", "#66727f", "#c3ccd6", "#e4e8ec"
PYSHARD, TORCH = "#0b4f8a", "#f0a35e"
SHADES = ("#9fb3c8", "#d3dce4", "#6d9bc3", PYSHARD)
STYLE = {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED}
STYLE |= {"xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False}
Part = tuple[str, str, list[float]]  # label, colour, one value per run


def draw(runs: list[Run], options: Namespace) -> None:
    """Writes the picture of one run, or of two side by side, to `options.out`."""
    count = sum(p.numel() for p in runs[0].model.parameters())
    held = [run.memory() for run in runs]
    times: list[Part] = [
        ("forward and backward", SHADES[1], [median(run.compute) for run in runs]),
        ("optimizer", PYSHARD, [median(run.update) for run in runs]),
    ]
    memory: list[Part] = [
        (kind, shade, [kinds[kind] / count for kinds in held])
        for kind, shade in zip(KINDS, SHADES, strict=True)
        if any(kinds[kind] for kinds in held)
    ]
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(11.5, 5.8), dpi=140, layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1.3, 1), wspace=0.03)
        if len(runs) > 1:
            losses, lowest = left.subplots(2, 1, sharex=True, height_ratios=(4, 1))
            _difference(lowest, runs, options.start)
        else:
            losses = lowest = left.subplots()
        _losses(losses, runs, options.start)
        lowest.set_xlabel("step")
        upper, lower = right.subplots(2, 1)
        _bars(upper, runs, "ms per step (median)", times)
        _bars(lower, runs, "bytes held per parameter", memory)
        dtype = str(options.dtype).removeprefix("torch.")
        figure.suptitle(
            f"A byte-level GPT of {count / 1e6:.1f} M parameters in {dtype} learns {options.text.name}\n"
            f"torch {torch.__version__} on the CPU, threads: {torch.get_num_threads()}, seed: {options.seed}"
            + (", same initial weights and batches for both" if len(runs) > 1 else ""),
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


def _losses(axes: Axes, runs: list[Run], start: int) -> None:
    """The baseline wide and pale, pyshard thin and dark on top of it: both show where they agree."""
    width = max(1, len(runs[0].losses) // 50)
    for run in reversed(runs):
        ours = run.name == "pyshard"
        steps = _steps(axes, start, len(run.losses))
        smooth = [fmean(run.losses[max(0, i - width + 1) : i + 1]) for i in range(len(run.losses))]
        axes.plot(
            steps,
            smooth,
            color=PYSHARD if ours else TORCH,
            linewidth=1.2 if ours else 4.5,
            alpha=1.0 if ours else 0.8,
            label=f"{run.title}, on held-out text {run.validation_loss:.3f}",
        )
        if ours and width > 1:
            axes.plot(steps, run.losses, color=PALE, linewidth=0.6, zorder=1, label=f"{run.title}, each step")
    axes.set_ylabel("training loss, nats per byte" + (f" (mean of {width} steps)" if width > 1 else ""))
    axes.legend(frameon=False, loc="upper right")


def _difference(axes: Axes, runs: list[Run], start: int) -> None:
    gap = [a - b for a, b in zip(runs[0].losses, runs[1].losses, strict=True)]
    axes.plot(_steps(axes, start, len(gap)), gap, color=PYSHARD, linewidth=0.8)
    axes.set_ylabel(f"{runs[0].name}\n− {runs[1].name}")


def _bars(axes: Axes, runs: list[Run], label: str, parts: list[Part]) -> None:
    """One bar per run, cut into parts with their values; a thin last part has its value after the bar."""
    longest = max(sum(values[i] for _, _, values in parts) for i in range(len(runs)))
    left = [0.0] * len(runs)
    for name, shade, values in parts:
        axes.barh(range(len(runs)), values, left=left, color=shade, height=0.55, label=name)
        for i, value in enumerate(values):
            end = left[i] + value
            number = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
            if value > 0.09 * longest:
                colour = "white" if shade == PYSHARD else INK
                axes.text(left[i] + value / 2, i, number, ha="center", va="center", color=colour)
            elif name == parts[-1][0] and value > 0:
                axes.text(end + 0.01 * longest, i, number, va="center", color=PYSHARD)
            left[i] = end
    axes.set_xlim(0, 1.08 * longest)
    axes.set_yticks(range(len(runs)), [run.name for run in runs], color=INK)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.tick_params(axis="y", length=0)
    axes.legend(
        frameon=False,
        ncols=len(parts),
        loc="lower left",
        bbox_to_anchor=(-0.02, 1),
        fontsize=8.5,
        columnspacing=1.2,
        handlelength=1.2,
    )
