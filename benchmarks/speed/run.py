"""Time and memory of perex, plain training and the peers, in interleaved rounds; every number checked in the same run.

    python benchmarks/speed/run.py                  the six models of the table
    python benchmarks/speed/run.py --only 'MLP*' --rounds 3
    python benchmarks/speed/run.py --sweeps                           batch, length and width, too
    python benchmarks/speed/run.py --device cuda --dtype bfloat16

Two suites: norms, beside a plain forward and backward; and private steps, beside plain ones with SGD. Each round runs
all ways once, so that a busy moment of the machine hits all alike. A cell holds the median of its
ratios over plain in the same round, their quartiles, the peak memory of a fresh process, and the worst relative
error against the loop in float64. Results go to benchmarks/results/, with the machine they are of.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from models import TABLE, Case, cnn, gpt, lstm, mlp, tiny
from private import PRIVATE, clipped
from torch import Tensor, nn
from ways import SLOW, WAYS, Step, Unsupported, exact

ROOT = Path(__file__).resolve().parents[2]
WRONG = 1e-2  # in float32; half precision is given a tenth


class Suite(NamedTuple):
    """Ways to the same numbers.

    Attributes:
        ways: by name, `plain` first, which the times of all are set against.
        truth: the numbers, by a loop in float64.
        error: how far those of a way are from them.
    """

    ways: dict[str, Callable[..., Step]]
    truth: Callable[[Case, nn.Module, Tensor, Tensor], Tensor]
    error: Callable[[Tensor, Tensor], Tensor]


SUITES = {
    "norms": Suite(WAYS, exact, lambda found, truth: ((found - truth).abs() / truth).max()),
    "private": Suite(PRIVATE, clipped, lambda found, truth: (found - truth).norm() / truth.norm()),
}


def sweeps() -> list[Case]:
    """Over the batch, the length of a sequence, and the width; and steps that are very short."""
    batches = [mlp(batch=batch) for batch in (16, 64, 1024)] + [cnn(batch) for batch in (8, 256)]
    lengths = [gpt(2, 256, 2000, length, 1024 // length) for length in (16, 32, 128, 256)]
    return [*batches, *lengths, *(mlp(width) for width in (256, 512, 2048)), lstm(), *tiny()]


def set_up(suite: Suite, case: Case, way: str, device: str, dtype: torch.dtype) -> Step:
    """A step of one way, on a model of its own."""
    model, x, y = case.build()
    model, y = model.to(device, dtype), y.to(device)
    x = x.to(device, dtype) if x.is_floating_point() else x.to(device)
    return suite.ways[way](case, model, x, y)


def seconds(step: Step, device: str) -> float:
    """How long a step takes."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait for a device."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(
    suite: Suite, case: Case, ways: Sequence[str], rounds: int, device: str, dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """Cells of one model: ratios over plain, and errors."""
    model, x, y = case.build()
    truth = suite.truth(case, model, x, y)
    steps: dict[str, Step] = {}
    cells: dict[str, dict[str, Any]] = {}
    for way in ways:
        try:
            steps[way] = set_up(suite, case, way, device, dtype)
            found = steps[way]()
            cells[way] = {}
            if callable(found):
                found = found()
            if found is not None:
                error = float(suite.error(found.cpu().double(), truth))
                limit = WRONG if dtype == torch.float32 else 0.1
                cells[way] = {"error": error, "status": "exact" if error < limit else "wrong"}
            seconds(steps[way], device)  # warm
        except (Unsupported, ImportError) as reason:
            cells[way] = {"status": "unsupported", "message": str(reason)[:200]}
        except (MemoryError, torch.OutOfMemoryError):
            cells[way] = {"status": "out of memory"}
        except Exception as reason:
            cells[way] = {"status": "unsupported", "message": f"{type(reason).__name__}: {reason}"[:200]}
        if "message" in cells[way] or cells[way].get("status") == "out of memory":
            steps.pop(way, None)
    times: dict[str, list[float]] = {way: [] for way in steps}
    ratios: dict[str, list[float]] = {way: [] for way in steps}
    for number in range(rounds):
        here = [way for way in steps if way not in SLOW or number < max(3, rounds // 5)]
        taken = {way: seconds(steps[way], device) for way in here}
        for way, value in taken.items():
            times[way].append(value)
            ratios[way].append(value / taken["plain"])
    for way, values in ratios.items():
        low, high = statistics.quantiles(values, n=4)[::2] if len(values) > 1 else (values[0], values[0])
        cells[way] |= {"ms": 1e3 * statistics.median(times[way]), "ratio": statistics.median(values)}
        cells[way] |= {"quartiles": [low, high], "rounds": len(values)}
    return cells


def peak(suite: Suite, case: Case, way: str, device: str, dtype: torch.dtype) -> int:
    """Bytes that three steps of one way take beyond what was there, in this process."""
    step = set_up(suite, case, way, device, dtype)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
        before = resident("VmRSS")
    for _ in range(3):
        step()
    return (torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")) - before


def resident(name: str) -> int:
    """Bytes of memory that this process has, or has had at its peak, as Linux counts them."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def fresh_peak(suite: str, case: Case, way: str, options: argparse.Namespace) -> int | None:
    """The same in a fresh process."""
    command = [sys.executable, __file__, "--peak", suite, case.name, way]
    command += ["--device", options.device, "--dtype", options.dtype]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def about(options: argparse.Namespace) -> dict[str, Any]:
    """The machine, and what ran on it."""
    versions = {}
    for name in ("torch", "perex", "opacus", "backpack-for-pytorch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    environment = {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "MKL_", "KMP_"))}
    return {
        "date": str(datetime.date.today()), "commit": commit.strip(), "device": device, "dtype": options.dtype,
        "threads": torch.get_num_threads(), "python": platform.python_version(), **versions, **environment,
    }  # fmt: skip


def merged(before: dict[str, Any], rows: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of an earlier run, and in place of those of models that ran again, these; in the order of the cases."""
    order = [case.name for case in [*TABLE, *sweeps()]]
    found = {suite: own for suite, own in before.items() if suite != "about"}
    for suite, own in rows.items():
        by_name = {row["model"]: row for row in [*found.get(suite, []), *own]}
        found[suite] = sorted(by_name.values(), key=lambda row: order.index(row["model"]))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time and memory beside plain training and the peers.")
    parser.add_argument("--only", default="*", help="models, as a glob")
    parser.add_argument("--suite", default="*", help="norms or private, as a glob")
    parser.add_argument("--ways", default="*", help="ways, as a glob")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--sweeps", action="store_true", help="other batches, lengths and widths, too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-memory", action="store_true", help="leave out the fresh processes")
    parser.add_argument("--peak", nargs=3, metavar=("SUITE", "MODEL", "WAY"), help="print the peak memory of one cell")
    parser.add_argument("--merge", action="store_true", help="keep what the file has of other models")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    cases = {case.name: case for case in [*TABLE, *sweeps()]}
    if options.peak:
        suite, case, way = options.peak
        print(peak(SUITES[suite], cases[case], way, options.device, dtype))
        return
    wanted = list(cases.values()) if options.sweeps else TABLE
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, suite in SUITES.items():
        ways = [way for way in suite.ways if way == "plain" or fnmatch.fnmatch(way, options.ways)]
        for case in wanted if fnmatch.fnmatch(name, options.suite) else []:
            if not fnmatch.fnmatch(case.name, options.only):
                continue
            cells = timed(suite, case, ways, options.rounds, options.device, dtype)
            for way, cell in cells.items():
                if "ms" in cell and not options.no_memory:
                    cell["bytes"] = fresh_peak(name, case, way, options)
            rows.setdefault(name, []).append({"model": case.name, "cells": cells})
            summary = ", ".join(f"{way} {cell['ratio']:.2f}" if "ratio" in cell else f"{way} {cell['status']}"
                                for way, cell in cells.items())  # fmt: skip
            print(f"{name}, {case.name}: plain {cells['plain']['ms']:.1f} ms; {summary}", flush=True)
    out = options.out or ROOT / "benchmarks" / "results" / f"speed-{datetime.date.today()}-{options.device}.json"
    if options.merge and out.exists():
        rows = merged(json.loads(out.read_text()), rows)
    out.write_text(json.dumps({"about": about(options), **rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
