"""Batch norm with running statistics, run by perex where no weight has a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import scramble
from torch import Tensor, nn
from torch.nn import functional as F

import perex
from perex.rules import rescaling

B, STEPS = 4, 4


@pytest.fixture
def taken(monkeypatch):
    """However small inputs are; what came out."""
    found: list[Tensor] = []
    run = rescaling.Rescaling.run

    def noted(self: Any, given: Any) -> Tensor | None:
        out = run(self, given)
        found.extend([] if out is None else [out.detach()])
        return out

    monkeypatch.setattr(rescaling, "WORTH_A_FUNCTION", 1)
    monkeypatch.setattr(rescaling.Rescaling, "run", noted)
    return found


def net(norm: nn.Module | None = None) -> nn.Module:
    layers = nn.Sequential(
        nn.Conv2d(2, 3, 3), norm or nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 2), nn.BatchNorm2d(3),
        nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5),
    )  # fmt: skip
    model = scramble(layers.double()).eval()
    for layer in model:
        if getattr(layer, "running_var", None) is not None:
            layer.running_mean.normal_(generator=torch.Generator().manual_seed(1))
            layer.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
    return model


def images() -> Tensor:
    return torch.randn(B, 2, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), torch.arange(len(x)) % 5, reduction="none")


def alone(model: nn.Module, x: Tensor, names: list[str] | None = None) -> Tensor:
    """Norms of the gradients of each example, one after the other."""
    found = []
    for b in range(len(x)):
        wanted = [p for name, p in model.named_parameters() if p.requires_grad and (names is None or name in names)]
        loss = F.cross_entropy(model(x[b : b + 1]), torch.tensor([b % 5]))
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted)]).norm())
    return torch.stack(found)


@pytest.mark.parametrize("call", ["loss", "losses"])
@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, eps=0.1)], ids=str)
def test_as_the_loop(norm, call, taken):
    model, x = net(norm), images()
    expected = alone(model, x)
    with perex.attach(model, param_grads=False) as px:
        for _ in range(STEPS):
            values = losses(model, x)
            values.mean().backward() if call == "loss" else px.backward(values)
            torch.testing.assert_close(px.norms(), expected)
    assert taken
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_outputs_are_torchs_to_the_bit(layout, taken):
    model, x = net(), images().contiguous(memory_format=layout)
    model[2].inplace = False
    expected = model[:2](x)
    with perex.attach(model, param_grads=False) as px:
        for _ in range(STEPS):
            px.backward(losses(model, x))
    assert taken and torch.equal(taken[0], expected) and taken[0].stride() == expected.stride()


def test_frozen_and_untracked_ones(taken):
    model, x = net(), images()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(("0.", "6.")))
    expected = alone(model, x)
    with perex.attach(model, param_grads=False) as px:
        for _ in range(STEPS):
            px.backward(losses(model, x))
            torch.testing.assert_close(px.norms(), expected)


def test_where_parameters_get_gradients_it_is_torchs(taken):
    model, x = net(), images()
    with perex.attach(model) as px:
        for _ in range(STEPS):
            model.zero_grad()
            losses(model, x).mean().backward()
        px.norms()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    losses(model, x).mean().backward()
    assert all(torch.equal(p.grad, found[name]) for name, p in model.named_parameters())
    assert not taken


def test_those_that_are_not_tracked(taken):
    model, x = net(), images()
    names = ["0.weight", "0.bias", "6.weight", "6.bias"]
    expected = alone(model, x, names)
    with perex.attach(model, params=names, param_grads=False) as px:
        for _ in range(STEPS):
            px.backward(losses(model, x))
            torch.testing.assert_close(px.norms(), expected)
    assert all(p.grad is None for p in model.parameters())


def test_with_statistics_of_the_batch_it_is_refused_as_ever(taken):
    model, x = net(), images()
    with perex.attach(model, param_grads=False) as px:
        for _ in range(STEPS):
            px.backward(losses(model, x))
        taken.clear()
        model.train()
        with pytest.raises(perex.PerexError):
            px.backward(losses(model, x))
            px.norms()
    assert not taken


def test_gradients_of_the_input_and_theirs(taken):
    model, x = net(), images().requires_grad_()
    (expected,) = torch.autograd.grad(losses(model, x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(expected.square().sum(), x)
    with perex.attach(model, param_grads=False, loss_reduction="sum") as px:
        for _ in range(STEPS):
            x.grad = None
            px.backward(losses(model, x))
            torch.testing.assert_close(x.grad, expected)
        assert taken
        (first,) = torch.autograd.grad(losses(model, x).sum(), x, create_graph=True)
        torch.testing.assert_close(torch.autograd.grad(first.square().sum(), x)[0], second)
        out = losses(model, x)
        several = torch.autograd.grad(out, x, torch.eye(B, dtype=out.dtype), is_grads_batched=True)[0]
        torch.testing.assert_close(several.sum(0), expected)


def test_statistics_that_change_before_the_backward(taken):
    model, x = net(), images()
    with perex.attach(model, param_grads=False) as px:
        for _ in range(STEPS):
            px.backward(losses(model, x))
        expected, found = px.norms().clone(), losses(model, x)
        kept = model[4].running_var.clone()
        model[4].running_var.mul_(4)
        with pytest.raises(RuntimeError):  # its tap has saved it
            px.backward(found)
        model[4].running_var.copy_(kept)
        px.backward(losses(model, x))
        torch.testing.assert_close(px.norms(), expected)
