"""Everything that needs a GPU, into one file: the tests marked gpu, then the benchmarks.

    python -m benchmarks.gpu_report               # make gpu-report; writes benchmarks/results/<card>.json
    python -m benchmarks.gpu_report --part tests  # only the tests, or only the benchmarks

Runs with the Python that starts it and needs no network. Fails with one line where there is no GPU, and after
writing the result when a test or a benchmark failed or the extension has no CUDA code.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, results
from pyshard import _C


def run_pytest(*arguments: str) -> int:
    """pytest's exit code; its output goes where ours goes. The tree is importable from any folder."""
    path = os.pathsep.join(filter(None, [str(machine.ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "pytest", *arguments]
    print(f"gpu-report: {' '.join(['pytest', *arguments])}", flush=True)
    return subprocess.run(command, cwd=machine.ROOT, env=os.environ | {"PYTHONPATH": path}).returncode


def outcome(case: ElementTree.Element) -> tuple[str, str]:
    """What happened to a test of pytest's XML report, and the first line of why."""
    for tag, word in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(tag)
        if found is not None:
            return word, (found.get("message") or "").split("\n")[0]
    return "passed", ""


def read_report(path: Path) -> dict[str, Any]:
    """Counts by outcome and by file, and the reasons of what did not pass."""
    files: dict[str, Counter[str]] = {}
    reasons: dict[str, list[dict[str, str]]] = {"failed": [], "skipped": []}
    for case in ElementTree.parse(path).iter("testcase"):
        module, name = case.get("classname") or "collection", case.get("name") or ""
        word, reason = outcome(case)
        files.setdefault(module, Counter())[word] += 1
        if word in reasons:
            reasons[word].append({"test": f"{module}::{name}", "reason": reason})
    total = sum(files.values(), Counter())
    counts = {word: total[word] for word in ("passed", "failed", "skipped")}
    return {
        **counts,
        "files": {name: dict(count) for name, count in sorted(files.items())},
        "reasons": reasons,
    }


def run_tests() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "gpu.xml"
        code = run_pytest("tests", "-m", "gpu", f"--junitxml={report}")
        found = read_report(report) if report.exists() else {"passed": 0, "failed": 0, "skipped": 0}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "build": _C.build_note,
        "exit_code": code,
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="gpu-report", description="GPU tests and benchmarks into one JSON file.")
    parser.add_argument("--part", choices=["all", "tests", "benchmarks"], default="all", help="what to run")
    part = parser.parse_args().part
    if not torch.cuda.is_available():
        sys.exit(f"gpu-report: torch {torch.__version__} finds no CUDA device. Run it on a machine with a GPU.")

    path = results.RESULTS / f"{machine.slug('cuda')}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    troubles = []
    if _C.build_note.startswith("CUDA part left out"):
        troubles.append(_C.build_note)

    tests = before.get("gpu_tests")
    if part != "benchmarks":
        tests = run_tests()
        if tests["exit_code"] or not tests["passed"]:
            troubles.append("tests: {passed} passed, {failed} failed, {skipped} skipped".format(**tests))
    if part != "tests":
        code = run_pytest("benchmarks", "--device", "cuda", "--result", str(path))
        if code:
            troubles.append(f"benchmarks: pytest ended with code {code}")

    # The benchmarks' file, with the tests beside their cases.
    content = json.loads(path.read_text()) if path.exists() else {}
    content = {"environment": machine.environment("cuda"), "cases": {}} | content
    if tests is not None:
        content["gpu_tests"] = tests
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(f"gpu-report: written to {path}")
    if troubles:
        sys.exit("\n".join(f"gpu-report: {trouble}" for trouble in troubles))


if __name__ == "__main__":
    main()
