r"""Recurrent layers back through time: the gradients of what their gates get.

A step reads $W x_t + c$ (*given*) and $U h_{t-1} + d$ (*kept*). With all outputs $h_t$ at hand, the gates of all steps
are computed at once, and the slopes of all steps from these, so that going back, a step is a few products and one with
$U$. Rows are those of the first step, then of the second, and so on; later ones may have fewer, in packed sequences.
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
        shown: whether the output is all that there is to know of a step.
    """

    shown: bool

    def gates(self, given: Tensor, kept: Tensor) -> Tensor:
        """The activated gates of all steps, `(N, k H)`; unless they are shown. What is given may be written over."""
        ...

    def slopes(self, acts: Tensor, before: Tensors) -> list[Tensor]:
        """What `back` reads, of all steps: `(N, ...)` each."""
        ...

    def back(self, grad: Tensor, others: Tensors, slopes: Tensors, out: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        r"""From the gradients of the states after a step: $\delta$ is written to `out`, `(n, k H)`.

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

    shown = False

    def gates(self, given: Tensor, kept: Tensor) -> Tensor:
        """See `Cell.gates`: i, f, g and o."""
        acts = given.add_(kept)
        i_f, g, o = acts.tensor_split((acts.shape[1] // 2, acts.shape[1] // 4 * 3), 1)
        for gate, activate in ((i_f, Tensor.sigmoid_), (g, Tensor.tanh_), (o, Tensor.sigmoid_)):
            activate(gate)
        return acts

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

    shown = False

    def gates(self, given: Tensor, kept: Tensor) -> Tensor:
        """See `Cell.gates`: r, z, n, and $n_h$."""
        (r_z_x, n_x), (r_z_h, n_h) = (t.tensor_split((t.shape[1] // 3 * 2,), 1) for t in (given, kept))
        r_z = r_z_x.add_(r_z_h).sigmoid_()
        return torch.cat((r_z, torch.addcmul(n_x, r_z.chunk(2, 1)[0], n_h).tanh_(), n_h), 1)

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

    shown = True

    def __init__(self, relu: bool) -> None:
        self.relu = relu

    def gates(self, given: Tensor, kept: Tensor) -> Tensor:
        """See `Cell.gates`: what is shown."""
        acts = given.add_(kept)
        return acts.relu_() if self.relu else acts.tanh_()

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

    def flat(self) -> list[Tensor]:
        """Those that there are, in the order in which torch's operators take them."""
        return [weight for weight in self if weight is not None]


class Trace(NamedTuple):
    """What going forward leaves.

    Attributes:
        acts: the activated gates, `(N, k H)`.
        before: the states that each step began with, `(N, H')`, and `(N, H)` for an LSTM's second.
        hidden: what was projected, `(N, H)`, if anything was.
    """

    acts: Tensor
    before: list[Tensor]
    hidden: Tensor | None


def steps(sizes: Sequence[int], backwards: bool) -> list[tuple[int, int]]:
    """Where the rows of each step start and stop, in the order in which they are run."""
    found = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))
    return found[::-1] if backwards else found


def resized(states: list[Tensor], size: int, source: Tensors, sink: Tensors = ()) -> list[Tensor]:
    """States with as many rows as a step has: new ones come from `source`, and those that end go to `sink`."""
    now = len(states[0])
    if size < now:
        for state, end in zip(states, sink, strict=False):
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


def trace(
    cell: Cell, x: Tensor, out: Tensor, sizes: Sequence[int], first: Tensors, weights: Weights, backwards: bool
) -> Trace:
    """What one layer did in one direction.

    Args:
        cell: what happens in a step.
        x: its input, `(N, d)`.
        out: its output, `(N, H')`.
        sizes: how many rows each step has.
        first: the first states, `(S, H')` and, for an LSTM, `(S, H)`.
        weights: the layer's.
        backwards: whether the last step is the first one.
    """
    order = steps(sizes, backwards)
    before = [before_each(out, order, first[0])]
    acts = out
    if not cell.shown:
        given, kept = multiplied(x, weights.ih.mT, weights.b_ih), multiplied(before[0], weights.hh.mT, weights.b_hh)
        acts = cell.gates(given, kept)
    hidden: Tensor | None = None
    if len(first) > 1:  # of an LSTM
        i, f, g, o = acts.chunk(4, 1)
        after, added = torch.empty_like(i), i * g
        states = [first[1][: order[0][1] - order[0][0]]]
        for start, stop in order:
            states = resized(states, stop - start, first[1:])
            states = [torch.addcmul(added[start:stop], f[start:stop], states[0], out=after[start:stop])]
        before.append(before_each(after, order, first[1]))
        hidden = o * after.tanh_() if weights.hr is not None else None
    return Trace(acts, before, hidden)


def before_each(after: Tensor, order: Sequence[tuple[int, int]], first: Tensor) -> Tensor:
    """The states that each step began with, of those after it, `(N, H)`, and of the first, `(S, H)`."""
    found, (last, size) = after.new_empty(after.shape), (0, 0)
    for start, stop in order:
        old = min(size, stop - start)
        found[start : start + old] = after[last : last + old]
        found[start + old : stop] = first[old : stop - start]
        last, size = start, stop - start
    return found


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
    found = grad.new_empty(trace.acts.shape)
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
