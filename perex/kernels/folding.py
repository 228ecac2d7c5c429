"""Convolutions of few channels as such of more: the last axis of the kernel counts among the channels.

A product of matrices of 3 channels leaves most of a GPU's tiles empty; with the 7 places of a row of the kernel, it is
one of 21.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from perex.kernels.geometry import Geometry

FEW = 16
"""Below how many channels that is done."""


def folded(geometry: Geometry) -> Geometry:
    """The convolution after `fold`, or the same where nothing is folded; its weight has the same entries, and zeros."""
    rows, channels, *kernel = geometry.weight_shape
    if channels >= FEW or kernel[-1] == 1 or geometry.transposed or geometry.groups > 1:
        return geometry
    return replace(
        geometry,
        weight_shape=torch.Size((rows, whole(channels * kernel[-1]), *kernel[:-1], 1)),
        stride=(*geometry.stride[:-1], 1),
        padding=(*geometry.padding[:-1], 0),
        dilation=(*geometry.dilation[:-1], 1),
    )


def fold(x: Tensor, places: int, geometry: Geometry) -> Tensor:
    """What a convolution is of after folding.

    Args:
        x: input, `(B, R, C, *spatial, W)`.
        places: how many the kernel takes along the last axis, W'.
        geometry: the convolution's options, before.

    Returns:
        Tensor `(B, R, C', *spatial, W')`, the channels next to each other in memory and some of them zero.
    """
    size, step = geometry.weight_shape[-1], geometry.stride[-1]
    pad, spread = geometry.padding[-1], geometry.dilation[-1]
    windows = F.pad(x, (pad, pad)).unfold(-1, spread * (size - 1) + 1, step)[..., :places, ::spread]
    windows = windows.movedim(2, -2)  # (B, R, *spatial, W', C, k)
    channels = windows.shape[-2] * size
    out = x.new_zeros(*windows.shape[:-2], whole(channels))
    out[..., :channels].unflatten(-1, windows.shape[-2:]).copy_(windows)
    return out.movedim(-1, 2)


def whole(channels: int) -> int:
    """So many channels, and more to be a multiple of what is read at a time."""
    return -(-channels // FEW) * FEW
