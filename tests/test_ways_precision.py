"""Scaled losses and automatic mixed precision: norms are of the loss before scaling, `.grad` as the scaler wants it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from oracle import assert_identical, scramble
from torch import Tensor, nn
from torch.amp import GradScaler

import perex

B, T, D = 4, 3, 5
every_way = pytest.mark.parametrize("param_grads", [True, False])
every_call = pytest.mark.parametrize("call", ["loss", "losses"])
HALF = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)


class Net(nn.Module):
    """A weight used twice, a normalisation, an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 2)
        self.norm, self.act = nn.LayerNorm(D), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(self.first(x)))
        return self.last(self.twice(self.twice(h).tanh()))


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    return scramble(Net()).to(dtype)


def inputs(step: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(step)).to(dtype)


def losses_of(out: Tensor, first: int = 0) -> Tensor:
    out = out if out.dtype == torch.float64 else out.float()
    return out.sin().sum((1, 2)) * torch.arange(first + 1, first + 1 + len(out)).to(out.dtype)


def alone(model: nn.Module, x: Tensor) -> Tensor:
    """Norms from the loop, in float64, on a copy of the model."""
    model, x, found = copy.deepcopy(model).double(), x.double(), []
    for i in range(B):
        grads = torch.autograd.grad(losses_of(model(x[i : i + 1]), i).sum(), list(model.parameters()))
        found.append(torch.cat([g.flatten() for g in grads]).norm())
    return torch.stack(found)


def scaler_of(scale: float, **options: float) -> GradScaler:
    return GradScaler("cpu", init_scale=scale, **options)


def run(px: perex.Tracker | None, scaler: GradScaler, losses: Tensor, call: str) -> None:
    if px is not None and call == "losses":
        px.backward(losses)
    else:
        scaler.scale(losses.mean()).backward()


@every_way
@every_call
@pytest.mark.parametrize("scale", [1.0, 2.0**14, 3.7, 1e-3])
def test_norms_are_of_the_loss_before_scaling(scale, call, param_grads):
    """In float64, to rounding; `.grad` is that of the scaled loss, to the bit where scaling is exact."""
    model, scaler = net(), scaler_of(scale)
    run(None, scaler, losses_of(model(inputs())), "loss")
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with perex.attach(model, param_grads=param_grads, grad_scaler=scaler) as px:
        run(px, scaler, losses_of(model(inputs())), call)
        torch.testing.assert_close(px.norms(), alone(model, inputs()), rtol=1e-9, atol=0)
        by = px.squared_norms(by="module")
        torch.testing.assert_close(sum(by.values()).sqrt(), px.norms(), rtol=1e-9, atol=0)
    for name, p in model.named_parameters():
        if not param_grads:
            assert p.grad is None
        elif call == "loss" or math.log2(scale).is_integer():
            assert_identical(p.grad, expected[name], name)
        else:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-12, atol=1e-14)


@every_way
@every_call
@HALF
@pytest.mark.parametrize("autocast", [True, False])
def test_training_with_a_scaler(autocast, half, call, param_grads):
    """Several steps with a scale that grows: weights, scale and `.grad` as without perex; every step's norms right."""
    data = [inputs(step, torch.float32) for step in range(3)]

    def train(attached: bool) -> tuple[list[Tensor], list[Tensor], float]:
        model, scaler = net(torch.float32), scaler_of(2.0**8, growth_interval=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        px = perex.attach(model, param_grads=param_grads, grad_scaler=scaler) if attached else None
        seen = []
        for x in data:
            optimizer.zero_grad()
            with torch.autocast("cpu", half, enabled=autocast):
                out = model(x)
            run(px, scaler, losses_of(out), call)
            if px is not None:
                found = px.norms()
                tolerance = 1e-4 if not autocast else 0.15 if half == torch.bfloat16 else 0.02
                torch.testing.assert_close(found.double(), alone(model, x), rtol=tolerance, atol=0)
            seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            if param_grads:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                if px is not None:
                    assert torch.equal(px.norms(), found), "the scale of the backward counts, not the one after it"
        if px is not None:
            px.detach()
        return seen, [p.detach().clone() for p in model.parameters()], scaler.get_scale()

    grads, weights, scale = train(True)
    if not param_grads:
        assert not grads
        return
    plain_grads, plain_weights, plain_scale = train(False)
    assert scale == plain_scale == 2.0**9
    if not autocast and call == "loss":
        assert all(torch.equal(a, b) for a, b in zip(grads + weights, plain_grads + plain_weights, strict=True))
    # under autocast the weight that is used twice is converted twice, and its two gradients are added in float32
    tolerance = 1e-5 if not autocast else 0.1 if half == torch.bfloat16 else 0.01
    for a, b in zip(weights, plain_weights, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for a, b in zip(grads, plain_grads, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@every_way
@every_call
def test_overflow(call, param_grads):
    """A gradient that leaves float16 is an infinite norm of its example, the step is skipped, and then all is right."""
    model, scaler = nn.Linear(3, 2, bias=False), scaler_of(2.0**17)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, factor = torch.ones(3, 3), torch.tensor([2.0**-9, 1.0, 2.0**-12])
    scales = []
    with perex.attach(model, loss_reduction="sum", param_grads=param_grads, grad_scaler=scaler) as px:
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                losses = model(x).float().sum(1) * factor
            if call == "losses":
                px.backward(losses)
            else:
                scaler.scale(losses.sum()).backward()
            expected = factor * math.sqrt(6)
            over = not scaler.get_scale() < 2**16
            assert (px.norms()[1] == math.inf) == over
            torch.testing.assert_close(px.norms()[[0, 2]], expected[[0, 2]], rtol=1e-3, atol=0)
            scales.append(scaler.get_scale())
            if param_grads:
                scaler.step(optimizer)
                scaler.update()
            else:
                scaler.update(scaler.get_scale() / 2)
        torch.testing.assert_close(px.norms(), expected, rtol=1e-3, atol=0)
    assert scales[:3] == [2.0**17, 2.0**16, 2.0**15]


@every_way
def test_a_gradient_that_is_not_a_number(param_grads):
    model, scaler = net(), scaler_of(1024.0)
    with perex.attach(model, param_grads=param_grads, grad_scaler=scaler) as px:
        px.backward(losses_of(model(inputs())) * torch.tensor([1.0, math.nan, 1.0, 1.0]))
        assert px.norms()[1].isnan()
        torch.testing.assert_close(px.norms()[[0, 2, 3]], alone(model, inputs())[[0, 2, 3]], rtol=1e-9, atol=0)


@every_way
def test_several_backwards_with_scales_of_their_own(param_grads):
    """Gradient accumulation: the scale is that of each backward."""
    model, scaler = net(), scaler_of(4.0)
    with perex.attach(model, param_grads=param_grads, grad_scaler=scaler) as px:
        for step in range(3):
            scaler.scale(losses_of(model(inputs(step))).mean()).backward()
            scaler.update(4.0 ** (step + 2))
            torch.testing.assert_close(px.norms(), alone(model, inputs(step)), rtol=1e-9, atol=0)


def test_a_scaler_that_is_switched_off():
    model, scaler = net(), GradScaler("cpu", enabled=False)
    with perex.attach(model, grad_scaler=scaler) as px:
        scaler.scale(losses_of(model(inputs())).mean()).backward()
        torch.testing.assert_close(px.norms(), alone(model, inputs()), rtol=1e-9, atol=0)


def test_losses_that_mix_are_refused_with_a_scaler_too():
    model = net()
    with perex.attach(model, grad_scaler=scaler_of(64.0)) as px:
        out = model(inputs())
        with pytest.raises(perex.ExamplesMixError):
            px.backward(losses_of(out - out.mean(0)))


def test_without_being_told_norms_are_of_the_scaled_loss():
    """perex cannot see what a loss was multiplied by."""
    model, scaler = net(), scaler_of(64.0)
    with perex.attach(model) as px:
        scaler.scale(losses_of(model(inputs())).mean()).backward()
        torch.testing.assert_close(px.norms() / scaler.get_scale(), alone(model, inputs()), rtol=1e-9, atol=0)


@pytest.mark.parametrize("wrong", [2.0, "scaler", True])
def test_what_is_no_scaler(wrong):
    with pytest.raises(perex.AttachError, match="grad_scaler"):
        perex.attach(net(), grad_scaler=wrong)


# Layers that nobody asks for are coarser


class Adapted(nn.Module):
    """A frozen layer in half precision, and adapters."""

    def __init__(self, half: torch.dtype) -> None:
        super().__init__()
        self.base = nn.Linear(32, 32).to(half).requires_grad_(False)
        self.a, self.b = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x.to(self.base.weight.dtype)).float() + self.b(self.a(x))


class Read(nn.Module):
    """A frozen recurrence in half precision, read by a head."""

    def __init__(self, half: torch.dtype) -> None:
        super().__init__()
        self.half, self.body = half, nn.LSTM(32, 32, batch_first=True).to(half).requires_grad_(False)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.to(self.half))[0].float())


@HALF
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["adapters", "recurrence"])
def test_frozen_layers_in_half_precision(kind, seed, half):
    """Examples do not mix there, however the rounding of one alone differs; in the second step of new losses, too."""
    torch.manual_seed(seed)
    layers = [Adapted(half), nn.GELU(), Adapted(half), nn.GELU(), Adapted(half)]
    model, x = nn.Sequential(*layers) if kind == "adapters" else Read(half), torch.randn(6, 200, 32)
    with perex.attach(model, param_grads=False) as px:
        for each in (lambda out: out.mean(1).square().sum(1), lambda out: out.mean((1, 2)).exp()):
            px.backward(each(model(x)))
            assert bool(px.norms().isfinite().all())


@pytest.mark.parametrize("count", [3, 7, 100])
def test_losses_in_half_precision_are_weighted_alike(count):
    """The weight 1/B is rounded, and norms are not to be off by that."""
    model, x = nn.Linear(D, 1), torch.randn(count, D)
    with perex.attach(model) as px:
        px.backward(model(x).squeeze(1).to(torch.bfloat16))
        expected = (1 + x.square().sum(1)).sqrt()
        assert torch.allclose(px.norms(), expected, rtol=1e-6)
