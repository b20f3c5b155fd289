"""The README's pictures, drawn from committed results.

python -m benchmarks.report [RESULT.json] [--out docs/benchmarks.png]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.results import DISTRIBUTED, RESULTS, header

DOCS = RESULTS.parent.parent / "docs"

# case -> heading, and the rows shown: those who do the same work. All others stand in the result file. Two panels
# that stand side by side have equally many rows.
PANELS: dict[str, tuple[str, list[str]]] = {
    "fp32 step": (
        "fp32, one tensor of 33.5 M elements",
        ["pyshard", "DeepSpeedCPUAdam", "torch fused", "bitsandbytes AdamW", "torch foreach"],
    ),
    "many small, fresh gradients": (
        "fp32, 2,000 tensors of 1,024 elements",
        ["pyshard", "DeepSpeedCPUAdam", "torch fused", "bitsandbytes AdamW", "torch foreach"],
    ),
    "bf16 step, clipping": (
        "bf16 with exact fp32 master and clipping, 33.5 M",
        ["pyshard", "DeepSpeedCPUAdam on fp32 master", "torch fused on fp32 master"],
    ),
    "bf16 step, no clipping": (
        "bf16 with exact fp32 master, 33.5 M",
        ["pyshard", "DeepSpeedCPUAdam on fp32 master", "torch fused on fp32 master"],
    ),
    "sharded step": (
        "Two ranks on one host",
        [
            "pyshard shm, stage 2",
            "pyshard collective, stage 2, model=",
            "forward + backward",
            "torch fused, unsharded",
            "DDP",
            "DDP + ZeroRedundancyOptimizer",
            "FSDP2",
            "DeepSpeed ZeRO-1",
            "DeepSpeed ZeRO-2",
        ],
    ),
    **{
        f"two hosts, {gbit} Gbit/s": (
            f"Two hosts, {gbit} Gbit/s between them",
            [
                "pyshard, fp32",
                "pyshard, bf16 gradients on the wire",
                "pyshard, bf16 model",
                "forward + backward",
                "DDP",
                "DDP, bf16 gradients on the wire",
                "DDP, bf16 model",
                "DDP + ZeroRedundancyOptimizer",
                "FSDP2",
            ],
        )
        for gbit in (1, 4)
    },
}
OURS, TORCH, OTHER, INK, MUTED = "#0b4f8a", "#f0a35e", "#b8c2cc", "#1f2933", "#66727f"


def _rows(summary: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """The rows to draw, fastest first."""
    found = [row for row in summary["contestants"] if row["name"] in names]
    return sorted(found, key=lambda row: row["median"])


def _limit(summary: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[float, str]:
    """Where the subject's work is bound by memory or by a link: the least time that this allows, and what it is."""
    subject = next((row for row in rows if row["role"] == "subject"), {})
    if subject.get("roofline", 0) >= 0.5:
        text = f"same bytes at the {summary['roofline']['gb_per_s']:.0f} GB/s\nof a plain sweep"
        return subject["median"] * subject["roofline"], text
    notes = subject.get("notes", {})
    if "link ms" in notes:
        return notes["link ms"], f"the link alone, for the\n{notes['sent MB']:.0f} MB of pyshard, fp32"
    return 0.0, ""


def _panel(axes: Any, title: str, summary: dict[str, Any], names: list[str]) -> None:
    rows = _rows(summary, names)
    longest = max(row["median"] for row in rows)
    for y, row in enumerate(rows):
        ours = row["name"].startswith("pyshard")
        colour = OURS if ours else TORCH if row["name"].startswith("torch") else OTHER
        axes.barh(y, row["median"], color=colour, height=0.66)
        others = "ratio" in row and row["role"] != "subject"
        times = f"  {row['ratio']:.{2 if row['ratio'] < 2 else 1}f}x" if others else ""
        digits = ",.0f" if row["median"] >= 1000 else ".3g"
        label = f"{row['median']:{digits}} {summary['unit']}"
        text = axes.annotate(
            label,
            (row["median"], y),
            (5, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            weight="bold",
        )
        axes.annotate(times, (1, 0.5), xycoords=text, va="center", color=MUTED)
    limit, words = _limit(summary, rows)
    if words:
        axes.axvline(limit, color=INK, linewidth=1, linestyle=(0, (3, 3)))
        axes.annotate(
            words,
            (limit, len(rows) - 0.5),
            (4, -1),
            textcoords="offset points",
            va="top",
            fontsize=7.5,
            color=MUTED,
        )
    axes.set_yticks(range(len(rows)), [row["name"].replace(" on fp32 master", " + casts") for row in rows])
    axes.set_ylim(len(rows) - 0.35, -0.6)
    axes.set_xlim(0, longest * 1.38)
    axes.set_title(title, loc="left", fontsize=10.5, weight="bold", color=INK)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)


def draw(result: dict[str, Any], out: Path) -> None:
    """A panel per case of PANELS in the result, bars of median time per step. ValueError: no such case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (title, result["cases"][case], names) for case, (title, names) in PANELS.items() if case in result["cases"]
    ]
    if not panels:
        raise ValueError(f"the result holds none of the cases {', '.join(PANELS)}; run `make bench` first")
    with plt.rc_context({"font.size": 9, "font.family": "DejaVu Sans"}):
        counts = [len(_rows(summary, names)) for _, summary, names in panels]
        heights = [max(counts[i : i + 2]) + 1.25 for i in range(0, len(panels), 2)]  # so bars are equally thick
        size = (11, 0.4 * sum(heights) + 0.9)
        figure, grid = plt.subplots(
            len(heights), 2, figsize=size, height_ratios=heights, squeeze=False, layout="constrained"
        )
        for axes, (title, summary, names) in zip(grid.flat, panels, strict=False):
            _panel(axes, title, summary, names)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        kind = "training" if all(summary["title"].startswith("Training") for _, summary, _ in panels) else "AdamW"
        figure.suptitle(
            f"Time of one {kind} step, and its multiple of pyshard's",
            x=0.01,
            ha="left",
            weight="bold",
            fontsize=12.5,
        )
        date = max(summary["date"] for _, summary, _ in panels)[:10]
        figure.supxlabel(
            f"{header(result['environment'])}\ninterleaved runs, medians, {date}",
            x=0.01,
            ha="left",
            fontsize=7,
            color=MUTED,
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=160)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws docs/benchmarks*.png from results of the benchmarks.")
    parser.add_argument("result", nargs="?", type=Path, help="default: the newest cpu-*.json of either kind")
    parser.add_argument("--out", type=Path, help=f"default: {DOCS}/benchmarks.png, or benchmarks-distributed.png")
    options = parser.parse_args()
    found = [options.result] if options.result else newest()
    if not found:
        sys.exit(f"report: no result in {RESULTS}; run `make bench` first")
    for path in found:
        out = options.out or DOCS / f"benchmarks{DISTRIBUTED if path.stem.endswith(DISTRIBUTED) else ''}.png"
        draw(json.loads(path.read_text()), out)
        print(f"written: {out}")


def newest() -> list[Path]:
    """The newest result of a CPU, and the newest one of several processes."""
    found = sorted(RESULTS.glob("cpu-*.json"), key=lambda path: path.stat().st_mtime)
    kinds = {path.stem.endswith(DISTRIBUTED): path for path in found}
    return list(kinds.values())


if __name__ == "__main__":
    main()
