"""Parameters that are given to every example as a row of its own: class tokens, queries, first states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import Bare, check, scramble
from test_cost_guards import peak
from torch import Tensor, nn
from torch.nn import functional as F

import perex

T, D = 4, 3

Make = Callable[[Any, Tensor], Tensor]
SPREADS: dict[str, tuple[Make, str]] = {
    "expand": (lambda q, x: q.expand(len(x), -1, -1), "12D"),
    "expand of two dimensions": (lambda q, x: q.expand(len(x), -1, -1), "2D"),
    "expand_as": (lambda q, x: q.expand_as(x[:, :2]), "12D"),
    "broadcast_to": (lambda q, x: torch.broadcast_to(q, (len(x), 2, 3)), "12D"),
    "a part": (lambda q, x: q[1:3].expand(len(x), -1, -1), "5D"),
    "of one vector": (lambda q, x: q.expand(len(x), 2, -1), "D"),
    "transposed": (lambda q, x: q.mT.expand(len(x), -1, -1), "D2"),
    "and transposed": (lambda q, x: q.expand(len(x), -1, -1).mT, "D2"),
    "time first": (lambda q, x: q.expand(-1, len(x), -1).transpose(0, 1), "21D"),
    "repeat": (lambda q, x: q.repeat(len(x), 1, 1), "12D"),
    "repeat of two dimensions": (lambda q, x: q.repeat(len(x), 1, 1), "2D"),
    "repeat a part": (lambda q, x: q[:, :1].repeat(len(x), 2, 1), "13D"),
    "repeat rows": (lambda q, x: q.repeat(len(x), 2, 1), "11D"),
    "tile": (lambda q, x: q.tile((len(x), 1, 1)), "12D"),
    "contiguous": (lambda q, x: q.expand(len(x), -1, -1).contiguous(), "12D"),
    "unsqueezed": (lambda q, x: q[None].expand(len(x), -1, -1).clone(), "2D"),
    "viewed": (lambda q, x: q.view(1, 2, 3).repeat(len(x), 1, 1), "6"),
    "looked up": (lambda q, x: F.embedding(torch.tensor([1, 3]).expand(len(x), -1), q), "5D"),
    "looked up, time first": (
        lambda q, x: F.embedding(torch.tensor([[1], [1]]).expand(-1, len(x)), q).transpose(0, 1),
        "5D",
    ),
    "padded": (lambda q, x: F.embedding(torch.tensor([1, 3]).expand(len(x), -1), q, padding_idx=3), "5D"),
    "repeat_interleave": (lambda q, x: q.repeat_interleave(len(x), 0), "12D"),
    "scaled": (lambda q, x: (2 * q).expand(len(x), -1, -1), "12D"),
    "and scaled": (lambda q, x: q.expand(len(x), -1, -1) * 2, "12D"),
    "indexed": (lambda q, x: q[torch.zeros(len(x), dtype=torch.long)], "12D"),
    "columns": (lambda q, x: q.expand(2, len(x), 3).transpose(0, 1), "1D"),
    "of two": (lambda q, x: torch.cat([q, q.sin()], 1).expand(len(x), -1, -1), "11D"),
    "twice": (lambda q, x: q.expand(len(x), -1, -1) + q.repeat(len(x), 1, 1), "12D"),
}
MEETS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "cat": lambda m, q, x: torch.cat([q, x], 1),
    "add": lambda m, q, x: q + x[:, :2],
    "attention": lambda m, q, x: F.scaled_dot_product_attention(q, x, x),
    "bmm": lambda m, q, x: torch.bmm(q, x.mT),
    "written": lambda m, q, x: x.index_copy(1, torch.tensor([1, 3]), q),
    "multiplied": lambda m, q, x: q * x[:, 1:3],
}


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("spread", SPREADS)
def test_rows_of_one_parameter(spread, batch):
    make, shape = SPREADS[spread]
    model = scramble(Bare(lambda m, x: torch.cat([make(m.q, x), x * m.a], 1), {"D": D}, q=shape, a="D"))
    check(model, (torch.randn(batch, T, D),))


@pytest.mark.parametrize("spread", ["expand", "repeat", "contiguous", "of one vector", "scaled"])
@pytest.mark.parametrize("meets", MEETS)
def test_wherever_they_meet_examples(meets, spread):
    make, shape = SPREADS[spread]
    model = scramble(Bare(lambda m, x: MEETS[meets](m, make(m.q, x), x * m.a), {"D": D}, q=shape, a="D"))
    check(model, (torch.randn(3, T, D),))


def test_rows_of_examples_that_are_folded():
    """Two rows an example show the parameter."""

    def forward(m: Any, x: Tensor) -> Tensor:
        rows = (x * m.a).flatten(0, 1)  # (2 B, T, D)
        return torch.cat([m.q.expand(len(rows), -1, -1), rows], 1).unflatten(0, (len(x), 2)).flatten(1)

    check(scramble(Bare(forward, {"D": D}, q="12D", a="D")), (torch.randn(3, 2, T, D),))


def test_a_row_that_was_changed_in_place():
    def forward(m: Any, x: Tensor) -> Tensor:
        rows = m.q.repeat(len(x), 1, 1)
        rows[:, 0] *= 2
        return torch.cat([rows, x * m.a], 1)

    check(scramble(Bare(forward, {"D": D}, q="12D", a="D")), (torch.randn(3, T, D),))


@pytest.mark.parametrize("spread", ["expand", "repeat", "contiguous"])
def test_memory_does_not_grow_with_the_square_of_the_batch(spread):
    make, _ = SPREADS[spread]
    model = Bare(lambda m, x: torch.cat([make(m.q, x), m.layer(x)], 1))
    model.q, model.layer = nn.Parameter(torch.randn(1, 16, 128)), nn.Linear(128, 128)
    x = torch.randn(64, 16, 128)
    with perex.attach(model, param_grads=False) as px:

        def step() -> None:
            px.backward(model(x).square().mean((1, 2)))
            assert px.norms().shape == (64,)

        for _ in range(2):
            step()
        assert peak(step) < 16 * x.nbytes  # all examples' gradients of all rows would take 64 of them


class Attends(nn.Module):
    """Queries go through layers of their own, as in a Perceiver, a detector or an attention pool."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.queries = how, nn.Parameter(torch.randn(1, 2, D))
        self.table = nn.Embedding(5, D)
        self.norm, self.layer = nn.LayerNorm(D), nn.Linear(D, D)
        self.attention = nn.MultiheadAttention(D, 3, batch_first=True)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q = self.queries.repeat(len(x), 1, 1) if "repeat" in self.how else self.queries.expand(len(x), -1, -1)
        if "table" in self.how:
            q = q + self.table(torch.arange(2).expand(len(x), -1))
        if "norm" in self.how:
            q = self.norm(q)
        if "layer" in self.how:
            q = self.layer(q).relu() + q
        if "self" in self.how:
            q = q + self.attention(q, q, q)[0]
        if "split" in self.how:
            q = torch.cat(q.chunk(2, 1)[::-1], 1)
        if "first" in self.how:
            q = q.transpose(0, 1).contiguous().transpose(0, 1)
        if "in place" in self.how:
            q = q.clone()
            q.mul_(2)
        if "written" in self.how:
            q = q.clone()
            before = q + 1
            q[:, 0] = 0
            q = q + before
        if "centred" in self.how:  # over rows that are all the same
            q = q - 0.5 * q.mean(0)
        if "sorted" in self.how:
            q = q.flip(0) + q.cumsum(0)[:1]
        if "drop" in self.how:
            q = self.drop(q)
        if "both" in self.how:  # once for all, and once for each
            q = q + q[:1].sum()
        h = self.attention(q, self.layer(x), x, need_weights="heads" in self.how)[0]
        return torch.cat([h, self.layer(q)], 1) if "again" in self.how else h


LAYERS = [
    "norm", "repeat, norm, layer", "layer, self", "table, norm", "layer, split", "repeat, layer, first",
    "layer, in place", "layer, written", "layer, both", "norm, layer, again", "table, self, again",
    "self, both, again", "heads", "repeat, norm, heads, again", "layer, centred", "layer, sorted",
    "norm, centred, layer, again",
]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("how", LAYERS)
def test_layers_of_their_own(how, batch):
    check(scramble(Attends(how)), (torch.randn(batch, T, D),))


def test_dropout_on_queries():
    """Its masks are drawn once: norms are those of the masks that the output has."""
    model, x = scramble(Attends("layer, drop")).double().train(), torch.randn(3, T, D, dtype=torch.float64)
    expected = []
    for b in range(3):
        torch.manual_seed(1)
        grads = torch.autograd.grad(model(x)[b].sum(), list(model.parameters()), allow_unused=True)
        expected.append(sum(g.square().sum() for g in grads if g is not None).sqrt())
    with perex.attach(model, audit=False, loss_reduction="sum") as px:
        torch.manual_seed(1)
        model(x).sum().backward()
    torch.testing.assert_close(px.norms(), torch.stack(expected))


def test_layers_on_queries_are_tapped():
    model = Attends("norm, layer")
    with perex.attach(model, audit=False) as px:
        px.backward(model(torch.randn(3, T, D)).sum((1, 2)))
    ways = {way for row in px.report().rows for way in row.ways}
    assert "pulled back" not in ways


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_rows_that_are_not_the_examples(batch):
    """As many as there are examples, along time, heads, or both."""

    def forward(m: Any, x: Tensor) -> Tensor:
        size = x.shape[1]  # positions
        along = m.layer(m.p.expand(size, -1))  # (T, D)
        heads = m.layer(m.p.expand(size, 2, -1)).mean(0)  # (2, D)
        table = m.layer(m.p.expand(size, size, -1)).sum(-1)  # (T, T)
        rows = m.layer(m.p.expand(len(x), size, -1))  # (B, T, D): these are
        h = x * m.a + along + along[:1]
        h = h + (h @ h.mT + table).softmax(-1) @ h
        return h + rows + heads.sum(0)

    model = Bare(forward, {"D": D}, p="D", a="D")
    model.layer = nn.Linear(D, D)
    check(scramble(model), (torch.randn(batch, batch, D),))
