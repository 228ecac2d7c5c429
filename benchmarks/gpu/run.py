"""Time and memory of perex, with Triton kernels and without, plain training and the peers on a GPU.

    python benchmarks/gpu/run.py                                 ten models, in bf16 autocast and in TF32
    python benchmarks/gpu/run.py --only 'GPT-2*' --precision bf16
    python benchmarks/gpu/run.py --device cpu --small            does it run? Tiny models, on any machine

Each round runs all ways once, timed by CUDA events; a cell holds the median of its times, of its ratios over plain in
the same round, their quartiles, how long the host was busy, the peak memory of its first steps beyond the model, and
the worst relative error of the norms of the first few examples against a loop in the same precision. Ways that are far
slower than plain run in fewer rounds. For perex, also how often each way to a norm was taken. Results go to
benchmarks/results/, with the device and the environment that they are of.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import fnmatch
import gc
import glob
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "speed"))

import large  # noqa: E402
import models  # noqa: E402
import ways  # noqa: E402
from models import Case  # noqa: E402
from ways import Step, Unsupported  # noqa: E402

import perex  # noqa: E402
from perex.kernels.triton import available  # noqa: E402

FEW = 2
"""How many examples the loop checks."""

FEWEST, PATIENCE = 3, 1500.0
"""In how many rounds a way runs at least, and how many milliseconds it may take in all before it runs in no more."""

Built = tuple[nn.Module, Tensor, Tensor]  # a model, inputs and targets

SetUp = Callable[[Case, nn.Module, Tensor, Tensor], Step]

WRONG = {"bf16": 0.1, "tf32": 1e-2, "float32": 1e-3}
"""From which relative error on a norm is wrong, by precision."""


class Precise(nn.Module):
    """A model whose forward runs in a precision."""

    def __init__(self, model: nn.Module, precision: str, device: str) -> None:
        super().__init__()
        self.model, self.half, self.device = model, precision == "bf16", device

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16) if self.half else nullcontext():
            return self.model(x).float()


def without_triton(function: Callable[[], Any]) -> Callable[[], Any]:
    """The same, as where Triton is not installed."""

    def run() -> Any:
        kept, available.importable = available.importable, lambda: False  # type: ignore[assignment]
        try:
            return function()
        finally:
            available.importable = kept

    return run


def scoring(triton: bool) -> SetUp:
    """perex, statistics alone, with Triton kernels or without them."""

    def set_up(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Step:
        px = perex.attach(model, param_grads=False)

        def step() -> Tensor:
            px.backward(case.loss(model(x), y))
            return px.norms()  # type: ignore[return-value]

        chosen = step if triton else without_triton(step)
        chosen.report = px.report if triton else without_triton(px.report)  # type: ignore[attr-defined]
        return chosen

    return set_up


def graphed(way: SetUp) -> SetUp:
    """A way, recorded in a CUDA graph and replayed: without what the host takes for it."""

    def set_up(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Step:
        if not x.is_cuda:
            raise Unsupported("CUDA graphs are for GPUs")
        step = way(case, model, x, y)
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        with torch.cuda.graph(graph, stream=stream):
            norms = step()

        def replay() -> Tensor | None:
            graph.replay()
            return norms

        replay.reads = step  # type: ignore[attr-defined]  # the model and its inputs, which must live
        return replay

    return set_up


WAYS: dict[str, SetUp] = {
    "plain": ways.plain,
    "floor": ways.floor,
    "perex": scoring(True),
    "perex, .grad": ways.with_grads,
    "plain, graph": graphed(ways.plain),
    "floor, graph": graphed(ways.floor),
    "perex, graph": graphed(scoring(True)),
    "perex, .grad, graph": graphed(ways.with_grads),
    "perex, no Triton": scoring(False),
    "vmap": ways.mapped,
    "vmap, chunks": ways.in_chunks,
    "Opacus, hooks": ways.opacus_hooks,
    "Opacus, ghost": ways.opacus_ghost,
}


def in_precision(precision: str) -> None:
    """Let float32 be multiplied as TF32, or not."""
    tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def set_up(case: Case, way: str, built: Built, precision: str, device: str) -> Step:
    """A step of one way, on a model of its own."""
    model, x, y = built
    return WAYS[way](case, Precise(copy.deepcopy(model), precision, device), x, y)


def truth(case: Case, built: Built, precision: str, device: str) -> Tensor:
    """The loop's norms of the first examples, in the same precision."""
    model, x, y = built
    found = ways.loop(case, Precise(model, precision, device), x[:FEW], y[:FEW])()
    assert found is not None
    return found.double().cpu()


def milliseconds(step: Step, device: str) -> tuple[float, float]:
    """How long a step takes, on a GPU from when it begins to work until it is done; and how long it keeps the host."""
    start = time.perf_counter()
    if device == "cpu":
        step()
        return 1e3 * (time.perf_counter() - start), 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    begin.record()
    step()
    end.record()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return begin.elapsed_time(end), 1e3 * host


def first(
    case: Case, way: str, built: Built, precision: str, device: str, expected: Tensor
) -> tuple[Step, dict[str, Any]]:
    """A step that is warm, and what its first runs tell: memory, error and ways."""
    step = set_up(case, way, built, precision, device)
    cell: dict[str, Any] = {"status": "ran"}
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    norms = step()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
        cell["bytes"] = torch.cuda.max_memory_allocated() - before
    if norms is not None:
        found = norms.detach().double().cpu()[:FEW]
        cell["error"] = float(((found - expected).abs() / expected).max())
        cell["status"] = "exact" if cell["error"] < WRONG[precision] else "wrong"
    if hasattr(step, "report"):
        cell["ways"] = dict(Counter(way for row in step.report().rows for way in row.ways))
    return step, cell


def timed(case: Case, names: Sequence[str], rounds: int, precision: str, device: str) -> dict[str, dict[str, Any]]:
    """Cells of one model in one precision."""
    in_precision(precision)
    with torch.device(device):
        built = case.build()
    expected = truth(case, built, precision, device)
    steps: dict[str, Step] = {}
    cells: dict[str, dict[str, Any]] = {}
    for way in names:
        try:
            steps[way], cells[way] = first(case, way, built, precision, device, expected)
        except (MemoryError, torch.OutOfMemoryError):
            cells[way] = {"status": "out of memory"}
        except (Unsupported, ImportError) as reason:
            cells[way] = {"status": "unsupported", "message": str(reason)[:300]}
        except Exception as reason:
            cells[way] = {"status": "unsupported", "message": f"{type(reason).__name__}: {reason}"[:300]}
        if device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
    times: dict[str, list[float]] = {way: [] for way in steps}
    hosts: dict[str, list[float]] = {way: [] for way in steps}
    for done in range(rounds):
        for way, step in list(steps.items()):
            if done >= FEWEST and sum(times[way]) > PATIENCE:
                continue
            try:
                whole, host = milliseconds(step, device)
                times[way].append(whole)
                hosts[way].append(host)
            except torch.OutOfMemoryError:  # with the models of the other ways beside it
                cells[way] = {"status": "out of memory"}
                del steps[way]
    for way in steps:
        cells[way] |= {"ms": statistics.median(times[way]), "host ms": statistics.median(hosts[way])}
        cells[way]["rounds"] = len(times[way])
        if "plain" not in steps:
            continue
        ratios = [own / plain for own, plain in zip(times[way], times["plain"], strict=False)]
        low, high = statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else (ratios[0], ratios[0])
        cells[way] |= {"ratio": statistics.median(ratios), "quartiles": [low, high]}
    return cells


def told(cells: dict[str, dict[str, Any]]) -> None:
    """Print what went wrong, and which ways perex took."""
    for way, cell in cells.items():
        if cell["status"] in ("wrong", "unsupported"):
            print(f"  {way}: {cell['status']} {cell.get('error', '')} {cell.get('message', '')[:150]}", flush=True)
    if "ways" in cells.get("perex", {}):
        print(f"  {cells['perex']['ways']} off {cells['perex'].get('error', 0):.1e}", flush=True)


def compiled(names: Sequence[str], precisions: Sequence[str], processes: int) -> None:
    """Have kernels compiled that these models need, in processes that share Triton's cache."""
    waiting = [[name, precision] for name in names for precision in precisions]
    running: list[subprocess.Popen[bytes]] = []
    start = time.perf_counter()
    while waiting or running:
        running = [process for process in running if process.poll() is None]
        if waiting and len(running) < processes:
            name, precision = waiting.pop()
            command = [sys.executable, __file__, "--only", glob.escape(name), "--precision", precision, "--rounds", "1"]
            command += ["--ways", "perex", "perex, .grad", "--batch", "4", "--out", os.devnull]
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        time.sleep(0.1)
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)


def about(device: str) -> dict[str, Any]:
    """The machine, and what ran on it."""
    versions = {}
    for name in ("torch", "triton", "perex", "opacus", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    found: dict[str, Any] = {"device": platform.processor() or platform.machine()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        capability = f"{properties.major}.{properties.minor}"
        found = {"device": properties.name, "capability": capability, "bytes": properties.total_memory}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    prefixes = ("CUDA_", "TORCH_", "PYTORCH_", "TRITON_", "OMP_", "NVIDIA_TF32")
    environment = {name: value for name, value in os.environ.items() if name.startswith(prefixes)}
    return {
        "date": str(datetime.date.today()), "commit": commit.strip(), **found, "threads": torch.get_num_threads(),
        "python": platform.python_version(), **versions, "triton runs": device == "cuda" and available.compiles(),
        "environment": environment,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time and memory beside plain training and the peers, on a GPU.")
    parser.add_argument("--only", nargs="+", default=["*"], help="models, as globs")
    parser.add_argument("--ways", nargs="+", default=["*"], help="ways, as globs")
    parser.add_argument("--precision", nargs="+", choices=list(WRONG), default=["bf16", "tf32"])
    parser.add_argument("--rounds", type=int, default=21, help="0: compile kernels only")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models")
    parser.add_argument("--batch", type=int, help="another number of examples")
    parser.add_argument("--warm", type=int, default=0, help="processes that compile kernels beforehand, a model each")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no further model is begun")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    small = [models.mlp(32, 4), models.cnn(2), models.gpt(1, 16, 40, 12, 2), *large.SMALL]
    names = [way for way in WAYS if any(fnmatch.fnmatch(way, wanted) for wanted in ["plain", *options.ways])]
    every = small if options.small else [*models.TABLE, *large.LARGE]
    cases = [case for case in every if any(fnmatch.fnmatch(case.name, wanted) for wanted in options.only)]
    if options.batch:
        cases = [dataclasses.replace(case, batch=options.batch) for case in cases]
    if options.warm:
        compiled([case.name for case in cases], options.precision, options.warm)
    if not options.rounds:
        return
    found = about(options.device)
    name = "-".join(["gpu", found["date"], *found["device"].lower().split()])
    out = options.out or ROOT / "benchmarks" / "results" / f"{name}.json"
    rows = []
    begun = time.perf_counter()
    for case in cases:
        for precision in options.precision:
            if time.perf_counter() - begun > options.limit:
                print(f"out of time before {case.name}, {precision}", flush=True)
                continue
            cells = timed(case, names, options.rounds, precision, options.device)
            rows.append({"model": case.name, "precision": precision, "cells": cells})
            summary = ", ".join(f"{way} {cell['ratio']:.2f}" if "ratio" in cell else f"{way} {cell['status']}"
                                for way, cell in cells.items())  # fmt: skip
            host = ", ".join(f"{cell['host ms']:.1f}" for cell in cells.values() if "host ms" in cell)
            print(
                f"{case.name}, {precision}: plain {cells['plain'].get('ms', 0):.1f} ms; {summary}; host {host}",
                flush=True,
            )
            told(cells)
            out.write_text(json.dumps({"about": found, "rows": rows}, indent=1) + "\n")
            del cells
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
