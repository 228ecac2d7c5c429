"""How kernels cut their work into tiles, and what that costs; known without Triton, for plans."""

from __future__ import annotations

import torch

from perex.kernels.triton.available import tensor_cores

LARGEST, LARGEST_PLAIN = 128, 64
"""The side of the largest tile, on tensor cores and without them."""

SMALLEST = 16
"""The least side that `tl.dot` takes."""

SLACK, SLACK_PLAIN = 1.0, 2.0
"""By how much whole tiles are slower than the backend's matrix products; guessed, on no GPU yet measured."""


def side(size: int, dtype: torch.dtype) -> int:
    """The side of tiles that cover a dimension: a power of two."""
    largest = LARGEST if tensor_cores(dtype) else LARGEST_PLAIN
    return min(largest, max(SMALLEST, 1 << (size - 1).bit_length()))


def step(dtype: torch.dtype) -> int:
    """How much of the dimension that is summed over is read at a time: 128 bytes a row, less without tensor cores."""
    return 128 // dtype.itemsize if tensor_cores(dtype) else 16


def warps(rows: int, columns: int) -> int:
    """How many warps share a tile."""
    return 8 if rows * columns > 64 * 64 else 4


def tiles(size: int, side: int) -> int:
    """How many tiles cover a dimension."""
    return -(-size // side)


def slack(dtype: torch.dtype, *sizes: int) -> float:
    """By how much products of matrices of these sizes are slower than the backend's, tiles' empty parts counted."""
    total = SLACK if tensor_cores(dtype) else SLACK_PLAIN
    for size in sizes:
        total *= tiles(size, side(size, dtype)) * side(size, dtype) / max(size, 1)
    return total
