r"""Squared norms of convolutions' weight gradients from the Gram matrix of pixels.

$\|G_b\|^2 = \sum_{pq} (g_p \cdot g_q)(u_p \cdot u_q)$ with patches $u_p \cdot u_q = \sum_k x_{ps+k} \cdot x_{qs+k}$: a
Gram matrix of pixels, moved along its diagonals and added up, one spatial dimension after the other. The size of the
kernel times channels never appears.

With a stride, an entry of the kernel meets only every s-th pixel: those make an image of their own, a *phase*. Phases
and places are laid on one *grid*, so that a shift by a pixel is one by the same number of rows and columns, and
matrices are read in long runs. All of them are symmetric: only pieces of rows are computed, up to the diagonal.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from perex.kernels.blocks import block_size, example_blocks
from perex.kernels.geometry import Geometry, by_group
from perex.kernels.plan import Plan

OPERATOR = 300_000
"""What calling one of torch's operators costs beside its arithmetic, in multiply-adds; measured on two CPU cores."""

Phase = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]
"""The first pixel in each spatial dimension, and by how many pixels of the phase the kernel's entries are shifted."""


PIECES, SHORTEST = 4, 64
"""Into how many pieces rows are cut, and how short these may be."""


def pieces(positions: int) -> Iterator[tuple[int, int]]:
    """Ranges of positions, for products of each with itself and all before it."""
    step = max(SHORTEST, -(-positions // PIECES))
    yield from ((start, min(start + step, positions)) for start in range(0, max(positions, 1), step))


def phases(geometry: Geometry) -> list[Phase]:
    """The images of every s-th pixel: entry k reads pixel $ps + kd - \\pi = (p + o)s + f$, of phase f, shifted by o."""
    axes = []
    for size, step, spread, padding in zip(
        geometry.weight_shape[2:], geometry.stride, geometry.dilation, geometry.padding, strict=True
    ):
        shifts: dict[int, tuple[int, ...]] = {}
        for k in range(size):
            shift, first = divmod(k * spread - padding, step)
            shifts[first] = (*shifts.get(first, ()), shift)
        axes.append(list(shifts.items()))
    return [tuple(zip(*axis, strict=True)) for axis in itertools.product(*axes)]  # type: ignore[misc]


def grid_of(narrow: torch.Size, wide: torch.Size, geometry: Geometry) -> tuple[int, ...]:
    """The sides of the least grid that all places lie on, and those pixels of each phase that a place meets."""
    sides = []
    for axis, (pixels, places) in enumerate(zip(wide[3:], narrow[3:], strict=True)):
        met = [
            min(-(-(pixels - first[axis]) // geometry.stride[axis]), places + max(shifts[axis]))
            for first, shifts in phases(geometry)
        ]
        sides.append(max(places, *met))
    return tuple(sides)


def plan(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan:
    """What `inner_products` does with tensors of these shapes."""
    narrow, wide = (x, grads) if geometry.transposed else (grads, x)
    found, groups = phases(geometry), geometry.groups
    positions = narrow[1] * math.prod(grid_of(narrow, wide, geometry))
    rows = [stop - start for start, stop in pieces(positions)]
    pairs = groups * x[0] * sum(n * sum(rows[: i + 1]) for i, n in enumerate(rows))
    channels = (len(found) * wide[2] + narrow[2]) // groups
    additions = sum(len(shift) for _, shifts in found for shift in shifts if shift != (0,)) + len(found) - 1
    step = blocks_of(x[0], groups, positions)
    moved = pairs * (additions + 4)
    if max(geometry.stride) > 1:
        moved += 4 * wide.numel() // math.prod(geometry.stride) * len(found)  # copied pixel by pixel
    calls = -(-x[0] // step) * len(rows) * (additions + 3 * len(found) + 6) * OPERATOR
    flops = pairs * (2 * channels + additions + 3)
    return Plan("pixel Gram", flops, 4 * step * groups * positions**2, moved, 1.1, calls)


def blocks_of(batch: int, groups: int, positions: int) -> int:
    """How many examples are taken at a time: of half a block, as each of several matrices is read again soon."""
    return block_size(batch, 2 * groups * positions**2)


def inner_products(x: Tensor, grads: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    r"""$\sum_{pq} (g_p \cdot g_q) \sum_k x_{ps+k} \cdot x_{qs+k}$.

    Args:
        x: input, `(B, R, C_in, *spatial)`, R rows (images) an example.
        grads: output gradient, `(B, R, C_out, *spatial')`.
        geometry: the convolution's options.

    Returns:
        Two tensors `(B,)`: the sums, and those of the absolute values of their terms.
    """
    narrow, wide = (x, grads) if geometry.transposed else (grads, x)
    grid, groups, still = grid_of(narrow.shape, wide.shape, geometry), geometry.groups, (1,) * (x.dim() - 3)
    positions = narrow.shape[1] * math.prod(grid)
    masks = functools.cache(functools.partial(inside, x.new_ones(()), grid, positions))
    totals, sizes = [], []
    for i, j in example_blocks(len(x), 0, blocks_of(len(x), groups, positions)):
        alike = torch.zeros((), dtype=x.dtype, device="cpu")
        for n, (first, shifts) in enumerate(phases(geometry)):
            grams = lower_gram(on_grid(wide[i:j], grid, first, geometry.stride, groups))
            for axis, shift in enumerate(shifts):
                grams = moved(grams, grid, axis, shift, masks)
            alike = alike.add_(grams) if n else grams  # (b G, L, L)
        total, size = products(on_grid(narrow[i:j], grid, (0,) * len(still), still, groups), alike)
        totals.append(total.unflatten(0, (-1, groups)).sum(1))
        sizes.append(size.unflatten(0, (-1, groups)).sum(1))
    return torch.cat(totals), torch.cat(sizes)


def on_grid(
    images: Tensor, grid: tuple[int, ...], first: tuple[int, ...], steps: tuple[int, ...], groups: int
) -> Tensor:
    """Some pixels of images, `(b, R, C, *spatial)`, on a grid, cut or filled up with zeros: `(b G, L, C / G)`."""
    for axis, (start, step, side) in enumerate(zip(first, steps, grid, strict=True), start=3):
        if start or step > 1 or images.shape[axis] > side:
            images = images[(slice(None),) * axis + (slice(start, start + (side - 1) * step + 1, step),)]
    missing = [side - size for side, size in zip(grid, images.shape[3:], strict=True)]
    if any(missing):
        images = F.pad(images, [n for side in reversed(missing) for n in (0, side)])
    return by_group(images.contiguous(), groups).flatten(2, -2).flatten(0, 1)


def lower_gram(pixels: Tensor) -> Tensor:
    """The inner products of pixels, `(n, L, C)` to `(n, L, L)`: by pieces, up to the diagonal; not set above."""
    images, positions, _ = pixels.shape
    ranges = list(pieces(positions))
    if len(ranges) == 1:
        return pixels @ pixels.mT
    found = pixels.new_empty(images, positions, positions)
    for start, stop in ranges:  # not with `out=`: into a part of a matrix, products are written one image at a time
        found[:, start:stop, :stop] = pixels[:, start:stop] @ pixels[:, :stop].mT
    return found


def moved(
    grams: Tensor, grid: tuple[int, ...], axis: int, shifts: tuple[int, ...], masks: Callable[[int, int], Tensor | None]
) -> Tensor:
    r"""$\sum_o M[p + o, q + o]$ on and below the diagonal, with o along one dimension of the grid; zero outside of it.

    Args:
        grams: M, `(n, L, L)`; what lies above its diagonal is not looked at.
        grid: the sides of the grid; there may be several in L.
        axis: a dimension of it.
        shifts: numbers of pixels.
        masks: what `inside` says of a dimension and a shift.

    Returns:
        Tensor `(n, L, L)`.
    """
    if shifts == (0,):
        return grams
    positions, pitch = grams.shape[1], math.prod(grid[axis + 1 :])
    others = [shift for shift in shifts if shift and abs(shift) < grid[axis]]
    total = torch.empty_like(grams)
    for start, stop in pieces(positions):
        rows = total[:, start:stop, :stop]
        rows.copy_(grams[:, start:stop, :stop]) if 0 in shifts else rows.zero_()
        for shift in others:
            offset, mask = shift * pitch, masks(axis, shift)
            left, top, end = max(0, -offset), max(start, -offset), min(stop, positions - offset)
            if top >= end:
                continue
            there = grams[:, top + offset : end + offset, left + offset : end + offset]
            here = total[:, top:end, left:end]
            here.add_(there) if mask is None else here.addcmul_(there, mask[top:end, left:end])
    return total


def inside(like: Tensor, grid: tuple[int, ...], positions: int, axis: int, shift: int) -> Tensor | None:
    """Ones where both pixels, shifted, are still in the grid, `(L, L)`; None if they would leave the matrix else."""
    pitch = math.prod(grid[axis + 1 :])
    if grid[axis] * pitch == positions:
        return None
    within = like.new_zeros(positions)
    within.view(-1, grid[axis], pitch)[:, max(0, -shift) : grid[axis] - max(0, shift)] = 1
    return within[:, None] * within


def products(vectors: Tensor, alike: Tensor) -> tuple[Tensor, Tensor]:
    r"""$\sum_{pq} (g_p \cdot g_q) M_{pq}$ and the sum of absolute values, by pieces up to the diagonal.

    Args:
        vectors: g, `(n, L, C)`.
        alike: M, `(n, L, L)`, symmetric; what lies above its diagonal is not looked at.

    Returns:
        Two tensors `(n,)`.
    """
    ranges = list(pieces(vectors.shape[1]))
    if len(ranges) == 1:
        product = (vectors @ vectors.mT).mul_(alike)
        return product.sum((1, 2)), product.abs_().sum((1, 2))
    total, size = vectors.new_zeros(2, len(vectors))
    for start, stop in ranges:
        product = (vectors[:, start:stop] @ vectors[:, :stop].mT).mul_(alike[:, start:stop, :stop])
        product[:, :, start:].tril_()
        once = product.diagonal(start, 1, 2).sum(1)
        total += 2 * product.sum((1, 2)) - once
        size += 2 * product.abs_().sum((1, 2)) - once
    return total, size
