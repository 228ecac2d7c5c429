"""Stacks of matrices whose positions lie next to each other: what TF32 is multiplied fast from.

Tensor cores of Hopper GPUs read float32 from shared memory only along the dimension that is summed over, where half
precision may lie either way. For outer products that dimension is positions, which are apart in what layers read and in
their gradients. Copies with positions innermost, and products of these, take less than half of the time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perex.kernels.triton.available import tensor_cores
from perex.kernels.triton.tiles import tiles

TILE = 64
"""The side of what one program turns."""

ALIGNED = 4
"""Of how many positions there is a multiple, so that each run begins where 16 bytes are read at a time."""


@triton.jit(do_not_specialize=["groups", "positions", "width", "down", "across"])
def turning_kernel(
    x: tl.tensor,
    out: tl.tensor,
    groups: int,
    positions: int,
    width: int,
    whole: int,
    x_b: tl.tensor,
    x_g: tl.tensor,
    x_t: tl.tensor,
    x_k: tl.tensor,
    down: int,
    across: int,
    SIDE: tl.constexpr,
) -> None:
    """Copy a tile of an example's and group's matrix: positions innermost, zeros behind the last."""
    program = tl.program_id(0)
    tile, which = program % (down * across), (program // (down * across)).to(tl.int64)
    t = ((tile // across) * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    k = ((tile % across) * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    x += (which // groups) * x_b + (which % groups) * x_g
    there = (t[:, None] < positions) & (k[None, :] < width)
    numbers = tl.load(x + t[:, None] * x_t + k[None, :] * x_k, mask=there, other=0.0)
    out += which * width * whole
    tl.store(out + k[:, None] * whole + t[None, :], tl.trans(numbers), mask=(k[:, None] < width) & (t[None, :] < whole))


def turning(*stacks: Tensor) -> bool:
    """Whether products of stacks are better multiplied from copies: in TF32, where any has its positions apart."""
    tf32 = stacks[0].dtype == torch.float32 and tensor_cores(torch.float32)
    return tf32 and any(x.stride(2) != 1 for x in stacks)


def lengthwise(x: Tensor) -> Tensor:
    """`(B, G, T, k)` with its positions next to each other, and perhaps a few zeros behind them."""
    batch, groups, positions, width = x.shape
    whole = -(-positions // ALIGNED) * ALIGNED
    out = x.new_empty(batch, groups, width, whole)
    down, across = tiles(positions, TILE), tiles(width, TILE)
    with torch.cuda.device_of(x):
        turning_kernel[(batch * groups * down * across,)](
            x, out, groups, positions, width, whole, *x.stride(), down, across, SIDE=TILE
        )
    return out.mT
