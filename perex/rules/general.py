r"""The general path: any operator, by its own vector-Jacobian product, one example at a time.

For the shared argument $S$ of an operator that maps row to row, $y_b = f(x_b, S)$, the per-example gradient
is $G_b = J_S f(x_b, S)^\top g_b$. Gradients of large arguments are made as they are reduced, some examples' at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from perex.factors import Dense, Factor, Mapped
from perex.kernels.blocks import block
from perex.kernels.products import widen
from perex.rules.call import Captured, own_rows
from perex.rules.registry import Rule
from perex.rules.row_by_row import RowByRow


def general(captured: Captured) -> dict[Any, Factor]:
    """Per-example gradients of all wanted tensors of the call, by their numbers."""
    call, batch = captured.call, captured.batch
    wanted: list[int] = list(call.slots)
    if not batch:
        return {i: Dense(widen(captured.tensors[i]).new_zeros(0, *captured.tensors[i].shape)) for i in wanted}
    operator = RowByRow.of(captured, wanted)
    large = [i for i in wanted if i not in operator.rows and batch * call.shapes[i].numel() > block()]
    factors: dict[Any, Factor] = {i: Mapped(batch, call.shapes[i], partial(alone, operator, i)) for i in large}
    if small := [i for i in wanted if i not in large]:
        for index, values in zip(small, operator.gradients(small, 0, batch), strict=True):
            factors[index] = own_rows(values, call.rows.get(index), batch, call.shapes[index])
    return factors


def alone(operator: RowByRow, index: int, start: int, stop: int) -> Tensor:
    """The gradients of some examples for one tensor."""
    (found,) = operator.gradients([index], start, stop)
    return found


GENERAL = Rule("general", (), frozenset(), {}, general)
