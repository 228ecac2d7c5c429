"""What batch norms with given statistics get of each example, in one pass over input and gradient; see `planes.h`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from perex.kernels.compiled.library import address, kernel, lanes, runnable, seen
from perex.kernels.geometry import OPERATORS


def plane_sums(x: Tensor, grads: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    """See `perex.kernels.affine.plane_sums`; None where there is no kernel, as for images with channels last."""
    if not lanes() or not runnable(x, grads, mean, variance) or not (in_planes(x) and in_planes(grads)):
        return None
    weight, bias = seen(torch.ops.perex.plane_sums, _sums)(x, grads, mean, variance, eps)
    return weight, bias


def _sums(x: Tensor, grads: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    """`plane_sums` as an operator: both in one tensor."""
    batch, images, channels = x.shape[:3]
    threads = min(torch.get_num_threads(), batch * channels)
    numbers = threads, batch, images, channels, x[0, 0, 0].numel(), *x.stride()[:3], *grads.stride()[:3]
    shape, found = (ctypes.c_int64 * len(numbers))(*numbers), x.new_empty(2, batch, channels)
    tensors = x, grads, mean.contiguous(), variance.contiguous()
    kernel("planes", x.dtype)(shape, ctypes.c_double(eps), *map(address, (*tensors, *found)))
    return found


OPERATORS.define("plane_sums(Tensor x, Tensor grads, Tensor mean, Tensor variance, float eps) -> Tensor")
OPERATORS.impl("plane_sums", _sums, "CPU")


def in_planes(images: Tensor) -> bool:
    """Whether the numbers of each channel of `(B, R, C, *spatial)` lie side by side."""
    after = 1
    for size, stride in zip(reversed(images.shape[3:]), reversed(images.stride()[3:]), strict=True):
        if size > 1 and stride != after:
            return False
        after *= size
    return True
