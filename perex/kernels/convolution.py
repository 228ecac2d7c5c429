r"""Squared norms of per-example weight gradients of convolutions, $G_b = \sum_p g_{bp} u_{bp}^\top$.

$u_{bp}$ is the patch of the input under output position $p$. In a transposed convolution, input and output gradient
exchange their roles: *wide* is what the kernel moves over, *narrow* has a row for each place that it takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from perex.kernels import outer, pixels
from perex.kernels.blocks import block_size, example_blocks
from perex.kernels.cancellation import recomputed
from perex.kernels.geometry import (
    Geometry,
    by_group,
    measures,
    options_of,
    patches,
    weight_gradient,
    weight_gradients,
)
from perex.kernels.outer import whole_squares
from perex.kernels.plan import Plan
from perex.kernels.spot import current
from perex.kernels.strategies import Strategies
from perex.kernels.triton.available import usable
from perex.kernels.triton.tiles import side, slack, tiles

NORMS = Strategies("convolutions")
"""Ways to $\\|G_b\\|^2$, for `x` of shape `(B, R, C_in, *spatial)` and `grads` `(B, R, C_out, *spatial')`, R images an
example. Their constants were measured on two CPU cores, against a batched weight gradient of the same shapes."""

CALL = 8_000_000
"""What a backend call for one example costs beside its arithmetic, in multiply-adds."""

SCATTERED, FEW_ENTRIES, FEW_POSITIONS = 350, 2**17, 256
"""What a call for several examples costs for each entry of the weight, unless these are few and positions many."""

GATHER = 1.5
"""By how much a fused kernel is slower for looking up where patches lie; guessed."""


def squared_norm(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    r"""$\|G_b\|^2$ in the cheapest way.

    Args:
        x: input, `(B, R, C_in, *spatial)`, R rows (images) an example.
        grads: output gradient, `(B, R, C_out, *spatial')`.
        geometry: the convolution's options.

    Returns:
        Tensor `(B,)`.
    """
    if x.numel() == 0 or grads.numel() == 0:
        return grads.new_zeros(x.shape[0])
    return NORMS.run((x.shape, grads.shape, geometry), x, grads, geometry)


def plan(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan:
    """What `squared_norm` does with an input and output gradient of these shapes."""
    if x.numel() == 0 or grads.numel() == 0:
        return Plan("nothing", 0, 0)
    return NORMS.choose(x, grads, geometry)


def _multiplied_out(x: torch.Size, grads: torch.Size, geometry: Geometry) -> tuple[int, int, int]:
    """Positions, entries of the weight, and operations to multiply all examples out and square them."""
    positions, rows, columns = measures(x, grads, geometry)
    entries = geometry.groups * rows * columns
    return positions, entries, 2 * x[0] * entries * (positions + 1)


def _calls(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan:
    _, entries, flops = _multiplied_out(x, grads, geometry)
    return Plan("call per example", flops, entries, x[0] * entries, 1.0, x[0] * CALL)


@NORMS.way("call per example", _calls)
def call_per_example(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    """$G_b$ multiplied out by one call of the backend for each example."""
    gradients = (weight_gradient(x[b], grads[b], geometry) for b in range(x.shape[0]))
    return torch.cat([whole_squares(gradient.unsqueeze(0)) for gradient in gradients])


def _grouped(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan | None:
    positions, entries, flops = _multiplied_out(x, grads, geometry)
    block = block_size(x[0], entries)
    few = entries <= FEW_ENTRIES and positions >= FEW_POSITIONS
    calls = x[0] * entries * (0 if few else SCATTERED) + -(-x[0] // block) * CALL
    return Plan("grouped calls", flops, block * entries, 2 * x[0] * entries, 1.1, calls) if x[0] > 1 else None


@NORMS.way("grouped calls", _grouped)
def grouped_calls(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    """$G_b$ of several examples in one call of the backend, each example a group of channels."""
    parts = []
    for i, j in example_blocks(x.shape[0], math.prod(geometry.weight_shape)):
        gradients = weight_gradients(x[i:j], grads[i:j], *options_of(geometry))
        parts.append(whole_squares(gradients))
    return torch.cat(parts)


def in_blocks(x: Tensor, grads: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """$G_b$ of some examples after the other, `(b, *weight_shape)`, in the cheaper of the two ways above."""
    if cheaper_one_by_one(x.shape, grads.shape, geometry):
        yield from (weight_gradient(x[b], grads[b], geometry).unsqueeze(0) for b in range(x.shape[0]))
        return
    for i, j in example_blocks(x.shape[0], math.prod(geometry.weight_shape)):
        yield weight_gradients(x[i:j], grads[i:j], *options_of(geometry))


def cheaper_one_by_one(x: torch.Size, grads: torch.Size, geometry: Geometry) -> bool:
    """Whether a call of the backend for each example costs less than one for several."""
    several = _grouped(x, grads, geometry)
    return several is None or _calls(x, grads, geometry).cost <= several.cost


def multiplied_out(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    """$G_b$ of all examples, `(B, *weight_shape)`."""
    if x.numel() == 0 or grads.numel() == 0:
        return grads.new_zeros(x.shape[0], *geometry.weight_shape)
    return torch.cat(list(in_blocks(x, grads, geometry)))


def summed_plan(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan:
    """What `summed` costs with tensors of these shapes."""
    plan = _calls(x, grads, geometry)
    if not cheaper_one_by_one(x, grads, geometry):
        plan = _grouped(x, grads, geometry) or plan
    return plan._replace(way=f"{plan.way}, with the sum", moved=2 * plan.moved)


def summed(x: Tensor, grads: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    r"""Squared norms `(B,)`, and the sum over examples $\sum_b G_b$, added up while each block is at hand."""
    norms, total = [], grads.new_zeros(geometry.weight_shape)
    for gradients in in_blocks(x, grads, geometry):
        norms.append(whole_squares(gradients))
        total += gradients[0] if len(gradients) == 1 else gradients.sum(0)
    return torch.cat(norms), total


def _unfolded(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan:
    batch, groups = x[0], geometry.groups
    positions, rows, columns = measures(x, grads, geometry)
    inner = outer.plan(torch.Size((batch, groups, positions, rows)), torch.Size((batch, groups, positions, columns)))
    entries = groups * positions * columns
    elements = inner.elements + block_size(batch, entries) * entries
    return Plan(f"unfolded, {inner.way}", inner.flops, elements, inner.moved + 2 * batch * entries, 1.3, inner.calls)


@NORMS.way("unfolded", _unfolded)
def unfolded(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    r"""$\|\sum_p g_p u_p^\top\|^2$ with the patches unfolded, a few examples at a time; see `perex.kernels.outer`."""
    narrow, wide = (x, grads) if geometry.transposed else (grads, x)
    positions, columns = narrow.shape[1] * math.prod(narrow.shape[3:]), math.prod(geometry.weight_shape[1:])
    parts = []
    for i, j in example_blocks(x.shape[0], geometry.groups * positions * columns):
        left = by_group(narrow[i:j], geometry.groups).flatten(2, -2)  # (b, G, T, m)
        parts.append(outer.squared_norm(left, patches(wide[i:j], narrow.shape[3:], geometry)))
    return torch.cat(parts)


@NORMS.way("pixel Gram", pixels.plan)
def pixel_gram(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    r"""$\sum_{pq} (g_p \cdot g_q)(u_p \cdot u_q)$, with the inner products of patches from those of pixels."""
    totals, sizes = pixels.inner_products(x, grads, geometry)
    return recomputed(totals, sizes, lambda b: call_per_example(x[b], grads[b], geometry))


def _triton_direct(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan | None:
    spot, counted = current(), 2**31 - 1  # positions and columns are counted in 32 bits
    if spot is None or not usable(spot) or len(x) > 5 or max(x[1:].numel(), grads[1:].numel()) > counted:
        return None
    _, rows, columns = measures(x, grads, geometry)
    _, _, flops = _multiplied_out(x, grads, geometry)
    sums = x[0] * geometry.groups * tiles(rows, side(rows, spot.dtype)) * tiles(columns, side(columns, spot.dtype))
    return Plan("Triton direct", flops, sums, sums, GATHER * slack(spot.dtype, rows, columns))


@NORMS.way("Triton direct", _triton_direct, fused=True)
def triton_direct(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    r"""$\|\sum_p g_p u_p^\top\|^2$, patches read where they lie and each tile of the gradient squared in registers."""
    from perex.kernels.triton.convolution import direct

    return direct(x, grads, geometry)
