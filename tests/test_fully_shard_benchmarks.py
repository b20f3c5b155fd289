"""The benchmarks of full sharding: that they run, and that contestants train alike. Not how fast anything is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    "fsdp optimizer step": (5, ["pyshard.AdamW, DTensors: ≤ 1.05x pyshard.AdamW, plain local tensors"]),
    "fsdp many small": (4, ["pyshard.AdamW, DTensors: ≥ 8x torch fused, DTensors"]),
    "fsdp step": (4, ["FSDP2 + pyshard.AdamW: ≤ 1x FSDP2 + torch fused"]),
}


@pytest.mark.timeout(280)
def test_quick_run(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_fsdp_step.py", "-p", "no:cacheprovider", "--quick"]
    done = subprocess.run(
        [*command, "--result", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=270, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "result-distributed.json").read_text())["cases"]
    assert set(found) == set(CASES)
    for name, (count, targets) in CASES.items():
        assert len(found[name]["contestants"]) == count
        assert set(targets) <= {target["text"] for target in found[name]["targets"]}
        # Adam's updates in other orders of operations; losses of the model are near ln 256, sums of parameters near 10.
        compared = {row["name"]: row["difference"] for row in found[name]["contestants"] if "difference" in row}
        assert len(compared) >= count - 1
        for who, difference in compared.items():
            assert difference < 1e-4, (name, who)
