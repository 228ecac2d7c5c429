"""Layers that read one input: its Gram matrix is computed once, and never taken for another's."""

from __future__ import annotations

import pytest
import torch
from oracle import check
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import perex
from perex.kernels import outer
from perex.kernels.readers import Readers, reading

B, T, D = 3, 16, 64


class Attention(nn.Module):
    """Queries, keys and values by layers of their own; `changes` makes what the last of them reads another tensor."""

    def __init__(self, changes: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))
        self.changes = changes

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        v = self.v(x.cos() if self.changes else x)
        return self.out(F.softmax(q @ k.mT, -1) @ v)


def steps(model: nn.Module, x: Tensor, **options: object) -> tuple[perex.tracker.Tracker, int]:
    """A tracker after three steps, and the operations of the last."""
    px = perex.attach(model, param_grads=False, **options)
    for _ in range(3):
        with FlopCounterMode(display=False) as counter:
            px.backward(model(x).sin().sum((1, 2)))
    return px, counter.get_total_flops()


@pytest.mark.parametrize(("way", "pairs"), [("Gram", outer.products(T)[0]), ("compiled Gram", T * (T + 1) // 2)])
def test_its_gram_is_computed_once(way, pairs):
    if way not in outer.NORMS.plans(*[torch.Size((B, 1, T, D))] * 2):
        pytest.skip("no kernels in C were built, or a CPU without AVX2")
    torch.manual_seed(0)
    x = torch.randn(B, T, D)
    products = 2 * B * pairs * D
    px, one = steps(Attention(), x, strategies=[way])
    qkv = [row for row in px.report().rows if row.module in ("q", "k", "v")]
    assert sorted(row.way for row in qkv) == [way, *[f"{way}, of a shared input"] * 2]
    other, apart = steps(Attention(changes=True), x, strategies=[way])
    assert [row.way for row in other.report().rows].count(f"{way}, of a shared input") == 1
    assert apart - one == products
    assert sum(row.flops for row in other.report().rows) - sum(row.flops for row in px.report().rows) == products


@pytest.mark.parametrize("changes", [False, True])
def test_norms_are_exact(changes):
    check(Attention(changes).double(), (torch.randn(B, T, D, dtype=torch.float64),))


def test_nothing_is_left_of_it():
    model = Attention()
    px, _ = steps(model, torch.randn(B, T, D))
    readers = px._backwards.latest.readers
    assert not readers.kept and not readers.ahead


def test_it_is_taken_for_no_other():
    readers, x = Readers(), torch.randn(4, 4)
    for _ in range(9):
        readers.expect([x])

    def once(x: Tensor) -> list[float]:
        return list(readers.once(x, "", 1, lambda: [float(x.sum())]))

    first = once(x)
    assert once(x) is not first and once(x) == first and readers.hits == 2
    for other in (x.mT, x[:2], x.view(torch.int32)):
        assert once(other) == [float(other.sum())]
    assert once(x) == first
    x.add_(1)
    assert once(x) == [float(x.sum())] != first


def test_what_is_larger_than_the_input_is_not_kept():
    readers, x = Readers(), torch.randn(2, 1, 16, 3)
    readers.expect([x, x])
    with reading(readers):
        outer.gram(torch.randn(2, 1, 16, 8), x)
    assert not readers.kept


def test_the_last_reader_lets_go():
    readers, x = Readers(), torch.randn(3)
    readers.expect([x, x])
    list(readers.once(x, "", 1, lambda: [1]))
    readers.done([x])
    assert readers.kept
    readers.done([x])
    assert not readers.kept
