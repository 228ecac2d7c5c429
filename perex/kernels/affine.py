r"""Sums $\sum g \hat{x}$ and $\sum g$ over planes or rows: gradients of a norm layer's weight and bias."""

from __future__ import annotations

import torch
from torch import Tensor

from perex.kernels.compiled import planes, rows
from perex.kernels.spot import Spot
from perex.kernels.triton.available import usable

WIDEST = 8192
"""How many numbers a row has at most that a kernel holds at once."""


def plane_sums(x: Tensor, grads: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    r"""$\sum_p g_{bcp} (x_{bcp} - \mu_c) / \sqrt{v_c + \epsilon}$ and $\sum_p g_{bcp}$, in float32 or better.

    Args:
        x: `(B, R, C, *spatial)`, R images an example.
        grads: likewise.
        mean: $\mu$, `(C,)`.
        variance: $v$, `(C,)`.
        eps: $\epsilon$.

    Returns:
        Tensors `(B, C)`.
    """
    if not x.numel():
        return x.new_zeros(x.shape[0], x.shape[2]), x.new_zeros(x.shape[0], x.shape[2])
    if x.is_cuda and usable(Spot("cuda", x.dtype)) and usable(Spot("cuda", grads.dtype)):
        from perex.kernels.triton.affine import plane_sums as fused

        return fused(x, grads, mean, variance, eps)
    return planes.plane_sums(x, grads, mean, variance, eps) or by_backend(x, grads, mean, variance, eps)


def by_backend(x: Tensor, grads: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same, as torch's backward of a batch norm with the channels of all examples side by side."""
    batch, _, channels = x.shape[:3]
    x, grads = (rows.transpose(0, 1).flatten(1, 2).contiguous() for rows in (x, grads))  # (R, B * C, *spatial)
    mean, variance = mean.repeat(batch), variance.repeat(batch)
    ones, inverse = torch.ones_like(mean), (variance + eps).rsqrt()  # CUDA wants what a forward would have saved
    _, weight, bias = torch.ops.aten.native_batch_norm_backward(
        grads, x, ones, mean, variance, mean, inverse, False, eps, [False, True, True]
    )
    return weight.view(batch, channels), bias.view(batch, channels)


def row_sums(x: Tensor, grads: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor] | None:
    r"""$\sum_t g_{bt} \hat{x}_{bt}$ and $\sum_t g_{bt}$ with every row $x_{bt}$ normalised.

    Args:
        x: `(B, T, d)`.
        grads: likewise.
        eps: added to the variance, or to the mean of squares.
        centred: whether the mean is subtracted (layer norm) or not (RMS norm).

    Returns:
        Tensors `(B, d)`, in float32 or better; None where there is no kernel for it.
    """
    if not x.numel():
        return None
    if not x.is_cuda:
        return rows.row_sums(x, grads, eps, centred)
    if x.shape[2] > WIDEST:
        return None
    if not usable(Spot("cuda", x.dtype)) or not usable(Spot("cuda", grads.dtype)):
        return None
    from perex.kernels.triton.affine import row_sums as fused

    return fused(x, grads, eps, centred)
