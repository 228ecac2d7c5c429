"""`torch.einsum` of examples with a weight: exact for all letters, in short form where it is a product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Bare, check, grid, scramble
from torch import Tensor, nn

import perex

SIZES = {"b": 3, "t": 2, "s": 4, "c": 3, "d": 2, "n": 5, "m": 2, "h": 2}


class Summed(nn.Module):
    """One sum behind a layer that makes examples need gradients."""

    def __init__(self, equation: str, weight: str, first: bool, folded: bool = False) -> None:
        super().__init__()
        self.equation, self.first, self.folded = equation, first, folded
        self.scale = nn.Parameter(torch.ones(()))
        self.weight = nn.Parameter(torch.randn([SIZES[letter] for letter in weight]))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        pair = (self.weight, x) if self.first else (x, self.weight)
        return torch.einsum(self.equation, *pair)


def rule(model: nn.Module, x: Tensor) -> str:
    with perex.attach(model) as px:
        model(x).mean().backward()
    return next(row.rule for row in px.report().rows if row.operator == "einsum")


letters = st.sets(st.sampled_from("ts")), st.sets(st.sampled_from("cd")), st.sets(st.sampled_from("nm"))


@grid(120)
@given(
    parts=st.tuples(*letters),
    order=st.randoms(use_true_random=False),
    first=st.booleans(),
    dots=st.booleans(),
    spaced=st.booleans(),
)
def test_products(parts, order, first, dots, spaced):
    rows, summed, free = (sorted(part) for part in parts)
    if not summed and not free:
        return
    inner, weight, outer = [*rows, *summed], [*summed, *free], [*rows, *free]
    for group in (inner, weight, outer):
        order.shuffle(group)
    x = torch.randn([SIZES[letter] for letter in ["b", *inner]])
    inner, weight, outer = map("".join, (inner, weight, outer))
    if dots and inner.startswith("".join(rows)) and outer.startswith("".join(rows)):
        inner, outer = (f"...{part[len(rows) :]}" for part in (inner, outer))
    else:
        inner, outer = f"b{inner}", f"b{outer}"
    equation = f"{weight},{inner}->{outer}" if first else f"{inner},{weight}->{outer}"
    equation = equation.replace(",", " , ") if spaced else equation
    model = Summed(equation, weight, first)
    if x.dim() > 1:
        assert rule(model, x) == "einsum"
    check(model, (x,))


@pytest.mark.parametrize(
    "equation", ["tbc,cn->tbn", "tbc,nc->tbn", "ctb,cn->tbn", "tbc,cdn->tbdn", "tcb,cn->tnb", "bct,cn->bnt"]
)
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_wherever_the_batch_is(equation, batch):
    inner = equation.split(",")[0]
    weight = equation.split(",")[1].split("->")[0]
    x = torch.randn([batch if letter == "b" else SIZES[letter] for letter in inner])
    dim = inner.index("b")
    if equation.split("->")[1].index("b") == dim:
        check(Summed(equation, weight, False), (x,), batch_dim=dim)


@pytest.mark.parametrize(
    ("equation", "weight", "shape"),
    [
        ("bthc,hcd->bthd", "hcd", "bthc"),  # a weight for each head
        ("btc,cn->bn", "cn", "btc"),  # rows are added up
        ("btc,c->btc", "c", "btc"),
        ("btc,tc->b", "tc", "btc"),
        ("btc,ncd->btn", "ncd", "btc"),  # so is a part of the weight
        ("btc,cn", "cn", "btc"),  # the result's letters are not said
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_other_sums_are_exact_too(equation, weight, shape, first):
    left, _, rest = equation.partition(",")
    right, arrow, out = rest.partition("->")
    equation = f"{right},{left}{arrow}{out}" if first else equation
    check(Summed(equation, weight, first), (torch.randn([SIZES[letter] for letter in shape]),))


def test_rows_folded_into_the_batch_and_a_weight_that_is_derived():
    def forward(m: Bare, x: Tensor) -> Tensor:
        rows = torch.einsum("rc,nc->rn", x.flatten(0, 1) * m.a, m.w.tanh())
        return torch.einsum("cn,btn->btc", m.v, rows.unflatten(0, x.shape[:2]))

    check(scramble(Bare(forward, {"D": 3}, a="D", w="5D", v="25")), (torch.randn(3, 4, 3),))


@pytest.mark.parametrize("equation", ["btc,cn->btn", "btc,nc->bnt"])
@pytest.mark.parametrize("empty", "tcn")
def test_nothing_to_sum(equation, empty, monkeypatch):
    monkeypatch.setitem(SIZES, empty, 0)
    weight = equation[4:6]
    check(Summed(equation, weight, False), (torch.randn([SIZES[letter] for letter in "btc"]),))


def test_under_autocast_it_reads_what_the_operator_reads():
    model = Summed("btc,cn->btn", "cn", False)
    x = torch.randn(3, 2, 3)
    with perex.attach(model, params=["weight"], loss_reduction="sum") as px, torch.autocast("cpu", torch.bfloat16):
        px.backward(model(x).float().sum((1, 2)))
    expected = x.bfloat16().float().sum(1).norm(dim=1) * SIZES["n"] ** 0.5
    torch.testing.assert_close(px.norms(), expected, rtol=1e-5, atol=0)
