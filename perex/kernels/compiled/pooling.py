"""Max pooling of images on CPUs, windows of neighbouring places side by side in a vector; its kernel: `pooling.h`."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from perex.kernels.compiled.library import address, kernel, lanes, room, runnable

WIDEST_STEP = 4
"""From how far apart a vector's pixels are collected one by one, at most."""

WASTE = 4
"""How many times as many lanes a row may have as places."""

LARGEST = 2**18
"""The most pixels of an image: threads pack one, and larger ones leave the caches."""


def pooled(images: Tensor, options: list[Any]) -> tuple[Tensor, Tensor] | None:
    """What `aten.max_pool2d_with_indices` gives, to the bit, or None where there is no kernel for that.

    Args:
        images: `(N, C, H, W)`, contiguous.
        options: kernel size, stride, padding and dilation, a pair each, and whether incomplete windows count.

    Returns:
        Tensors `(N, C, H', W')`: the largest pixels, and where in the image they are.
    """
    window, step, padding, spread, rounding = options
    batch, channels, height, width = images.shape
    if not lanes() or not plain(images) or height * width > LARGEST or step[1] > WIDEST_STEP:
        return None
    if min(*window, *step, *spread) < 1 or any(not 0 <= p <= k // 2 for p, k in zip(padding, window, strict=True)):
        return None  # torch says what is wrong
    axes = zip((height, width), window, step, padding, spread, strict=True)
    places = [count(*of_axis, rounding) for of_axis in axes]
    if min(batch, channels, *places) < 1 or WASTE * places[1] < lanes(images.dtype):
        return None
    integers = (
        *(batch * channels, height, width, *places, min(torch.get_num_threads(), batch * channels)),
        *(*window, *step, *padding, *spread),
    )
    shape = (ctypes.c_int64 * len(integers))(*integers)
    largest = images.new_empty(batch, channels, *places)
    where = torch.empty_like(largest, dtype=torch.int64)
    with room("pool", images.dtype, shape) as space:
        kernel("pool", images.dtype)(shape, *(address(tensor) for tensor in (images, largest, where)), space)
    return largest, where


def plain(images: Tensor) -> bool:
    """Whether images lie in memory as they are, and nobody wants to see the operators."""
    return runnable(images) and not torch._C._len_torch_dispatch_stack()


def count(size: int, kernel: int, step: int, padding: int, spread: int, rounding: bool) -> int:
    """How many windows there are along one dimension; incomplete ones, where these count, begin within the image."""
    places = (size + 2 * padding - spread * (kernel - 1) - 1 + (step - 1 if rounding else 0)) // step + 1
    return places - 1 if rounding and (places - 1) * step >= size + padding else places
