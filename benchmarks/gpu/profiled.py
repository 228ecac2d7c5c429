"""Where the time of a step goes on a GPU: kernels by the time they take, and what the host does meanwhile.

python benchmarks/gpu/profiled.py --only 'ResNet-50*' --precision bf16 --ways plain perex
"""

from __future__ import annotations

import argparse
import cProfile
import fnmatch
import pstats
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import run
import torch
from run import large, models
from torch.profiler import ProfilerActivity, profile


def kernels(step: Any, most: int) -> list[str]:
    """The kernels of three steps that take the most time of the device, a line each."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    rows = [event for event in found.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    rows.sort(key=lambda event: -event.self_device_time_total)
    whole = sum(event.self_device_time_total for event in rows) / 3e3
    lines = [f"device busy {whole:.2f} ms in {sum(event.count for event in rows) // 3} kernels"]
    return lines + [f"{e.self_device_time_total / 3e3:8.3f} {e.count // 3:5d}  {e.key[:100]}" for e in rows[:most]]


def functions(step: Any, out: Path, most: int) -> None:
    """What the host does in ten steps, by function."""
    profiler = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):  # the backward in this thread, which is the one looked at
        profiler.enable()
        for _ in range(10):
            step()
        torch.cuda.synchronize()
        profiler.disable()
    with out.open("a") as file:
        pstats.Stats(profiler, stream=file).sort_stats("tottime").print_stats(most)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Where the time of a step goes on a GPU.")
    parser.add_argument("--only", nargs="+", default=["*"], help="models, as globs")
    parser.add_argument("--ways", nargs="+", default=["plain", "perex"])
    parser.add_argument("--precision", nargs="+", choices=list(run.WRONG), default=["bf16"])
    parser.add_argument("--most", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("profile.txt"))
    options = parser.parse_args(arguments)
    options.out.write_text("")
    for case in [*models.TABLE, *large.LARGE]:
        if not any(fnmatch.fnmatch(case.name, wanted) for wanted in options.only):
            continue
        for precision in options.precision:
            run.in_precision(precision)
            with torch.device("cuda"):
                built = case.build()
            for way in options.ways:
                step = run.set_up(case, way, built, precision, "cuda")
                for _ in range(3):
                    step()
                torch.cuda.synchronize()
                with options.out.open("a") as file:
                    print(f"=== {case.name}, {precision}, {way}", *kernels(step, options.most), sep="\n", file=file)
                functions(step, options.out, options.most)


if __name__ == "__main__":
    main()
