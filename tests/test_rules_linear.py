"""Linear on input of any rank, Bilinear, and the Conv1D of Hugging Face."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import PLACES, check, grid, place, quiet
from torch import nn
from transformers.pytorch_utils import Conv1D

small = st.integers(0, 4)
middles = st.lists(st.integers(0, 3), max_size=3)


@grid(60)
@given(
    batch=st.integers(1, 3),
    middle=middles,
    features=st.tuples(small, small),
    bias=st.booleans(),
    where=st.sampled_from(PLACES),
)
def test_linear(batch, middle, features, bias, where):
    layer = quiet(nn.Linear, *features, bias=bias)
    check(*place(layer, where, torch.randn(batch, *middle, features[0])))


@grid(20)
@given(sizes=st.lists(st.integers(1, 3), min_size=2, max_size=4), data=st.data(), where=st.sampled_from(PLACES))
def test_linear_with_the_batch_on_any_axis(sizes, data, where):
    batch_dim = data.draw(st.integers(0, len(sizes) - 1))
    check(*place(nn.Linear(3, 2), where, torch.randn(*sizes, 3)), batch_dim=batch_dim)


@grid(20)
@given(
    batch=st.integers(1, 3),
    positions=st.integers(1, 40),
    features=st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
def test_linear_over_short_and_long_sequences(batch, positions, features):
    check(*place(nn.Linear(*features), "later", torch.randn(batch, positions, features[0])))


@pytest.mark.parametrize(
    "transform",
    [
        lambda x: x.transpose(1, 2),
        lambda x: x[:, ::2],
        lambda x: x[:, :1].expand(-1, 4, -1),
        lambda x: x.flip(1),
    ],
)
def test_linear_on_strided_input(transform):
    check(*place(nn.Linear(4, 5), "first", transform(torch.randn(3, 4, 4))))


@grid(40)
@given(
    batch=st.integers(1, 3),
    middle=middles,
    features=st.tuples(*[st.integers(1, 3)] * 3),
    bias=st.booleans(),
    where=st.sampled_from(PLACES),
)
def test_bilinear(batch, middle, features, bias, where):
    layer = nn.Bilinear(*features, bias=bias)
    inputs = (torch.randn(batch, *middle, n) for n in features[:2])
    check(*place(layer, where, *inputs))


@grid(40)
@given(
    batch=st.integers(1, 3),
    middle=middles,
    nf=st.integers(1, 4),
    nx=st.integers(1, 4),
    where=st.sampled_from(PLACES),
)
def test_conv1d_of_hugging_face(batch, middle, nf, nx, where):
    check(*place(Conv1D(nf, nx), where, torch.randn(batch, *middle, nx)))


class NoBias(nn.Linear):
    """Inherits `forward`: still a Linear."""


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("layer", [nn.Linear(3, 2), NoBias(3, 2), Conv1D(2, 3), nn.Bilinear(3, 3, 2)], ids=repr)
def test_one_of_two_parameters_frozen(layer, frozen):
    getattr(layer, frozen).requires_grad_(False)
    x = torch.randn(3, 3, 3)
    check(*place(layer, "later", *([x, x.flip(0)] if isinstance(layer, nn.Bilinear) else [x])))
