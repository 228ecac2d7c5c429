"""What a step of the benchmarks' models costs, in operations and bytes, beside a step of plain training."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "speed"))

from models import TABLE, Case  # noqa: E402
from private import PRIVATE  # noqa: E402
from ways import WAYS  # noqa: E402

import perex  # noqa: E402

# Operations over plain's, at most: statistics alone, and with `.grad`.
FLOPS = {
    "MLP": (0.62, 1.01),
    "3-conv CNN": (0.88, 1.03),
    "ResNet-18": (0.82, 1.02),
    "GPT 4L": (0.81, 1.01),
    "GPT 2L d=256 V=2000 T=64": (0.79, 1.11),
    "GPT 2L d=256 V=2000 T=512": (1.01, 1.01),
}
SPARE = 2**20 + 2**16
"""Bytes that perex may take beyond plain training, for blocks of its products, a quarter of a `BLOCK`, or for output
gradients in another order, and for norms."""


def stepping(case: Case, way: str) -> tuple[nn.Module, Callable[[], object]]:
    """A step that has run before: the first one is audited, and the second tells which products norms can share."""
    model, x, y = case.build()
    step = WAYS[way](case, model, x, y)
    for _ in range(0 if way == "plain" else 2):
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
    """Clipped in little memory, it takes a tenth more than a plain step, and the sums."""
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
    model, step = clipping(case)
    sums = sum(parameter.nbytes for parameter in model.parameters())
    for _ in range(2):  # whichever way is found in the first steps
        step()
        model.zero_grad()
    assert peak(step) <= 1.1 * plain + sums / 2 + SPARE


def clipping(case: Case) -> tuple[nn.Module, Callable[[], object]]:
    """A step that clips, with `memory="low"`."""
    model, x, y = case.build()
    px = perex.attach(model, param_grads=False, memory="low")

    def step() -> None:
        px.backward(case.loss(model(x), y))
        px.clip_(1.0)

    return model, step


@pytest.mark.parametrize(("way", "most"), [("perex", 1.7), ("perex, low", 1.25)])
def test_a_private_step(way, most):
    """Where parameters outweigh activations: noise and sums take memory only for a piece of one parameter at a time."""
    peaks = []
    for kind in ("plain", way):
        model, x, y = TABLE[0].build()
        step = PRIVATE[kind](TABLE[0], model, x, y)
        for _ in range(3):
            step()
        model.zero_grad()
        peaks.append(peak(step))
    assert peaks[1] <= most * peaks[0]


def test_a_table_of_a_million_rows():
    """Norms of an embedding need no gradient of the table's size, 1 GB."""
    table = nn.Embedding.from_pretrained(torch.zeros(1_000_000, 256), freeze=False)
    model, ids = nn.Sequential(table, nn.Linear(256, 4)), torch.randint(1_000_000, (16, 32))
    px = perex.attach(model, param_grads=False)

    def step() -> None:
        px.backward(model(ids).square().mean((1, 2)))
        assert px.norms().shape == (16,)

    step()
    assert peak(step) < 2**23


def norm_flops(length: int, batch: int) -> int:
    """Operations of the norms of a linear layer alone, by what the layer itself takes less."""
    layer, x = nn.Linear(96, 160), torch.randn(batch, length, 96)
    px = perex.attach(layer, param_grads=False, audit=False)

    def step() -> None:
        px.backward(layer(x).square().mean((1, 2)))

    step()
    return flops(step) - 2 * batch * length * 96 * 160


def test_cost_is_linear_in_the_batch():
    assert norm_flops(24, 64) == 2 * norm_flops(24, 32) > 0


@pytest.mark.parametrize("length", [1, 2, 8, 32, 64, 128, 512])
def test_sequences_never_cost_more_than_either_form(length):
    direct, gram = 2 * length * 96 * 160, 2 * length**2 * (96 + 160)
    assert norm_flops(length, 4) <= 1.1 * 4 * min(direct, gram)  # they also differ in what they write


def test_the_last_layer_alone_costs_a_forward():
    """Nothing runs back behind it."""
    for case in TABLE[:2]:
        model, step = stepping(case, "perex, last layer")
        forward = flops(WAYS["forward"](case, *case.build()))
        assert forward <= flops(step) <= 1.01 * forward
