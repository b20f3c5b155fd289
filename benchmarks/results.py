"""From samples to numbers: medians, bandwidth, fraction of the roofline, targets; the table and the file."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.harness import Absent, Contestant, Race

RESULTS = Path(__file__).with_name("results")
DISTRIBUTED = "-distributed"  # at the end of the names of results of several processes
UNITS = {"s": 1.0, "ms": 1e3, "µs": 1e6, "MB": 1.0}  # one second in each; a sample of bytes is in MB


@dataclass(frozen=True)
class Target:
    """A number to reach. `measure` takes it from a case's summary; None: what it needs was not measured."""

    text: str
    measure: Callable[[dict[str, Any]], float | None]
    bound: float
    at_least: bool = True

    def judge(self, summary: dict[str, Any]) -> dict[str, Any]:
        value = self.measure(summary)
        met = None if value is None else (value >= self.bound if self.at_least else value <= self.bound)
        key = "at_least" if self.at_least else "at_most"
        return {
            "text": self.text,
            key: self.bound,
            "measured": None if value is None else round(value, 4),
            "met": met,
        }


@dataclass(frozen=True)
class Case:
    """One claim: who races over what."""

    name: str
    title: str
    entries: Sequence[Contestant | Absent]
    targets: Sequence[Target] = ()
    rounds: int = 30
    warmup: int = 3
    unit: str = "ms"
    reference: str = ""  # the contestant whose results the others' are compared with
    facts: dict[str, Any] = field(default_factory=dict)  # anything else worth storing, e.g. sizes
    ranks: bool = False  # the contestants run in processes of one thread each


def _row(summary: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((row for row in summary["contestants"] if row["name"] == name), None)


def _median(summary: dict[str, Any], name: str) -> float | None:
    row = _row(summary, name)
    return None if row is None else row["median"]


def ratio(summary: dict[str, Any], above: str, below: str) -> float | None:
    """Median time of `above` over that of `below`."""
    a, b = _median(summary, above), _median(summary, below)
    return None if a is None or b is None else a / b


def faster_than(peer: str, bound: float, subject: str = "pyshard") -> Target:
    """The peer takes at least `bound` times the subject's time."""
    return Target(f"≥ {bound:g}x {peer}", lambda s: ratio(s, peer, subject), bound)


def of_roofline(bound: float, subject: str = "pyshard") -> Target:
    """The subject reaches at least this fraction of the bandwidth that the best sweep measured."""
    return Target(f"≥ {bound:g} of roofline", lambda s: (_row(s, subject) or {}).get("roofline"), bound)


def no_slower_than(other: str, bound: float, subject: str) -> Target:
    """The subject takes at most `bound` times the other's time."""
    return Target(f"≤ {bound:g}x {other}", lambda s: ratio(s, subject, other), bound, at_least=False)


def within(bound: float, unit: str, subject: str = "pyshard") -> Target:
    """The subject's median is at most `bound`, in the case's unit."""
    return Target(f"≤ {bound:g} {unit}", lambda s: _median(s, subject), bound, at_least=False)


def fact_within(fact: str, bound: float, text: str) -> Target:
    """A stored fact is at most `bound`."""
    return Target(text, lambda s: s["facts"].get(fact), bound, at_least=False)


def _significant(value: float) -> float:
    return float(f"{value:.5g}")


def summarise(case: Case, race: Race) -> dict[str, Any]:
    """A case's numbers as they are stored: plain JSON values, times in the case's unit."""
    scale = UNITS[case.unit]
    rows: list[dict[str, Any]] = []
    for entry in race.present:
        samples = race.samples[entry.name]
        median = statistics.median(samples)
        q1, _, q3 = statistics.quantiles(samples, n=4) if len(samples) > 1 else (median, median, median)
        row: dict[str, Any] = {"name": entry.name, "version": entry.version, "role": entry.role}
        row |= {"median": median * scale, "min": min(samples) * scale, "max": max(samples) * scale}
        row |= {"q1": q1 * scale, "q3": q3 * scale}
        if entry.nbytes:
            row |= {"bytes": entry.nbytes, "traffic": entry.traffic, "gb_per_s": entry.nbytes / median / 1e9}
        rows.append(row)

    best = max((row for row in rows if row["role"] == "sweep"), key=lambda row: row["gb_per_s"], default=None)
    subject = next((row for row in rows if row["role"] == "subject"), None)
    expected = race.result(case.reference)
    for row in rows:
        if best is not None and "gb_per_s" in row:
            row["roofline"] = row["gb_per_s"] / best["gb_per_s"]
        if subject is not None and row["role"] != "sweep":
            row["ratio"] = row["median"] / subject["median"]
        made = race.result(row["name"])
        if expected is not None and made is not None:
            row["difference"] = (made.float() - expected.float()).abs().max().item()
        row |= {key: _significant(value) for key, value in row.items() if isinstance(value, float)}
        notes = race.notes(row["name"])
        if notes:
            row["notes"] = {key: _significant(value) for key, value in notes.items()}

    summary: dict[str, Any] = {
        "title": case.title,
        "unit": case.unit,
        "rounds": len(next(iter(race.samples.values()), [])),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "load_average": round(os.getloadavg()[0], 2),
        "facts": case.facts,
        "roofline": None if best is None else {"sweep": best["name"], "gb_per_s": best["gb_per_s"]},
        "reference": case.reference if expected is not None else "",
        "contestants": sorted(rows, key=lambda row: (row["role"] == "sweep", row["role"] != "subject")),
        "absent": [{"name": entry.name, "reason": entry.reason} for entry in race.absent],
    }
    summary["targets"] = [target.judge(summary) for target in case.targets]
    return summary


def table(summary: dict[str, Any]) -> str:
    """The summary of one case as text, a line per contestant."""
    unit = summary["unit"]
    notes = [*dict.fromkeys(key for row in summary["contestants"] for key in row.get("notes", {}))]
    head = ("", unit, "min - max", "GB/s", "roofline", f"{'bytes' if unit == 'MB' else 'time'} / ours", *notes)
    lines = [head]
    for row in summary["contestants"]:
        lines.append(
            (
                row["name"],
                f"{row['median']:.4g}",
                f"{row['min']:.4g} - {row['max']:.4g}",
                f"{row['gb_per_s']:.1f}" if "gb_per_s" in row else "",
                f"{row['roofline']:.2f}" if "roofline" in row else "",
                f"{row['ratio']:.2f}x" if "ratio" in row else "",
                *(f"{row['notes'][key]:.4g}" if key in row.get("notes", {}) else "" for key in notes),
            )
        )
    lines = [*zip(*(column for column in zip(*lines) if any(column[1:])))]  # a column without numbers says nothing
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = [f"{summary['title']}  [{summary['rounds']} rounds, load {summary['load_average']}]"]
    for name, *cells in lines:
        text.append("  " + name.ljust(widths[0]) + "".join("  " + c.rjust(w) for c, w in zip(cells, widths[1:])))
    text += [f"  {entry['name']}: not run, {entry['reason']}" for entry in summary["absent"]]
    verdict = {True: "met", False: "MISSED", None: "not measured"}
    for target in summary["targets"]:
        measured = "" if target["measured"] is None else f" ({target['measured']:.3g})"
        text.append(f"  target {target['text']}: {verdict[target['met']]}{measured}")
    return "\n".join(text)


def header(environment: dict[str, Any]) -> str:
    """One line on the machine, one on the versions."""
    spec = environment["machine"]
    gpu = f"{spec['gpu']}, CUDA {spec['cuda']}, " if "gpu" in spec else ""
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    return (
        f"{gpu}{spec['cpu']} ({spec['isa']}), {spec['cores']} cores, "
        f"{spec['threads']} thread{'s' * (spec['threads'] != 1)}{' per rank' * spec.get('per_rank', False)}, "
        f"{spec['memory_gib']:g} GiB\nPython {environment['python']}, {versions}; {environment['compiler']}"
    )


def save(path: Path, environment: dict[str, Any], cases: dict[str, dict[str, Any]]) -> None:
    """Writes the result file. Cases of the same machine and versions that were not run again stay in it."""
    kept: dict[str, Any] = {}
    if path.exists():
        old = json.loads(path.read_text())
        if old.get("environment") == environment:
            kept = old["cases"]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, "cases": dict(sorted((kept | cases).items()))}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
