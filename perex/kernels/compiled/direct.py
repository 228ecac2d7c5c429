r"""$\|\sum_p g_{bp} u_{bp}^\top\|^2$ of convolutions, each tile of $G_b$ multiplied out and squared in registers.

Patches are read where they lie in a padded copy of a few rows of the image; nothing is unfolded, and no $G_b$ is larger
than a thread's cache. The sum over examples is left beside it on demand. The kernel itself is in `direct.h`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from perex.kernels.compiled.library import address, in_runs, kernel, lanes, room, seen
from perex.kernels.compiled.shape import CACHED, applies, oriented, shape_of
from perex.kernels.geometry import OPERATORS, Geometry, geometry_of, measures, options_of
from perex.kernels.plan import Plan

COST, CALL = 0.42, 2_000_000
"""What a multiply-add costs, and a call beside its arithmetic, in multiply-adds of a large matrix product of torch's.

Measured on two cores of an AMD EPYC of the fifth generation. Elsewhere, the backend's convolutions change as ours do.
"""


def plan(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan | None:
    """What `squares_and_sum` does with tensors of these shapes; None where there is no kernel for them."""
    if not applies(geometry):
        return None
    flops = operations(x, grads, *options_of(geometry))
    slack = COST * wasted(x, grads, geometry)
    packed = min(CACHED, 2 * (x[1:].numel() + grads[1:].numel()))
    held = torch.get_num_threads() * (geometry.weight_shape.numel() + packed)
    moved = (x.numel() + grads.numel()) // 8 + x[0] * geometry.weight_shape.numel()  # out of registers, and in again
    return Plan("compiled direct", flops, held, moved, slack, CALL)


def operations(x: Sequence[int], grads: Sequence[int], weight_shape: Sequence[int], *options: Any) -> int:
    """A multiply-add for each place and entry of the weight, and one more to square it.

    Where the kernel's rows have three neighbouring columns, four for two places in place of six: see `winograd.h`.
    """
    stride, _, dilation, transposed, *_ = options
    narrow = x if transposed else grads
    entries, places = math.prod(weight_shape), narrow[-1]
    if (weight_shape[-1], stride[-1], dilation[-1]) == (3, 1, 1) and places > 3:
        products = entries // 3 * 4 * -(-places // 2)
    else:
        products = entries * places
    return int(2 * narrow[0] * (narrow[1] * math.prod(narrow[3:-1]) * products + entries))


def wasted(x: torch.Size, grads: torch.Size, geometry: Geometry) -> float:
    """How many times as many multiply-adds there are with those that nobody needs: of whole vectors and threes."""
    _, rows, _ = measures(x, grads, geometry)
    channels, last = geometry.weight_shape[1], geometry.weight_shape[-1]
    side = last if last > 1 else channels
    return -(-rows // (2 * lanes())) * 2 * lanes() / rows * -(-side // 3) * 3 / side


def squares_and_sum(x: Tensor, grads: Tensor, geometry: Geometry, summing: bool) -> tuple[Tensor, Tensor | None]:
    r"""$\|G_b\|^2$, and $\sum_b G_b$ if that is wanted.

    Args:
        x: input, `(B, R, C_in, *spatial)`, R rows (images) an example, with one or two spatial dimensions.
        grads: output gradient, `(B, R, C_out, *spatial')`.
        geometry: the convolution's options.
        summing: whether the sum is wanted.

    Returns:
        Tensor `(B, P)`, terms to be added up, and one of `geometry.weight_shape`, or None.
    """
    shape = geometry.weight_shape if summing else None
    options = options_of(geometry)
    run = seen(torch.ops.perex.direct_squares, _squares)
    return in_runs(lambda *given: run(*given, *options), x, grads, shape)


def _squares(x: Tensor, grads: Tensor, total: Tensor | None, *options: Any) -> Tensor:
    """`squares_and_sum` as an operator, which leaves the sum in `total`."""
    geometry = geometry_of(*options)
    wide, narrow = oriented(x, grads, geometry)
    shape = shape_of(wide, narrow, geometry)
    found = x.new_empty(len(x), shape[1])  # by parts
    with room("direct", x.dtype, shape, total is not None) as space:
        kernel("direct", x.dtype)(shape, *(address(tensor) for tensor in (wide, narrow, found, total)), space)
    return found


OPERATORS.define(
    "direct_squares(Tensor x, Tensor grads, Tensor(a!)? total, int[] weight_shape, int[] stride, int[] padding, "
    "int[] dilation, bool transposed, int[] output_padding, int groups) -> Tensor"
)
OPERATORS.impl("direct_squares", _squares, "CPU")


@register_flop_formula(torch.ops.perex.direct_squares)
def _operations(x: Any, grads: Any, total: Any, *options: Any, **kwargs: Any) -> int:
    """Operations of `direct_squares`."""
    return operations(x, grads, *options)
