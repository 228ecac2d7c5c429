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

PROCESSORS = 132
"""How many programs a Hopper GPU runs beside each other at full speed: fewer leave some of it idle."""

SHORTEST = 32
"""The side that tiles are not made smaller than, so that there are enough of them."""

FASTEST = 64 * 64
"""Elements of the tiles that are multiplied out fastest of all: with fewer, it is reading that takes the time."""


ALIGNED, WORTH_COPYING = 16, 2**24
"""Of how many elements rows have to begin at multiples, to be read many at a time; and how many a tensor has at least
that is worth a copy for that."""

MOST = 2**26
"""Elements that copies may have at a time: 256 MiB."""


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


def direct_tile(m: int, n: int, dtype: torch.dtype, stacks: int, lengthwise: bool = False) -> Tile:
    """For so many `(m, n)` gradients, m at least n; whether positions of each row and column are next to each other."""
    if not tensor_cores(dtype):
        return Tile(*enough(side(m, LARGEST_PLAIN), side(n, LARGEST_PLAIN), m, n, stacks), 16, 4, 3)
    half = dtype.itemsize == 2
    rows, columns = enough(side(m, LARGEST), side(n, LARGEST if half else 2 * LARGEST), m, n, stacks)
    few = rows * columns <= 64 * 64
    return Tile(rows, columns, 128 // dtype.itemsize, 4 if few or half and not lengthwise else 8, 4 if few else 3)


def enough(rows: int, columns: int, m: int, n: int, stacks: int) -> tuple[int, int]:
    """Sides of tiles, halved until there are as many as run beside each other."""
    while stacks * tiles(m, rows) * tiles(n, columns) < PROCESSORS and max(rows, columns) > SHORTEST:
        rows, columns = (rows // 2, columns) if rows > columns else (rows, columns // 2)
    return rows, columns


def gram_tile(positions: int, dtype: torch.dtype, stacks: int) -> Tile:
    """For pairs of so many positions, in so many stacks."""
    largest = LARGEST if positions > 2 * LARGEST else LARGEST // 2
    rows = side(positions, largest if tensor_cores(dtype) else LARGEST_PLAIN)
    while stacks * pairs(positions, rows) < PROCESSORS and rows > SHORTEST:
        rows //= 2
    if not tensor_cores(dtype):
        return Tile(rows, rows, 16, 4, 3)
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


def pairs(size: int, side: int) -> int:
    """How many pairs of tiles there are along a dimension, one with itself included."""
    count = tiles(size, side)
    return count * (count + 1) // 2


def work(programs: int, size: int, tile: Tile) -> int:
    """As how many multiply-adds it takes that programs multiply a tile out over a dimension of this size each.

    Whole steps count, what a program takes to begin and to end, and processors that have no program; a small tile takes
    as long as a larger one.
    """
    steps = tiles(size, tile.step) * tile.step + BEGIN
    return max(programs, PROCESSORS) * max(tile.rows * tile.columns, FASTEST) * steps


def copied_at_once(elements: int) -> int:
    """How many examples to copy at a time that have so many elements each."""
    return max(1, MOST // max(1, elements))


def worth_aligning(shape: torch.Size) -> bool:
    """Whether a stack of rows is to be copied so that each begins where many elements are read at a time."""
    return shape[-1] % ALIGNED != 0 and shape.numel() >= WORTH_COPYING
