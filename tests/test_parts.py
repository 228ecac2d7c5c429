"""Parts of a model that are called one after the other, with what one of them has kept for the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import no_trace, scramble
from torch import Tensor, nn
from torch.nn import functional as F

import perex

B, D = 4, 4


class Parts(nn.Module):
    """An encoder and a decoder that share a place to keep tensors in; the user calls both."""

    def __init__(self, decode: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder(decode)
        self.decoder.kept = self.encoder.kept


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.kept = nn.Linear(3, D), dict[str, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        h = self.l(x)
        self.kept.update(h=h.detach(), mean=h.detach().mean(0), n=(x[:, 0] > 0).sum(), x=x, graph=h.sin())
        self.kept.update(mask=x[:, :1] > 0, weight=F.normalize(self.l.weight, dim=1))
        return h


class Decoder(nn.Module):
    def __init__(self, decode: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.l, self.w, self.decode = nn.Linear(D, D), nn.Parameter(torch.empty(D)), decode
        self.kept: dict[str, Tensor] = {}

    def forward(self, h: Tensor) -> Tensor:
        return self.decode(self, h)


def run(model: Parts, x: Tensor) -> Tensor:
    return model.decoder(model.encoder(x)).sin().sum(1)


def loop(model: Parts, x: Tensor) -> Tensor:
    each, inputs = list(model.parameters()), x.split(1)
    rows = [torch.autograd.grad(run(model, one).sum(), each, materialize_grads=True) for one in inputs]
    return torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in rows])


CLEAN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "nothing kept": lambda m, h: m.l(h),
    "features": lambda m, h: m.l(h) * m.kept["h"] * m.w,
    "features with their graph": lambda m, h: m.l(h) * m.kept["graph"],
    "inputs": lambda m, h: m.l(h) - m.kept["x"].sum(1, keepdim=True),
    "a mask": lambda m, h: torch.where(m.kept["mask"], m.l(h), m.w),
    "dropout of its own": lambda m, h: F.dropout(m.l(h), 0.0),
}
MIXED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a mean": lambda m, h: m.l(h) - m.kept["mean"] * m.w,
    "a mean of features": lambda m, h: m.l(h) - m.kept["h"].mean(0),
    "a count": lambda m, h: m.l(h) / (1 + m.kept["n"]),
    "other examples' inputs": lambda m, h: m.l(h) - m.kept["x"].flip(0).sum(1, keepdim=True),
    "other examples' features": lambda m, h: m.l(h) + m.kept["graph"].roll(1, 0),
}


@pytest.mark.parametrize("call", ["loss", "losses"])
@pytest.mark.parametrize("name", CLEAN)
def test_what_is_kept_is_known_in_the_next_part(name, call):
    model, x = scramble(Parts(CLEAN[name])).double(), torch.randn(3, B, 3).double()
    expected = [loop(model, each) for each in x]
    with no_trace(model), perex.attach(model, param_grads=False) as px:
        for each, norms in zip(x, expected, strict=True):
            losses = run(model, each)
            px.backward(losses) if call == "losses" else losses.mean().backward()
            assert torch.allclose(px.norms(), norms, rtol=1e-9)


@pytest.mark.parametrize("call", ["loss", "losses"])
@pytest.mark.parametrize("name", MIXED)
def test_examples_that_mix_by_way_of_it_are_refused(name, call):
    model = scramble(Parts(MIXED[name])).double()
    with perex.attach(model) as px:
        for _ in range(2):
            with pytest.raises(perex.PerexError):
                losses = run(model, torch.randn(B, 3).double())
                px.backward(losses) if call == "losses" else losses.mean().backward()
                px.norms()


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_each_part_is_run_alone(part):
    """Where the size of the batch decides, nothing but that can tell."""
    model = Parts(lambda m, h: m.l(h) / (len(h) if part == "decoder" else 1))
    if part == "encoder":
        forward = model.encoder.forward
        model.encoder.forward = lambda x: forward(x) / len(x)
    with perex.attach(scramble(model)) as px, pytest.raises(perex.ExamplesMixError, match="alone"):
        px.backward(run(model, torch.randn(B, 3)))


def test_what_is_kept_and_changed_between_calls():
    """What was written there, nobody saw."""
    model = scramble(Parts(lambda m, h: m.l(h) * m.kept["h"])).double()
    with perex.attach(model) as px, pytest.raises(perex.PerexError, match="changed between"):
        h = model.encoder(torch.randn(B, 3).double())
        model.encoder.kept["h"].copy_(model.encoder.kept["h"].flip(0))
        px.backward(model.decoder(h).sin().sum(1))
        px.norms()


def test_what_derives_from_parameters_and_is_kept_is_exact_or_refused():
    model, x = scramble(Parts(lambda m, h: m.l(h) * m.kept["weight"].sum(1))).double(), torch.randn(B, 3).double()
    expected = loop(model, x)
    with perex.attach(model) as px:
        try:
            px.backward(run(model, x))
        except perex.PerexError as error:
            assert "requires grad" in str(error)
        else:
            assert torch.allclose(px.norms(), expected)
