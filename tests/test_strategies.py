"""Ways to the norms: forced by name, measured, chosen by cost; the same numbers by all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import perex
from perex.kernels.plan import Plan
from perex.kernels.strategies import Preferences, Strategies, preferring


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 2, stride=2, groups=2), nn.Flatten(2), nn.Linear(9, 5)
    ).double()


def norms(**options: object) -> tuple[Tensor, list[str]]:
    model, x = net(), torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(1)).double()
    with perex.attach(model, **options) as px:
        for _ in range(2):
            px.backward(model(x).sin().sum((1, 2)))
        return px.norms(), [row.way for row in px.report().rows]


WAYS = {
    "direct": ["unfolded, direct", "unfolded, direct", "direct"],
    "Gram": [None, None, "Gram"],
    "call per example": ["call per example"] * 2,
    "grouped calls": ["grouped calls"] * 2,
    "unfolded": [None, None],
    "pixel Gram": ["pixel Gram"] * 2,
}


@pytest.mark.parametrize("name", WAYS)
def test_a_way_can_be_asked_for(name):
    expected, _ = norms()
    found, ways = norms(strategies=name)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    for way, wanted in zip(ways, WAYS[name], strict=False):
        assert wanted is None or way == wanted or name == "direct"


def test_the_first_of_several_that_applies_is_taken():
    _, ways = norms(strategies=["pixel Gram", "Gram", "direct"])
    assert ways == ["pixel Gram", "pixel Gram", "Gram"]


def test_an_unknown_name_is_refused():
    with pytest.raises(perex.AttachError, match="'fast'.*pixel Gram"):
        perex.attach(net(), strategies="fast")


def test_measured_ways_give_the_same_numbers():
    expected, _ = norms()
    found, ways = norms(autotune=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    assert len(ways) == 3 and all(ways)


def test_each_shape_is_measured_once_and_the_fastest_taken():
    runs: list[str] = []
    kind = Strategies("a test")

    def plan(cost: int):
        return lambda shape: Plan("", cost, 0)

    @kind.way("slow", plan(1))
    def slow(x: Tensor) -> Tensor:
        runs.append("slow")
        for _ in range(200):
            x = x.exp().log()
        return x

    @kind.way("fast", plan(2))
    def fast(x: Tensor) -> Tensor:
        runs.append("fast")
        return x

    @kind.way("hopeless", plan(1000))
    def hopeless(x: Tensor) -> Tensor:
        raise AssertionError("not worth trying")

    x = torch.ones(1000)
    with preferring(Preferences(autotune=True)):
        for _ in range(3):
            kind.run((x.shape,), x)
        assert kind.pick(x.shape)[0] == "fast" and kind.pick(torch.Size((3,)))[0] == "slow"
    assert runs == ["slow"] * 2 + ["fast"] * 2 + ["fast"] * 3
    runs.clear()
    kind.run((x.shape,), x)
    assert runs == ["slow"]  # by cost
    with pytest.raises(ValueError, match="already"):
        kind.way("fast", plan(1))(fast)
    from perex.kernels import strategies

    strategies._all.remove(kind)
