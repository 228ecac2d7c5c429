"""The benchmarks run: one model, two rounds, and the page made of them; those for GPUs, in little."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks" / "speed"


def run(*command: object) -> None:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_model_and_its_page(tmp_path):
    results, page = tmp_path / "speed.json", tmp_path / "benchmarks.md"
    run(FOLDER / "run.py", "--only", "MLP 784-256-*", "--sweeps", "--rounds", 2, "--ways", "[!lvB]*", "--out", results)
    (row,) = json.loads(results.read_text())["rows"]
    cells = row["cells"]
    assert cells["perex"]["status"] == cells["perex, .grad"]["status"] == "exact"
    assert all(cells[way]["ratio"] > 0 and cells[way]["bytes"] > 0 for way in ("plain", "floor", "perex"))
    run(FOLDER / "page.py", results, "--out", page)
    assert "| MLP 784-256-256-10 (256) |" in page.read_text() and (tmp_path / "images" / "benchmarks.png").exists()


def test_the_benchmark_for_gpus_runs_on_a_cpu(tmp_path):
    results, command = tmp_path / "gpu.json", FOLDER.parent / "gpu" / "run.py"
    options = ["--device", "cpu", "--small", "--only", "GPT-2*", "--ways", "perex*", "--precision", "tf32"]
    run(command, *options, "--rounds", 2, "--out", results)
    found = json.loads(results.read_text())
    (row,) = found["rows"]
    assert set(row["cells"]) == {"plain", "perex, Triton", "perex"} and found["about"]["triton runs"] is False
    for way in ("perex, Triton", "perex"):
        cell = row["cells"][way]
        assert cell["status"] == "exact" and cell["ratio"] > 0 and cell["ways"]["segments"] == 1
