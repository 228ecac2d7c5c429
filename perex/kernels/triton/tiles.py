"""How kernels cut their work into tiles; known without Triton, for plans."""

from __future__ import annotations

from typing import NamedTuple

import torch

from perex.kernels.triton.available import tensor_cores

LARGEST, LARGEST_PLAIN = 128, 64
"""The side of the largest tile, on tensor cores and without them."""

SMALLEST = 16
"""The least side that `tl.dot` takes."""


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


def direct_tile(m: int, n: int, dtype: torch.dtype) -> Tile:
    """For `(m, n)` gradients with m at least n."""
    if not tensor_cores(dtype):
        return Tile(side(m, LARGEST_PLAIN), side(n, LARGEST_PLAIN), 16, 4, 3)
    rows, columns = side(m, LARGEST), side(n, 2 * LARGEST if dtype.itemsize == 2 else LARGEST)
    return Tile(rows, columns, 128 // dtype.itemsize, warps(rows, columns), 3)


def gram_tile(positions: int, dtype: torch.dtype) -> Tile:
    """For pairs of so many positions."""
    if not tensor_cores(dtype):
        rows = side(positions, LARGEST_PLAIN)
        return Tile(rows, rows, 16, 4, 3)
    rows = side(positions, LARGEST)
    return Tile(rows, rows, 128 // dtype.itemsize, warps(rows, rows), 3)


def channels_tile(m: int, n: int, dtype: torch.dtype) -> Tile:
    """For `(m, n)` gradients of channels, where positions are looked up before they are read: more is on its way."""
    if not tensor_cores(dtype):
        return Tile(side(m, LARGEST_PLAIN), side(n, LARGEST_PLAIN), 16, 4, 3)
    rows, columns = side(m, LARGEST), side(n, LARGEST)
    return Tile(rows, columns, 128 // dtype.itemsize, warps(rows, columns), 5)


def warps(rows: int, columns: int) -> int:
    """How many warps share a tile."""
    return 8 if rows * columns > 64 * 64 else 4


def tiles(size: int, side: int) -> int:
    """How many tiles cover a dimension."""
    return -(-size // side)


def covered(size: int, side: int) -> int:
    """How much of a dimension whole tiles cover, what is beyond it included."""
    return tiles(size, side) * side
