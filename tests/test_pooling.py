"""Max pooling with channels last: torch's numbers and gradients to the bit, alone and in models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import grid
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import perex
from perex.capture import substitutes
from perex.kernels import blocks, pooling

B, C, SIDE = 4, 3, 10


@pytest.fixture
def small(monkeypatch):
    """However small the images are."""
    monkeypatch.setattr(pooling, "WORTH_REORDERING", 1)


@pytest.fixture
def taken(small, monkeypatch):
    """What was pooled, in place of torch's operator."""
    found: list[Tensor] = []

    def noted(*args: Any, **kwargs: Any) -> Tensor | None:
        out = pooling.max_pool2d(*args, **kwargs)
        found.extend([] if out is None else [out.detach()])
        return out

    for func in (F.max_pool2d, torch.max_pool2d):
        monkeypatch.setitem(substitutes.ALIKE_TO_THE_BIT, func, noted)
    return found


def equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and bool(((one == other) | (one.isnan() & other.isnan())).all())


sizes = st.one_of(st.integers(1, 4), st.tuples(st.integers(1, 4), st.integers(1, 4)), st.tuples(st.integers(1, 4)))


@grid(150)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(4, 12), st.integers(4, 12)),
    kernel=sizes,
    stride=st.one_of(st.none(), st.just([]), sizes),
    padding=st.one_of(st.integers(0, 1), st.tuples(st.integers(0, 1), st.integers(0, 1))),
    dilation=st.one_of(st.integers(1, 2), st.tuples(st.integers(1, 2), st.integers(1, 2))),
    ceil=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    numbers=st.sampled_from(["any", "ties", "none"]),
)
def drawn(shape, kernel, stride, padding, dilation, ceil, dtype, numbers) -> None:
    x = torch.randn(shape).to(dtype)
    if numbers == "ties":
        x = x.round().clamp(0)
    elif numbers == "none":
        x = torch.where(torch.rand(shape) < 0.2, torch.tensor([torch.nan, torch.inf, -torch.inf])[len(x) % 3], x)
    one, other = (x.to(dtype).clone().requires_grad_() for _ in range(2))
    options = (kernel, stride, padding, dilation, ceil)
    try:
        expected = F.max_pool2d(other, *options)
    except RuntimeError:
        assume(False)
    found = pooling.max_pool2d(one, *options)
    assert found is not None and found.is_contiguous() and equal(found, expected)
    weights = torch.randn(expected.shape).to(dtype)
    for out, leaf in ((found, one), (expected, other)):
        (slope,) = torch.autograd.grad(out, leaf, weights.requires_grad_(), create_graph=True)
        leaf.grad = slope
    assert equal(one.grad, other.grad)
    again = [torch.autograd.grad(leaf.grad.sum(), weights, retain_graph=True)[0] for leaf in (one, other)]
    assert equal(*again)


@pytest.mark.parametrize("block", [1, 700, 2**20])
def test_to_the_bit(block, small, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", block)
    drawn()


def test_several_gradients_at_once(small):
    x, weights = torch.randn(B, C, 6, 6, requires_grad=True), torch.randn(5, B, C, 3, 3)
    found, expected = (
        torch.autograd.grad(out, x, weights, is_grads_batched=True)[0]
        for out in (pooling.max_pool2d(x, 2), F.max_pool2d(x, 2))
    )
    assert torch.equal(found, expected)


class Own(Tensor):
    """Somebody's kind of tensor."""


@pytest.mark.parametrize(
    "images",
    [
        torch.randn(B, C, 6, 6).to(memory_format=torch.channels_last),
        torch.randn(B, 6, 6, C).movedim(-1, 1)[:, :, 1:],
        torch.randn(C, 6, 6),
        torch.randn(0, C, 6, 6),
        torch.ones(B, C, 6, 6, dtype=torch.int64),
        torch.randn(B, C, 6, 6).as_subclass(Own),
        torch.randn(B, C, 6, 6, device="meta"),
    ],
    ids=["channels last", "a part", "one image", "none", "integers", "another kind", "no memory"],
)
def test_what_is_left_to_torch(images, small):
    assert pooling.max_pool2d(images, 2) is None


def test_small_images_and_indices_are_left_to_torch(monkeypatch):
    x = torch.randn(B, C, 6, 6)
    assert pooling.max_pool2d(x, 2) is None
    monkeypatch.setattr(pooling, "WORTH_REORDERING", x.numel())
    assert pooling.max_pool2d(x, 2) is not None and pooling.max_pool2d(x, 2, return_indices=True) is None


# In a model


class Net(nn.Module):
    """Pools by a module, a function in place of one, and torch's own, and writes over what was pooled."""

    def __init__(self, inner: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(C, 5, 3, padding=1), nn.Conv2d(5, 6, 3), nn.Linear(6, 2)
        self.pool, self.inner = nn.MaxPool2d(3, 2, padding=1), inner

    def body(self, x: Tensor) -> Tensor:
        h = self.pool(self.one(x).relu()).mul_(2)
        h = F.max_pool2d(self.two(h), 2, ceil_mode=True).relu_()
        return torch.max_pool2d(h, 2).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.body, x, use_reentrant=False) if self.inner else self.body(x)
        return self.head(h)


def losses(out: Tensor) -> Tensor:
    return out.sin().sum(1)


def twins(**options: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    model = Net(**options).double()
    return model, copy.deepcopy(model)


def alone(model: nn.Module, x: Tensor) -> Tensor:
    norms = []
    for b in range(len(x)):
        grads = torch.autograd.grad(losses(model(x[b : b + 1])).sum(), list(model.parameters()))
        norms.append(sum(g.square().sum() for g in grads).sqrt())
    return torch.stack(norms)


@pytest.mark.parametrize("param_grads", [True, False])
def test_from_the_second_step_on(param_grads, taken):
    model, plain = twins()
    with perex.attach(model, audit=False, loss_reduction="sum", param_grads=param_grads) as px:
        for step in range(4):
            x = torch.randn(B, C, SIDE, SIDE, dtype=torch.float64, requires_grad=step % 2 == 1)
            other = x.detach().clone().requires_grad_(x.requires_grad)
            taken.clear()
            for one, given in ((model, x), (plain, other)):
                one.zero_grad()
                losses(one(given)).sum().backward()
            assert len(taken) == (3 if step else 0)
            torch.testing.assert_close(px.norms(), alone(plain, x.detach()), rtol=1e-9, atol=0)
            if param_grads:
                pairs = zip(model.parameters(), plain.parameters(), strict=True)
                assert all(torch.equal(p.grad, q.grad) for p, q in pairs)
                assert not x.requires_grad or torch.equal(x.grad, other.grad)


def known(model: nn.Module, **options: Any) -> perex.Tracker:
    """Attached, and the model's calls known."""
    px = perex.attach(model, audit=False, loss_reduction="sum", **options)
    for _ in range(2):
        px.backward(losses(model(torch.randn(B, C, SIDE, SIDE, dtype=torch.float64))))
    return px


def test_checkpoints_save_what_torch_saves(taken):
    model, plain = twins(inner=True)
    with known(model) as px:
        taken.clear()
        x = torch.randn(B, C, SIDE, SIDE, dtype=torch.float64)
        px.backward(losses(model(x)))
        torch.testing.assert_close(px.norms(), alone(plain, x), rtol=1e-9, atol=0)
    assert not taken


def test_what_is_saved_elsewhere_is_left_to_torch(taken):
    model, plain = twins()
    with known(model) as px, torch.autograd.graph.save_on_cpu():
        taken.clear()
        x = torch.randn(B, C, SIDE, SIDE, dtype=torch.float64)
        px.backward(losses(model(x)))
        torch.testing.assert_close(px.norms(), alone(plain, x), rtol=1e-9, atol=0)
    assert not taken


def test_somebody_elses_mode_sees_the_operator(taken):
    seen: list[Any] = []

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    model, _ = twins()
    with known(model) as px:
        taken.clear()
        with Watching():
            px.backward(losses(model(torch.randn(B, C, SIDE, SIDE, dtype=torch.float64))))
    assert not taken and F.max_pool2d in seen and torch.max_pool2d in seen


def test_gradients_that_are_differentiated_again(taken):
    model, plain = twins()
    x = torch.randn(B, C, SIDE, SIDE, dtype=torch.float64, requires_grad=True)

    def second(one: nn.Module) -> Tensor:
        (slope,) = torch.autograd.grad(losses(one(x)).sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    with known(model):
        taken.clear()
        found = second(model)
        assert taken
    torch.testing.assert_close(found, second(plain), rtol=1e-9, atol=1e-12)


def test_a_loss_of_each_example_and_clipping(taken):
    model, plain = twins()
    x = torch.randn(B, C, SIDE, SIDE, dtype=torch.float64)
    norms = alone(plain, x)
    (losses(plain(x)) * (0.3 / norms).clamp(max=1)).sum().backward()
    for memory in ("high", "low"):
        with known(model, memory=memory) as px:
            model.zero_grad()
            px.backward(losses(model(x)))
            px.clip_(0.3)
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(B, 1, 6, 6), (B, 5, 1, 1), (B, 1, 1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_strides_are_those_of_torch(shape, layout, small):
    """Images of one channel, or one pixel, are contiguous in both orders, and torch goes by their strides."""
    x = torch.randn(shape).contiguous(memory_format=layout)
    x = torch.empty_strided(shape, torch.empty(shape).to(memory_format=layout).stride()).copy_(x)
    expected, found = F.max_pool2d(x, 1, 1), pooling.max_pool2d(x, 1, 1)
    assert found is None or torch.equal(found, expected) and found.stride() == expected.stride()


@pytest.mark.parametrize("size", [torch.tensor(2), (torch.tensor(2), 2), 2.0])
def test_sizes_that_are_no_integers_are_left_to_torch(size, small):
    x = torch.randn(B, C, SIDE, SIDE)
    assert pooling.max_pool2d(x, 2) is not None and pooling.max_pool2d(x, size) is None
