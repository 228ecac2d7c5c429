r"""$\sum_{ts} (l_t \cdot l_s)(r_t \cdot r_s)$ of linear layers over positions, one example's matrices at a time.

The matrices of inner products are no larger than a thread's cache. The kernel itself is in `pairs.h`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from perex.kernels import large
from perex.kernels.compiled.library import address, asked, kernel, lanes, room, seen
from perex.kernels.compiled.outer import shape_of
from perex.kernels.geometry import OPERATORS
from perex.kernels.plan import Plan

LONGEST = 1024
"""Positions, at most: beyond, the matrices leave the caches."""

COST, ELSEWHERE, CALL = 0.55, 1.3, 8_000_000
"""What a multiply-add costs, where torch's matrix products are slow and elsewhere, and a call beside its arithmetic.

In multiply-adds of a large matrix product of torch's, as measured on two cores of AMD EPYCs.
"""

COPY = 0.5
"""What copying a number costs, as a part of what writing and reading it would."""


def plan(left: torch.Size, right: torch.Size) -> Plan | None:
    """What `inner_products` does with tensors `(B, T, m)` and `(B, T, n)`; None if there is no kernel."""
    examples, positions, rows = left
    columns, high = right[2], 2 * lanes()
    if lanes() == 0 or not (left.numel() and right.numel()) or positions > LONGEST:
        return None
    pairs, threads = positions * (positions + 1) // 2, torch.get_num_threads()
    tasks = examples * parts(examples, positions, high)
    idle = threads * -(-tasks // threads) / tasks
    blocks = -(-positions // high)
    slack = (COST if large.onednn_is_faster() else ELSEWHERE) * idle * (1 + 3 / positions)
    held = threads * blocks * high * (2 * blocks * high + 256)
    moved = int(COPY * examples * positions * (rows + columns))
    return Plan("compiled Gram", 2 * examples * pairs * (rows + columns + 1), held, moved, slack, CALL)


def parts(examples: int, positions: int, high: int) -> int:
    """Into how many tasks an example is cut, each with every so-many-th block of positions: as many for each thread."""
    threads = torch.get_num_threads()
    if examples % threads == 0 or examples >= 4 * threads:
        return 1
    return min(threads, -(-positions // high))


def inner_products(left: Tensor, right: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""$\|G_b\|^2$, as a sum over pairs of positions, and the sum of these terms' absolute values.

    Args:
        left: `(B, T, m)`.
        right: `(B, T, n)`.
        known: what `of_one` made of `right`, if that is at hand.

    Returns:
        Two tensors `(B,)`.
    """
    found = seen(torch.ops.perex.pair_squares, _squares)(left, right, known)
    squares, sizes = found.sum(2) if found.shape[2] > 1 else found.squeeze(2)
    return squares, sizes


def of_one(x: Tensor) -> Tensor:
    r"""$x_t \cdot x_s$ of all positions of `(B, T, n)`, in the kernel's own order, for several calls that read `x`."""
    made: Tensor = seen(torch.ops.perex.pair_products, _products)(x)
    return made


def numbers_of_one(x: Tensor) -> int:
    """How many numbers `of_one` makes of `(B, T, n)`."""
    return len(x) * asked("pairs_of_one", x.dtype, shape_of(x, x, 1, 1, 1))


def _run(left: Tensor, right: Tensor, known: Tensor | None, made: Tensor | None) -> Tensor:
    """Call the kernel: squares and sizes, `(2, B, P)`."""
    left, right = (t if t.stride(2) == 1 else t.contiguous() for t in (left, right))
    down = parts(len(left), left.shape[1], 2 * lanes(left.dtype))
    found, shape = left.new_empty(2, len(left), down), shape_of(left, right, len(left) * down, down, 1)
    with room("pairs", left.dtype, shape) as space:
        tensors = left, right, known, made, *found
        kernel("pairs", left.dtype)(shape, *(address(tensor) for tensor in tensors), space)
    return found


def _squares(left: Tensor, right: Tensor, known: Tensor | None) -> Tensor:
    """`inner_products` as an operator, `(2, B, P)`."""
    if not (left.numel() and right.numel()):
        return left.new_zeros(2, len(left), 1)
    return _run(left, right, known, None)


def _products(x: Tensor) -> Tensor:
    """`of_one` as an operator."""
    made = x.new_empty(numbers_of_one(x))
    if x.numel():
        _run(x, x, None, made)
    return made


OPERATORS.define("pair_squares(Tensor left, Tensor right, Tensor? known) -> Tensor")
OPERATORS.impl("pair_squares", _squares, "CPU")
OPERATORS.define("pair_products(Tensor x) -> Tensor")
OPERATORS.impl("pair_products", _products, "CPU")


@register_flop_formula(torch.ops.perex.pair_squares)
def _operations(left: Any, right: Any, known: Any, **kwargs: Any) -> int:
    """Operations of `pair_squares`."""
    width = left[2] + 1 + (right[2] if known is None else 0)
    return int(left[0] * left[1] * (left[1] + 1) * width)


@register_flop_formula(torch.ops.perex.pair_products)
def _operations_of_one(x: Any, **kwargs: Any) -> int:
    """Operations of `pair_products`."""
    return int(x[0] * x[1] * (x[1] + 1) * x[2])
