"""What a convolution does: its options, the gradient of its weight, and the patches under its kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula


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

    @property
    def options(self) -> tuple[Any, ...]:
        """What torch's convolutions take after input, weight and bias."""
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups

    def of_several(self, examples: int) -> Geometry:
        """The same for several examples side by side, each a group (or groups) of channels."""
        rows, *columns = self.weight_shape
        return replace(self, weight_shape=torch.Size((examples * rows, *columns)), groups=examples * self.groups)


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
        *geometry.options,
        [False, True, False],
    )[1]


def convolved(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The convolution by a weight, `(R, C_in, *spatial)` to `(R, C_out, *spatial')`."""
    return torch.convolution(
        x,
        weight,
        None,
        *geometry.options,
    )


def _weight_gradients(
    x: Tensor,
    grad: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """Each example's gradient of a convolution's weight, all from one grouped convolution.

    Args:
        x: input, `(B, R, C_in, *spatial)`.
        grad: output gradient, `(B, R, C_out, *spatial')`.
        weight_shape: the weight's shape; further arguments are as in `Geometry`.

    Returns:
        Tensor `(B, *weight_shape)`.
    """
    geometry = geometry_of(weight_shape, stride, padding, dilation, transposed, output_padding, groups)
    inputs, outputs = (t.transpose(0, 1).flatten(1, 2) for t in (x, grad))  # (R, B * C, *spatial)
    found = weight_gradient(inputs, outputs, geometry.of_several(x.shape[0]))
    return found.reshape(x.shape[0], *weight_shape)


OPERATORS = torch.library.Library("perex", "DEF")  # its operators go when it goes
OPERATORS.define(
    "weight_gradients(Tensor x, Tensor grad, int[] weight_shape, int[] stride, int[] padding, int[] dilation, "
    "bool transposed, int[] output_padding, int groups) -> Tensor"
)
OPERATORS.impl("weight_gradients", _weight_gradients, "CompositeExplicitAutograd")
weight_gradients = torch.ops.perex.weight_gradients
"""`_weight_gradients` as an operator of its own, so that operations are counted right: torch's formula for convolutions
has no groups. (`torch.library.custom_op` would import the compiler when it is first run: 800 modules, 50 MB.)"""


def options_of(geometry: Geometry) -> tuple[Any, ...]:
    """A geometry's fields, as an operator takes them."""
    return tuple(list(value) if isinstance(value, tuple) else value for value in vars(geometry).values())


def geometry_of(weight_shape: Sequence[int], *options: Any) -> Geometry:
    """The geometry, from its fields as an operator takes them."""
    fields: list[Any] = [tuple(value) if isinstance(value, list) else value for value in options]
    return Geometry(torch.Size(weight_shape), *fields)


@register_flop_formula(torch.ops.perex.weight_gradients)
def _operations(x: Any, grad: Any, weight_shape: Any, *options: Any, **kwargs: Any) -> int:
    """Operations of `weight_gradients`: a multiply-add for each position and entry of the weight."""
    narrow = x if options[3] else grad
    return 2 * int(narrow[0] * narrow[1] * math.prod(narrow[3:]) * math.prod(weight_shape))


def measures(x: torch.Size, grads: torch.Size, geometry: Geometry) -> tuple[int, int, int]:
    """Positions of an example, and rows and columns of the weight of one group."""
    narrow = x if geometry.transposed else grads
    rows, columns = geometry.weight_shape[0] // geometry.groups, math.prod(geometry.weight_shape[1:])
    return narrow[1] * math.prod(narrow[3:]), rows, columns


def by_group(images: Tensor, groups: int) -> Tensor:
    """`(b, R, C, *spatial)` as `(b, G, R, *spatial, C / G)`."""
    return images.unflatten(2, (groups, -1)).movedim(2, 1).movedim(3, -1)


def patches(wide: Tensor, places: torch.Size, geometry: Geometry) -> Tensor:
    """The patch under each place of the kernel.

    Args:
        wide: what the kernel moves over, `(b, R, C, *spatial)`.
        places: how many places it takes in each spatial dimension.
        geometry: the convolution's options.

    Returns:
        Tensor `(b, G, T, n)`, with T the places of all R rows and n the columns of the weight. In a CPU's memory the
        places of one column are neighbours, as pixels of the image are: copied in runs, not one by one.
    """
    kernel = geometry.weight_shape[2:]
    if any(geometry.padding):
        wide = F.pad(wide, [side for size in reversed(geometry.padding) for side in (size, size)])
    for axis, (size, step, spread, count) in enumerate(
        zip(kernel, geometry.stride, geometry.dilation, places, strict=True), start=3
    ):
        wide = wide.unfold(axis, spread * (size - 1) + 1, step).narrow(axis, 0, count)[..., ::spread]
    grouped = wide.unflatten(2, (geometry.groups, -1)).movedim(1, 3)  # (b, G, C/G, R, *places, *kernel)
    if wide.is_cuda:
        return grouped.movedim(2, 3 + len(kernel)).flatten(3 + len(kernel)).flatten(2, -2)
    columns = grouped.movedim(tuple(range(-len(kernel), 0)), tuple(range(3, 3 + len(kernel))))
    return columns.flatten(2, 2 + len(kernel)).flatten(3).mT
