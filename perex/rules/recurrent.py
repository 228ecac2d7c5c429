r"""Recurrent layers: in each step, gates read a row of the input and the state before, $W x_t + c$ and $U h_{t-1} + d$.

So with $\delta_t$ the gradient of what the gates get, $G_b = \sum_t \delta_{bt} x_{bt}^\top$ for $W$, and likewise with
$h_{b,t-1}$ for $U$. The operator is unrolled in time, for all examples at once, and autograd says what $\delta$ is.

torch's operators are `(input, hx, weights, bias, layers, dropout, train, bidirectional, batch_first)`; for packed
sequences `(data, batch_sizes, hx, weights, bias, layers, dropout, train, bidirectional)`, where step t has the first
`batch_sizes[t]` sequences, longest first; and `(input, hx, w_ih, w_hh, b_ih, b_hh)` for a single step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from perex.capture.axis import Axis, Held
from perex.factors import Dense, Factor, Outer
from perex.kernels.products import widen
from perex.rules.call import Call, Captured, unpack
from perex.rules.linear import positions
from perex.rules.registry import Rule

# Cells: from what the gates get of input and state, and the states before, to the states after


def lstm(given: Tensor, kept: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
    r"""$c' = f c + i g$ and $h' = o \tanh c'$."""
    i, f, g, o = (given + kept).chunk(4, 1)
    c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    return [o.sigmoid() * c.tanh(), c]


def gru(given: Tensor, kept: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
    r"""$h' = (1 - z) n + z h$ with $n = \tanh(n_x + r n_h)$."""
    (r, z, n), (own_r, own_z, own_n) = given.chunk(3, 1), kept.chunk(3, 1)
    n = (n + (r + own_r).sigmoid() * own_n).tanh()
    return [n + (z + own_z).sigmoid() * (states[0] - n)]


def rnn_tanh(given: Tensor, kept: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
    r"""$h' = \tanh(\cdot)$."""
    return [(given + kept).tanh()]


def rnn_relu(given: Tensor, kept: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
    r"""$h' = \max(\cdot, 0)$."""
    return [(given + kept).relu()]


Cell = Callable[[Tensor, Tensor, Sequence[Tensor]], list[Tensor]]

CELLS: dict[Any, Cell] = {
    torch.lstm: lstm,
    torch.gru: gru,
    torch.rnn_tanh: rnn_tanh,
    torch.rnn_relu: rnn_relu,
    torch.lstm_cell: lstm,
    torch.gru_cell: gru,
    torch.rnn_tanh_cell: rnn_tanh,
    torch.rnn_relu_cell: rnn_relu,
}

STEPS = frozenset({torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell})
"""Those that are a single step."""


# One call


@dataclass
class Recurrence:
    """A call as a sequence of steps.

    Attributes:
        cell: what happens in a step.
        layout: how rows of inputs and outputs lie: `"padded"` sequences `(T, S, d)`, `"batch first"` `(S, T, d)`,
            `"packed"` `(N, d)`, or a single `"step"` `(S, d)`.
        x: all rows of the input, those of the first step first, `(N, d)`.
        sizes: how many rows each step has, fewer and fewer.
        states: the first ones, `(L D, S, H)` each, for S sequences.
        weights: for each layer and direction, `w_ih, w_hh`, perhaps `b_ih, b_hh`, and `w_hr` of a projection.
        numbers: their numbers among the call's tensors.
        bias: whether there are biases.
        directions: D, 1 or 2.
    """

    cell: Cell
    layout: str
    x: Tensor
    sizes: list[int]
    states: list[Tensor]
    weights: list[list[Tensor]]
    numbers: list[list[int]]
    bias: bool
    directions: int

    @classmethod
    def of(cls, call: Call, tensors: Mapping[int, Tensor]) -> Recurrence:
        """A call of one of torch's operators, with these tensors."""
        func, args = call.func, unpack(call.args, tensors)  # type: ignore[arg-type]
        hx = args[1]
        if func in STEPS:
            flat = [ref for ref in call.args[2:] if ref is not None]
            layout, sizes, bias, layers, directions = "step", [len(args[0])], len(flat) > 2, 1, 1
        elif is_packed(args):
            hx, flat, bias, layers = args[2], call.args[3], args[4], args[5]
            layout, sizes, directions = "packed", args[1].tolist(), 1 + args[8]
        else:
            flat, bias, layers, directions = call.args[2], args[3], args[4], 1 + args[7]
            layout, sizes = ("batch first", []) if args[8] else ("padded", [])
            length, sequences = args[0].shape[:2][:: -1 if args[8] else 1]
            sizes = [sequences] * length
        states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
        numbers = [[ref.number for ref in part] for part in in_parts(flat, layers * directions)]
        weights = [[tensors[number] for number in part] for part in numbers]
        states = [state.unsqueeze(0) for state in states] if layout == "step" else states
        found = cls(CELLS[func], layout, args[0], sizes, states, weights, numbers, bias, directions)
        found.x = found.rows(args[0])
        return found

    def rows(self, tensor: Tensor) -> Tensor:
        """An input or output, or its gradient, as rows `(N, m)`, those of the first step first."""
        if self.layout in ("step", "packed"):
            return tensor
        return (tensor.transpose(0, 1) if self.layout == "batch first" else tensor).flatten(0, 1)

    def by_example(self, rows: Tensor, axis: Held, batch: int) -> Tensor:
        """Rows as those of each example, `(B, T, m)`; `axis` says where examples are in the first output."""
        if self.layout not in ("step", "packed"):
            rows = rows.unflatten(0, (len(self.sizes), -1))  # (T, S, m)
            axis = axis.moved(1) if isinstance(axis, Axis) else axis
        return positions(axis.front(rows, batch))


def is_packed(args: Sequence[Any]) -> bool:
    """Whether these are the arguments for packed sequences."""
    return isinstance(args[1], Tensor) and not args[1].is_floating_point()


def in_parts(items: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """Cut into so many parts of one length."""
    each = len(items) // count
    return [items[k : k + each] for k in range(0, len(items), each)]


class Read(NamedTuple):
    """What a weight read, and a bias was added to.

    Attributes:
        weight: its number among the call's tensors.
        bias: likewise, None if there is none.
        rows: `(N, n)`.
        gates: what came of them, `(N, m)` in all.
    """

    weight: int
    bias: int | None
    rows: Tensor
    gates: list[Tensor]


def unrolled(call: Recurrence) -> tuple[list[Tensor], list[Read]]:
    """The outputs, rows `(N, D H)` and the last states `(L D, S, H)` each, and what every weight read on the way."""
    x, reads = call.x, []
    last: list[list[Tensor]] = []
    for k in range(0, len(call.weights), call.directions):
        outs = []
        for backwards in range(call.directions):
            out, states, own = direction(call, x, k + backwards, bool(backwards))
            outs.append(out)
            last.append(states)
            reads += own
        x = torch.cat(outs, 1) if len(outs) > 1 else outs[0]
    return [x, *(torch.stack(parts) for parts in zip(*last, strict=True))], reads


def direction(call: Recurrence, x: Tensor, k: int, backwards: bool) -> tuple[Tensor, list[Tensor], list[Read]]:
    """One layer in one direction: its rows, its last states `(S, H)`, and what its weights read."""
    (w_ih, w_hh, *rest), (n_ih, n_hh, *others) = call.weights[k], call.numbers[k]
    b_ih, b_hh = rest[:2] if call.bias else (None, None)
    projection = rest[-1] if len(rest) in (1, 3) else None
    gates = followed(F.linear(x, w_ih, b_ih))
    first = [states[k] for states in call.states]
    states = [state[: call.sizes[-1 if backwards else 0]] for state in first]
    before, kept, hidden, outs = ([] for _ in range(4))
    ended: list[list[Tensor]] = []
    steps = list(enumerate(gates.split(call.sizes)))
    for t, given in reversed(steps) if backwards else steps:
        size, now = call.sizes[t], len(states[0])
        if size < now:
            ended.append([state[size:] for state in states])
            states = [state[:size] for state in states]
        elif size > now:
            states = [torch.cat((state, new[now:size])) for state, new in zip(states, first, strict=True)]
        before.append(states[0])
        kept.append(followed(F.linear(states[0], w_hh, b_hh)))
        states = call.cell(given, kept[-1], states)
        if projection is not None:
            hidden.append(states[0])
            states = [followed(F.linear(states[0], projection)), *states[1:]]
        outs.append(states[0])
    for group in (before, kept, hidden, outs) if backwards else ():
        group.reverse()
    states = [torch.cat(parts) for parts in zip(states, *reversed(ended), strict=True)]
    n_bias = others if call.bias else (None, None)
    reads = [Read(n_ih, n_bias[0], x, [gates]), Read(n_hh, n_bias[1], torch.cat(before), kept)]
    if projection is not None:
        reads.append(Read(others[-1], None, torch.cat(hidden), outs))
    return torch.cat(outs), states, reads


def followed(tensor: Tensor) -> Tensor:
    """A tensor whose gradient can be asked for."""
    return tensor if tensor.requires_grad else tensor.requires_grad_()


# The rule


def recurrent(captured: Captured) -> dict[Any, Factor]:
    """Gradients of weights and biases, and of inputs and first states that are parameters, by their numbers."""
    call, batch = captured.call, captured.batch
    tensors = {index: widen(tensor) for index, tensor in captured.tensors.items()}
    own = {number for part in Recurrence.of(call, tensors).numbers for number in part}
    with torch.enable_grad():
        others = {index: tensors[index].detach().requires_grad_() for index in call.slots if index not in own}
        steps = Recurrence.of(call, {**tensors, **others})
        outputs, reads = unrolled(steps)
    reads = [read for read in reads if read.weight in call.slots or read.bias in call.slots]
    if call.func in STEPS:
        outputs = outputs[1:]  # there are only states
    elif captured.grads[0] is not None:
        captured.grads[0] = steps.rows(captured.grads[0])
    pairs = [(y, g.reshape(y.shape)) for y, g in zip(outputs, captured.grads, strict=True) if g is not None]
    asked = [*others.values(), *(gate for read in reads for gate in read.gates)]
    found = iter(torch.autograd.grad([y for y, _ in pairs], asked, [g for _, g in pairs], materialize_grads=True))
    factors: dict[Any, Factor] = {}
    for index in others:
        axis, grad = call.rows.get(index), next(found)
        factors[index] = Dense(grad.unsqueeze(0) if axis is None else axis.unrows(axis.rows(grad, batch), batch))
    for read in reads:
        deltas = torch.cat([next(found) for _ in read.gates])
        deltas, rows = (steps.by_example(t.detach(), call.out_axes[0], batch) for t in (deltas, read.rows))
        if read.weight in call.slots:
            factors[read.weight] = Outer(deltas, rows, call.shapes[read.weight])
        if read.bias in call.slots:
            factors[read.bias] = Dense(deltas.sum(1))
    return factors


RECURRENT = Rule("recurrent", (), frozenset(), {}, recurrent)
"""For calls of `CELLS` whose arguments are given by position."""
