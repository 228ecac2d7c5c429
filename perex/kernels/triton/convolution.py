r"""Squared norms of convolutions' weight gradients, $G_b = \sum_p g_{bp} u_{bp}^\top$, patches read where they lie.

A piece of the gradient is a sum of outer products of pixels, $G_b[:, :, k] = \sum_p g_{bp} x_{b, q_k(p)}^\top$ for a
place k in the kernel: pixel $q_k(p)$ is under it at position p, or none is. Which it is, a table says, `(K, P)`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from perex.kernels.folding import fold, folded
from perex.kernels.geometry import Geometry, patches
from perex.kernels.products import product
from perex.kernels.triton.available import precision, widened
from perex.kernels.triton.outer import pair_of, settled
from perex.kernels.triton.tiles import ALIGNED, Tile, channels_tile, tiles

PAIRS = Tile(32, 32, 0, 4, 1)
"""How pairs of positions are cut."""


@triton.jit(do_not_specialize=["groups", "down", "across", "places"])
def direct_kernel(
    narrow: tl.tensor,
    wide: tl.tensor,
    table: tl.tensor,
    wanted: tl.tensor,
    out: tl.tensor,
    groups: int,
    positions: int,
    places: int,
    m: int,
    n: int,
    narrow_b: tl.tensor,
    narrow_p: tl.tensor,
    narrow_c: tl.tensor,
    wide_b: tl.tensor,
    wide_p: tl.tensor,
    down: int,
    across: int,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ALL: tl.constexpr,
) -> None:
    r"""$\sum_{ij \in tile} (\sum_p g_{pi} x_{q(p) j})^2$ of one example, group, place in the kernel and tile."""
    program = tl.program_id(0)
    tile, which = program % (down * across), program // (down * across)
    place, which = which % places, which // places
    example, group = (which // groups).to(tl.int64), which % groups
    here = table + place * positions
    if not ALL:
        positions = positions * tl.load(wanted + example).to(tl.int32)
    i = (tile // across) * ROWS + tl.arange(0, ROWS)
    j = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    rows = narrow + example * narrow_b + (group * m + i)[:, None] * narrow_c
    columns = wide + example * wide_b + (group * n + j)[None, :]
    gradient = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, positions, STEP):
        p = start + tl.arange(0, STEP)
        q = tl.load(here + p, mask=p < positions, other=-1)
        gs = tl.load(rows + p[None, :] * narrow_p, mask=(i[:, None] < m) & (p[None, :] < positions), other=0.0)
        xs = tl.load(columns + q[:, None] * wide_p, mask=(q[:, None] >= 0) & (j[None, :] < n), other=0.0)
        if WIDEN:
            gs, xs = gs.to(tl.float32), xs.to(tl.float32)
        gradient = tl.dot(gs, xs, gradient, input_precision=PRECISION)
    tl.store(out + program, tl.sum(gradient * gradient))


@triton.jit(do_not_specialize=["positions", "places", "pixels", "count", "pairs"])
def shifted_kernel(
    narrow: tl.tensor,
    wide: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    positions: int,
    places: int,
    pixels: int,
    count: int,
    pairs: int,
    TILE: tl.constexpr,
) -> None:
    r"""$\sum_{ps} N_{ps} \sum_k W_{q_k(p) q_k(s)}$ of a pair of tiles, and of its terms' absolute values."""
    program = tl.program_id(0)
    pair, which = program % pairs, (program // pairs).to(tl.int64)
    i, j = pair_of(pair, count)
    p, s = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    wide += which * pixels * pixels
    narrow += which * positions * positions
    total = tl.zeros((TILE, TILE), tl.float32)
    for place in range(places):
        one = tl.load(table + place * positions + p, mask=p < positions, other=-1)
        other = tl.load(table + place * positions + s, mask=s < positions, other=-1)
        there = (one[:, None] >= 0) & (other[None, :] >= 0)
        total += tl.load(wide + one[:, None] * pixels + other[None, :], mask=there, other=0.0)
    there = (p[:, None] < positions) & (s[None, :] < positions)
    terms = total * tl.load(narrow + p[:, None] * positions + s[None, :], mask=there, other=0.0)
    times = tl.where(i == j, 1.0, 2.0)
    tl.store(out + program, times * tl.sum(terms))
    tl.store(size + program, times * tl.sum(tl.abs(terms)))


def direct(
    x: Tensor, grads: Tensor, geometry: Geometry, wanted: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """The sums of `direct_terms`, `(B,)`."""
    return direct_terms(x, grads, geometry, wanted, tile).sum(1)


def direct_terms(
    x: Tensor, grads: Tensor, geometry: Geometry, wanted: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    r"""$\|\sum_p g_p u_p^\top\|^2$, nothing unfolded and each tile of the gradient squared where it was multiplied out.

    Args:
        x: input, `(B, R, C_in, *spatial)`.
        grads: output gradient, `(B, R, C_out, *spatial')`.
        geometry: the convolution's options.
        wanted: of which examples, `(B,)` bytes, zero or one; others cost next to nothing, and get zeros.
        tile: how channels are cut.

    Returns:
        Tensor `(B, P)` in float32, squares of one tile each.
    """
    batch, groups = x.shape[0], geometry.groups
    if x.numel() == 0 or grads.numel() == 0:
        return grads.new_zeros(batch, 1, dtype=torch.float32)
    if folded(geometry) != geometry:
        x, geometry = fold(x, grads.shape[-1], geometry), folded(geometry)
    narrow, wide = (x, grads) if geometry.transposed else (grads, x)
    narrow, wide = pixels(narrow), pixels(wide).contiguous()  # (B, P, C)
    if narrow.stride(2) != 1 and (narrow.stride(1) != 1 or narrow.shape[1] % ALIGNED):
        narrow = narrow.contiguous()  # else it would be read number by number
    table = pixels_under(geometry, x.shape[1:2] + x.shape[3:], grads.shape[1:2] + grads.shape[3:], x.device)
    m, n = narrow.shape[2] // groups, wide.shape[2] // groups
    tile = tile or channels_tile(m, n, x.dtype)
    down, across, places = tiles(m, tile.rows), tiles(n, tile.columns), table.shape[0]
    out = x.new_empty(batch, groups * places * down * across, dtype=torch.float32)
    with torch.cuda.device_of(x):
        direct_kernel[(out.numel(),)](
            narrow, wide, table, wanted, out, groups, table.shape[1],
            places, m, n, *narrow.stride(), *wide.stride()[:2], down, across,
            ROWS=tile.rows, COLUMNS=tile.columns, STEP=tile.step, PRECISION=precision(x.dtype),
            WIDEN=widened(x.dtype), ALL=wanted is None, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def pixel_gram(x: Tensor, grads: Tensor, geometry: Geometry, tile: Tile | None = None) -> Tensor:
    """The sums of `pixel_gram_terms`, `(B,)`."""
    return pixel_gram_terms(x, grads, geometry, tile).sum(1)


def pixel_gram_terms(x: Tensor, grads: Tensor, geometry: Geometry, tile: Tile | None = None) -> Tensor:
    r"""$\sum_{ps} (g_p \cdot g_s) \sum_k x_{q_k(p)} \cdot x_{q_k(s)}$, from the Gram matrices of pixels.

    Args:
        x: input, `(B, R, C_in, *spatial)`.
        grads: output gradient, `(B, R, C_out, *spatial')`.
        geometry: the convolution's options.
        tile: how positions are cut.

    Returns:
        Tensor `(B, P)` in float32; multiplied out where terms cancel.
    """
    batch, groups = x.shape[0], geometry.groups
    if x.numel() == 0 or grads.numel() == 0:
        return grads.new_zeros(batch, 1, dtype=torch.float32)
    narrow, wide = (
        t.movedim(1, 2).flatten(2).unflatten(1, (groups, -1))  # (B, G, C / G, P)
        for t in ((x, grads) if geometry.transposed else (grads, x))
    )
    grams = [product(t.mT, t).contiguous() for t in (narrow, wide)]  # (B, G, P, P)
    table = pixels_under(geometry, x.shape[1:2] + x.shape[3:], grads.shape[1:2] + grads.shape[3:], x.device)
    positions = table.shape[1]
    tile = tile or PAIRS
    count = tiles(positions, tile.rows)
    pairs = count * (count + 1) // 2
    terms = x.new_empty(2, batch, groups * pairs, dtype=torch.float32)
    with torch.cuda.device_of(x):
        shifted_kernel[(batch * groups * pairs,)](
            *grams, table, *terms, positions, table.shape[0], wide.shape[3], count, pairs,
            TILE=tile.rows, num_warps=tile.warps,
        )  # fmt: skip
    return settled(terms, x.dtype, lambda wanted: direct_terms(x, grads, geometry, wanted))


def pixels(images: Tensor) -> Tensor:
    """`(B, R, C, *spatial)` as `(B, P, C)`, all pixels of an example in one dimension."""
    return images.movedim(2, -1).flatten(1, -2)


IN_GRAPHS: set[Tensor] = set()
"""Tables that recorded CUDA graphs read: they must outlive those."""


def pixels_under(geometry: Geometry, inputs: torch.Size, outputs: torch.Size, device: torch.device) -> Tensor:
    """`pixel_table`, which is remembered."""
    table = pixel_table(geometry, inputs, outputs, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        IN_GRAPHS.add(table)
    return table


@lru_cache(maxsize=256)
def pixel_table(geometry: Geometry, inputs: torch.Size, outputs: torch.Size, device: torch.device) -> Tensor:
    """Which pixel each place in the kernel is over, at each position: `(K, P)`, -1 where it is over none.

    Args:
        geometry: the convolution's options.
        inputs: `(R, *spatial)`.
        outputs: `(R, *spatial')`.
        device: where to.
    """
    narrow, wide = (inputs, outputs) if geometry.transposed else (outputs, inputs)
    kernel = geometry.weight_shape[2:]
    alone = replace(geometry, weight_shape=torch.Size((1, 1, *kernel)), groups=1)
    numbers = torch.arange(1, math.prod(wide) + 1, dtype=torch.int32, device="cpu").reshape(1, wide[0], 1, *wide[1:])
    found = patches(numbers, torch.Size(narrow[1:]), alone) - 1  # (1, 1, P, K)
    return found[0, 0].mT.contiguous().to(device)
