r"""Recurrent layers back through time: the gradients of what their gates get.

A step reads $W x_t + c$ (*given*) and $U h_{t-1} + d$ (*kept*). Forward, it leaves the activated gates. From these, the
slopes of all steps are computed at once, so that going back, a step is a few products and one with $U$. Rows are those
of the first step, then of the second, and so on; later steps may have fewer, as packed sequences do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from perex.kernels.large import by_onednn, faster, multiplied

Tensors = Sequence[Tensor]


class Cell(Protocol):
    """What happens in a step of n rows, H numbers each.

    Attributes:
        acts: what a step leaves, in multiples of H.
        width: what going back leaves, likewise.
    """

    acts: int
    width: int

    def forward(self, given: Tensor, kept: Tensor, states: Tensors, acts: Tensor) -> list[Tensor]:
        """The states after the step; `acts`, `(n, acts H)`, is written."""
        ...

    def slopes(self, acts: Tensor, before: Tensors) -> list[Tensor]:
        """What `back` reads, of all steps: `(N, ...)` each."""
        ...

    def back(self, grad: Tensor, others: Tensors, slopes: Tensors, out: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        r"""From the gradients of the states after a step: $\delta$ is written to `out`, `(n, width H)`.

        Returns:
            The gradient of the first state before it, but for what comes through $U$ (None for zero); the others'.
        """
        ...

    def given(self, out: Tensor) -> Tensor:
        r"""$\delta$ of what is given, `(n, k H)`."""
        ...

    def kept(self, out: Tensor) -> Tensor:
        r"""$\delta$ of what is kept, `(n, k H)`."""
        ...


class LSTM:
    r"""$c' = f c + i g$ and $h' = o \tanh c'$."""

    acts, width = 4, 4

    def forward(self, given: Tensor, kept: Tensor, states: Tensors, acts: Tensor) -> list[Tensor]:
        """See `Cell.forward`."""
        i, f, g, o = torch.add(given, kept, out=acts).chunk(4, 1)
        c = torch.addcmul(f.sigmoid_() * states[1], i.sigmoid_(), g.tanh_())
        return [o.sigmoid_() * c.tanh(), c]

    def slopes(self, acts: Tensor, before: Tensors) -> list[Tensor]:
        r"""$\tanh(c') o'$; $o (1 - \tanh^2 c')$; $g i'$, $c f'$ and $i g'$; and f."""
        i, f, g, o = acts.chunk(4, 1)
        after = torch.addcmul(f * before[1], i, g).tanh_()
        inner = torch.stack((g * i * (1 - i), before[1] * f * (1 - f), i * (1 - g * g)), 1)
        return [after * o * (1 - o), o * (1 - after * after), inner, f]

    def back(self, grad: Tensor, others: Tensors, slopes: Tensors, out: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """See `Cell.back`."""
        of_o, of_c, inner, f = slopes
        outs = out.unflatten(1, (4, -1))
        torch.mul(grad, of_o, out=outs[:, 3])
        c = torch.addcmul(others[0], grad, of_c)
        torch.mul(c.unsqueeze(1), inner, out=outs[:, :3])
        return None, [c * f]

    def given(self, out: Tensor) -> Tensor:
        """See `Cell.given`."""
        return out

    def kept(self, out: Tensor) -> Tensor:
        """See `Cell.kept`."""
        return out


class GRU:
    r"""$h' = (1 - z) n + z h$ with $n = \tanh(n_x + r n_h)$."""

    acts, width = 4, 4

    def forward(self, given: Tensor, kept: Tensor, states: Tensors, acts: Tensor) -> list[Tensor]:
        """See `Cell.forward`."""
        (r_x, z_x, n_x), (r_h, z_h, n_h), (r, z, n, inner) = given.chunk(3, 1), kept.chunk(3, 1), acts.chunk(4, 1)
        torch.add(r_x, r_h, out=r).sigmoid_()
        torch.add(z_x, z_h, out=z).sigmoid_()
        torch.addcmul(n_x, r, n_h, out=n).tanh_()
        inner.copy_(n_h)
        return [torch.lerp(n, states[0], z)]

    def slopes(self, acts: Tensor, before: Tensors) -> list[Tensor]:
        r"""Of $n_x$, r, z and $n_h$; and z."""
        r, z, n, inner = acts.chunk(4, 1)
        of_n = (1 - z) * (1 - n * n)
        of_r = of_n * inner * r * (1 - r)
        return [torch.stack((of_n, of_r, (before[0] - n) * z * (1 - z), of_n * r), 1), z]

    def back(self, grad: Tensor, others: Tensors, slopes: Tensors, out: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """See `Cell.back`."""
        torch.mul(grad.unsqueeze(1), slopes[0], out=out.unflatten(1, (4, -1)))
        return grad * slopes[1], []

    def given(self, out: Tensor) -> Tensor:
        """See `Cell.given`."""
        n_x, r, z, _ = out.chunk(4, 1)
        return torch.cat((r, z, n_x), 1)

    def kept(self, out: Tensor) -> Tensor:
        """See `Cell.kept`."""
        return out[:, out.shape[1] // 4 :]


class Simple:
    r"""$h' = \tanh(\cdot)$ or $\max(\cdot, 0)$."""

    acts, width = 1, 1

    def __init__(self, relu: bool) -> None:
        self.relu = relu

    def forward(self, given: Tensor, kept: Tensor, states: Tensors, acts: Tensor) -> list[Tensor]:
        """See `Cell.forward`."""
        torch.add(given, kept, out=acts)
        return [acts.relu_() if self.relu else acts.tanh_()]

    def slopes(self, acts: Tensor, before: Tensors) -> list[Tensor]:
        """See `Cell.slopes`."""
        return [(acts <= 0).logical_not_().to(acts.dtype) if self.relu else 1 - acts * acts]

    def back(self, grad: Tensor, others: Tensors, slopes: Tensors, out: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """See `Cell.back`."""
        torch.mul(grad, slopes[0], out=out)
        return None, []

    def given(self, out: Tensor) -> Tensor:
        """See `Cell.given`."""
        return out

    def kept(self, out: Tensor) -> Tensor:
        """See `Cell.kept`."""
        return out


class Weights(NamedTuple):
    """Of one layer in one direction; H' = H, or P where there is a projection.

    Attributes:
        ih: W, `(k H, d)`.
        hh: U, `(k H, H')`.
        b_ih: c, `(k H,)`.
        b_hh: d, likewise.
        hr: the projection, `(P, H)`.
    """

    ih: Tensor
    hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    hr: Tensor | None = None


class Trace(NamedTuple):
    """What going forward leaves.

    Attributes:
        acts: the activated gates, `(N, acts H)`.
        before: the states that each step began with, `(N, H')`, and `(N, H)` for an LSTM's second.
        hidden: what was projected, `(N, H)`, if anything was.
        out: `(N, H')`.
        last: the last states, `(S, H')` and `(S, H)`.
    """

    acts: Tensor
    before: list[Tensor]
    hidden: Tensor | None
    out: Tensor
    last: list[Tensor]


def steps(sizes: Sequence[int], backwards: bool) -> list[tuple[int, int]]:
    """Where the rows of each step start and stop, in the order in which they are run."""
    found = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))
    return found[::-1] if backwards else found


def resized(states: list[Tensor], size: int, source: Tensors, sink: Tensors) -> list[Tensor]:
    """States with as many rows as a step has: new ones come from `source`, and those that end go to `sink`."""
    now = len(states[0])
    if size < now:
        for state, end in zip(states, sink, strict=True):
            end[size:now] = state[size:]
        return [state[:size] for state in states]
    if size > now:
        return [torch.cat((state, new[now:size])) for state, new in zip(states, source, strict=True)]
    return states


def multiplier(rows: Tensor, matrix: Tensor, times: int) -> Callable[..., Tensor]:
    """What multiplies rows by a matrix, and adds a bias, in each of many steps."""
    return by_onednn if faster(rows, matrix, times=times) else plainly


def plainly(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ b + bias` of two matrices."""
    return a @ b if bias is None else torch.addmm(bias, a, b)


def forward(cell: Cell, x: Tensor, sizes: Sequence[int], first: Tensors, weights: Weights, backwards: bool) -> Trace:
    """Run one layer in one direction.

    Args:
        cell: what happens in a step.
        x: the input, `(N, d)`.
        sizes: how many rows each step has.
        first: the first states, `(S, H')` and, for an LSTM, `(S, H)`.
        weights: the layer's.
        backwards: whether the last step is the first one.
    """
    given, product = multiplied(x, weights.ih.mT, weights.b_ih), multiplier(first[0], weights.hh.mT, len(sizes))
    width = weights.hr.shape[1] if weights.hr is not None else first[0].shape[1]
    acts, out = x.new_empty(len(x), cell.acts * width), x.new_empty(len(x), first[0].shape[1])
    before, last = [x.new_empty(len(x), state.shape[1]) for state in first], [torch.empty_like(s) for s in first]
    hidden = x.new_empty(len(x), width) if weights.hr is not None else None
    order = steps(sizes, backwards)
    states = [state[: order[0][1] - order[0][0]] for state in first]
    for i, j in order:
        states = resized(states, j - i, first, last)
        for all_before, state in zip(before, states, strict=True):
            all_before[i:j] = state
        kept = product(states[0], weights.hh.mT, weights.b_hh)
        states = cell.forward(given[i:j], kept, states, acts[i:j])
        if hidden is not None and weights.hr is not None:
            hidden[i:j] = states[0]
            states = [states[0] @ weights.hr.mT, *states[1:]]
        out[i:j] = states[0]
    resized(states, 0, first, last)
    return Trace(acts, before, hidden, out, last)


def back(
    cell: Cell, trace: Trace, sizes: Sequence[int], grad: Tensor, last: Tensors, weights: Weights, backwards: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    r"""Run it back through time.

    Args:
        cell: what happens in a step.
        trace: what going forward left.
        sizes: how many rows each step has.
        grad: the gradient of its output, `(N, H')`.
        last: the gradients of its last states.
        weights: the layer's.
        backwards: whether the last step was the first one.

    Returns:
        The gradients $\delta$ of what is given and of what is kept, `(N, k H)` each; of the outputs with all that came
        after them, `(N, H')`; and of the first states.
    """
    slopes, product = cell.slopes(trace.acts, trace.before), multiplier(last[0], weights.hh.mT, len(sizes))
    width = trace.acts.shape[1] // cell.acts
    found = grad.new_empty(len(grad), cell.width * width)
    grads, first = torch.empty_like(grad) if weights.hr is not None else grad, [torch.empty_like(s) for s in last]
    order = steps(sizes, not backwards)
    carry = [state[: order[0][1] - order[0][0]] for state in last]
    for i, j in order:
        carry = resized(carry, j - i, last, first)
        here = carry[0] + grad[i:j]
        if weights.hr is not None:
            grads[i:j] = here
            here = here @ weights.hr
        direct, others = cell.back(here, carry[1:], [slope[i:j] for slope in slopes], found[i:j])
        through = product(cell.kept(found[i:j]), weights.hh)
        carry = [through if direct is None else through.add_(direct), *others]
    resized(carry, 0, last, first)
    return cell.given(found), cell.kept(found), grads, first
