"""Calls of torch's recurrent operators, as sequences of steps.

They are `(input, hx, weights, bias, layers, dropout, train, bidirectional, batch_first)`; for packed sequences
`(data, batch_sizes, hx, weights, bias, layers, dropout, train, bidirectional)`, where step t has the first
`batch_sizes[t]` sequences, longest first; and `(input, hx, w_ih, w_hh, b_ih, b_hh)` for a single step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perex.capture.axis import Axis, Held
from perex.kernels import recurrence
from perex.kernels.recurrence import Cell, Weights
from perex.rules.call import Ref, unpack
from perex.rules.linear import positions

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
        func: the operator.
        args: its arguments.
    """

    cell: Cell
    layout: str
    x: Tensor
    sizes: list[int]
    states: list[Tensor]
    weights: list[Weights]
    numbers: list[dict[str, int]]
    directions: int
    func: Any
    args: Sequence[Any]

    @classmethod
    def of(cls, func: Any, template: Sequence[Any], tensors: Mapping[int, Tensor] | Sequence[Tensor]) -> Recurrence:
        """A call of one of torch's operators, with these tensors in the places of their numbers."""
        args = unpack(template, tensors)  # type: ignore[arg-type]
        hx = args[1]
        if func in STEPS:
            flat = [ref for ref in template[2:] if ref is not None]
            layout, sizes, bias, layers, directions = "step", [len(args[0])], len(flat) > 2, 1, 1
        elif is_packed(args):
            hx, flat, bias, layers = args[2], template[3], args[4], args[5]
            layout, sizes, directions = "packed", args[1].tolist(), 1 + args[8]
        else:
            flat, bias, layers, directions = template[2], args[3], args[4], 1 + args[7]
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
        found = cls(CELLS[func], layout, args[0], sizes, states, weights, numbers, directions, func, args)
        found.x = found.rows(args[0])
        return found

    def rows(self, tensor: Tensor) -> Tensor:
        """An input or output, or its gradient, as rows `(N, m)`, those of the first step first."""
        if self.layout in ("step", "packed"):
            return tensor
        return (tensor.transpose(0, 1) if self.layout == "batch first" else tensor).flatten(0, 1)

    def layers(self, count: int) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs of the first layers as rows, and their last states, by torch's operator, a layer at a time."""
        if self.layout == "step":
            found = self.func(*self.args)
            last = [found] if isinstance(found, Tensor) else list(found)
            return [last[0]], last
        outs, ends, rows = list[Tensor](), list[list[Tensor]](), self.x
        for k in range(0, count * self.directions, self.directions):
            own = slice(k, k + self.directions)
            flat = [tensor for weights in self.weights[own] for tensor in weights.flat()]
            first = [state[own] for state in self.states]
            hx = first if len(first) > 1 else first[0]
            options = "b_ih" in self.numbers[0], 1, 0.0, False, self.directions > 1
            if self.layout == "packed":
                rows, *last = self.func(rows, self.args[1], hx, flat, *options)
            else:
                steps = rows.unflatten(0, (len(self.sizes), -1))
                out, *last = self.func(steps, hx, flat, *options, False)
                rows = out.flatten(0, 1)
            outs.append(rows)
            ends.append(last)
        return outs, [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*ends, strict=True)]

    def in_layout(self, rows: Tensor) -> Tensor:
        """Rows as the operator lays out its output."""
        if self.layout in ("step", "packed"):
            return rows
        found = rows.unflatten(0, (len(self.sizes), -1))
        return found.transpose(0, 1) if self.layout == "batch first" else found

    def by_example(self, rows: Tensor, axis: Held, batch: int) -> Tensor:
        """Rows as those of each example, `(B, T, m)`; `axis` says where examples are in the first output."""
        if self.layout not in ("step", "packed"):
            rows = rows.unflatten(0, (len(self.sizes), -1))  # (T, S, m)
            axis = axis.moved(1) if isinstance(axis, Axis) else axis
        return positions(axis.front(rows, batch))


def is_packed(args: Sequence[Any]) -> bool:
    """Whether these are the arguments for packed sequences."""
    return isinstance(args[1], Tensor) and not args[1].is_floating_point()


def inputs_of(template: Sequence[Any], packed: bool) -> list[Ref]:
    """The input and the first states, one, or an LSTM's two, among an operator's arguments."""
    states = template[2 if packed else 1]
    return [template[0], states] if isinstance(states, Ref) else [template[0], *states]


def in_parts(items: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """Cut into so many parts of one length."""
    each = len(items) // count
    return [items[k : k + each] for k in range(0, len(items), each)]
