r"""Squared norms of gradients that are a few rows of a table, $G_b[v] = \sum_{t : id_{bt} = v} g_{bt}$."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perex.kernels.triton.tiles import tiles

WIDEST, AT_ONCE = 256, 8
"""How much of a row a program adds up, and how many positions it reads at a time."""


@triton.jit(do_not_specialize=["positions", "across"])
def segments_kernel(
    order: tl.tensor,
    counts: tl.tensor,
    grads: tl.tensor,
    out: tl.tensor,
    positions: int,
    width: int,
    grads_b: tl.tensor,
    grads_t: tl.tensor,
    grads_d: tl.tensor,
    across: int,
    AT_ONCE: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    r"""$\sum_{j \in tile} (\sum_t g_{tj})^2$ over the positions t that read one row of the table."""
    program = tl.program_id(0)
    slot, tile = (program // across).to(tl.int64), program % across
    j = (tile * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    base = grads + (slot // positions) * grads_b + j[None, :] * grads_d
    count = tl.load(counts + slot)
    parts = tl.zeros((AT_ONCE, COLUMNS), tl.float32)
    for start in range(0, count, AT_ONCE):
        k = start + tl.arange(0, AT_ONCE)
        t = tl.load(order + slot + k, mask=k < count, other=0)
        parts += tl.load(base + t[:, None] * grads_t, mask=(k[:, None] < count) & (j[None, :] < width), other=0.0)
    row = tl.sum(parts, 0)
    tl.store(out + program, tl.sum(row * row))


def squared_norm(ids: Tensor, grads: Tensor) -> Tensor:
    r"""$\|G_b\|^2 = \sum_v \|\sum_{t : id_{bt} = v} g_{bt}\|^2$, rows added up in registers.

    Positions of an example are sorted by the row that they read. Where a run of equal rows begins, programs add it up;
    those of its other positions find nothing to do. So how many rows differ is asked by nobody, and nothing waits.

    Args:
        ids: `(B, T)` integers, rows of the table.
        grads: `(B, T, d)`, with any strides.

    Returns:
        Tensor `(B,)`, in float32.
    """
    batch, positions, width = grads.shape
    if grads.numel() == 0:
        return grads.new_zeros(batch, dtype=torch.float32)
    found, order = torch.sort(ids.int(), dim=1)  # of 32 bits, for half the passes
    found, order = found.contiguous(), order.contiguous()
    begin, end = torch.searchsorted(found, found), torch.searchsorted(found, found, right=True)
    counts = (end - begin) * (begin == torch.arange(positions, device=ids.device))
    columns = min(WIDEST, triton.next_power_of_2(width))
    across = tiles(width, columns)
    out = grads.new_empty(batch, positions * across, dtype=torch.float32)
    with torch.cuda.device_of(grads):
        segments_kernel[(out.numel(),)](
            order, counts, grads, out, positions, width, *grads.stride(), across, AT_ONCE=AT_ONCE, COLUMNS=columns
        )
    return out.sum(1)
