r"""Per-example weight gradients of convolutions, and their norms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from perex.kernels import outer
from perex.kernels.blocks import block_size, example_blocks
from perex.kernels.plan import Plan


@dataclass(frozen=True)
class Geometry:
    """The options of a convolution that decide which weight gradient goes with which input.

    `weight_shape` is `(C_out, C_in / groups, *kernel)`, or `(C_in, C_out / groups, *kernel)` when transposed.
    """

    weight_shape: torch.Size
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def weight_gradient(x: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
    r"""The gradient of a convolution's weight, summed over rows.

    Args:
        x: input, `(R, C_in, *spatial)`.
        grad: output gradient, `(R, C_out, *spatial')`.
        geometry: the convolution's options.

    Returns:
        Tensor of `geometry.weight_shape`.
    """
    if x.numel() == 0 or grad.numel() == 0:
        return x.new_zeros(geometry.weight_shape)
    weight = x.new_zeros(()).expand(geometry.weight_shape)  # its values are not read, only its shape
    return torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.transposed,
        geometry.output_padding,
        geometry.groups,
        [False, True, False],
    )[1]


CALL = 300_000
"""What a backend call costs beside its arithmetic, in multiply-adds."""


def sizes(x: torch.Size, grads: torch.Size, geometry: Geometry) -> tuple[int, int, int]:
    """Positions of an example, and rows and columns of the weight of one group."""
    narrow = x if geometry.transposed else grads
    rows, columns = geometry.weight_shape[0] // geometry.groups, math.prod(geometry.weight_shape[1:])
    return narrow[1] * math.prod(narrow[3:]), rows, columns


def unfolds(x: torch.Size, grads: torch.Size, geometry: Geometry) -> bool:
    """Whether unfolding patches is cheaper than a backend call for each example."""
    positions, rows, columns = sizes(x, grads, geometry)
    direct = geometry.groups * positions * rows * columns
    gram = geometry.groups * positions**2 * (rows + columns)
    return min(direct, gram) + 4 * geometry.groups * positions * columns < direct + CALL


def plan(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan:
    """What `squared_norm` does with an input and output gradient of these shapes.

    Args:
        x: `(B, R, C_in, *spatial)`.
        grads: `(B, R, C_out, *spatial')`.
        geometry: the convolution's options.
    """
    batch, groups = x[0], geometry.groups
    if x.numel() == 0 or grads.numel() == 0:
        return Plan("nothing", 0, 0)
    positions, rows, columns = sizes(x, grads, geometry)
    if unfolds(x, grads, geometry):
        left, right = torch.Size((batch, groups, positions, rows)), torch.Size((batch, groups, positions, columns))
        inner = outer.plan(left, right)
        patches = block_size(batch, groups * positions * columns) * groups * positions * columns
        return Plan(f"unfolded, {inner.way}", inner.flops, inner.elements + patches)
    entries = groups * rows * columns
    return Plan("call per example", 2 * batch * entries * (positions + 1), 2 * entries)


def squared_norm(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    r"""$\|G_b\|^2$ by the cheaper of two ways.

    One backend call an example multiplies $G_b$ out. Or patches are unfolded, a few examples at a time, and their
    outer products with the output gradient take the direct or Gram form (`perex.kernels.outer`): better where calls
    are small, or positions few and channels many.

    Args:
        x: input, `(B, R, C_in, *spatial)`, R rows (images) an example.
        grads: output gradient, `(B, R, C_out, *spatial')`.
        geometry: the convolution's options.

    Returns:
        Tensor `(B,)`.
    """
    batch = x.shape[0]
    if batch == 0 or x.numel() == 0 or grads.numel() == 0:
        return grads.new_zeros(batch)
    if unfolds(x.shape, grads.shape, geometry):
        return unfolded_squared_norm(x, grads, geometry)
    gradients = (weight_gradient(x[b], grads[b], geometry) for b in range(batch))
    return torch.stack([outer.square(gradient).sum() for gradient in gradients])


def unfolded_squared_norm(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    r"""$\|\sum_p g_p u_p^\top\|^2$ with the patches $u_p$ unfolded, a few examples at a time.

    A transposed convolution is the same with the roles of input and output gradient exchanged.

    Args:
        x: `(B, R, C_in, *spatial)`.
        grads: `(B, R, C_out, *spatial')`.
        geometry: the convolution's options.

    Returns:
        Tensor `(B,)`.
    """
    narrow, wide = (x, grads) if geometry.transposed else (grads, x)
    positions, columns = narrow.shape[1] * math.prod(narrow.shape[3:]), math.prod(geometry.weight_shape[1:])
    parts = []
    for i, j in example_blocks(x.shape[0], geometry.groups * positions * columns):
        left = narrow[i:j].unflatten(2, (geometry.groups, -1)).movedim(2, 1).movedim(3, -1)  # (b, G, R, *spatial, m)
        right = patches(wide[i:j], narrow.shape[3:], geometry)
        parts.append(outer.squared_norm(left.flatten(2, -2), right))
    return torch.cat(parts)


def patches(wide: Tensor, places: torch.Size, geometry: Geometry) -> Tensor:
    """The patch under each place of the kernel.

    Args:
        wide: what the kernel moves over, `(b, R, C, *spatial)`.
        places: how many places it takes in each spatial dimension.
        geometry: the convolution's options.

    Returns:
        Tensor `(b, G, T, n)`, with T the places of all R rows and n the columns of the weight.
    """
    kernel = geometry.weight_shape[2:]
    padded = F.pad(wide, [side for size in reversed(geometry.padding) for side in (size, size)])
    for axis, (size, step, spread, count) in enumerate(
        zip(kernel, geometry.stride, geometry.dilation, places, strict=True), start=3
    ):
        padded = padded.unfold(axis, spread * (size - 1) + 1, step).narrow(axis, 0, count)[..., ::spread]
    grouped = padded.unflatten(2, (geometry.groups, -1)).movedim(2, 1)  # (b, G, R, C/G, *places, *kernel)
    return grouped.movedim(3, 3 + len(kernel)).flatten(3 + len(kernel)).flatten(2, -2)
