"""A small case of `make coverage`, so that it cannot rot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks" / "coverage"


def run(*command: object) -> str:
    """Run a script; fails with what it printed."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_architectures_and_their_page(tmp_path):
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    for name in ("mixtral", "torch/LSTM"):
        run(FOLDER / "run.py", "--only", name, "--out", results)
    rows = [row for line in results.read_text().splitlines() if "type" in (row := json.loads(line))]
    assert [(row["type"], row["source"]) for row in rows] == [("mixtral", "transformers"), ("torch/LSTM", "torch")]
    for row in rows:
        assert row["perex"]["status"] == row["training"]["status"] == "exact"
        assert row["perex"]["error"] < 1e-9
        assert row["private"]["status"] in ("exact", "refused") and row["private"].get("moved", 1) <= 1 + 1e-7
        assert {row["vmap"]["status"], row["opacus"]["status"]} <= {"exact", "wrong", "error"}
    run(FOLDER / "table.py", results, "--out", page)
    assert "| mixtral" in page.read_text() and "| torch/LSTM" in page.read_text()
