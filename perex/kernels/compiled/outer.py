r"""$\|\sum_t l_{bt} r_{bt}^\top\|^2$ of linear layers over positions, each tile of $G_b$ squared in registers.

The sum over examples comes out of the same tiles, so that both cost what the weight's gradient costs alone. The kernel
itself is in `outer.h`.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from perex.kernels import large
from perex.kernels.compiled.library import address, in_runs, kernel, lanes, room, seen
from perex.kernels.geometry import OPERATORS
from perex.kernels.plan import Plan

COST, ELSEWHERE, CALL = 0.45, 1.0, 8_000_000
"""What a multiply-add costs, where torch's matrix products are slow and elsewhere, and a call beside its arithmetic.

In multiply-adds of a large matrix product of torch's, as measured on two cores of AMD EPYCs, of the fifth generation
and of the third.
"""

TILE = 0.375
"""What squaring an entry of a tile costs, or adding it to a sum, as a part of what writing and reading it would."""

HIGH, WIDE = 288, 256
"""Rows and columns of a block, at most: it is to stay in a thread's cache."""


def plan(left: torch.Size, right: torch.Size, summing: bool = False) -> Plan | None:
    """What `squares_and_sum` does with tensors `(B, T, m)` and `(B, T, n)`; None if there is no kernel."""
    examples, positions, rows = left
    columns = right[2]
    if lanes() == 0 or not (left.numel() and right.numel()):
        return None
    entries, threads = examples * rows * columns, torch.get_num_threads()
    down, across = blocks(rows, columns, threads, *tile())
    idle = threads / min(threads, down * across)
    whole = -(-rows // tile()[0]) * -(-columns // tile()[1]) * tile()[0] * tile()[1] / (rows * columns)
    slack = (COST if large.onednn_is_faster() else ELSEWHERE) * idle * whole
    high, wide = min(HIGH, rows), min(WIDE, columns)
    held = threads * (high * wide + (high + wide) * min(positions, HIGH)) + 2 * down * across * examples
    moved = int(TILE * idle * entries * (1 + summing))
    return Plan("compiled direct", 2 * entries * (positions + 1), held, moved, slack, CALL)


@functools.lru_cache(1024)
def blocks(rows: int, columns: int, threads: int, high: int, wide: int) -> tuple[int, int]:
    """Into how many blocks of rows and columns a gradient is cut, of whole tiles: as many for each thread, or many."""
    most_down, most_across = -(-rows // high), -(-columns // wide)
    down, across = -(-rows // HIGH), -(-columns // WIDE)
    while down * across % threads and down * across < 4 * threads:
        if down < most_down and (rows * across >= columns * down or across == most_across):
            down += 1
        elif across < most_across:
            across += 1
        else:
            break
    return down, across


def tile(dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Rows and columns of a tile; as `PANEL` and `ROWS` in C."""
    return 12 if lanes() >= 16 else 6, 2 * lanes(dtype)


def squares_and_sum(left: Tensor, right: Tensor, summing: bool) -> tuple[Tensor, Tensor | None]:
    r"""$\|G_b\|^2$, and $\sum_b G_b$ if that is wanted.

    Args:
        left: `(B, T, m)`.
        right: `(B, T, n)`.
        summing: whether the sum is wanted.

    Returns:
        Tensor `(B, P)`, terms to be added up, and one of shape `(m, n)`, or None.
    """
    shape = (left.shape[2], right.shape[2]) if summing else None
    return in_runs(seen(torch.ops.perex.outer_squares, _squares), left, right, shape)


def _squares(left: Tensor, right: Tensor, total: Tensor | None) -> Tensor:
    """`squares_and_sum` as an operator, which leaves the sum in `total`."""
    if not (left.numel() and right.numel()):
        if total is not None:
            total.zero_()
        return left.new_zeros(len(left), 1)
    left, right = (t if t.stride(2) == 1 else t.contiguous() for t in (left, right))
    down, across = blocks(left.shape[2], right.shape[2], torch.get_num_threads(), *tile(left.dtype))
    found, shape = left.new_empty(len(left), down * across), shape_of(left, right, down * across, down, across)
    with room("outer", left.dtype, shape) as space:
        kernel("outer", left.dtype)(shape, *(address(tensor) for tensor in (left, right, found, total)), space)
    return found


def shape_of(left: Tensor, right: Tensor, tasks: int, down: int, across: int) -> Any:
    """`Outer` of `shape.h`."""
    numbers = min(torch.get_num_threads(), tasks), *left.shape, right.shape[2], down, across
    return (ctypes.c_int64 * 11)(*numbers, *left.stride()[:2], *right.stride()[:2])


OPERATORS.define("outer_squares(Tensor left, Tensor right, Tensor(a!)? total) -> Tensor")
OPERATORS.impl("outer_squares", _squares, "CPU")


@register_flop_formula(torch.ops.perex.outer_squares)
def _operations(left: Any, right: Any, total: Any, **kwargs: Any) -> int:
    """Operations of `outer_squares`."""
    return int(2 * left[0] * (left[1] + 1) * left[2] * right[2])
