"""Max pooling of images on CPUs, where torch does it number by number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perex.kernels.blocks import example_blocks
from perex.kernels.compiled.pooling import pooled
from perex.kernels.large import in_memory

WORTH_REORDERING = 2**16
"""Pixels that images have to have in all: below, it is over in a tenth of a millisecond."""


LARGEST_WINDOW = 36
"""Pixels that a window has at most: torch is as fast where there are many to each place."""


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    """What `torch.max_pool2d` gives, to the bit, or None where that is to be called.

    With channels first, torch looks at one number after the other: a kernel of our own looks at as many windows at once
    as a register holds. Without it, torch does so for channels that are last: images are brought into that order, some
    at a time, and the result is brought back. Gradients go where the operator's own would.

    Args:
        input: images `(N, C, H, W)`; the other arguments are the operator's own.

    Returns:
        Tensor `(N, C, H', W')`.
    """
    if type(input) is not Tensor or input.layout != torch.strided or not input.is_floating_point() or return_indices:
        return None
    if input.dim() != 4 or input.numel() < WORTH_REORDERING or not in_memory(input):
        return None
    _, channels, height, width = input.shape
    if input.stride() != (channels * height * width, height * width, width, 1):  # of one channel, both orders are one
        return None
    options = kernel_size, kernel_size if stride in (None, (), []) else stride, padding, dilation
    pairs = [pair(option) for option in options]
    if None in pairs or math.prod(pairs[0] or ()) > LARGEST_WINDOW:
        return None
    found: Tensor = Pooling.apply(input, [*pairs, ceil_mode])
    return found


def pair(option: Any) -> list[int] | None:
    """An option of both spatial dimensions; None where it is not of integers, which is for torch to read."""
    values = list(option) if isinstance(option, (list, tuple)) else [option]
    if not all(isinstance(value, int) for value in values):
        return None
    return values * 2 if len(values) == 1 else values


def reordered(images: Tensor, options: list[Any]) -> list[Tensor]:
    """The largest pixels, and where they are, by torch's operator, with channels last."""
    results: list[Tensor] = []
    for i, j in example_blocks(len(images), images[0].numel()):
        part = images[i:j].contiguous(memory_format=torch.channels_last)
        found = torch.ops.aten.max_pool2d_with_indices(part, *options)
        results = results or [t.new_empty(len(images), *t.shape[1:]) for t in found]
        for result, one in zip(results, found, strict=True):
            result[i:j] = one
    return results


class Pooling(torch.autograd.Function):
    """The largest pixel of each window, for each channel."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, options: list[Any]) -> Tensor:
        """`(N, C, H, W)` to `(N, C, H', W')`."""
        largest, indices = pooled(images.detach(), options) or reordered(images.detach(), options)
        ctx.save_for_backward(images, indices)
        ctx.options = options
        return largest

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Each gradient goes to the pixel that was the largest."""
        images, indices = ctx.saved_tensors
        return torch.ops.aten.max_pool2d_with_indices_backward(grad, images, *ctx.options, indices), None
