r"""Per-example weight gradients of convolutions, one backend call an example."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
