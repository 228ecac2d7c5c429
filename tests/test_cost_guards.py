"""What a step of the benchmarks' models costs, in operations and bytes, beside a step of plain training."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "speed"))

from models import TABLE, Case  # noqa: E402
from ways import WAYS  # noqa: E402

# Operations over plain's, at most: statistics alone, and with `.grad`.
FLOPS = {
    "MLP": (0.62, 1.01),
    "3-conv CNN": (0.88, 1.23),
    "ResNet-18": (0.82, 1.16),
    "GPT 4L": (0.81, 1.14),
    "GPT 2L d=256 V=2000 T=64": (0.79, 1.12),
    "GPT 2L d=256 V=2000 T=512": (1.01, 1.35),
}
SPARE = 2**20
"""Bytes that perex may take beyond plain training, for blocks of its products: a quarter of a `BLOCK`."""


def stepping(case: Case, way: str) -> tuple[nn.Module, Callable[[], object]]:
    """A step that has run before: the first one is audited."""
    model, x, y = case.build()
    step = WAYS[way](case, model, x, y)
    step()
    return model, step


def flops(step: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak(step: Callable[[], object]) -> int:
    """The most bytes that a step holds at once beyond what was there, as torch's allocator counts them."""
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            step()
    finally:
        gc.enable()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def limits(case: Case) -> tuple[float, float]:
    return next(found for name, found in FLOPS.items() if case.name.startswith(name))


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_a_step(case):
    measured = {}
    for way in ("plain", "perex", "perex, .grad"):
        model, step = stepping(case, way)
        operations = flops(step)
        model.zero_grad()  # what a step frees does not count
        measured[way] = operations, peak(step)
    operations, plain = measured.pop("plain")
    assert plain > 2**22, "the test of the test: the peak is seen"
    for (way, (found, most)), limit in zip(measured.items(), limits(case), strict=True):
        assert found <= limit * operations, f"{way}: {found / operations:.3f} of plain training's operations"
        assert most <= plain + SPARE, f"{way}: {most / 2**20:.1f} MiB at the peak, not {plain / 2**20:.1f} as plainly"
