r"""Squared norms and inner products of sums of outer products, $G_b = \sum_t l_{bt} r_{bt}^\top$."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from perex.kernels.blocks import block_size, example_blocks
from perex.kernels.plan import Plan


def choose(positions: int, m: int, n: int) -> Literal["one position", "Gram", "direct"]:
    """The cheapest form for `positions` outer products of `m` by `n` entries."""
    if positions == 1:
        return "one position"
    return "Gram" if positions * (m + n) < m * n else "direct"


def plan(left: torch.Size, right: torch.Size) -> Plan:
    """What `squared_norm` does with tensors of these shapes.

    Args:
        left: `(B, G, T, m)`.
        right: `(B, G, T, n)`.
    """
    batch, groups, positions, m = left
    n = right[3]
    way = choose(positions, m, n)
    if way == "one position":
        return Plan(way, 2 * batch * groups * (m + n + 1), batch * groups * (m + n))
    if way == "Gram":
        pairs = groups * positions**2
        return Plan(way, 2 * batch * pairs * (m + n + 1), 3 * block_size(batch, pairs) * pairs)
    entries = groups * m * n
    return Plan(way, 2 * batch * entries * (positions + 1), 2 * block_size(batch, entries) * entries)


def squared_norm(left: Tensor, right: Tensor) -> Tensor:
    r"""$\|G_b\|^2$ by the cheapest of three forms.

    One position: $\|l\|^2 \|r\|^2$. Otherwise *direct*, $2 T m n$ operations an example to multiply $G_b$
    out, or *Gram*, $\sum_{ts} (l_t \cdot l_s)(r_t \cdot r_s)$ with $2 T^2 (m + n)$.

    Args:
        left: `(B, G, T, m)`, for G independent groups.
        right: `(B, G, T, n)`.

    Returns:
        Tensor `(B,)`.
    """
    positions, m, n = left.shape[2], left.shape[3], right.shape[3]
    way = choose(positions, m, n)
    if way == "one position":
        return (square(left).sum(3) * square(right).sum(3)).sum((1, 2))
    if way == "Gram":
        return gram_dot(left, right, left, right)
    return direct_squared_norm(left, right)


def direct_squared_norm(left: Tensor, right: Tensor) -> Tensor:
    r"""$\|\sum_t l_t r_t^\top\|^2$, multiplied out a few examples at a time.

    Args:
        left: `(B, G, T, m)`.
        right: `(B, G, T, n)`.

    Returns:
        Tensor `(B,)`.
    """
    elements = left.shape[1] * left.shape[3] * right.shape[3]
    parts = []
    for i, j in example_blocks(left.shape[0], elements):
        gradient = left[i:j].mT @ right[i:j]  # (b, G, m, n)
        parts.append(square(gradient).sum((1, 2, 3)))
    return torch.cat(parts)


def gram_dot(left: Tensor, right: Tensor, other_left: Tensor, other_right: Tensor) -> Tensor:
    r"""$\langle G_b, H_b \rangle = \sum_{ts} (l_t \cdot l'_s)(r_t \cdot r'_s)$, position pair by position pair.

    Args:
        left: `(B, G, T, m)`.
        right: `(B, G, T, n)`.
        other_left: `(B, G, S, m)`.
        other_right: `(B, G, S, n)`.

    Returns:
        Tensor `(B,)`.
    """
    elements = left.shape[1] * left.shape[2] * other_left.shape[2]
    parts = []
    for i, j in example_blocks(left.shape[0], elements):
        lefts = left[i:j] @ other_left[i:j].mT  # (b, G, T, S)
        rights = right[i:j] @ other_right[i:j].mT
        parts.append((lefts * rights).sum((1, 2, 3)))
    return torch.cat(parts)


def square(x: Tensor) -> Tensor:
    """Elementwise square; of complex numbers, of their modulus."""
    return (x * x.conj()).real if x.is_complex() else x * x
