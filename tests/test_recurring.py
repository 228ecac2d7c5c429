"""Recurrent operators as perex runs them: gradients of what they read, and whatever is done to what they give."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import scramble
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import perex
from perex.rules import recurring

B, T, D, H = 3, 4, 3, 5
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN": nn.RNN,
    "ReLU": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
    "projected": lambda *sizes, **options: nn.LSTM(*sizes, proj_size=2, **options),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "batch first": {"batch_first": True},
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True},
    "all": {"num_layers": 3, "bidirectional": True, "batch_first": True},
    "no bias": {"bias": False, "num_layers": 2},
}


class Net(nn.Module):
    """Something before, a recurrent layer with first states that the examples give, and what is made of its results."""

    def __init__(self, rnn: nn.Module, lengths: list[int] | None, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        width = getattr(rnn, "proj_size", 0) or H
        self.before, self.rnn, self.lengths, self.after = nn.Linear(D, D), rnn, lengths, after
        self.start = nn.Linear(D, width)
        self.cell = nn.Linear(D, H)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        h = self.before(x)
        layers = self.rnn.num_layers * (1 + self.rnn.bidirectional)
        first = [self.start(h.mean(1)).expand(layers, -1, -1).contiguous()]
        if isinstance(self.rnn, nn.LSTM):
            first.append(self.cell(h.mean(1)).expand(layers, -1, -1).contiguous())
        hx = tuple(first) if len(first) > 1 else first[0]
        if self.lengths is not None:
            packed = pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
            out, last = self.rnn(packed, hx)
            out = pad_packed_sequence(out, batch_first=True)[0]
        else:
            out, last = self.rnn(h if self.rnn.batch_first else h.transpose(0, 1), hx)
            out = out if self.rnn.batch_first else out.transpose(0, 1)
        last = last[-1] if isinstance(last, tuple) else last
        out = self.after(out)
        return out.sin().flatten(1).sum(1) + last.cos().sum((0, 2))


def reference(model: nn.Module, x: Tensor, lengths: Tensor) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Each example's gradients of all parameters, and of its input."""
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    inputs = []
    for b in range(len(x)):
        one = x[b : b + 1].clone().requires_grad_()
        loss = model(one, lengths[b : b + 1]).sum()
        found = torch.autograd.grad(loss, [one, *model.parameters()], materialize_grads=True, allow_unused=True)
        inputs.append(found[0])
        for gradients, gradient in zip(rows.values(), found[1:], strict=True):
            gradients.append(gradient)
    return rows, inputs


@pytest.fixture
def runs(monkeypatch):
    """How often perex has run an operator, and how often its backward was the operator's own."""
    seen: dict[str, Any] = {"run": 0, "by operator": 0, "left": []}
    apply, own = recurring.Recurrent.apply, recurring.by_operator

    def counted(*args: Any) -> Any:
        seen["run"] += 1
        seen["left"].append(weakref.ref(args[0]))
        return apply(*args)

    def counted_too(*args: Any) -> Any:
        seen["by operator"] += 1
        return own(*args)

    monkeypatch.setattr(recurring.Recurrent, "apply", counted)
    monkeypatch.setattr(recurring, "by_operator", counted_too)
    return seen


def agrees(model: nn.Module, lengths: list[int] | None = None, steps: int = 3) -> None:
    """Norms, and gradients of inputs, are the loop's, in first and later steps."""
    model = scramble(model).double()
    x = torch.randn(B, T, D, dtype=torch.float64)
    sizes = torch.tensor(lengths or [T] * B)
    rows, inputs = reference(model, x, sizes)
    out = model(x, sizes)
    for param_grads in (False, True):
        with perex.attach(model, param_grads=param_grads, loss_reduction="sum", audit=False) as px:
            for _ in range(steps):
                model.zero_grad()
                given = x.clone().requires_grad_()
                again = model(given, sizes)
                torch.testing.assert_close(again, out)
                px.backward(again)
                torch.testing.assert_close(given.grad, torch.cat(inputs))
                norms = px.norms(by="parameter")
                for name, gradients in rows.items():
                    expected = torch.stack([gradient.norm() for gradient in gradients])
                    torch.testing.assert_close(norms.get(name, torch.zeros(B).double()), expected)
                    grad = model.get_parameter(name).grad
                    if param_grads and grad is not None:
                        torch.testing.assert_close(grad, torch.stack(gradients).sum(0))


@pytest.mark.parametrize("lengths", [None, [2, 4, 3]], ids=["whole", "packed"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind, options, lengths, runs):
    agrees(Net(LAYERS[kind](D, H, **OPTIONS[options]), lengths, lambda out: out), lengths)
    assert runs["run"] == 3 and not runs["by operator"]


@pytest.mark.parametrize("options", ["one layer", "all"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(
    "after",
    [
        lambda out: out.mul_(2),
        lambda out: out.masked_fill_(out > 0.1, 0.5),
        lambda out: out[:, -1],
        lambda out: out.detach(),
        lambda out: torch.cat([out, out.relu_()], 1),
        lambda out: out.add_(out.detach().clone()),
        lambda out: [out * 2, out.data.zero_()][0],
    ],
    ids=["in place", "filled in place", "the last", "states alone", "twice", "added in place", "unseen"],
)
def test_what_is_done_to_outputs(kind, options, after, runs):
    """What was changed in place, seen or unseen, is of no matter to the operator's backward, nor to perex's."""
    net = Net(LAYERS[kind](D, H, **OPTIONS[options]), None, after)
    agrees(net)
    assert runs["run"] == 3


class Cells(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.before, self.cell = (
            nn.Linear(D, D),
            {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN": nn.RNNCell}[kind](D, H),
        )

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        h: Any = None
        for step in self.before(x).unbind(1):
            h = self.cell(step, h)
        return sum(state.sin().sum(1) for state in (h if isinstance(h, tuple) else (h,)))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_cells(kind, runs):
    agrees(Cells(kind))
    assert runs["run"] == 3 * T and not runs["by operator"]


def attached(kind: str = "LSTM", **options: Any) -> tuple[nn.Module, Tensor, Tensor, perex.Tracker]:
    model = scramble(Net(LAYERS[kind](D, H, **options), None, lambda out: out)).double()
    px = perex.attach(model, param_grads=False, loss_reduction="sum", audit=False)
    return model, torch.randn(B, T, D, dtype=torch.float64, requires_grad=True), torch.tensor([T] * B), px


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_graph_that_runs_twice(kind, runs):
    model, x, sizes, px = attached(kind)
    loss = model(x, sizes).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    loss.backward(retain_graph=True)
    norms = px.norms()
    torch.testing.assert_close(x.grad, first)
    x.grad = None
    loss.backward()
    torch.testing.assert_close(x.grad, first)
    torch.testing.assert_close(px.norms(), norms)
    px.detach()


def test_gradients_of_inputs_that_are_differentiated_again(runs):
    model, x, sizes, px = attached("GRU", num_layers=2)
    (first,) = torch.autograd.grad(model(x, sizes).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    px.detach()
    (expected,) = torch.autograd.grad(model(x, sizes).sum(), x, create_graph=True)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, torch.autograd.grad(expected.square().sum(), x)[0])
    assert runs["by operator"] == 1


class States(nn.Module):
    """A layer whose input and first states lead to each other, or are the same."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.before, self.kind = nn.Linear(D, D), kind
        self.rnn: nn.Module = {"from the input": nn.GRU, "the same": nn.LSTM, "cell": nn.GRUCell}[kind](D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        if self.kind == "from the input":
            return self.rnn(h.transpose(0, 1), h.mean(1)[None].contiguous())[0].sin().sum((0, 2))
        if self.kind == "the same":
            first = h.mean(1)[None].contiguous()
            return self.rnn(h.transpose(0, 1), (first, first))[0].sin().sum((0, 2))
        state = None
        for _ in range(3):
            state = self.rnn(h.mean(1), state)
        return state.sin().sum(1)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("param_grads", [True, False])
@pytest.mark.parametrize("kind", ["from the input", "the same", "cell"])
def test_states_with_a_graph(kind, param_grads, runs):
    model = scramble(States(kind)).double()
    x = torch.randn(B, T, D, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    rows = [torch.autograd.grad(model(leaf[b : b + 1]).sum(), [leaf, *model.parameters()]) for b in range(B)]
    norms = torch.stack([torch.cat([g.flatten() for g in each[1:]]).norm() for each in rows])
    gradient = torch.stack([each[0] for each in rows]).sum(0)
    (first,) = torch.autograd.grad(model(leaf).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    with perex.attach(model, param_grads=param_grads, loss_reduction="sum", audit=False) as px:
        for _ in range(2):
            given = x.clone().requires_grad_()
            (found,) = torch.autograd.grad(model(given).sum(), given, create_graph=True)
            torch.testing.assert_close(found, gradient)
            torch.testing.assert_close(torch.autograd.grad(found.square().sum(), given)[0], second)
            model(given).sum().backward(create_graph=True)
            torch.testing.assert_close(given.grad, gradient)
            torch.testing.assert_close(px.norms(), norms)
            model.zero_grad()
            given.grad = None


@pytest.mark.parametrize("param_grads", [True, False])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_hooks_on_results_that_are_not_read(kind, param_grads):
    seen = []

    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = LAYERS[kind](D, H, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out, last = self.rnn(x)
            (last[0] if isinstance(last, tuple) else last).register_hook(lambda grad: seen.append(grad) or grad * 1)
            return out.sum((1, 2))

    model = Hooked()
    with perex.attach(model, param_grads=param_grads) as px:
        for _ in range(2):
            px.backward(model(torch.randn(B, T, D)))
    assert not seen


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("audit", [False, True])
@pytest.mark.parametrize("param_grads", [False, True])
def test_an_input_that_is_changed_after_it_was_read(cell, param_grads, audit):
    """Torch keeps a copy where the batch comes first, so this is allowed."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.rnn = nn.Linear(D, D), cell(D, D, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x)
            x += self.rnn(x)[0]
            return x.sin().sum((1, 2))

    model, x = Residual().double(), torch.randn(B, 3, D, dtype=torch.float64)
    expected = []
    for b in range(B):  # of one example alone, rows lie in order, and torch keeps no copy
        grads = torch.autograd.grad(model(x)[b], list(model.parameters()))
        expected.append(sum(grad.square().sum() for grad in grads).sqrt())
    with perex.attach(model, param_grads=param_grads, audit=audit) as px:
        for _ in range(2):
            px.backward(model(x))
            torch.testing.assert_close(px.norms(), torch.stack(expected))


def test_a_projection_that_only_later_steps_would_read():
    """Its gradient arrives at the parameter, as none."""
    model = scramble(nn.LSTM(D, H, proj_size=2)).double()
    with perex.attach(model, batch_dim=1) as px:
        model(torch.randn(1, B, D, dtype=torch.float64))[1][1].sum().backward()
        assert not px.norms(by="parameter")["weight_hr_l0"].any()


class Sorted(nn.Module):
    """First states that depend on an example's rank among all."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.before, self.rnn, self.checkpointed = nn.Linear(D, D), nn.GRU(D, H, batch_first=True), checkpointed

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        def read(x: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            states = torch.zeros(1, len(x) + 1, H, dtype=x.dtype)[:, lengths.argsort()]
            return self.rnn(packed, states)[1][-1].sum(1)

        h = self.before(x)
        return checkpoint(read, h, use_reentrant=False) if self.checkpointed else read(h)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("param_grads", [True, False])
def test_what_is_refused_keeps_the_gradients_of_inputs(param_grads, checkpointed):
    model = Sorted(checkpointed)
    x, lengths = torch.randn(3, 5, D, requires_grad=True), torch.tensor([2, 5, 3])
    (expected,) = torch.autograd.grad(model(x, lengths).sum(), x)
    with perex.attach(model, param_grads=param_grads) as px:
        model(x, lengths).sum().backward()
        torch.testing.assert_close(x.grad, expected)
        with pytest.raises(perex.PerexError, match="`argsort` works along the batch axis"):
            px.norms()


def test_frozen_layers(runs):
    model, x, sizes, px = attached()
    model.rnn.requires_grad_(False)
    px.backward(model(x, sizes))
    found = x.grad
    norms = px.norms()
    px.detach()
    x.grad = None
    rows, inputs = reference(model.requires_grad_(True), x.detach(), sizes)
    torch.testing.assert_close(found, torch.cat(inputs))
    squares = [torch.stack(each).flatten(1).square().sum(1) for name, each in rows.items() if "rnn" not in name]
    torch.testing.assert_close(norms, torch.stack(squares).sum(0).sqrt())


def test_weights_that_change_before_the_backward_are_noticed(runs):
    model, x, sizes, px = attached()
    out = model(x, sizes)
    with torch.no_grad():
        model.rnn.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    px.detach()


def test_nothing_is_kept(runs):
    model, x, sizes, px = attached(num_layers=2)
    gc.disable()
    try:
        for backward in (True, False, True):
            out = model(x, sizes)
            if backward:
                px.backward(out)
                px.norms()
            del out
        assert [left() for left in runs["left"]] == [None] * 3
    finally:
        gc.enable()
    px.detach()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_in_float32(kind, options, runs):
    """Where oneDNN runs LSTMs, and multiplies large matrices."""
    model = Net(LAYERS[kind](D, 64, **OPTIONS[options]), None, lambda out: out)
    model.start, model.cell = nn.Linear(D, 64), nn.Linear(D, 64)
    x, sizes = torch.randn(7, 9, D), torch.tensor([9] * 7)
    rows, inputs = reference(copy.deepcopy(model).double(), x.double(), sizes)
    with perex.attach(model, param_grads=False, loss_reduction="sum", audit=False) as px:
        for _ in range(3):
            given = x.clone().requires_grad_()
            px.backward(model(given, sizes))
            torch.testing.assert_close(given.grad.double(), torch.cat(inputs), rtol=1e-3, atol=1e-4)
            expected = torch.stack([torch.stack(each).flatten(1).square().sum(1) for each in rows.values()]).sum(0)
            torch.testing.assert_close(px.norms().double(), expected.sqrt(), rtol=1e-5, atol=1e-5)
    assert runs["run"] == 3
