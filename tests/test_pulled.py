"""Large parameters whose gradients come through tensors derived from them: normalized, scaled, factorized weights."""

import copy
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from oracle import Bare, scramble
from test_cost_guards import peak
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import perex
from perex.factors import Derived, Outer, Pulled
from perex.kernels import blocks

B, T, D = 3, 4, 5
SIZES = {"D": D, "E": 6, "R": 2}


@pytest.fixture
def few_at_a_time(monkeypatch):
    """Every parameter is large, and of one example at a time."""
    monkeypatch.setattr(blocks, "BLOCK", 1)


def written(values: Tensor) -> Tensor:
    """A lower triangle of some values, in memory of its own."""
    rows, columns = torch.tril_indices(*values.shape)
    z = torch.zeros_like(values)
    z[rows, columns] = values[rows, columns]
    return z


class Between(nn.Module):
    """A layer between two others, so that something comes before and after."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(D, D), layer, nn.Linear(6, 2)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.call(self.layer, self.first(x)).tanh())
        return out


def images(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = layer(x.mT).mT
    return out


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: Between(parametrizations.weight_norm(nn.Linear(D, 6)), lambda m, x: m(x)),
    "weight norm, whole": lambda: Between(parametrizations.weight_norm(nn.Linear(D, 6), dim=None), lambda m, x: m(x)),
    "convolution": lambda: Between(parametrizations.weight_norm(nn.Conv1d(D, 6, 3, padding=1)), images),
    "spectral norm": lambda: Between(parametrizations.spectral_norm(nn.Linear(D, 6)), lambda m, x: m(x)),
    "orthogonal": lambda: Between(parametrizations.orthogonal(nn.Linear(D, 6)), lambda m, x: m(x)),
}
WEIGHTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, str]]] = {
    "tanh": (lambda m, x: F.linear(x, m.w.tanh()), {"w": "ED"}),
    "scaled": (lambda m, x: F.linear(x, m.w * 0.3), {"w": "ED"}),
    "by a parameter": (lambda m, x: F.linear(x, m.w * m.s), {"w": "ED", "s": "E1"}),
    "factors": (lambda m, x: F.linear(x, m.b @ m.a), {"a": "RD", "b": "ER"}),
    "low rank": (lambda m, x: F.linear(x, m.w + 0.5 * (m.b @ m.a)), {"w": "ED", "a": "RD", "b": "ER"}),
    "normalized": (lambda m, x: F.linear(x, F.normalize(m.w, dim=1)), {"w": "ED"}),
    "half of it unused": (lambda m, x: F.linear(x, (m.w.sin(), m.v.cos())[0]), {"w": "ED", "v": "ED"}),
    "of a large one": (lambda m, x: x * m.w.sum(0), {"w": "ED"}),
    "a table": (lambda m, x: F.embedding((x[..., 0] > 0).long(), m.w.sin()), {"w": "ED"}),
    "twice": (lambda m, x: F.linear(x, (w := m.w.sin())) + F.linear(x.cos(), w), {"w": "ED"}),
    "two ways": (lambda m, x: F.linear(x, m.w.sin()) + F.linear(x.cos(), m.w.cos()), {"w": "ED"}),
    "two kinds": (lambda m, x: F.linear(x, (w := m.w.sin())) @ w + x @ w.T @ w, {"w": "ED"}),
    "and itself": (lambda m, x: F.linear(x, m.w.sin()) + F.linear(x.cos(), m.w), {"w": "ED"}),
    "written into zeros": (lambda m, x: F.linear(x, written(m.w.sin())), {"w": "ED"}),
    "with a bias": (lambda m, x: F.linear(x, m.w.sin(), m.c.exp()), {"w": "ED", "c": "E"}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, few_at_a_time):
    model = scramble(LAYERS[name]()).eval()
    oracle.check(lambda: copy.deepcopy(model), (torch.randn(B, T, D),), bits=False)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, few_at_a_time):
    call, shapes = WEIGHTS[name]
    oracle.check(scramble(Bare(call, SIZES, **shapes)), (torch.randn(B, T, D),), bits=False)


@pytest.mark.parametrize("name", ["low rank", "twice", "normalized", "and itself"])
def test_several_at_a_time(name, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 8 * SIZES["D"] * SIZES["E"])
    call, shapes = WEIGHTS[name]
    oracle.check(scramble(Bare(call, SIZES, **shapes)), (torch.randn(7, T, D),), bits=False)


def test_examples_that_do_not_all_come_by(few_at_a_time):
    """Only some examples reach the weight, as those that are routed to an expert."""

    def call(m: Any, x: Tensor) -> Tensor:
        chosen = (x[:, 0, 0] > 0).nonzero().flatten()
        return x.index_add(0, chosen, F.linear(x[chosen], m.w.sin()) @ m.v)

    x = torch.randn(5, T, D)
    x[:, 0, 0] = torch.tensor([1.0, -1, 1, -1, 1])
    oracle.check(scramble(Bare(call, SIZES, w="ED", v="ED")), (x,), bits=False)


def net() -> nn.Module:
    """A layer whose weight is 256 KiB, and 16 MiB for all examples of a batch."""
    layer = parametrizations.weight_norm(nn.Linear(256, 256))
    return nn.Sequential(nn.Linear(256, 256), layer, nn.ReLU(), nn.Linear(256, 10))


@pytest.mark.parametrize("param_grads", [True, False])
def test_memory(param_grads):
    model, x = net(), torch.randn(64, 8, 256)

    def plain() -> None:
        model(x).square().mean().backward()

    plain()
    model.zero_grad()
    before = peak(plain)
    with perex.attach(model, param_grads=param_grads, audit=False) as px:

        def step() -> None:
            model.zero_grad()
            px.backward(model(x).square().flatten(1).mean(1))
            px.norms()

        for _ in range(3):
            step()
        model.zero_grad()
        assert peak(step) < before + 2 * 4 * blocks.BLOCK  # and not 16 MiB and more


def test_clipped_in_little_memory():
    model, x = net(), torch.randn(64, 8, 256)
    with perex.attach(model, param_grads=False, audit=False, memory="low") as px:

        def step() -> None:
            model.zero_grad()
            px.backward(model(x).square().flatten(1).mean(1))
            px.clip_(1.0)

        for _ in range(3):
            step()
        assert peak(step) < 12 * 2**20


class Prompt(nn.Module):
    """Rows that a layer makes of a parameter, and that are given to every example then."""

    def __init__(self, spread: str) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(4, D))
        self.layer, self.last, self.spread = nn.Linear(D, D), nn.Linear(D, 2), spread

    def forward(self, x: Tensor) -> Tensor:
        rows = self.layer(self.q)
        rows = {
            "expand": lambda: rows.expand(len(x), -1, -1),
            "repeat": lambda: rows.repeat(len(x), 1, 1),
            "unsqueezed": lambda: rows[None].expand(len(x), -1, -1),
            "part": lambda: rows[1:3].expand(len(x), -1, -1),
            "transposed": lambda: rows.mT.expand(len(x), -1, -1).mT,
            "rows in turn": lambda: rows[:1].repeat(len(x), 2, 1),
            "and scaled": lambda: rows.expand(len(x), -1, -1) * 2,
            "scaled in place": lambda: rows.repeat(len(x), 1, 1).mul_(2),
            "scaled in place before": lambda: (rows * 1).mul_(2).expand(len(x), -1, -1),
            "and in place after": lambda: [copies := rows.repeat(len(x), 1, 1), rows.mul_(2)][0],
        }[self.spread]()
        out: Tensor = self.last(torch.cat([rows, x], 1).tanh())
        return out


SPREAD = ["expand", "repeat", "unsqueezed", "part", "transposed", "rows in turn", "and scaled", "scaled in place"]


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("spread", [*SPREAD, "scaled in place before", "and in place after"])
def test_layers_before_rows_are_given_to_examples(spread, batch):
    model = scramble(Prompt(spread)).double()
    x = torch.randn(batch, T, D, dtype=torch.float64)
    expected = []
    for b in range(batch):
        model.zero_grad()
        model(x[b : b + 1]).square().sum().backward()
        expected.append({name: p.grad.clone() for name, p in model.named_parameters()})
    model.zero_grad()
    for param_grads in (True, False):
        with perex.attach(model, param_grads=param_grads, audit=False, loss_reduction="sum") as px:
            for _ in range(3):
                px.backward(model(x).square().flatten(1).sum(1))
                for name, norms in px.norms(by="parameter").items():
                    torch.testing.assert_close(norms, torch.stack([each[name].norm() for each in expected]))
    oracle.check(model, (x,), bits=False)


def test_memory_of_rows_that_a_layer_makes():
    """Nothing of the size of batch times batch is made."""
    model, x = Prompt("expand"), torch.randn(256, 1, D)
    with perex.attach(model, param_grads=False, audit=False) as px:

        def step() -> None:
            px.backward(model(x).square().flatten(1).sum(1))
            px.norms()

        for _ in range(3):
            step()
        assert peak(step) < 256 * 256 * 4 * D * 4 // 4


class OneByOne(torch.autograd.Function):
    """The sine, by an operator that cannot differentiate several gradients at once."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return w.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return grad * w.cos() * (1 if float(grad.abs().sum()) >= 0 else 0)  # a number in Python, of one gradient


def test_operators_without_a_batched_derivative():
    w, (left, right) = torch.randn(4, D, requires_grad=True), (torch.randn(B, T, 4), torch.randn(B, T, D))
    one, other = (
        Pulled(Outer(left, right, w.shape), Derived(make(w), w), w.shape) for make in (OneByOne.apply, torch.sin)
    )
    torch.testing.assert_close(one.dense(0, B), other.dense(0, B))
    torch.testing.assert_close(one.squared_norm(), (left.mT @ right * w.detach().cos()).square().sum((1, 2)))


def large(*more: nn.Module) -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(600, 700)), *more).double()


@pytest.mark.parametrize("memory", [None, "auto", "high", "low"])
@pytest.mark.parametrize("param_grads", [True, False])
def test_clipping_after_the_first_backward(param_grads, memory):
    model, x = large(), torch.randn(B, 600, dtype=torch.float64)
    rows = [torch.autograd.grad(model(x[b : b + 1]).sin().sum(), list(model.parameters())) for b in range(B)]
    norms = torch.stack([torch.cat([g.flatten() for g in each]).norm() for each in rows])
    weights = 0.5 / norms.clamp(min=0.5)
    options = {} if memory is None else {"memory": memory}
    with perex.attach(model, param_grads=param_grads, **options) as px:
        for _ in range(3):
            model.zero_grad()
            px.backward(model(x).sin().sum(1))
            px.clip_(0.5)
            for k, parameter in enumerate(model.parameters()):
                expected = sum(w * each[k] for w, each in zip(weights, rows, strict=True))
                torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("param_grads", [True, False])
@pytest.mark.parametrize("change", [lambda p: p.mul_(2), lambda p: p.data.mul_(2)], ids=["in place", "data"])
def test_parameters_that_change_before_gradients_are_used(change, param_grads):
    model, x = large(), torch.randn(B, 600, dtype=torch.float64)
    with perex.attach(model, param_grads=param_grads, memory="high") as px:
        sums = []
        for changed in (False, True):
            model.zero_grad()
            before = copy.deepcopy(model.state_dict())
            px.backward(model(x).sin().sum(1))
            if changed:
                with torch.no_grad():
                    for parameter in model.parameters():
                        change(parameter)
            px.reweight_(torch.arange(B, dtype=torch.float64))
            sums.append([p.grad.clone() for p in model.parameters()])
            model.load_state_dict(before)
        torch.testing.assert_close(sums[0], sums[1])


@pytest.mark.parametrize("param_grads", [True, False])
@pytest.mark.parametrize("change", ["data", "set_"])
def test_other_data_in_a_derived_tensor_is_refused(change, param_grads):
    """What perex reads is in front of what the user's code holds, and shares its memory."""

    def call(m: Any, x: Tensor) -> Tensor:
        q = m.w.clone()
        if change == "data":
            q.data = (q.data * 2).round() / 2
        else:
            with torch.no_grad():
                q.set_((q * 2).round() / 2)
        return F.linear(x, q)

    model = scramble(Bare(call, SIZES, w="ED"))
    with perex.attach(model, param_grads=param_grads, audit=False), pytest.raises(perex.PerexError, match="other data"):
        model(torch.randn(B, T, D))
