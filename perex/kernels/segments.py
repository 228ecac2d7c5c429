r"""Squared norms of gradients that are a few rows of a table, $G_b[v] = \sum_{t : id_{bt} = v} g_{bt}$."""

from __future__ import annotations

import torch
from torch import Tensor

from perex.kernels.outer import squares
from perex.kernels.plan import Plan


def plan(grads: torch.Size) -> Plan:
    """What `squared_norm` does with output gradients of shape `(B, T, d)`, if no row is read twice."""
    entries = grads.numel()
    return Plan("segments", 3 * entries, 2 * entries)


def squared_norm(ids: Tensor, grads: Tensor, table_rows: int) -> Tensor:
    r"""$\|G_b\|^2 = \sum_v \|\sum_{t : id_{bt} = v} g_{bt}\|^2$, linear in the number of positions.

    Positions of one example that read the same row are added first; their squares are summed then.

    Args:
        ids: `(B, T)` integers, rows of the table.
        grads: `(B, T, d)`.
        table_rows: number of rows of the table.

    Returns:
        Tensor `(B,)`.
    """
    batch, positions = ids.shape
    out = grads.new_zeros(batch)
    if ids.numel() == 0 or grads.shape[2] == 0:
        return out
    examples = torch.arange(batch, device=ids.device).unsqueeze(1)
    keys, segment = torch.unique(examples * table_rows + ids.long(), return_inverse=True)
    rows = grads.new_zeros(len(keys), grads.shape[2])
    rows.index_add_(0, segment.flatten(), grads.flatten(0, 1))
    return out.index_add_(0, keys // table_rows, squares(rows, 1))
