"""Numbers that go where perex does not see: scripted code, an inner backward, memory under two names."""

from __future__ import annotations

import warnings

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perex

B, D = 4, 5
x = torch.randn(B, D)
flipped = torch.arange(B).flip(0)
both_ways = pytest.mark.parametrize("own", [True, False], ids=["loss.backward", "px.backward"])
every_way = pytest.mark.parametrize("param_grads", [True, False])


def scripted(function):
    """What perex cannot see into."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # by torch itself
        return torch.jit.script(function)


@scripted
def swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()


@scripted
def mean(x: Tensor) -> Tensor:
    return x.mean(0)


@scripted
def centered(x: Tensor) -> Tensor:
    return x - x.mean(0)


class Net(nn.Module):
    """Three layers, with a function of (net, hidden) behind the first."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.a, self.b, self.c = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.register_buffer("graph", torch.rand(9, 9))
        self.register_buffer("bank", torch.zeros(9, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.function(self, self.a(x).tanh()))


def losses(out: Tensor) -> Tensor:
    return out.square().sum(1)


def norms(model: nn.Module, own: bool, param_grads: bool) -> Tensor:
    with perex.attach(model, param_grads=param_grads) as px:
        found = losses(model(x))
        found.mean().backward() if own else px.backward(found)
        return px.norms()


def complex_parts(m: Net, h: Tensor) -> Tensor:
    z = torch.zeros(h.shape, dtype=torch.cdouble)
    z.real, z.imag = h, 2 * h
    return h + m.b(z.real * z.imag)


def inner_backward_by_rows(m: Net, h: Tensor) -> Tensor:
    d = h.detach().requires_grad_()
    (d**3).sum().backward()
    return h + d.grad


APART = {
    "a scripted function": lambda m, h: h + m.b(swish(h) * 1.0),
    "and a view": lambda m, h: h + m.b(swish(h)[:, :].view(-1, D)),
    "mapped over rows": lambda m, h: h + m.b(torch.func.vmap(lambda row: row - row.mean())(h) + 0),
    "parts of complex numbers": complex_parts,
    "an inner backward": inner_backward_by_rows,
}


@both_ways
@every_way
@pytest.mark.parametrize("case", APART)
def test_what_comes_from_there_is_exact_or_refused(case, own, param_grads):
    model = oracle.scramble(Net(APART[case]))
    try:
        found = norms(model, own, param_grads)
    except perex.UnsupportedError:
        return
    model.zero_grad()
    for b in range(B):
        grads = torch.autograd.grad(losses(model(x[b : b + 1])).sum(), list(model.parameters()), allow_unused=True)
        assert torch.allclose(found[b], sum(g.square().sum() for g in grads if g is not None).sqrt())


def inner_backward(m: Net, h: Tensor) -> Tensor:
    d = h.detach().requires_grad_()
    (d @ d.T).logsumexp(1).sum().backward()
    return h + d.grad


def draws(m: Net, h: Tensor) -> Tensor:
    return h + 0 * torch.stack([torch.randn(D) for _ in h]) + centered(h.detach())


def real_part(m: Net, h: Tensor) -> Tensor:
    z = torch.zeros(h.shape, dtype=torch.cdouble)
    z.real = h
    return h - z.real.mean(0)


def filled_again(m: Net, h: Tensor) -> Tensor:
    z = torch.zeros_like(h)
    z += h
    z[flipped, :2] = h[:, :2]
    return z[flipped]


def filled_by_a_view(m: Net, h: Tensor) -> Tensor:
    z = torch.zeros_like(h)
    z[:, :3].add_(h[:, :3])
    z[flipped, :2] = h[:, :2]
    return z[flipped]


def early_view(m: Net, h: Tensor) -> Tensor:
    z = torch.zeros_like(h)
    view = z[:, :2]
    z[flipped] = h
    return torch.cat([view, h[:, 2:]], 1)


def early_view_of_nobody(m: Net, h: Tensor) -> Tensor:
    z = h.new_zeros(2 * B, D)
    z[:B] = h
    view = z[B:]
    z[B:] = h
    return h - view.mean(0)


def written_out(m: Net, h: Tensor) -> Tensor:
    with torch.no_grad():
        torch.mul(h, 1, out=m.bank[:B])
    return h - m.bank[:B].mean(0)


def written_to_data(m: Net, h: Tensor) -> Tensor:
    m.bank.data[:B] = h.detach()
    return h - m.bank[:B].mean(0)


def written_past_a_detached(m: Net, h: Tensor) -> Tensor:
    z = torch.zeros(B, D)
    other = z.detach()
    z.copy_(h.detach())
    return h - other.mean(0)


def with_itself(m: Net, h: Tensor) -> Tensor:
    t = h[:, :, None]
    return h * F.conv1d(t, t)[:, :, 0].mean(1, keepdim=True)


def among_each_other(m: Net, h: Tensor) -> Tensor:
    values = h[:, 0].detach().contiguous()
    return h * (1 + torch.bucketize(values, values))[:, None]


MIXED = {
    "a scripted mean": lambda m, h: h - mean(h).unsqueeze(0),
    "a scripted mean, with draws in another order when alone": draws,
    "an inner backward": inner_backward,
    "the real part of complex numbers": real_part,
    "one tensor as bias and factor": lambda m, h: torch.addmm(h, m.graph[:B, :B], h),
    "one tensor as bias and factor, by name": lambda m, h: torch.addmm(input=h, mat1=m.graph[:B, :B], mat2=h),
    "images as their own kernels": with_itself,
    "values looked up among themselves": among_each_other,
    "zeros that hold examples": filled_again,
    "zeros that hold examples by way of a view": filled_by_a_view,
    "a view of zeros": early_view,
    "a view of rows that are nobody's": early_view_of_nobody,
    "`out=` a view": written_out,
    "`.data`": written_to_data,
    "a detached tensor": written_past_a_detached,
}


@both_ways
@every_way
@pytest.mark.parametrize("case", MIXED)
def test_mixtures_from_there_are_refused(case, own, param_grads):
    model = oracle.scramble(Net(MIXED[case]))
    with pytest.raises(perex.PerexError):
        norms(model, own, param_grads)


def joined_in_place(m: Net, h: Tensor) -> Tensor:
    """As keys are put together in multi-head latent attention."""
    whole = h.new_empty(len(h), D)
    whole[..., :2].copy_(h[:, :2])
    whole[..., 2:].copy_(m.b(h)[:, 2:])
    return whole.tanh()


def own_buffer(m: Net, h: Tensor) -> Tensor:
    m.bank[: len(h)] = h.detach()
    return h + m.bank[: len(h)] * 0.5


def pieces(m: Net, h: Tensor) -> Tensor:
    h = h + 0
    one, other = h[:, :2], h[:, 2:]
    one *= 0.5
    one += m.b.bias[:2]
    return torch.cat([other, one], 1)


WRITTEN = {
    "a buffer": own_buffer,
    "parts of an empty tensor": joined_in_place,
    "pieces": pieces,
    "`out=`": lambda m, h: h + torch.mul(h.detach(), 2, out=h.new_empty(0)),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_ordinary_writes_are_followed(case):
    oracle.check(Net(WRITTEN[case]), (x,), loss=oracle.projection())
