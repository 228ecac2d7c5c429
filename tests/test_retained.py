"""Tensors whose gradients the user has autograd keep: in the model, of its output, behind it."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import Tensor, nn

import perex
from perex.capture.retained import retained

B, D = 6, 8
x = torch.randn(B, D)
every_way = pytest.mark.parametrize("param_grads", [True, False])


class Net(nn.Module):
    """Has autograd keep the gradients of what is within."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.within = nn.Linear(D, D), nn.Linear(D, 4), None

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).sigmoid()
        h.retain_grad()
        self.within = h
        return self.b(h)


def forward(model: Net) -> tuple[Tensor, list[Tensor]]:
    """Losses, and three tensors that retain their gradients."""
    out = model(x)
    out.retain_grad()
    behind = out.log_softmax(1)
    behind.retain_grad()
    losses = behind.square().sum(1)
    return losses, [model.within, out, behind]


def expected() -> tuple[Net, list[Tensor]]:
    model = oracle.scramble(Net())
    losses, tensors = forward(model)
    losses.mean().backward()
    found = [tensor.grad for tensor in tensors]
    model.zero_grad()
    return model, found


def assert_kept(tensors: list[Tensor], grads: list[Tensor], times: int = 1) -> None:
    for tensor, grad in zip(tensors, grads, strict=True):
        assert torch.allclose(tensor.grad, times * grad)


@every_way
@pytest.mark.parametrize("memory", ["auto", "low", "high"])
def test_checks_leave_them_alone(memory, param_grads):
    """In the first, checked step and in those after it, whether a backward is of the losses or of their mean."""
    model, grads = expected()
    with perex.attach(model, param_grads=param_grads, memory=memory) as px:
        for own in (False, False, True, False):
            losses, tensors = forward(model)
            losses.mean().backward() if own else px.backward(losses)
            assert_kept(tensors, grads)


@every_way
def test_a_second_weighted_run_leaves_them_alone(param_grads):
    model, grads = expected()
    with perex.attach(model, param_grads=param_grads, memory="low") as px:
        for _ in range(2):
            losses, tensors = forward(model)
            px.backward(losses)
            px.clip_(1e-3)
            assert_kept(tensors, grads)


@pytest.mark.parametrize("audit", [True, False])
def test_a_second_run_where_they_retain_from_a_later_step_on(audit):
    model, grads = expected()
    with perex.attach(model, memory="low", audit=audit) as px:
        for step in range(3):
            losses, tensors = forward(model)
            px.backward(losses)
            px.clip_(1e-3)
            if step:
                assert_kept(tensors, grads)


def test_they_add_up_as_ever():
    """Where the user runs two backwards of one graph."""
    model, grads = expected()
    with perex.attach(model) as px:
        losses, tensors = forward(model)
        losses.mean().backward(retain_graph=True)
        assert_kept(tensors, grads)
        px.backward(losses)
        assert_kept(tensors, grads, times=2)


def test_they_are_found_wherever_they_are():
    losses, tensors = forward(oracle.scramble(Net()))
    assert {id(tensor) for tensor in tensors} <= {id(tensor) for tensor in retained()}
    assert losses.requires_grad


@pytest.mark.parametrize("memory", ["high", "low"])
def test_behind_the_output_from_a_later_step_on(memory):
    """Losses of a new kind are checked, and so is who retains gradients."""
    model = oracle.scramble(nn.Linear(D, 4))
    with perex.attach(model, memory=memory) as px:
        for step in range(3):
            y = model(x)
            z = y * 2 if step else y
            if step:
                z.retain_grad()
            px.backward(z.square().sum(1))
            if step:
                assert torch.allclose(z.grad, 2 * z.detach() / B)
