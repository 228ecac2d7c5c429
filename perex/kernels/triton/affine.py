r"""Sums $\sum g \hat{x}$ and $\sum g$ over planes or rows, both from one reading."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perex.kernels.triton.tiles import tiles

AT_ONCE, LONGEST = 2048, 1024
"""How many numbers a program reads at a time, and how many of one plane."""

SPREAD, SHORTEST = 1024, 8
"""How many programs share the rows of a batch, and how many rows each has at least."""


@triton.jit(do_not_specialize=["planes", "channels", "eps"])
def planes_kernel(
    x: tl.tensor,
    grads: tl.tensor,
    mean: tl.tensor,
    variance: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    planes: int,
    channels: int,
    length: int,
    eps: float,
    x_b: tl.tensor,
    x_c: tl.tensor,
    x_p: tl.tensor,
    grads_b: tl.tensor,
    grads_c: tl.tensor,
    grads_p: tl.tensor,
    PLANES: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    r"""$\sum_p g_p (x_p - \mu) / \sigma$ and $\sum_p g_p$ of some planes."""
    i = tl.program_id(0) * PLANES + tl.arange(0, PLANES)
    b, c = (i // channels).to(tl.int64), (i % channels).to(tl.int64)
    mu = tl.load(mean + c).to(tl.float32)
    xs = x + (b * x_b + c * x_c)[:, None]
    gs = grads + (b * grads_b + c * grads_c)[:, None]
    products, sums = tl.zeros((PLANES, STEP), tl.float32), tl.zeros((PLANES, STEP), tl.float32)
    for start in range(0, length, STEP):
        p = start + tl.arange(0, STEP)
        there = (i[:, None] < planes) & (p[None, :] < length)
        g = tl.load(gs + p[None, :].to(tl.int64) * grads_p, mask=there, other=0.0).to(tl.float32)
        value = tl.load(xs + p[None, :].to(tl.int64) * x_p, mask=there, other=0.0).to(tl.float32)
        products += g * (value - mu[:, None])
        sums += g
    inverse = tl.rsqrt(tl.load(variance + c).to(tl.float32) + eps)
    tl.store(weight + i, tl.sum(products, 1) * inverse, mask=i < planes)
    tl.store(bias + i, tl.sum(sums, 1), mask=i < planes)


@triton.jit(do_not_specialize=["rows", "each", "pieces", "eps"])
def rows_kernel(
    x: tl.tensor,
    grads: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    rows: int,
    each: int,
    pieces: int,
    width: int,
    eps: float,
    x_b: tl.tensor,
    x_t: tl.tensor,
    x_d: tl.tensor,
    grads_b: tl.tensor,
    grads_t: tl.tensor,
    grads_d: tl.tensor,
    COLUMNS: tl.constexpr,
    CENTRED: tl.constexpr,
) -> None:
    r"""$\sum_t g_t \hat{x}_t$ and $\sum_t g_t$ over a piece of an example's rows."""
    piece, example = tl.program_id(0) % pieces, (tl.program_id(0) // pieces).to(tl.int64)
    j = tl.arange(0, COLUMNS)
    xs = x + example * x_b + j.to(tl.int64) * x_d
    gs = grads + example * grads_b + j.to(tl.int64) * grads_d
    products, sums = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for t in range(piece * each, min(piece * each + each, rows)):
        value = tl.load(xs + tl.cast(t, tl.int64) * x_t, mask=j < width, other=0.0).to(tl.float32)
        g = tl.load(gs + tl.cast(t, tl.int64) * grads_t, mask=j < width, other=0.0).to(tl.float32)
        if CENTRED:
            value = tl.where(j < width, value - tl.sum(value) / width, 0.0)
        products += g * value * tl.rsqrt(tl.sum(value * value) / width + eps)
        sums += g
    out = tl.program_id(0).to(tl.int64) * width + j
    tl.store(weight + out, products, mask=j < width)
    tl.store(bias + out, sums, mask=j < width)


def plane_sums(x: Tensor, grads: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `perex.kernels.affine.plane_sums`."""
    batch, rows, channels = x.shape[:3]
    if not x.numel():
        return x.new_zeros(2, batch, channels, dtype=torch.float32).unbind()  # type: ignore[return-value]
    x, grads = (t.flatten(0, 1).unsqueeze(-1).flatten(2) for t in (x, grads))  # (B * R, C, P)
    planes, size = batch * rows * channels, x.shape[2]
    weight, bias = x.new_empty(2, batch, rows, channels, dtype=torch.float32)
    together = x.stride(1) == 1 and channels > 1  # channels are next to each other
    step = min(LONGEST, triton.next_power_of_2(size))
    step = min(step, 32) if together else step
    some = AT_ONCE // step
    with torch.cuda.device_of(x):
        planes_kernel[(tiles(planes, some),)](
            x, grads, mean, variance, weight, bias, planes, channels, size, eps, *x.stride(), *grads.stride(),
            PLANES=some, STEP=step, num_warps=4,
        )  # fmt: skip
    return (weight[:, 0], bias[:, 0]) if rows == 1 else (weight.sum(1), bias.sum(1))


def row_sums(x: Tensor, grads: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    """See `perex.kernels.affine.row_sums`."""
    batch, rows, width = x.shape
    each = max(SHORTEST, -(-batch * rows // SPREAD))
    pieces = tiles(rows, each)
    parts = x.new_empty(2, batch, pieces, width, dtype=torch.float32)
    columns = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        rows_kernel[(batch * pieces,)](
            x, grads, *parts, rows, each, pieces, width, eps, *x.stride(), *grads.stride(), COLUMNS=columns,
            CENTRED=centred, num_warps=4 if columns <= 2048 else 8,
        )  # fmt: skip
    weight, bias = parts.sum(2)
    return weight, bias
