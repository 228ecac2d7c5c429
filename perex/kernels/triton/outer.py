r"""Squared norms of sums of outer products, $G_b = \sum_t l_{bt} r_{bt}^\top$, tile by tile in registers.

Each program writes one number, a part of $\|G_b\|^2$; torch adds these up, always in the same order. Sizes have 32
bits; what is multiplied with strides, 64. Strides are declared as no `int`, so that Triton looks at their values: where
one is 1 and the others are multiples of 16, it reads 16 bytes at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from perex.kernels.cancellation import share_of
from perex.kernels.triton.available import precision, resolution, widened
from perex.kernels.triton.tiles import ALIGNED, Tile, copied_at_once, direct_tile, gram_tile, tiles, worth_aligning
from perex.kernels.triton.tiles import pairs as pairs_of_tiles
from perex.kernels.triton.turning import lengthwise, turning


@triton.jit(do_not_specialize=["groups", "down", "across"])
def direct_kernel(
    left: tl.tensor,
    right: tl.tensor,
    wanted: tl.tensor,
    out: tl.tensor,
    groups: int,
    positions: int,
    m: int,
    n: int,
    left_b: tl.tensor,
    left_g: tl.tensor,
    left_t: tl.tensor,
    left_m: tl.tensor,
    right_b: tl.tensor,
    right_g: tl.tensor,
    right_t: tl.tensor,
    right_n: tl.tensor,
    down: int,
    across: int,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ALL: tl.constexpr,
) -> None:
    r"""$\sum_{ij \in tile} (\sum_t l_{ti} r_{tj})^2$ of one example, group and tile of the weight."""
    program = tl.program_id(0)
    tile, which = program % (down * across), program // (down * across)
    example, group = (which // groups).to(tl.int64), (which % groups).to(tl.int64)
    if not ALL:
        positions = positions * tl.load(wanted + example).to(tl.int32)
    i = ((tile // across) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = ((tile % across) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    t = tl.arange(0, STEP).to(tl.int64)
    lefts = left + example * left_b + group * left_g + i[:, None] * left_m + t[None, :] * left_t
    rights = right + example * right_b + group * right_g + t[:, None] * right_t + j[None, :] * right_n
    gradient = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, positions, STEP):
        ls = tl.load(lefts, mask=(i[:, None] < m) & (t[None, :] < positions - start), other=0.0)
        rs = tl.load(rights, mask=(t[:, None] < positions - start) & (j[None, :] < n), other=0.0)
        if WIDEN:
            ls, rs = ls.to(tl.float32), rs.to(tl.float32)
        gradient = tl.dot(ls, rs, gradient, input_precision=PRECISION)
        lefts += tl.cast(STEP, tl.int64) * left_t
        rights += tl.cast(STEP, tl.int64) * right_t
    tl.store(out + program, tl.sum(gradient * gradient))


@triton.jit
def products(
    x: tl.tensor,
    t: tl.tensor,
    s: tl.tensor,
    positions: int,
    width: int,
    stride_t: tl.tensor,
    stride_k: tl.tensor,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
) -> tl.tensor:
    r"""$x_t \cdot x_s$ for a tile of positions $t$ and one of positions $s$."""
    gram = tl.zeros((TILE, TILE), tl.float32)
    k = tl.arange(0, STEP).to(tl.int64)
    one = x + t[:, None] * stride_t + k[None, :] * stride_k
    other = x + s[None, :] * stride_t + k[:, None] * stride_k
    for start in range(0, width, STEP):
        ones = tl.load(one, mask=(t[:, None] < positions) & (k[None, :] < width - start), other=0.0)
        others = tl.load(other, mask=(s[None, :] < positions) & (k[:, None] < width - start), other=0.0)
        if WIDEN:
            ones, others = ones.to(tl.float32), others.to(tl.float32)
        gram = tl.dot(ones, others, gram, input_precision=PRECISION)
        one += tl.cast(STEP, tl.int64) * stride_k
        other += tl.cast(STEP, tl.int64) * stride_k
    return gram


@triton.jit
def pair_of(pair: int, count: int) -> tuple[int, int]:
    """The tiles of the pair of a number: i, and j <= i.

    Pairs are counted by rows r of `count + 1`, in which tile r's r + 1 pairs come first and those of tile
    `count - 1 - r` after them.
    """
    row, column = pair // (count + 1), pair % (count + 1)
    i = tl.where(column <= row, row, count - 1 - row)
    j = tl.where(column <= row, column, column - row - 1)
    return i, j


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
    left_b: tl.tensor,
    left_g: tl.tensor,
    left_t: tl.tensor,
    left_m: tl.tensor,
    right_b: tl.tensor,
    right_g: tl.tensor,
    right_t: tl.tensor,
    right_n: tl.tensor,
    count: int,
    pairs: int,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    r"""$\sum_{ts} (l_t \cdot l_s)(r_t \cdot r_s)$ and $\sum_{ts} |(l_t \cdot l_s)(r_t \cdot r_s)|$ of a pair of tiles.

    A pair off the diagonal stands for two.
    """
    program = tl.program_id(0)
    pair, which = program % pairs, program // pairs
    example, group = (which // groups).to(tl.int64), (which % groups).to(tl.int64)
    i, j = pair_of(pair, count)
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


@triton.jit(do_not_specialize=["parts"])
def settling_kernel(
    terms: tl.tensor, values: tl.tensor, doubts: tl.tensor, parts: int, share: float, STEP: tl.constexpr
) -> None:
    """Add up an example's terms, and their absolute values; where the sum is too small to be trusted, it is zero."""
    example = tl.program_id(0)
    ours, sizes = terms + example.to(tl.int64) * parts, terms + (tl.num_programs(0) + example).to(tl.int64) * parts
    total, size = tl.zeros((STEP,), tl.float32), tl.zeros((STEP,), tl.float32)
    for start in range(0, parts, STEP):
        k = start + tl.arange(0, STEP)
        total += tl.load(ours + k, mask=k < parts, other=0.0)
        size += tl.load(sizes + k, mask=k < parts, other=0.0)
    value, whole = tl.sum(total), tl.sum(size)
    doubtful = (value <= share * whole) & (whole > 0)
    tl.store(values + example, tl.where(doubtful, 0.0, value))
    tl.store(doubts + example, doubtful.to(tl.uint8))


def settled(terms: Tensor, dtype: torch.dtype, exact: Callable[[Tensor], Tensor]) -> Tensor:
    """Squared norms from Gram matrices, multiplied out where terms cancel; nobody waits to hear where that is.

    What was multiplied out of other examples is zero, and what is left of these: so both are added up.

    Args:
        terms: `(2, B, K)`, parts of each sum of terms, and of their absolute values.
        dtype: of what was multiplied.
        exact: terms of squared norms without inner products, `(B, P)`, of examples that `(B,)` numbers say, zero or
            one; zeros for the others.

    Returns:
        Tensor `(B, 1 + P)`.
    """
    _, batch, parts = terms.shape
    values, doubts = terms.new_empty(batch, 1), terms.new_empty(batch, dtype=torch.uint8)
    with torch.cuda.device_of(terms):
        settling_kernel[(batch,)](terms, values, doubts, parts, share_of(resolution(dtype)), STEP=1024)
    return torch.cat((values, exact(doubts)), 1)


def direct(left: Tensor, right: Tensor, wanted: Tensor | None = None, tile: Tile | None = None) -> Tensor:
    """The sums of `direct_terms`, `(B,)`."""
    return direct_terms(left, right, wanted, tile).sum(1)


def direct_terms(left: Tensor, right: Tensor, wanted: Tensor | None = None, tile: Tile | None = None) -> Tensor:
    r"""$\|\sum_t l_t r_t^\top\|^2$, each tile of the gradient squared where it was multiplied out.

    Args:
        left: `(B, G, T, m)`, with any strides.
        right: `(B, G, T, n)`.
        wanted: of which examples, `(B,)` bytes, zero or one; others cost next to nothing, and get zeros.
        tile: how the gradient is cut.

    Returns:
        Tensor `(B, P)` in float32, squares of one tile each.
    """
    left, right = (left, right) if left.shape[3] >= right.shape[3] else (right, left)  # as `left` is read once
    batch, groups, positions, m = left.shape
    n = right.shape[3]
    if 0 in (*left.shape, n):
        return left.new_zeros(batch, 1, dtype=torch.float32)
    if wanted is None and turning(left, right):
        several = copied_at_once(groups * positions * (m + n))
        pieces = zip(left.split(several), right.split(several), strict=True)
        found = [direct_terms(lengthwise(ls), lengthwise(rs), tile=tile) for ls, rs in pieces]
        return found[0] if len(found) == 1 else torch.cat([each.sum(1, keepdim=True) for each in found])
    left, right = aligned(left), aligned(right)
    tile = tile or direct_tile(m, n, left.dtype, batch * groups, left.stride(2) == 1)
    down, across = tiles(m, tile.rows), tiles(n, tile.columns)
    out = left.new_empty(batch, groups * down * across, dtype=torch.float32)
    with torch.cuda.device_of(left):
        direct_kernel[(out.numel(),)](
            left, right, wanted, out, groups, positions, m, n, *left.stride(), *right.stride(), down, across,
            ROWS=tile.rows, COLUMNS=tile.columns, STEP=tile.step, PRECISION=precision(left.dtype),
            WIDEN=widened(left.dtype), ALL=wanted is None, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def gram(left: Tensor, right: Tensor, tile: Tile | None = None) -> Tensor:
    """The sums of `gram_terms`, `(B,)`."""
    return gram_terms(left, right, tile).sum(1)


def gram_terms(left: Tensor, right: Tensor, tile: Tile | None = None) -> Tensor:
    r"""$\sum_{ts} (l_t \cdot l_s)(r_t \cdot r_s)$, the products of a pair of tiles multiplied and added up at once.

    Args:
        left: `(B, G, T, m)`, with any strides.
        right: `(B, G, T, n)`.
        tile: how positions are cut.

    Returns:
        Tensor `(B, P)` in float32; multiplied out where terms cancel.
    """
    left, right = aligned(left), aligned(right)
    batch, groups, positions, m = left.shape
    n = right.shape[3]
    if 0 in (*left.shape, n):
        return left.new_zeros(batch, 1, dtype=torch.float32)
    tile = tile or gram_tile(positions, left.dtype, batch * groups)
    count = tiles(positions, tile.rows)
    pairs = pairs_of_tiles(positions, tile.rows)
    terms = left.new_empty(2, batch, groups * pairs, dtype=torch.float32)
    with torch.cuda.device_of(left):
        gram_kernel[(batch * groups * pairs,)](
            left, right, *terms, groups, positions, m, n, *left.stride(), *right.stride(), count, pairs,
            TILE=tile.rows, STEP=tile.step, PRECISION=precision(left.dtype), WIDEN=widened(left.dtype),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return settled(terms, left.dtype, lambda wanted: direct_terms(left, right, wanted))


def aligned(x: Tensor) -> Tensor:
    """The same, and a few zeros at the end of each row where rows of a large `(B, G, T, k)` begin at odd places.

    Such rows, as of gradients of 50257 logits, would be read number by number: much longer than a copy takes.
    """
    width, whole = x.shape[3], -(-x.shape[3] // ALIGNED) * ALIGNED
    if x.stride(3) != 1 or not worth_aligning(x.shape):
        return x
    copy = x.new_empty(*x.shape[:3], whole)
    copy[..., :width].copy_(x)
    copy[..., width:].zero_()
    return copy
