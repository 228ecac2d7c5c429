"""Closed forms for inner products between factors of the same parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from perex.factors.base import Factor
from perex.factors.dense import Dense
from perex.factors.narrow import narrow
from perex.factors.outer import Outer
from perex.factors.rows import Rows
from perex.kernels.blocks import block, block_size, example_blocks
from perex.kernels.outer import gram_dot
from perex.kernels.plan import Plan
from perex.kernels.products import widen

Product = Callable[[Any, Any], Tensor]
PRODUCTS: dict[tuple[type[Factor], type[Factor]], Product] = {}
PAIRS: dict[tuple[type[Factor], type[Factor]], Product] = {}
NARROW: dict[tuple[type[Factor], type[Factor]], Product] = {}
"""Those of `PRODUCTS` that take half precision as it is."""


def closed_form(
    first: type[Factor], second: type[Factor], forms: dict[tuple[type[Factor], type[Factor]], Product] = PRODUCTS
) -> Product | None:
    """The registered form of `Factor.dot` for two kinds, in either order."""
    form = forms.get((first, second))
    if form is not None:
        return form
    swapped = forms.get((second, first))
    return None if swapped is None else lambda a, b: swapped(b, a)


def all_pairs(first: type[Factor], second: type[Factor]) -> Product | None:
    """The registered form of `Factor.pairs` for two kinds, in either order."""
    form = PAIRS.get((first, second))
    if form is not None:
        return form
    swapped = PAIRS.get((second, first))
    return None if swapped is None else lambda a, b: swapped(b, a).mT


def product(
    first: type[Factor], second: type[Factor], forms: dict[tuple[type[Factor], type[Factor]], Product] = PRODUCTS
) -> Callable[[Product], Product]:
    """Register the inner product of two kinds of factors, real numbers: `(B,)`, or `(B, C)` among `PAIRS`."""

    def register(form: Product) -> Product:
        forms[first, second] = form
        return form

    return register


def closed_cost(first: Factor, second: Factor) -> Plan | None:
    """What the closed form costs where there is one, by shapes alone; None of those registered by others."""
    if isinstance(second, Dense) or isinstance(first, Outer) and isinstance(second, Rows):
        first, second = second, first
    if isinstance(first, Dense) and isinstance(second, Outer):
        size = second.left.numel() + second.right.numel()
        return Plan("Dense . Outer", second.dense_flops() + 2 * second.right.numel(), size)
    if isinstance(first, Dense) and isinstance(second, Rows):
        return Plan("Dense . Rows", 2 * second.grads.numel(), 2 * second.grads.numel())
    if isinstance(first, Rows) and isinstance(second, Outer) and second.left.shape[2] == first.shape[0]:
        pairs, d = first.ids.shape[1] * second.left.shape[1], first.grads.shape[2]
        return Plan("Rows . Outer", 2 * first.batch * pairs * (d + 1), 3 * block_size(first.batch, pairs) * pairs)
    if isinstance(first, Outer) and isinstance(second, Outer):
        pairs, width = first.left.shape[1] * second.left.shape[1], first.left.shape[2] + first.right.shape[2]
        return Plan("Gram", 2 * first.batch * pairs * (width + 1), 3 * block_size(first.batch, pairs) * pairs)
    return None


@product(Outer, Outer)
def outer_outer(first: Outer, second: Outer) -> Tensor:
    r"""$\sum_{ts} (l_t \cdot l'_s)(r_t \cdot r'_s)$."""
    return gram_dot(*(x.unsqueeze(1) for x in (first.left, first.right, second.left, second.right)))


@product(Dense, Outer)
def dense_outer(first: Dense, second: Outer) -> Tensor:
    r"""$\sum_t l_t^\top V r_t$."""
    weight = first.values.reshape(first.batch, second.left.shape[2], second.right.shape[2])
    return ((second.left @ weight) * second.right).sum((1, 2))


@product(Dense, Rows)
def dense_rows(first: Dense, second: Rows) -> Tensor:
    r"""$\sum_t V[id_t] \cdot g_t$."""
    index = second.ids.long().unsqueeze(2).expand_as(second.grads)
    return (first.values.gather(1, index) * second.grads).sum((1, 2))


@product(Rows, Outer, NARROW)
@product(Rows, Outer)
def rows_outer(first: Rows, second: Outer) -> Tensor:
    r"""$\sum_{ts} (g_t \cdot r_s) \, l_s[id_t]$: an embedding tied to an output layer.

    Row $id_t$ of $\sum_s l_s r_s^\top$ is $\sum_s l_s[id_t] r_s$; its product with $g_t$ needs neither
    table multiplied out.
    """
    left, right, grads = second.left, second.right, first.grads
    if second.shape != first.shape or left.shape[2] != first.shape[0]:
        return narrow(first).blockwise_dot(narrow(second))
    parts = []
    for i, j in example_blocks(first.batch, first.ids.shape[1] * left.shape[1]):
        similarity = widen(grads[i:j]) @ widen(right[i:j]).mT  # (b, T, S)
        columns = first.ids[i:j].long().unsqueeze(1).expand(-1, left.shape[1], -1)
        parts.append((similarity.mT * left[i:j].gather(2, columns)).sum((1, 2)))
    return torch.cat(parts)


def pair_blocks(one: int, other: int, elements: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of all pairs of examples of two batches, whose temporaries, `elements` a pair, stay within a block."""
    step = block_size(other, elements)
    own = max(1, block() // max(1, step * elements))
    for i in range(0, one, own):
        for k in range(0, other, step):
            yield slice(i, min(i + own, one)), slice(k, min(k + step, other))


def table(first: Factor, second: Factor, elements: int, form: Callable[[slice, slice], Tensor], like: Tensor) -> Tensor:
    """`(B, C)` inner products, a piece at a time."""
    found = like.new_zeros(first.batch, second.batch)
    for own, others in pair_blocks(first.batch, second.batch, elements):
        found[own, others] = form(own, others)
    return found


@product(Dense, Dense, PAIRS)
def dense_dense_pairs(first: Dense, second: Dense) -> Tensor:
    """One matrix product."""
    one, two = (factor.values.reshape(factor.batch, math.prod(factor.shape)) for factor in (first, second))
    return (one @ two.mH).real


@product(Dense, Outer, PAIRS)
@product(Dense, Rows, PAIRS)
def dense_pairs(first: Dense, second: Factor) -> Tensor:
    """Along each of the multiplied-out gradients."""
    rows = [second.along(direction) for direction in first.values]
    return torch.stack(rows) if rows else first.values.new_zeros(0, second.batch)


@product(Outer, Outer, PAIRS)
def outer_outer_pairs(first: Outer, second: Outer) -> Tensor:
    r"""$\sum_{ts} (l_{bt} \cdot l'_{cs})(r_{bt} \cdot r'_{cs})$, or multiplied out where that is cheaper."""
    positions, others = first.left.shape[1], second.left.shape[1]
    m, n = first.left.shape[2], first.right.shape[2]
    out = (positions / max(second.batch, 1) + others / max(first.batch, 1) + 1) * m * n
    if positions * others * (m + n) > out:
        return first.blockwise_pairs(second)

    def form(own: slice, those: slice) -> Tensor:
        lefts = torch.tensordot(first.left[own], second.left[those], ([2], [2]))  # (b, T, c, S)
        return lefts.mul_(torch.tensordot(first.right[own], second.right[those], ([2], [2]))).sum((1, 3))

    return table(first, second, positions * others, form, first.left)


@product(Rows, Rows, PAIRS)
def rows_rows_pairs(first: Rows, second: Rows) -> Tensor:
    r"""$\sum_{ts} [id_{bt} = id'_{cs}] \, g_{bt} \cdot g'_{cs}$."""

    def form(own: slice, those: slice) -> Tensor:
        same = first.ids[own][:, :, None, None] == second.ids[those]  # (b, T, c, S)
        return torch.tensordot(first.grads[own], second.grads[those], ([2], [2])).mul_(same).sum((1, 3))

    return table(first, second, first.ids.shape[1] * second.ids.shape[1], form, first.grads)


@product(Rows, Outer, PAIRS)
def rows_outer_pairs(first: Rows, second: Outer) -> Tensor:
    r"""$\sum_{ts} (g_{bt} \cdot r_{cs}) \, l_{cs}[id_{bt}]$."""
    if second.shape != first.shape or second.left.shape[2] != first.shape[0]:
        return first.blockwise_pairs(second)

    def form(own: slice, those: slice) -> Tensor:
        similar = torch.tensordot(first.grads[own], second.right[those], ([2], [2]))  # (b, T, c, S)
        return similar.mul_(second.left[those][:, :, first.ids[own].long()].permute(2, 3, 0, 1)).sum((1, 3))

    return table(first, second, first.ids.shape[1] * second.left.shape[1], form, first.grads)
