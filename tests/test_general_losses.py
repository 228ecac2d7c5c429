"""A loss that the model computes by itself, and returns already reduced over the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import Bare, no_trace, scramble
from torch import Tensor, nn

import perex

B, T, D, V = 3, 4, 5, 3
torch.manual_seed(0)
x, target, real = torch.randn(B, T, D).double(), torch.randint(V, (B, T)), torch.randn(B, T, V).double()
uneven = torch.tensor([[0, 1, -100, -100], [2, 1, 0, 2], [-100, 1, -100, 0]])
w = torch.tensor([1.0, 3.0, 0.5]).double()


def model(loss: Any) -> nn.Module:
    net = Bare(lambda m, *args: loss(m.b(m.a(args[0]).tanh()), *args[1:]))
    net.a, net.b = nn.Linear(D, D), nn.Linear(D, V)
    return scramble(net).double()


def compare(loss: Any, inputs: tuple[Tensor, ...], reduction: str, read: Any = lambda out: out) -> None:
    """The norms of a batch against the model's own loss on each example alone."""
    expected = []
    net = model(loss)
    for i in range(B):
        grads = torch.autograd.grad(read(net(*(t[i : i + 1] for t in inputs))), list(net.parameters()))
        expected.append(torch.stack([g.square().sum() for g in grads]).sum().sqrt())
    for param_grads in (True, False):
        with no_trace(net):
            with perex.attach(net, loss_reduction=reduction, param_grads=param_grads) as px:
                read(net(*inputs)).backward()
                torch.testing.assert_close(px.norms(), torch.stack(expected), rtol=1e-9, atol=1e-12)
            net.zero_grad()


def flat_ce(z: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(z.view(-1, V), y.view(-1), **options)


EXACT = {  # name: (loss, second input, reduction)
    "mean": (lambda z: z.square().mean(), None, "mean"),
    "sum": (lambda z: z.square().sum(), None, "sum"),
    "cross entropy": (flat_ce, target, "mean"),
    "cross entropy, summed": (lambda z, y: flat_ce(z, y, reduction="sum"), target, "sum"),
    "cross entropy, summed, some ignored": (lambda z, y: flat_ce(z, y, reduction="sum"), uneven, "sum"),
    "cross entropy over classes second": (lambda z, y: F.cross_entropy(z.mT, y), target, "mean"),
    "label smoothing": (lambda z, y: flat_ce(z, y, label_smoothing=0.1), target, "mean"),
    "shifted labels": (
        lambda z, y: F.cross_entropy(z[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1)), target, "mean"),
    "mean squared error": (lambda z, y: F.mse_loss(z, y), real, "mean"),
    "mean squared error by hand": (lambda z, y: ((z - y) ** 2).mean(), real, "mean"),
    "binary cross entropy": (lambda z, y: F.binary_cross_entropy_with_logits(z, y.sigmoid()), real, "mean"),
    "divergence, batch mean": (
        lambda z, y: F.kl_div(z.log_softmax(-1), y.softmax(-1), reduction="batchmean"), real, "mean"),
    "two terms": (lambda z, y: flat_ce(z, y) + 0.1 * z.square().mean(), target, "mean"),
    "scaled": (lambda z: 2 * z.square().mean() / 3, None, "mean"),
    "negated": (lambda z: -(z.square().sum((1, 2)).mean(0)), None, "mean"),
    "mean of means": (lambda z: z.square().mean((1, 2)).mean(), None, "mean"),
    "loop over examples": (lambda z: sum(z[i].square().sum() for i in range(len(z))), None, "sum"),
}  # fmt: skip


@pytest.mark.parametrize("case", EXACT)
def test_reduced_loss(case):
    loss, second, reduction = EXACT[case]
    inputs = (x,) if second is None else (x, second)
    if case == "loop over examples":
        try:
            compare(loss, inputs, reduction)
        except perex.PerexError as error:
            assert str(error)
    else:
        compare(loss, inputs, reduction)


def test_loss_beside_other_results():
    compare(lambda z, y: {"loss": flat_ce(z, y), "logits": z}, (x, target), "mean", lambda out: out["loss"])


UNEVEN = {  # an example's own loss divides by its own count, the batch's by the batch's
    "mean, some ignored": lambda z, y: flat_ce(z, y),
    "mean by class weights": lambda z, y: flat_ce(z, y.clamp(min=0), weight=w),
    "mean over a mask": lambda z, y: (z.square().sum(-1) * (y >= 0)).sum() / (y >= 0).sum(),
    "mean over what is picked": lambda z, y: z[y >= 0].square().mean(),
}


@pytest.mark.parametrize("case", UNEVEN)
def test_uneven_mean_is_exact_or_refused(case):
    try:
        compare(UNEVEN[case], (x, uneven), "mean")
    except perex.PerexError as error:
        assert str(error)


BENT = {
    "root of a mean": lambda z: z.square().mean().sqrt(),
    "logarithm of a mean": lambda z: z.square().mean().log(),
    "norm": lambda z: z.norm(),
    "standard deviation": lambda z: z.std(),
    "square of a batch mean": lambda z: z.mean(0).square().sum(),
    "product of two sums": lambda z: z.sum() * z.exp().sum(),
    "ratio of two sums": lambda z: z.exp().sum() / z.square().sum(),
    "largest": lambda z: z.amax(),
    "median": lambda z: z.median(),
    "covariance": lambda z: (z[:, 0].t() @ z[:, 0]).square().sum(),
    "weighted sum of a later layer": lambda z: (torch.ones(len(z), len(z)).to(z).tril() @ z[:, 0]).square().sum(),
    "power of a sum": lambda z: z.sum() ** 2,
    "tanh of a sum": lambda z: z.sum().tanh(),
    "hinge of a sum": lambda z: (z.sum() - 1).relu(),
    "sum of products": lambda z: (z.sum(0) * z.mean(0)).sum(),
    "log-sum-exp": lambda z: z.logsumexp((0, 1, 2)),
    "einsum": lambda z: torch.einsum("btv,ctv->", z, z),
}


@pytest.mark.parametrize("case", BENT)
def test_function_of_a_reduced_value_is_refused(case):
    """What follows a sum over the batch must be linear, or no example has a loss of its own."""
    for param_grads in (True, False):
        net = model(BENT[case])
        with no_trace(net), pytest.raises(perex.PerexError):
            with perex.attach(net, loss_reduction="sum", param_grads=param_grads) as px:
                net(x).backward()
                px.norms()


def test_a_batch_sum_that_is_returned_and_bent_outside():
    """A vector that no longer has a batch axis is not a loss; outside the model nothing follows it any more."""
    for param_grads in (True, False):
        net = model(lambda z: z.mean(0))
        with no_trace(net), pytest.raises(perex.PerexError):
            with perex.attach(net, loss_reduction="sum", param_grads=param_grads) as px:
                net(x).square().sum().backward()
                px.norms()
