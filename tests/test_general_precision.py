"""Numbers that are hard to hold: half precision, overflow, and losses that are no numbers."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import Loss, loop, projection, sliced
from torch import Tensor, nn

import perex

B, D = 3, 4
every_way = pytest.mark.parametrize("param_grads", [True, False])


def batch(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def reference(model: nn.Module, x: Tensor, loss: Loss | None = None) -> dict[str, Tensor]:
    """Squared norms by parameter, from the loop, on a model to which nothing is attached."""
    grads = loop(lambda: model, (x,), loss or projection(), batch_size=len(x), example=sliced())
    model.zero_grad()
    return {n: torch.stack([g.square().sum() for g in rows]) for n, rows in grads.items()}


def losses(out: Tensor) -> Tensor:
    return projection()(out, torch.arange(len(out)))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@every_way
def test_one_bad_loss_affects_its_own_norm_only(bad, param_grads):
    models = {
        "linear": (nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 2)), batch(B, D)),
        "sequence": (nn.Sequential(nn.Linear(D, 5), nn.LayerNorm(5), nn.Linear(5, 2)), batch(B, 4, D)),
        "image": (nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.ReLU()), batch(B, 1, 4, 4)),
        "ids": (nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), torch.arange(12).view(3, 4) % 5),
        "bags": (nn.EmbeddingBag(5, 3), torch.arange(12).view(3, 4) % 5),
        "bare": (Scale(), batch(B, 3)),
    }
    factor = torch.tensor([1.0, bad, 1.0], dtype=torch.float64)
    for name, (model, x) in models.items():
        expected = sum(reference(model.double(), x).values()).sqrt()
        for call in ("loss", "losses"):
            with perex.attach(model, param_grads=param_grads) as px:
                each = losses(model(x)) * factor
                each.mean().backward() if call == "loss" else px.backward(each)
                found = px.norms()
            assert not found[1].isfinite(), f"{name}: {found}"
            torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-9, atol=0, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_way
def test_half_precision_is_accumulated_in_single(dtype, param_grads):
    """Sums that a half-precision number cannot hold: 1001 positions, 1000 features."""
    model = nn.Linear(1000, 1).to(dtype)
    x = torch.ones(2, 1001, 1000, dtype=dtype)
    x[1] = 2
    with perex.attach(model, loss_reduction="sum", param_grads=param_grads) as px:
        (model(x).float()).sum((1, 2)).sum().backward()
        by = px.norms(by="parameter")
    assert by["weight"].dtype == torch.float32
    torch.testing.assert_close(by["weight"], torch.tensor([1, 2]) * 1001 * 1000**0.5, rtol=1e-6, atol=0)
    torch.testing.assert_close(by["bias"], torch.tensor([1001.0, 1001.0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(px.norms(), (by["weight"].square() + by["bias"].square()).sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["conv", "embedding", "norm", "bare"])
def test_half_precision_of_other_layers(dtype, kind):
    """Against float64, on numbers that half precision holds exactly."""
    layers = {
        "conv": (nn.Conv1d(2, 3, 3, padding=1), torch.randint(-3, 4, (2, 2, 600))),
        "embedding": (nn.Embedding(2, 3), torch.randint(2, (2, 3000))),
        "norm": (nn.PReLU(), -torch.ones(2, 3, 1001)),
        "bare": (Scale(), torch.ones(2, 3001, 3)),
    }
    layer, x = layers[kind]
    expected = reference(
        layer.double(),
        x.double() if kind != "embedding" else x,
        loss=lambda out, index: out.flatten(1).sum(1),
    )
    layer = layer.to(dtype)
    with perex.attach(layer, loss_reduction="sum") as px:
        layer(x if kind == "embedding" else x.to(dtype)).float().sum().backward()
        found = px.norms()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), sum(expected.values()).sqrt(), rtol=1e-5, atol=0)


@every_way
def test_overflow_in_float16_is_inf_for_that_example(param_grads):
    model = nn.Linear(3, 2).to(torch.float16)
    x = torch.ones(3, 3, dtype=torch.float16)
    x[1, 1] = 0  # an infinite gradient times a zero is no number; the norm is infinite all the same
    scale = torch.tensor([1.0, 1e6, 2.0])
    with perex.attach(model, loss_reduction="sum", param_grads=param_grads) as px:
        (model(x).sum(1).float() * scale).sum().backward()
        found = px.norms()
    assert not found[1].isfinite() and not found[1] < math.inf, found
    torch.testing.assert_close(found[[0, 2]], torch.tensor([1.0, 2.0]) * 8**0.5, rtol=1e-3, atol=0)


def test_overflow_in_float16_without_a_zero():
    model = nn.Linear(3, 2).to(torch.float16)
    with perex.attach(model, loss_reduction="sum") as px:
        out = model(torch.ones(3, 3, dtype=torch.float16))
        (out.sum(1).float() * torch.tensor([1.0, 1e6, 2.0])).sum().backward()
        assert px.norms()[1] == math.inf


def test_large_and_small_float32():
    """Squares that leave the range of float32 are no reason for a wrong norm, nor for a finite one."""
    model = nn.Linear(3, 2)
    with perex.attach(model, loss_reduction="sum") as px:
        (model(torch.ones(2, 3)).sum(1) * torch.tensor([1.0, 1e-15])).sum().backward()
        torch.testing.assert_close(px.norms(), torch.tensor([1.0, 1e-15]) * 8**0.5, rtol=1e-5, atol=0)
