"""Recurrent layers and cells: exact in every option, and never an example's gradient multiplied out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Bare, check, grid, scramble
from test_cost_guards import peak
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import perex
from perex.kernels import large

B, T, D, H = 3, 4, 3, 5
LAYERS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
CELLS = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN": nn.RNNCell}


def rules(px: perex.Tracker) -> set[str]:
    """Of all recurrent operators."""
    names = [f"{name}{end}" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu") for end in ("", "_cell")]
    return {row.rule for row in px.report().rows if row.operator in names}


def states(h: Any) -> list[Tensor]:
    return list(h) if isinstance(h, tuple) else [h]


class Reader(nn.Module):
    """Reads all rows and the last states, or some of them."""

    def __init__(self, rnn: nn.Module, time: int, reads: str, state: str, folded: bool) -> None:
        super().__init__()
        self.before, self.rnn, self.time, self.reads, self.folded = nn.Linear(D, D), rnn, time, reads, folded
        layers = rnn.num_layers * (1 + rnn.bidirectional)
        sizes = [rnn.proj_size or H, H][: 1 + isinstance(rnn, nn.LSTM)]
        self.first = nn.ParameterList([nn.Parameter(torch.randn(layers, 1, size)) for size in sizes])
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)  # (B, T, D), or (B, 2, T, D)
        h = h.flatten(0, 1) if self.folded else h
        given = None
        if self.state != "zeros":
            first = [p.expand(-1, len(h), -1) for p in self.first]
            if self.state == "of the examples":
                first = [p * h.mean((1, 2))[None, :, None] for p in first]
            first = [p.contiguous() for p in first]
            given = tuple(first) if len(first) == 2 else first[0]
        out, last = self.rnn(h if self.time else h.transpose(0, 1), given)
        out = out if self.time else out.transpose(0, 1)
        rows = out.sin().mean(1) if "rows" in self.reads else 0
        found = sum(s.cos().sum((0, 2))[:, None] for s in states(last)) if "states" in self.reads else 0
        if self.reads == "the last":
            found = states(last)[-1][-1].sin()
        found = rows + found
        return found.unflatten(0, (len(x), -1)).sum(1) if self.folded else found


@st.composite
def layers(draw: st.DrawFn, kind: str) -> nn.Module:
    options: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 2)),
        "bias": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
    }
    if kind == "LSTM":
        options["proj_size"] = draw(st.sampled_from([0, 2]))
    if kind == "RNN":
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    return scramble(LAYERS[kind](D, H, **options).double())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")  # torch's own
def test_layers(kind):
    @grid(25)
    @given(
        rnn=layers(kind),
        reads=st.sampled_from(["rows", "states", "rows and states", "the last"]),
        state=st.sampled_from(["zeros", "learned", "of the examples"]),
        folded=st.booleans(),
        batch=st.integers(1, 4),
        length=st.integers(1, 4),
    )
    def drawn(rnn, reads, state, folded, batch, length):
        model = Reader(rnn, rnn.batch_first, reads, state, folded).double()
        x = torch.randn(batch, *([2] if folded else []), length, D, dtype=torch.float64)
        with perex.attach(model) as px:
            px.backward(model(x).flatten(1).sum(1))
        assert rules(px) == {"recurrent"}
        check(model, (x,))

    drawn()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_packed_sequences(kind):
    """Of any lengths, in any order, with first states that are learned."""

    class Packed(nn.Module):
        def __init__(self, rnn: nn.Module) -> None:
            super().__init__()
            self.before, self.rnn = nn.Linear(D, D), rnn
            sizes = [rnn.proj_size or H, H][: 1 + isinstance(rnn, nn.LSTM)]
            count = rnn.num_layers * (1 + rnn.bidirectional)
            self.first = nn.ParameterList([nn.Parameter(torch.randn(count, 1, size)) for size in sizes])

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            h = pack_padded_sequence(self.before(x), lengths, batch_first=True, enforce_sorted=False)
            first = [p.expand(-1, len(x), -1).contiguous() for p in self.first]
            out, last = self.rnn(h, tuple(first) if len(first) == 2 else first[0])
            rows = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0]
            return rows.sin().sum(1) + sum(s.cos().sum((0, 2))[:, None] for s in states(last))

    @grid(25)
    @given(rnn=layers(kind), lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4))
    def drawn(rnn, lengths):
        model = Packed(rnn).double()
        x = torch.randn(len(lengths), max(lengths), D, dtype=torch.float64)
        with perex.attach(model) as px:
            px.backward(model(x, torch.tensor(lengths)).flatten(1).sum(1))
        assert rules(px) == {"recurrent"}
        check(model, (x, torch.tensor(lengths)))

    drawn()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("start", ["zeros", "learned"])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, start, bias):
    """Step by step, on their own outputs; the first input and state are parameters, the same for all examples."""

    def forward(m: Any, x: Tensor) -> Tensor:
        state = [x.new_zeros(len(x), H) if start == "zeros" else p.expand(len(x), -1) for p in (m.h, m.c)]
        outs = []
        for t in range(-1, x.shape[1]):
            row = m.x.expand(len(x), -1) if t < 0 else x[:, t]
            if t < 0 and start == "zeros":
                continue
            state = states(m.cell(row, tuple(state) if kind == "LSTM" else state[0]))
            outs.append(state[0].sin())
        return torch.stack(outs, 1).sum(1) + state[-1]

    model = Bare(forward)
    model.cell = CELLS[kind](D, H, bias=bias)
    for name, size in (("h", H), ("c", H), ("x", D)):
        setattr(model, name, nn.Parameter(torch.randn(1, size)))
    model = scramble(model).double()
    x = torch.randn(B, T, D, dtype=torch.float64)
    with perex.attach(model) as px:
        px.backward(model(x).flatten(1).sum(1))
    assert rules(px) == {"recurrent"}
    check(model, (x,), bits=start == "zeros")  # the first step is run again when its state meets examples


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("wanted", ["weight_ih*", "weight_hh*", "bias_ih*", "bias_hh*", "*_l0", "*_l1", "*_reverse"])
def test_some_of_the_parameters(kind, wanted):
    model = scramble(LAYERS[kind](D, H, 2, bidirectional=True, batch_first=True).double())
    check(model, (torch.randn(B, T, D),), lambda out, index: out[0].sin().sum((1, 2)), params=[wanted])


def test_gates_of_a_weight_that_is_normed():
    """Here the weight is derived from parameters: its gradient is pulled back to these."""
    model = scramble(nn.Sequential(nn.Linear(D, D), nn.LSTM(D, H, batch_first=True)).double())
    torch.nn.utils.parametrizations.weight_norm(model[1], "weight_hh_l0")
    check(model, (torch.randn(B, T, D),), lambda out, index: out[0].sin().sum((1, 2)))


def test_one_layer_twice():
    def forward(m: Any, x: Tensor) -> Tensor:
        first, last = m.rnn(x)
        return m.rnn(first, last)[0].sum(1)

    model = Bare(forward)
    model.rnn = nn.GRU(H, H, batch_first=True)
    check(scramble(model).double(), (torch.randn(B, T, H),))


@pytest.mark.parametrize("kind", LAYERS)
def test_products_by_onednn(kind, monkeypatch):
    """In float32, as they run where they are large."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    for name in ("WORTH_A_CALL", "WORTH_PREPARING"):
        monkeypatch.setattr(large, name, 1)
    monkeypatch.setattr(large, "onednn_is_faster", lambda: True)
    model = scramble(LAYERS[kind](D, H, 2, bidirectional=True, batch_first=True))
    x = torch.randn(B, T, D)
    with perex.attach(model, loss_reduction="sum") as px:
        px.backward(model(x)[0].sin().sum((1, 2)))
    wide, expected = copy.deepcopy(model).double(), []
    for b in range(B):
        grads = torch.autograd.grad(wide(x[b : b + 1].double())[0].sin().sum(), list(wide.parameters()))
        expected.append(sum(g.square().sum() for g in grads).sqrt())
    torch.testing.assert_close(px.norms().double(), torch.stack(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_example_without_a_number_spoils_its_own_norm_only(kind, value):
    for options in ({}, {"nonlinearity": "relu"})[: 1 + (kind == "RNN")]:
        model = scramble(LAYERS[kind](D, H, batch_first=True, **options).double())
        x = torch.randn(B, T, D, dtype=torch.float64)
        x[1, 2, 0] = value
        with perex.attach(model, loss_reduction="sum") as px:
            model(x)[0].sin().sum().backward()
        found, expected = px.norms(), []
        for b in range(B):
            grads = torch.autograd.grad(model(x[b : b + 1])[0].sin().sum(), list(model.parameters()))
            expected.append(sum(g.square().sum() for g in grads).sqrt())
        expected = torch.stack(expected)
        torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
        assert found[1].isfinite() == expected[1].isfinite()


@pytest.mark.parametrize("kind", LAYERS)
def test_memory_does_not_grow_with_batch_times_parameters(kind):
    """All examples' gradients would take 32 x 0.4 to 1.6 MB."""
    model = LAYERS[kind](16, 256, batch_first=True)
    x, parameters = torch.randn(32, 3, 16), sum(p.nbytes for p in model.parameters())
    with perex.attach(model, param_grads=False, audit=False) as px:

        def step() -> None:
            px.backward(model(x)[0].square().mean((1, 2)))
            assert px.norms().shape == (32,)

        step()
        assert peak(step) < 6 * parameters


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("given", ["learned", "constant"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_examples_in_the_first_state_alone(kind, given, batch_first, batch):
    """As in a decoder, which begins with the same token for all."""

    def forward(m: Any, x: Tensor) -> Tensor:
        shape = (len(x), 2, D) if batch_first else (2, len(x), D)
        rows = m.start.expand(shape) if given == "learned" else x.new_ones(shape)
        h = (x * m.a).sum(1).expand(1, -1, -1).contiguous()
        out, _ = m.rnn(rows, (h, h) if kind == "LSTM" else h)
        return (out if batch_first else out.transpose(0, 1)).sin().sum(1)

    model = Bare(forward, {"D": D}, a="5", start="D")
    model.rnn = LAYERS[kind](D, H, batch_first=batch_first)
    x = torch.randn(batch, T, H, dtype=torch.float64)
    check(scramble(model).double(), (x,))
    with perex.attach(model, audit=False, loss_reduction="sum") as px:
        for _ in range(2):
            model(x).sum().backward()
    expected = []
    for b in range(batch):
        grads = torch.autograd.grad(model(x[b : b + 1]).sum(), list(model.parameters()), allow_unused=True)
        expected.append(sum(g.square().sum() for g in grads if g is not None).sqrt())
    torch.testing.assert_close(px.norms(), torch.stack(expected))
