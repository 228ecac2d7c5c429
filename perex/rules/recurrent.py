r"""Recurrent layers: in each step, gates read a row of the input and the state before, $W x_t + c$ and $U h_{t-1} + d$.

So with $\delta_t$ the gradient of what the gates get, $G_b = \sum_t \delta_{bt} x_{bt}^\top$ for $W$, and likewise with
$h_{b,t-1}$ for $U$. The operator is run again, and back through time, for all examples at once; see
`perex.kernels.recurrence`.

torch's operators are `(input, hx, weights, bias, layers, dropout, train, bidirectional, batch_first)`; for packed
sequences `(data, batch_sizes, hx, weights, bias, layers, dropout, train, bidirectional)`, where step t has the first
`batch_sizes[t]` sequences, longest first; and `(input, hx, w_ih, w_hh, b_ih, b_hh)` for a single step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perex.capture.axis import Axis, Held
from perex.factors import Dense, Factor, Outer
from perex.kernels import recurrence
from perex.kernels.large import multiplied
from perex.kernels.products import widen
from perex.kernels.recurrence import Cell, Trace, Weights
from perex.rules.call import Call, Captured, Ref, own_rows, unpack
from perex.rules.linear import positions
from perex.rules.registry import Rule

LSTM, GRU, TANH, RELU = recurrence.LSTM(), recurrence.GRU(), recurrence.Simple(relu=False), recurrence.Simple(relu=True)

CELLS: dict[Any, Cell] = {
    torch.lstm: LSTM,
    torch.gru: GRU,
    torch.rnn_tanh: TANH,
    torch.rnn_relu: RELU,
    torch.lstm_cell: LSTM,
    torch.gru_cell: GRU,
    torch.rnn_tanh_cell: TANH,
    torch.rnn_relu_cell: RELU,
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
        weights: for each layer and direction.
        numbers: their numbers among the call's tensors, by their names.
        directions: D, 1 or 2.
    """

    cell: Cell
    layout: str
    x: Tensor
    sizes: list[int]
    states: list[Tensor]
    weights: list[Weights]
    numbers: list[dict[str, int]]
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
        names = ["ih", "hh", *(["b_ih", "b_hh"] if bias else []), "hr"]  # a projection is not always there
        numbers = [
            {name: ref.number for name, ref in zip(names, part, strict=False)}
            for part in in_parts(flat, layers * directions)
        ]
        weights = [Weights(**{name: tensors[number] for name, number in part.items()}) for part in numbers]
        states = [state.unsqueeze(0) for state in states] if layout == "step" else states
        found = cls(CELLS[func], layout, args[0], sizes, states, weights, numbers, directions)
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


# The rule


class Read(NamedTuple):
    r"""What a weight reads, and what comes back, of all steps.

    Attributes:
        weight: its number among the call's tensors.
        bias: that of the bias that is added, None if there is none.
        rows: x, `(N, n)`.
        deltas: $\delta$, `(N, m)`.
    """

    weight: int
    bias: int | None
    rows: Tensor
    deltas: Tensor


def recurrent(captured: Captured) -> dict[Any, Factor]:
    """Gradients of weights and biases, and of inputs and first states that are parameters, by their numbers."""
    call, batch = captured.call, captured.batch
    own = Recurrence.of(call, {index: widen(tensor) for index, tensor in captured.tensors.items()})
    factors: dict[Any, Factor] = {}
    grads = captured.grads if call.func not in STEPS else [None, *captured.grads]
    given = [call.args[0], *refs_of(call.args[2 if own.layout == "packed" else 1])]  # input and first states
    for read in through_time(own, grads, to_input=given[0].number in call.slots):
        if isinstance(read, Read):
            deltas = own.by_example(read.deltas, call.out_axes[0], batch)
            if read.weight in call.slots:
                rows = own.by_example(read.rows, call.out_axes[0], batch)
                factors[read.weight] = Outer(deltas, rows, call.shapes[read.weight])
            if read.bias in call.slots:
                factors[read.bias] = Dense(deltas.sum(1))
            continue
        for ref, grad in zip(given, read, strict=True):
            if grad is not None and ref.number in call.slots:
                axis, shape = call.rows.get(ref.number), call.shapes[ref.number]
                rows = grad.reshape(1, *shape) if axis is None else axis.rows(grad.reshape(shape), batch)
                factors[ref.number] = own_rows(rows, axis, batch, shape)
    return factors


def refs_of(states: Any) -> list[Any]:
    """The first states: one, or an LSTM's two."""
    return [states] if isinstance(states, Ref) else list(states)


def through_time(
    own: Recurrence, grads: Sequence[Tensor | None], to_input: bool
) -> Iterator[Read | list[Tensor | None]]:
    """What all weights read, from the last layer to the first; then the gradients of the input and of first states.

    Args:
        own: the call.
        grads: those of its outputs: rows, and last states.
        to_input: whether the input's gradient is wanted, too.
    """
    layers: list[tuple[Tensor, list[Trace]]] = []
    x = own.x
    for k in range(0, len(own.weights), own.directions):
        traces = [
            recurrence.forward(own.cell, x, own.sizes, [state[j] for state in own.states], own.weights[j], j > k)
            for j in range(k, k + own.directions)
        ]
        layers.append((x, traces))
        x = torch.cat([trace.out for trace in traces], 1) if len(traces) > 1 else traces[0].out
    grad = torch.zeros_like(x) if grads[0] is None else own.rows(grads[0])
    last = [
        torch.zeros_like(state) if given is None else given.reshape(state.shape)
        for state, given in zip(own.states, grads[1:], strict=True)
    ]
    first = [torch.empty_like(state) for state in own.states]
    while layers:
        x, traces = layers.pop()
        below: Tensor | None = None
        for backwards, part in enumerate(grad.chunk(len(traces), 1)):
            j = len(layers) * own.directions + backwards
            weights, numbers, trace = own.weights[j], own.numbers[j], traces[backwards]
            ends = [state[j] for state in last]
            given, kept, outs, starts = recurrence.back(
                own.cell, trace, own.sizes, part, ends, weights, bool(backwards)
            )
            yield Read(numbers["ih"], numbers.get("b_ih"), x, given)
            yield Read(numbers["hh"], numbers.get("b_hh"), trace.before[0], kept)
            if trace.hidden is not None:
                yield Read(numbers["hr"], None, trace.hidden, outs)
            for state, start in zip(first, starts, strict=True):
                state[j] = start
            if layers or to_input:
                down = multiplied(given, weights.ih)
                below = down if below is None else below.add_(down)
        grad = grad if below is None else below
    if own.layout == "batch first":
        grad = grad.unflatten(0, (len(own.sizes), -1)).transpose(0, 1)
    yield [grad if to_input else None, *first]


RECURRENT = Rule("recurrent", (), frozenset(), {}, recurrent)
"""For calls of `CELLS` whose arguments are given by position."""
