r"""Squared norms of gradients that are a few rows of a table, $G_b[v] = \sum_{t : id_{bt} = v} g_{bt}$."""

from __future__ import annotations

import torch
from torch import Tensor

from perex.kernels.outer import squares
from perex.kernels.plan import Plan
from perex.kernels.spot import current
from perex.kernels.strategies import Strategies
from perex.kernels.triton.available import usable

NORMS = Strategies("rows")
"""Ways to $\\|G_b\\|^2$, for `grads` of shape `(B, T, d)`, `ids` `(B, T)` and the number of rows of the table."""


def plan(grads: torch.Size) -> Plan:
    """What `squared_norm` does with output gradients of shape `(B, T, d)`, if no row is read twice."""
    return NORMS.choose(grads)


def squared_norm(ids: Tensor, grads: Tensor, table_rows: int) -> Tensor:
    r"""$\|G_b\|^2 = \sum_v \|\sum_{t : id_{bt} = v} g_{bt}\|^2$, linear in the number of positions.

    Args:
        ids: `(B, T)` integers, rows of the table.
        grads: `(B, T, d)`.
        table_rows: number of rows of the table.

    Returns:
        Tensor `(B,)`.
    """
    if grads.numel() == 0:
        return grads.new_zeros(len(ids))
    return NORMS.run((grads.shape,), grads, ids, table_rows)


def _segments(grads: torch.Size) -> Plan:
    entries = grads.numel()
    return Plan("segments", 3 * entries, 2 * entries, entries)


@NORMS.way("segments", _segments)
def segments(grads: Tensor, ids: Tensor, table_rows: int) -> Tensor:
    """Positions of one example that read the same row are added first; their squares are summed then."""
    batch = len(ids)
    examples = torch.arange(batch, device=ids.device).unsqueeze(1)
    keys, segment = torch.unique(examples * table_rows + ids.long(), return_inverse=True)
    rows = grads.new_zeros(len(keys), grads.shape[2])
    rows.index_add_(0, segment.flatten(), grads.flatten(0, 1))
    return grads.new_zeros(batch).index_add_(0, keys // table_rows, squares(rows, 1))


def _triton_segments(grads: torch.Size) -> Plan | None:
    spot, entries = current(), grads.numel()
    if spot is None or not usable(spot):
        return None
    return Plan("Triton segments", 3 * entries, 6 * grads[:2].numel(), 6 * grads[:2].numel())


@NORMS.way("Triton segments", _triton_segments, on_gpu=True)
def triton_segments(grads: Tensor, ids: Tensor, table_rows: int) -> Tensor:
    """The same, rows added up in registers rather than in memory."""
    from perex.kernels.triton.rows import squared_norm

    return squared_norm(ids, grads)
