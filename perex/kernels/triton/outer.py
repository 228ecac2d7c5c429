r"""Squared norms of sums of outer products, $G_b = \sum_t l_{bt} r_{bt}^\top$, tile by tile in registers.

Each program writes one number, a part of $\|G_b\|^2$; torch adds these up, always in the same order. Sizes have 32
bits; strides, and what is multiplied with them, 64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perex.kernels.cancellation import recomputed
from perex.kernels.triton.available import precision, widened
from perex.kernels.triton.tiles import side, step, tiles, warps


@triton.jit(do_not_specialize=["groups", "positions", "down", "across"])
def direct_kernel(
    left: tl.tensor,
    right: tl.tensor,
    out: tl.tensor,
    groups: int,
    positions: int,
    m: int,
    n: int,
    left_b: tl.int64,
    left_g: tl.int64,
    left_t: tl.int64,
    left_m: tl.int64,
    right_b: tl.int64,
    right_g: tl.int64,
    right_t: tl.int64,
    right_n: tl.int64,
    down: int,
    across: int,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    r"""$\sum_{ij \in tile} (\sum_t l_{ti} r_{tj})^2$ of one example, group and tile of the weight."""
    program = tl.program_id(0)
    tile, which = program % (down * across), program // (down * across)
    example, group = (which // groups).to(tl.int64), (which % groups).to(tl.int64)
    i = ((tile // across) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = ((tile % across) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    lefts = left + example * left_b + group * left_g + i[:, None] * left_m
    rights = right + example * right_b + group * right_g + j[None, :] * right_n
    gradient = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, positions, STEP):
        t = (start + tl.arange(0, STEP)).to(tl.int64)
        ls = tl.load(lefts + t[None, :] * left_t, mask=(i[:, None] < m) & (t[None, :] < positions), other=0.0)
        rs = tl.load(rights + t[:, None] * right_t, mask=(t[:, None] < positions) & (j[None, :] < n), other=0.0)
        if WIDEN:
            ls, rs = ls.to(tl.float32), rs.to(tl.float32)
        gradient = tl.dot(ls, rs, gradient, input_precision=PRECISION)
    tl.store(out + program, tl.sum(gradient * gradient))


@triton.jit
def products(
    x: tl.tensor,
    t: tl.tensor,
    s: tl.tensor,
    positions: int,
    width: int,
    stride_t: tl.int64,
    stride_k: tl.int64,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
) -> tl.tensor:
    r"""$x_t \cdot x_s$ for a tile of positions $t$ and one of positions $s$."""
    gram = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, width, STEP):
        k = (start + tl.arange(0, STEP)).to(tl.int64)
        one = x + t[:, None] * stride_t + k[None, :] * stride_k
        other = x + s[None, :] * stride_t + k[:, None] * stride_k
        ones = tl.load(one, mask=(t[:, None] < positions) & (k[None, :] < width), other=0.0)
        others = tl.load(other, mask=(s[None, :] < positions) & (k[:, None] < width), other=0.0)
        if WIDEN:
            ones, others = ones.to(tl.float32), others.to(tl.float32)
        gram = tl.dot(ones, others, gram, input_precision=PRECISION)
    return gram


@triton.jit(do_not_specialize=["groups", "positions", "count", "pairs"])
def gram_kernel(
    left: tl.tensor,
    right: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    groups: int,
    positions: int,
    m: int,
    n: int,
    left_b: tl.int64,
    left_g: tl.int64,
    left_t: tl.int64,
    left_m: tl.int64,
    right_b: tl.int64,
    right_g: tl.int64,
    right_t: tl.int64,
    right_n: tl.int64,
    count: int,
    pairs: int,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    r"""$\sum_{ts} (l_t \cdot l_s)(r_t \cdot r_s)$ and $\sum_{ts} |(l_t \cdot l_s)(r_t \cdot r_s)|$ of a pair of tiles.

    Pairs (i, j) with j <= i are counted by rows r of `count + 1`, in which tile r's r + 1 pairs come first and those of
    tile `count - 1 - r` after them. A pair off the diagonal stands for two.
    """
    program = tl.program_id(0)
    pair, which = program % pairs, program // pairs
    example, group = (which // groups).to(tl.int64), (which % groups).to(tl.int64)
    row, column = pair // (count + 1), pair % (count + 1)
    i = tl.where(column <= row, row, count - 1 - row)
    j = tl.where(column <= row, column, column - row - 1)
    t = (i * TILE + tl.arange(0, TILE)).to(tl.int64)
    s = (j * TILE + tl.arange(0, TILE)).to(tl.int64)
    x = left + example * left_b + group * left_g
    y = right + example * right_b + group * right_g
    lefts = products(x, t, s, positions, m, left_t, left_m, TILE, STEP, PRECISION, WIDEN)
    rights = products(y, t, s, positions, n, right_t, right_n, TILE, STEP, PRECISION, WIDEN)
    terms = lefts * rights
    times = tl.where(i == j, 1.0, 2.0)
    tl.store(out + program, times * tl.sum(terms))
    tl.store(size + program, times * tl.sum(tl.abs(terms)))


def direct(left: Tensor, right: Tensor) -> Tensor:
    r"""$\|\sum_t l_t r_t^\top\|^2$, each tile of the gradient squared where it was multiplied out.

    Args:
        left: `(B, G, T, m)`, with any strides.
        right: `(B, G, T, n)`.

    Returns:
        Tensor `(B,)`, in float32.
    """
    batch, groups, positions, m = left.shape
    n = right.shape[3]
    if 0 in (*left.shape, n):
        return left.new_zeros(batch, dtype=torch.float32)
    rows, columns = side(m, left.dtype), side(n, left.dtype)
    down, across = tiles(m, rows), tiles(n, columns)
    out = left.new_empty(batch, groups * down * across, dtype=torch.float32)
    with torch.cuda.device_of(left):
        direct_kernel[(out.numel(),)](
            left, right, out, groups, positions, m, n, *left.stride(), *right.stride(), down, across,
            ROWS=rows, COLUMNS=columns, STEP=step(left.dtype), PRECISION=precision(left.dtype),
            WIDEN=widened(left.dtype), num_warps=warps(rows, columns),
        )  # fmt: skip
    return out.sum(1)


def gram(left: Tensor, right: Tensor) -> Tensor:
    r"""$\sum_{ts} (l_t \cdot l_s)(r_t \cdot r_s)$, the products of a pair of tiles multiplied and added up at once.

    Args:
        left: `(B, G, T, m)`, with any strides.
        right: `(B, G, T, n)`.

    Returns:
        Tensor `(B,)`, in float32; multiplied out where terms cancel.
    """
    batch, groups, positions, m = left.shape
    n = right.shape[3]
    if 0 in (*left.shape, n):
        return left.new_zeros(batch, dtype=torch.float32)
    tile = side(positions, left.dtype)
    count = tiles(positions, tile)
    pairs = count * (count + 1) // 2
    out, size = left.new_empty(2, batch, groups * pairs, dtype=torch.float32)
    with torch.cuda.device_of(left):
        gram_kernel[(out.numel(),)](
            left, right, out, size, groups, positions, m, n, *left.stride(), *right.stride(), count, pairs,
            TILE=tile, STEP=step(left.dtype), PRECISION=precision(left.dtype), WIDEN=widened(left.dtype),
            num_warps=warps(tile, tile),
        )  # fmt: skip
    return recomputed(out.sum(1), size.sum(1), lambda b: direct(left[b], right[b]))
