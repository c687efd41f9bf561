"""The benchmark of the tail, tried out on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

from bench.attention import tail

ROOT = Path(__file__).parent.parent


def test_a_small_run_measures_each_call_with_and_without_a_tail(tmp_path: Path):
    output = tmp_path / "tail.json"
    command = [sys.executable, "-m", "bench.attention.tail", "--device", "cpu", "--small", "--output", str(output)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 2 * len(tail.WAYS) * len(tail.DENSITIES)
    assert all(row["forward_ms"] > 0 and row["forward_backward_ms"] > 0 for row in rows)
    assert [row["tail"] for row in rows[:2]] == ["None", "Tail(cell=64)"]
    assert output.with_suffix(".md").read_text().count("\n| packed |") == 6


def test_the_table_tells_what_a_tail_adds():
    row = {"dispatch": "packed", "backend": "triton", "density": 0.125}
    plain = row | {"tail": "None", "forward_ms": 8.0, "forward_backward_ms": 25.0, "peak_gb": 2.0}
    tailed = row | {"tail": "Tail()", "forward_ms": 9.5, "forward_backward_ms": 29.0, "peak_gb": 2.25}
    facts = {"command": "command", "device": "device", "date": "date", "versions": {"torch": "2"}}
    text = tail.markdown(facts, [plain, tailed])
    assert "| packed | triton | 0.125 | 8.00 / 25.00 | 9.50 / 29.00 | 1.50 / 4.00 | 0.25 |" in text
