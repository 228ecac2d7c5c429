"""What attacks on clipping, empty batches and looking in between have found."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import Tensor, nn

import perex


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.recurrent, self.head = getattr(nn, kind)(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


EMPTY = {
    **{kind: (lambda kind=kind: Recurrent(kind), torch.randn(0, 5, 3)) for kind in ("LSTM", "GRU", "RNN")},
    "a token each": (lambda: nn.Embedding(5, 4), torch.zeros(0).long()),
    "tokens": (lambda: nn.Embedding(5, 4), torch.zeros(0, 3).long()),
    "tables of tokens": (lambda: nn.Embedding(5, 4), torch.zeros(0, 3, 2).long()),
    "images": (lambda: nn.Conv2d(1, 2, 3), torch.randn(0, 1, 5, 5)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), torch.randn(0, 3, 4)),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("param_grads", [False, True])
def test_an_empty_batch_has_a_clipped_sum_of_zero(name, param_grads):
    make, x = EMPTY[name]
    model = make()
    with perex.attach(model, param_grads=param_grads) as px:
        px.backward(model(x).flatten(1).sum(1))
        assert px.clip_(1.0).shape == (0,)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("bound", [math.inf, 1e300, 1e39])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_bound_that_nothing_reaches(bound, dtype):
    model, x = nn.Linear(3, 1, bias=False).to(dtype), torch.tensor([[0.0, 3, 4], [0, 0, 0]], dtype=dtype)
    with perex.attach(model, param_grads=False) as px:
        px.backward(model(x).squeeze(1))
        px.clip_(bound)
    assert model.weight.grad.tolist() == [[0, 3, 4]]


@pytest.mark.parametrize("param_grads", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("when", ["before the forward", "after the backward"])
def test_zero_grad_begins_anew_wherever_it_stands(param_grads, set_to_none, when):
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1, bias=False), torch.randn(4, 3)
    expected = (x / x.norm(dim=1, keepdim=True).clamp(min=0.5) * 0.5).sum(0, keepdim=True)
    with perex.attach(model, param_grads=param_grads, memory="high") as px:
        for _ in range(3):
            if when == "before the forward":
                model.zero_grad(set_to_none)
            px.backward(model(x).squeeze(1))
            if when == "after the backward":
                model.zero_grad(set_to_none)
            px.clip_(0.5)
            torch.testing.assert_close(model.weight.grad, expected)


def test_without_zero_grad_clipped_sums_add_up():
    model, x = nn.Linear(3, 1, bias=False), torch.eye(3)
    for param_grads in (False, True):
        model.zero_grad()
        with perex.attach(model, param_grads=param_grads, memory="high") as px:
            for count in (1, 2, 3):
                px.backward(model(x).squeeze(1))
                px.clip_(0.5)
                torch.testing.assert_close(model.weight.grad, torch.full((1, 3), 0.5 * count))


def test_a_forward_without_gradients_in_between_does_not_matter():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with perex.attach(model, param_grads=False) as px:
        losses = model(x).sum(1)
        with torch.no_grad():
            model(torch.randn(7, 3))
        px.backward(losses)
        torch.testing.assert_close(px.norms(), (2 * (x.square().sum(1) + 1)).sqrt())
        with torch.no_grad():
            losses = model(x).sum(1)
        with pytest.raises(perex.NotReadyError, match="no_grad"):
            px.backward(losses)


@pytest.mark.parametrize("param_grads", [False, True])
@pytest.mark.parametrize("detach", [False, True])
def test_a_model_is_freed_with_its_tracker(param_grads, detach):
    def dropped() -> list[weakref.ref[nn.Module]]:
        model = nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 2))
        px = perex.attach(model, param_grads=param_grads)
        for _ in range(3):
            px.backward(model(torch.zeros(4, 2).long()).sum((1, 2)))
            px.norms()
        if detach:
            px.detach()
        return [weakref.ref(model), *map(weakref.ref, model.parameters())]

    refs = dropped()
    gc.collect()
    assert not [ref for ref in refs if ref() is not None]


def test_a_tensor_changed_in_place_before_the_backward_is_torch_s_to_report():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)
    kept: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, out: kept.append(out))
    with perex.attach(model) as px:
        losses = model(x).sum(1)
        with torch.no_grad():
            kept[0].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            px.backward(losses)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("call", ["loss", "losses"])
def test_a_hook_that_changes_gradients_which_are_no_numbers(value, call):
    """An example without a number spoils its own norm only."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    weights = torch.tensor([1.0, value, 1.0, 1.0], dtype=torch.float64)
    model[0].register_forward_hook(lambda m, args, out: out.register_hook(lambda grad: 0.5 * grad) and None)
    with perex.attach(model, loss_reduction="sum") as px:
        losses = model(x).sum(1) * weights
        losses.sum().backward() if call == "loss" else px.backward(losses)
    found = px.norms()
    expected = []
    for b in (0, 2, 3):
        grads = torch.autograd.grad(model(x[b : b + 1]).sum(), list(model.parameters()))
        expected.append(sum(g.square().sum() for g in grads).sqrt())
    torch.testing.assert_close(found[[0, 2, 3]], torch.stack(expected))
    assert not found[1].isfinite()


@pytest.mark.parametrize("model", [nn.Linear(12, 3), nn.Sequential(nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 2, 2))])
@pytest.mark.parametrize("to", ["input", "parameters"])
def test_several_backwards_at_once(model, to):
    """They give what torch gives, and norms are refused; the next step is as any."""
    model = model.double()
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    with perex.attach(model, loss_reduction="sum") as px:
        for _ in range(3):
            out, wanted = model(x), [x] if to == "input" else list(model.parameters())
            several = torch.randn(5, *out.shape, dtype=torch.float64)
            found = torch.autograd.grad(out, wanted, several, is_grads_batched=True)
            with pytest.raises(perex.UnsupportedError, match=r"several gradients at once.*is_grads_batched"):
                px.norms()
            model(x).square().flatten(1).sum().backward()
            assert px.norms().isfinite().all()
    out = model(x)
    for number, one in enumerate(several):
        expected = torch.autograd.grad(out, wanted, one, retain_graph=True)
        torch.testing.assert_close([grad[number] for grad in found], list(expected))
