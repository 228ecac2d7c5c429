r"""Products of groups of rows with a weight each: $y_r = x_r W_{e(r)}$, as experts make of their tokens."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from perex.capture.axis import Axis, Owners
from perex.factors import Factor, Few, Outer, Part, Place, Total
from perex.rules.call import Captured
from perex.rules.registry import operator_rule


@operator_rule(
    torch._grouped_mm,
    arguments="mat_a mat_b offs bias out_dtype",
    parameters="mat_b",
    saves={"mat_b": "mat_a offs"},
    applies=lambda tensors: tensors["mat_a"].dim() == 2 and tensors["mat_b"].dim() == 3,
)
def grouped_mm(captured: Captured) -> dict[str, Factor]:
    r"""`grouped_mm(x, W, offs)`: rows up to `offs[e]` go to expert e, so $G_b[e] = \sum_r x_r g_r^\top$ over its own.

    Experts have places of their own in `W`, `(E, d_in, d_out)`, so their gradients have nothing in common.
    """
    x, grads, axis = captured.value("mat_a"), captured.grads[0], captured.call.out_axes[0]
    assert grads is not None
    weight, batch = captured.shape("mat_b"), captured.batch
    own = axis.ids(batch) if isinstance(axis, Axis) else torch.zeros(len(x), dtype=torch.int64, device="cpu")
    ends = captured.value("offs").tolist()
    size, stride = tuple(weight[1:]), (weight[2], 1)
    parts: list[Factor] = []
    for expert, (start, stop) in enumerate(itertools.pairwise([0, *ends])):
        if start < stop:
            place = Place(weight, size, stride, expert * weight[1] * weight[2])
            parts.append(Part(of_rows(x[start:stop], grads[start:stop], own[start:stop], batch, weight), place))
    if not parts:
        parts.append(
            Part(
                Outer(grads.new_zeros(batch, 0, weight[1]), grads.new_zeros(batch, 0, weight[2]), torch.Size(size)),
                Place(weight, size, stride, 0),
            )
        )
    return {"mat_b": Total(parts)}


def of_rows(x: Tensor, grads: Tensor, owners: Tensor, batch: int, weight: torch.Size) -> Factor:
    """The gradients of one expert's weight, for the examples that have rows there."""
    rows = Axis(0, owners=Owners(owners))
    examples = Owners(owners).examples
    here = rows.among(examples, batch)
    left, right = here.front(x, len(examples)), here.front(grads, len(examples))
    return Few(Outer(left, right, torch.Size(weight[1:])), examples, batch)
