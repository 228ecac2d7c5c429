r"""$\sum_{pq} (g_p \cdot g_q) \sum_k x_{ps+k} \cdot x_{qs+k}$ of convolutions, one example's Gram matrices at a time.

The matrices are no larger than a thread's cache. The kernel itself is in `gram.h`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from perex.kernels.compiled.direct import CALL
from perex.kernels.compiled.library import address, kernel, room, seen
from perex.kernels.compiled.shape import applies, oriented, shape_of
from perex.kernels.geometry import OPERATORS, Geometry, geometry_of, options_of
from perex.kernels.plan import Plan

LARGEST = 2**20
"""How many numbers an example's two matrices may have: beyond, they leave the caches."""

COST = 0.6
"""What an operation costs, on average, of what it does in a large matrix product of torch's; as in `direct`."""


def plan(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan | None:
    """What `inner_products` does with tensors of these shapes; None where there is no kernel for them."""
    pixels, places = sides(x, grads, geometry.weight_shape, geometry.transposed)
    held = pixels**2 + places**2
    if not applies(geometry) or held > LARGEST:
        return None
    flops = operations(x, grads, geometry.weight_shape, geometry.transposed, geometry.groups)
    moved = x.numel() + grads.numel()
    return Plan("compiled pixel Gram", flops, torch.get_num_threads() * 2 * held, moved, COST, CALL)


def sides(x: Sequence[int], grads: Sequence[int], weight_shape: Sequence[int], transposed: bool) -> tuple[int, int]:
    """Pixels that an example's kernel may meet, and places that it takes: the sides of the two matrices."""
    wide, narrow = (grads, x) if transposed else (x, grads)
    met = [p if k == 1 else n for n, p, k in zip(wide[3:], narrow[3:], weight_shape[2:], strict=True)]
    return wide[1] * math.prod(met), narrow[1] * math.prod(narrow[3:])


def operations(
    x: Sequence[int], grads: Sequence[int], weight_shape: Sequence[int], transposed: bool, groups: int
) -> int:
    """A multiply-add for each pair of pixels, or of places, and channel; the sums over the kernel: half of each."""
    wide, narrow = (grads, x) if transposed else (x, grads)
    pixels, places = sides(x, grads, weight_shape, transposed)
    sums = places**2 * groups * (math.prod(weight_shape[2:]) + 2) // 2
    return int(x[0] * (pixels**2 * wide[2] + places**2 * narrow[2] + sums))


def inner_products(x: Tensor, grads: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    r"""$\|G_b\|^2$, as a sum over pairs of places, and the sum of these terms' absolute values.

    Args:
        x: input, `(B, R, C_in, *spatial)`, R rows (images) an example, with one or two spatial dimensions.
        grads: output gradient, `(B, R, C_out, *spatial')`.
        geometry: the convolution's options.

    Returns:
        Two tensors `(B,)`.
    """
    squares, sizes = seen(torch.ops.perex.gram_squares, _squares)(x, grads, *options_of(geometry))
    return squares.sum(1), sizes.sum(1)


def _squares(x: Tensor, grads: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """`inner_products` as an operator, `(B, G)` each."""
    geometry = geometry_of(*options)
    wide, narrow = oriented(x, grads, geometry)
    shape = shape_of(wide, narrow, geometry, whole=True)
    squares, sizes = x.new_empty(2, len(x), geometry.groups)
    with room("gram", x.dtype, shape) as space:
        kernel("gram", x.dtype)(shape, *(address(tensor) for tensor in (wide, narrow, squares, sizes)), space)
    return squares, sizes


OPERATORS.define(
    "gram_squares(Tensor x, Tensor grads, int[] weight_shape, int[] stride, int[] padding, int[] dilation, "
    "bool transposed, int[] output_padding, int groups) -> (Tensor, Tensor)"
)
OPERATORS.impl("gram_squares", _squares, "CPU")


@register_flop_formula(torch.ops.perex.gram_squares)
def _operations(x: Any, grads: Any, weight_shape: Any, *options: Any, **kwargs: Any) -> int:
    """Operations of `gram_squares`."""
    return operations(x, grads, weight_shape, options[3], options[5])
