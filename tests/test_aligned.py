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
    "cast": (lambda q, x: q.to(torch.complex128).expand(len(x), -1, -1).real, "12D"),
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
