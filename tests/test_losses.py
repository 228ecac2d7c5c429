"""Losses, one an example, of outputs that are complex, that went into the model again, or that nobody has."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perex

B, D, V = 4, 5, 7


class Spectrum(nn.Module):
    """A complex output; or that and a real one."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.a, self.b, self.both = nn.Linear(D, 8), nn.Linear(D, 3), both

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        spectrum = torch.fft.rfft(self.a(x).tanh())
        return (spectrum, self.b(x)) if self.both else spectrum


def magnitudes(out: Tensor | tuple[Tensor, Tensor], index: Tensor) -> Tensor:
    spectrum, real = out if isinstance(out, tuple) else (out, None)
    losses = spectrum.abs().square().sum(1) + spectrum.imag.sin().sum(1)
    return losses if real is None else losses + real.cos().sum(1)


@pytest.mark.parametrize("both", [False, True])
def test_of_complex_outputs(both):
    oracle.check(oracle.scramble(Spectrum(both)), (torch.randn(B, D),), magnitudes)


def test_of_complex_outputs_that_mix():
    model = oracle.scramble(Spectrum(False)).double()
    with perex.attach(model) as px, pytest.raises(perex.PerexError, match="loss"):
        out = model(torch.randn(B, D).double())
        px.backward((out - out.mean(0)).abs().square().sum(1))


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("param_grads", [True, False])
def test_of_an_output_that_went_into_the_model_again(steps, param_grads):
    """Unrolled in time by the user, as a simulator or a sampler is: one example's losses are of all its forwards."""
    model = oracle.scramble(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))).double()
    x = torch.randn(B, D).double()

    def losses(x: Tensor) -> Tensor:
        total = torch.zeros(len(x), dtype=x.dtype)
        for _ in range(steps):
            x = model(x)
            total = total + x.sin().sum(1)
        return total

    expected = []
    for i in range(B):
        model.zero_grad()
        losses(x[i : i + 1]).sum().backward()
        expected.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
    with perex.attach(model, param_grads=param_grads) as px:
        for _ in range(2):
            px.backward(losses(x))
            assert torch.allclose(px.norms(), torch.stack(expected), rtol=1e-9)


class Tied(nn.Module):
    """One table, embedded from, multiplied by, and summed in bags."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D)
        self.bag = nn.EmbeddingBag(V, D, mode="sum")
        self.bag.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.table(ids).mean(1) + self.bag(ids), self.table.weight)


@pytest.mark.parametrize("param_grads", [True, False])
@pytest.mark.parametrize("memory", ["auto", "low"])
def test_of_nobody(param_grads, memory):
    """An empty batch has no norms, and clips to zero; the batch after it is as all others are."""
    model = oracle.scramble(Tied()).double()
    index = torch.arange(B)
    ids = torch.randint(V, (B, 3))
    squares = oracle.check(model, (ids,), lambda out, index: F.cross_entropy(out, index % V, reduction="none"))
    with perex.attach(model, param_grads=param_grads, memory=memory) as px:
        for batch in (ids, ids[:0], ids):
            model.zero_grad()
            px.backward(F.cross_entropy(model(batch), index[: len(batch)] % V, reduction="none"))
            assert px.norms().shape == (len(batch),)
            px.clip_(0.1)
            assert len(batch) or not model.table.weight.grad.any()
    assert torch.allclose(px.norms(), sum(squares.values()).sqrt())
