"""How kernels cut their work into tiles; known without Triton, for plans."""

from __future__ import annotations

from typing import NamedTuple

import torch

from perex.kernels.triton.available import tensor_cores

LARGEST, LARGEST_PLAIN = 128, 64
"""The side of the largest tile, on tensor cores and without them."""

SMALLEST = 16
"""The least side that `tl.dot` takes."""

BEGIN = 64
"""As many positions a program could have multiplied in the time that it takes to begin and to end."""


class Tile(NamedTuple):
    """How one program's part of a product is cut.

    Attributes:
        rows: of the product.
        columns: of the product.
        step: how much of the dimension that is summed over is read at a time.
        warps: how many share the work.
        stages: how many steps are on their way from memory at a time.
    """

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


def side(size: int, largest: int) -> int:
    """The side of tiles that cover a dimension: a power of two."""
    return min(largest, max(SMALLEST, 1 << (size - 1).bit_length()))


def direct_tile(m: int, n: int, dtype: torch.dtype, lengthwise: bool = False) -> Tile:
    """For `(m, n)` gradients with m at least n; whether the positions of each row and column are next to each other."""
    if not tensor_cores(dtype):
        return Tile(side(m, LARGEST_PLAIN), side(n, LARGEST_PLAIN), 16, 4, 3)
    half = dtype.itemsize == 2
    rows, columns = side(m, LARGEST), side(n, LARGEST if half else 2 * LARGEST)
    few = rows * columns <= 64 * 64
    return Tile(rows, columns, 128 // dtype.itemsize, 4 if few or half and not lengthwise else 8, 4 if few else 3)


def gram_tile(positions: int, dtype: torch.dtype) -> Tile:
    """For pairs of so many positions."""
    if not tensor_cores(dtype):
        rows = side(positions, LARGEST_PLAIN)
        return Tile(rows, rows, 16, 4, 3)
    rows = side(positions, LARGEST if positions > 2 * LARGEST else LARGEST // 2)
    return Tile(rows, rows, 128 // dtype.itemsize, warps(rows, rows), 3 if dtype.itemsize == 2 else 4)


def channels_tile(m: int, n: int, dtype: torch.dtype) -> Tile:
    """For `(m, n)` gradients of channels, where positions are looked up before they are read: more is on its way."""
    if not tensor_cores(dtype):
        return Tile(side(m, LARGEST_PLAIN), side(n, LARGEST_PLAIN), 16, 4, 3)
    half = dtype.itemsize == 2
    rows, columns = side(m, LARGEST), side(n, LARGEST if half or n > LARGEST else LARGEST // 2)
    if columns == SMALLEST:
        rows = min(rows, LARGEST // 2)
    large = rows * columns == LARGEST**2
    step = 128 // dtype.itemsize
    return Tile(rows, columns, 2 * step if half and columns == SMALLEST else step, 8 if large else 4, 3 if large else 5)


def warps(rows: int, columns: int) -> int:
    """How many warps share a tile."""
    return 8 if rows * columns > 64 * 64 else 4


def tiles(size: int, side: int) -> int:
    """How many tiles cover a dimension."""
    return -(-size // side)


def covered(size: int, side: int) -> int:
    """How much of a dimension whole tiles cover, what is beyond it included."""
    return tiles(size, side) * side


def steps(positions: int, tile: Tile) -> int:
    """How many positions a program takes as long as: those of whole steps, and some to begin and to end."""
    return covered(positions, tile.step) + BEGIN
