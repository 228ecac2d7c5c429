"""Losses that depend on other examples' outputs, beside those that do not: outputs large enough for digests."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import perex
from perex.audit import RUN, digest
from perex.capture.axis import Axis, Single

B, D = 6, 5 * RUN + 7
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
APART = {
    "cross entropy": lambda out: F.cross_entropy(out, torch.arange(len(out)), reduction="none"),
    "squares": lambda out: out.square().sum(1),
    "tiny beside huge": lambda out: (out * torch.logspace(-20, 10, out.shape[1], dtype=out.dtype)).sum(1),
    "not a number": lambda out: out[:, 0].mul(torch.nan) + out.sum(1),
    "not used": lambda out: out[:, :1].sum(1),
}
MIXED = {
    "contrastive": lambda out: F.cross_entropy(out @ out.T, torch.arange(len(out)), reduction="none"),
    "one number of another's": lambda out: out.square().sum(1) + out.roll(1, 0)[:, 17],
    "the last number of another's": lambda out: out.square().sum(1) + out.roll(1, 0)[:, -1],
    "two that cancel in a sum": lambda out: out.square().sum(1) + (out.roll(1, 0)[:, 3] - out.roll(1, 0)[:, 4]),
    "a little of another's": lambda out: out.square().sum(1) + 0.1 * out.roll(1, 0)[:, 99],
    "a mean over the batch": lambda out: (out - out.mean(0)).square().sum(1),
    "only one loss does": lambda out: out.square().sum(1) + F.one_hot(torch.tensor(4), B).to(out) * out[1].sum(),
}


def run(loss: object, dtype: torch.dtype) -> perex.tracker.Tracker:
    torch.manual_seed(0)
    model = nn.Linear(4, D).to(dtype)
    with perex.attach(model) as px:
        px.backward(loss(model(torch.randn(B, 4, dtype=dtype))))
    return px


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", APART)
def test_losses_of_one_example_each(name, dtype):
    assert len(run(APART[name], dtype).norms()) == B


@pytest.mark.parametrize("exponent", [30, 37, 38, 39, 40, 42, 44, 46, 323])
def test_numbers_that_have_lost_their_digits(exponent):
    """A confident example's gradient is among the least that there are: twice as much is not what it was, twice."""
    dtype = torch.float64 if exponent > 300 else torch.float32
    for examples in (2, 6, 40):
        sizes = torch.ones(examples, dtype=torch.float64)
        sizes[1] = 10.0**-exponent
        torch.manual_seed(exponent)
        model, x = nn.Linear(4, 70).to(dtype), torch.randn(examples, 4, dtype=dtype)
        with perex.attach(model) as px:
            px.backward(model(x).square().mean(1) * sizes.to(dtype))
        assert float(px.norms()[1]) < 1e-18


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_losses_that_depend_on_others(name, dtype):
    with pytest.raises(perex.ExamplesMixError, match="losses"):
        run(MIXED[name], dtype)


@pytest.mark.parametrize("axis", [Axis(0), Axis(1), Axis(0, inner=2), Single(0)], ids=str)
def test_a_digest_is_a_sixty_fourth(axis):
    batch = 1 if isinstance(axis, Single) else B
    shape = {1: (300, B, 7)}.get(getattr(axis, "dim", 0), (2 * B if getattr(axis, "inner", 1) == 2 else B, 300, 7))
    grad = torch.randn(shape)
    found = digest(grad, axis, batch)
    rows = axis.front(grad, batch).flatten(1)
    assert len(found.sums) == len(rows) and found.sums.shape[1] == rows.shape[1] // RUN + rows.shape[1] % RUN
    runs = rows[:, : rows.shape[1] // RUN * RUN].unflatten(1, (-1, RUN)).abs().sum(2)
    assert bool((found.size[:, 0] >= runs.amax(1) * (1 - 1e-5)).all())
