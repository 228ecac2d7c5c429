r"""Recurrent layers: in each step, gates read a row of the input and the state before, $W x_t + c$ and $U h_{t-1} + d$.

So with $\delta_t$ the gradient of what the gates get, $G_b = \sum_t \delta_{bt} x_{bt}^\top$ for $W$, and likewise with
$h_{b,t-1}$ for $U$. The operator is run back through time for all examples at once; see `perex.kernels.recurrence`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perex.factors import Dense, Factor, Outer
from perex.kernels import recurrence
from perex.kernels.large import multiplied
from perex.kernels.products import widen
from perex.rules.call import Captured, own_rows
from perex.rules.recurrence import STEPS, Recurrence, inputs_of
from perex.rules.recurring import Run
from perex.rules.registry import Rule


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
    call, batch, run = captured.call, captured.batch, captured.left
    own = Recurrence.of(call.func, call.args, {index: widen(tensor) for index, tensor in captured.tensors.items()})
    outs = [widen(out) for out in run.outputs()] if isinstance(run, Run) else []
    layers = len(own.weights) // own.directions
    if len(outs) < layers:
        with torch.backends.cudnn.flags(enabled=False):  # which warns of weights that do not lie one after the other
            outs = own.layers(layers - len(outs))[0] + outs
    factors: dict[Any, Factor] = {}
    grads = captured.grads if call.func not in STEPS else [None, *captured.grads]
    given = inputs_of(call.args, own.layout == "packed")
    asked = isinstance(run, Run) and run.asked
    of: Tensor | None = None
    for read in through_time(own, outs, grads, to_input=asked or given[0].number in call.slots):
        if isinstance(read, Read):
            if read.deltas is not of:  # most gates add up what is given and what is kept
                of, deltas = read.deltas, own.by_example(read.deltas, call.out_axes[0], batch)
            if read.weight in call.slots:
                rows = own.by_example(read.rows, call.out_axes[0], batch)
                factors[read.weight] = Outer(deltas, rows, call.shapes[read.weight])
            if read.bias in call.slots:
                factors[read.bias] = Dense(deltas.sum(1))
            continue
        found = zip(given, read, strict=True)
        back = {ref.number: grad.reshape(call.shapes[ref.number]) for ref, grad in found if grad is not None}
        if isinstance(run, Run) and run.asked:
            run.found(captured.arrived, back)
        for number, grad in back.items():
            if number in call.slots:
                axis, shape = call.rows.get(number), call.shapes[number]
                rows = grad.reshape(1, *shape) if axis is None else axis.rows(grad, batch)
                factors[number] = own_rows(rows, axis, batch, shape)
    return factors


def through_time(
    own: Recurrence, outs: Sequence[Tensor], grads: Sequence[Tensor | None], to_input: bool
) -> Iterator[Read | list[Tensor | None]]:
    """What all weights read, from the last layer to the first; then the gradients of the input and of first states.

    Args:
        own: the call.
        outs: the outputs of all layers, as rows.
        grads: those of its outputs: rows, and last states.
        to_input: whether the input's gradient is wanted, too.
    """
    layers = list(zip([own.x, *outs[:-1]], outs, strict=True))
    x = outs[-1]
    grad = torch.zeros_like(x) if grads[0] is None else own.rows(grads[0])
    last = [
        torch.zeros_like(state) if given is None else given.reshape(state.shape)
        for state, given in zip(own.states, grads[1:], strict=True)
    ]
    first = [torch.empty_like(state) for state in own.states]
    while layers:
        x, out = layers.pop()
        below: Tensor | None = None
        parts = zip(grad.chunk(own.directions, 1), out.chunk(own.directions, 1), strict=True)
        for backwards, (part, half) in enumerate(parts):
            j = len(layers) * own.directions + backwards
            weights, numbers, ends = own.weights[j], own.numbers[j], [state[j] for state in last]
            begins = [state[j] for state in own.states]
            trace = recurrence.trace(own.cell, x, half, own.sizes, begins, weights, bool(backwards))
            given, kept, sums, starts = recurrence.back(
                own.cell, trace, own.sizes, part, ends, weights, bool(backwards)
            )
            yield Read(numbers["ih"], numbers.get("b_ih"), x, given)
            yield Read(numbers["hh"], numbers.get("b_hh"), trace.before[0], kept)
            if trace.hidden is not None:
                yield Read(numbers["hr"], None, trace.hidden, sums)
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
