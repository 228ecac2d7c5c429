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


ONE = ("--only", "MLP 784-256-*", "--sweeps", "--rounds", 2)


def test_one_model_and_its_page(tmp_path):
    results, page = tmp_path / "speed.json", tmp_path / "benchmarks.md"
    run(FOLDER / "run.py", *ONE, "--ways", "[pf]*", "--out", results)
    found = json.loads(results.read_text())
    (norms,), (private,) = found["norms"], found["private"]
    cells = norms["cells"]
    assert cells["perex"]["status"] == cells["perex, .grad"]["status"] == "exact"
    assert all(cells[way]["ratio"] > 0 and cells[way]["bytes"] > 0 for way in ("plain", "floor", "perex"))
    cells = private["cells"]
    assert cells["perex"]["error"] < 1e-5 and cells["perex, low"]["error"] < 1e-5
    run(FOLDER / "page.py", results, "--out", page)
    assert page.read_text().count("| MLP 784-256-256-10 (256) |") == 2 * 4
    assert (tmp_path / "images" / "benchmarks.png").exists()


def test_what_opacus_is_timed_at_is_private_too(tmp_path):
    results = tmp_path / "speed.json"
    run(FOLDER / "run.py", *ONE, "--suite", "private", "--ways", "Opacus*", "--no-memory", "--out", results)
    (row,) = json.loads(results.read_text())["private"]
    assert {row["cells"][way]["status"] for way in ("Opacus, hooks", "Opacus, ghost")} == {"exact"}


def test_the_benchmark_for_gpus_runs_on_a_cpu(tmp_path):
    results, command = tmp_path / "gpu.json", FOLDER.parent / "gpu" / "run.py"
    options = ["--device", "cpu", "--small", "--only", "GPT-2*", "--ways", "perex*", "--precision", "tf32"]
    run(command, *options, "--rounds", 2, "--out", results)
    found = json.loads(results.read_text())
    (row,) = found["rows"]
    ways = {"perex", "perex, .grad", "perex, no Triton"}
    graphs = {way for way, cell in row["cells"].items() if "CUDA graphs are for GPUs" in cell.get("message", "")}
    assert graphs == {"perex, graph", "perex, .grad, graph"}
    assert set(row["cells"]) == {"plain", *ways, *graphs} and found["about"]["triton runs"] is False
    for way in ways:
        cell = row["cells"][way]
        assert cell["status"] == "exact" and cell["ratio"] > 0
        assert way == "perex, .grad" or cell["ways"]["segments"] == 2  # tokens and positions
