r"""Squared norms of convolutions' weight gradients, $G_b = \sum_p g_{bp} u_{bp}^\top$, patches read where they lie.

An implicit matrix product: patch $u_{bp}$ is a row that exists as indices only, into what the kernel moves over.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perex.kernels.geometry import Geometry, measures
from perex.kernels.triton.available import precision, widened
from perex.kernels.triton.tiles import side, step, tiles, warps

SIZES = ["images", "groups", "m", "n", "high", "wide_high", "broad", "wide_broad", "down", "across"]
OPTIONS = ["step_y", "step_x", "pad_y", "pad_x", "spread_y", "spread_x"]
STRIDES = [f"{name}_{dim}" for name in ("narrow", "wide") for dim in "brcyx"]


@triton.jit(do_not_specialize=[*SIZES, *OPTIONS, *STRIDES])  # else almost every layer would compile its own
def direct_kernel(
    narrow: tl.tensor,
    wide: tl.tensor,
    out: tl.tensor,
    images: int,
    groups: int,
    m: int,
    n: int,
    high: int,
    broad: int,
    wide_high: int,
    wide_broad: int,
    step_y: int,
    step_x: int,
    pad_y: int,
    pad_x: int,
    spread_y: int,
    spread_x: int,
    narrow_b: tl.int64,
    narrow_r: int,
    narrow_c: int,
    narrow_y: int,
    narrow_x: int,
    wide_b: tl.int64,
    wide_r: int,
    wide_c: int,
    wide_y: int,
    wide_x: int,
    down: int,
    across: int,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    r"""$\sum_{ij \in tile} (\sum_p g_{pi} u_{pj})^2$ of one example, group and tile of the weight.

    Row i of the weight is a channel of `narrow`; column j a channel c of `wide` and a place (v, w) in the kernel.
    """
    program = tl.program_id(0)
    tile, which = program % (down * across), program // (down * across)
    example, group = (which // groups).to(tl.int64), which % groups
    i = (tile // across) * ROWS + tl.arange(0, ROWS)
    j = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    c, v, w = j // (KERNEL_Y * KERNEL_X), j // KERNEL_X % KERNEL_Y, j % KERNEL_X
    channels = n // (KERNEL_Y * KERNEL_X)
    rows = narrow + example * narrow_b + (group * m + i[:, None]) * narrow_c
    columns = wide + example * wide_b + (group * channels + c[:, None]) * wide_c
    y_offset, x_offset = v * spread_y - pad_y, w * spread_x - pad_x
    positions = images * high * broad
    gradient = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, positions, STEP):
        p = start + tl.arange(0, STEP)
        r, y, x = p // (high * broad), p // broad % high, p % broad
        there = p[None, :] < positions
        gs = tl.load(
            rows + (r * narrow_r + y * narrow_y + x * narrow_x)[None, :], mask=(i[:, None] < m) & there, other=0.0
        )
        ys = (y * step_y)[None, :] + y_offset[:, None]
        xs = (x * step_x)[None, :] + x_offset[:, None]
        inside = (ys >= 0) & (ys < wide_high) & (xs >= 0) & (xs < wide_broad)
        offsets = (r * wide_r)[None, :] + ys * wide_y + xs * wide_x
        us = tl.load(columns + offsets, mask=(j[:, None] < n) & there & inside, other=0.0)  # (COLUMNS, STEP)
        if WIDEN:
            gs, us = gs.to(tl.float32), us.to(tl.float32)
        gradient = tl.dot(gs, tl.trans(us), gradient, input_precision=PRECISION)
    tl.store(out + program, tl.sum(gradient * gradient))


def direct(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    r"""$\|\sum_p g_p u_p^\top\|^2$, nothing unfolded and each tile of the gradient squared where it was multiplied out.

    Args:
        x: input, `(B, R, C_in, *spatial)` with one or two spatial dimensions, and any strides.
        grads: output gradient, `(B, R, C_out, *spatial')`.
        geometry: the convolution's options.

    Returns:
        Tensor `(B,)`, in float32.
    """
    batch, groups = x.shape[0], geometry.groups
    if x.numel() == 0 or grads.numel() == 0:
        return grads.new_zeros(batch, dtype=torch.float32)
    narrow, wide = (planes(t) for t in ((x, grads) if geometry.transposed else (grads, x)))
    _, m, n = measures(x.shape, grads.shape, geometry)
    rows, columns = side(m, x.dtype), side(n, x.dtype)
    down, across = tiles(m, rows), tiles(n, columns)
    out = x.new_empty(batch, groups * down * across, dtype=torch.float32)
    kernel = in_plane(geometry.weight_shape[2:], 1)
    options = *in_plane(geometry.stride, 1), *in_plane(geometry.padding, 0), *in_plane(geometry.dilation, 1)
    with torch.cuda.device_of(x):
        direct_kernel[(out.numel(),)](
            narrow, wide, out, narrow.shape[1], groups, m, n, *narrow.shape[3:], *wide.shape[3:], *options,
            *strides(narrow), *strides(wide), down, across, KERNEL_Y=kernel[0], KERNEL_X=kernel[1],
            ROWS=rows, COLUMNS=columns, STEP=step(x.dtype), PRECISION=precision(x.dtype), WIDEN=widened(x.dtype),
            num_warps=warps(rows, columns),
        )  # fmt: skip
    return out.sum(1)


def in_plane(values: tuple[int, ...], missing: int) -> tuple[int, ...]:
    """An option of both dimensions of a plane, of which a line lacks the first."""
    return (missing, *values) if len(values) == 1 else tuple(values)


def planes(images: Tensor) -> Tensor:
    """`(B, R, C, H, W)`, with elements of an example so near to each other that 32 bits count them."""
    images = images if images.dim() == 5 else images.unsqueeze(3)
    reach = sum((size - 1) * stride for size, stride in zip(images.shape[1:], images.stride()[1:], strict=True))
    return images if reach < 2**31 else images.contiguous()


def strides(images: Tensor) -> list[int]:
    """Its strides; where a dimension has but one element, its stride leads nowhere and may be anything."""
    return [stride if size > 1 else 0 for size, stride in zip(images.shape, images.stride(), strict=True)]
