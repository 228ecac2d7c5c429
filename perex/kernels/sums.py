r"""Squared norms $\|G_b\|^2$ and the sum over examples $\sum_b G_b$ from one product: for `.grad` beside norms."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from perex.kernels import convolution, large, outer
from perex.kernels.blocks import block, example_blocks
from perex.kernels.compiled import direct as compiled_patches
from perex.kernels.compiled import outer as compiled_outer
from perex.kernels.compiled.library import runnable
from perex.kernels.convolution import MULTIPLIED, Multiplied, cheapest
from perex.kernels.geometry import Geometry
from perex.kernels.outer import whole_squares
from perex.kernels.plan import Plan
from perex.kernels.spot import plain
from perex.kernels.strategies import Strategies

OUTER = Strategies("outer products, with their sum")
"""Ways to both, for `left` of shape `(B, T, m)` and `right` `(B, T, n)`."""

PATCHES = Strategies("convolutions, with their sum")
"""Ways to both, for `x` of shape `(B, R, C_in, *spatial)` and `grads` `(B, R, C_out, *spatial')`."""

MOST = 2**22
"""Entries of weights that threads may add up examples in, each in its own, all together."""


def plan_of_outer(left: torch.Size, right: torch.Size) -> Plan:
    """What `of_outer` costs with tensors of these shapes."""
    plan = OUTER.choose(left, right)
    return plan._replace(way=f"{plan.way}, with the sum")


def of_outer(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    r"""Both of $G_b = \sum_t l_{bt} r_{bt}^\top$.

    Args:
        left: `(B, T, m)`.
        right: `(B, T, n)`.

    Returns:
        Tensors `(B,)` and `(m, n)`.
    """
    both: tuple[Tensor, Tensor] = OUTER.run((left.shape, right.shape), left, right)
    return both


def _direct(left: torch.Size, right: torch.Size) -> Plan:
    plan = outer.direct_plan(*(torch.Size((shape[0], 1, *shape[1:])) for shape in (left, right)))
    return plan._replace(moved=2 * plan.moved)


@OUTER.way("direct", _direct)
def direct(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Multiplied out, a few examples at a time, or a few rows of one, each squared and added up while it is at hand."""
    batch, m, n = left.shape[0], left.shape[2], right.shape[2]
    total, norms = left.new_zeros(m, n), left.new_zeros(batch)
    step = max(1, block() // max(1, n))  # of rows
    for i, j in example_blocks(batch, m * n):
        for k in range(0, max(m, 1), step):
            found = large.multiplied(left[i:j, :, k : k + step].mT, right[i:j])
            norms[i:j] += whole_squares(found)
            total[k : k + step] += found[0] if j - i == 1 else found.sum(0)
    return norms, total


def _compiled(left: torch.Size, right: torch.Size) -> Plan | None:
    return compiled_outer.plan(left, right, summing=True) if plain() else None


@OUTER.way("compiled direct", _compiled)
def compiled(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Each tile of a gradient squared and added up in registers."""
    if not runnable(left, right):
        return direct(left, right)
    squares, total = compiled_outer.squares_and_sum(left, right, summing=True)
    assert total is not None
    return squares.sum(1), total


def plan_of_patches(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan:
    """What `of_patches` costs with tensors of these shapes."""
    plan = PATCHES.choose(x, grads, geometry)
    return plan._replace(way=f"{plan.way}, with the sum", moved=plan.moved + x[0] * geometry.weight_shape.numel())


def of_patches(x: Tensor, grads: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    r"""Both of a convolution's gradients.

    Args:
        x: input, `(B, R, C_in, *spatial)`.
        grads: output gradient, `(B, R, C_out, *spatial')`.
        geometry: the convolution's options.

    Returns:
        Tensors `(B,)` and `geometry.weight_shape`.
    """
    both: tuple[Tensor, Tensor] = PATCHES.run((x.shape, grads.shape, geometry), x, grads, geometry)
    return both


def in_blocks(multiplied: Multiplied, x: Tensor, grads: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Multiplied out in some way, a few examples at a time, each squared and added up while it is at hand."""
    norms, total = [], grads.new_zeros(geometry.weight_shape)
    for gradients in multiplied(x, grads, geometry):
        norms.append(whole_squares(gradients))
        total += gradients[0] if len(gradients) == 1 else gradients.sum(0)
    return torch.cat(norms), total


for _name, (_plan, _multiplied) in MULTIPLIED.items():
    PATCHES.way(_name, _plan)(partial(in_blocks, _multiplied))


def _compiled_patches(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan | None:
    few = torch.get_num_threads() * geometry.weight_shape.numel() <= MOST
    return convolution.compiled_plan(x, grads, geometry) if few else None


@PATCHES.way("compiled direct", _compiled_patches)
def compiled_of_patches(x: Tensor, grads: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Each tile of a gradient squared and added up in registers."""
    if not runnable(x, grads):
        return in_blocks(cheapest(x.shape, grads.shape, geometry)[1], x, grads, geometry)
    squares, total = compiled_patches.squares_and_sum(x, grads, geometry, summing=True)
    assert total is not None
    return squares.sum(1), total
