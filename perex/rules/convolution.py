r"""Convolutions: $G_b = \sum_p g_{bp} u_{bp}^\top$, with $u_{bp}$ the patch under output position $p$."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from perex.factors import Dense, Factor, Patches
from perex.kernels.geometry import Geometry
from perex.rules.call import Captured
from perex.rules.linear import added
from perex.rules.registry import operator_rule


def images(rows: Tensor, spatial: int) -> Tensor:
    """`(B, C, ...)` or `(B, R, C, ...)` as `(B, R, C, ...)`, R images an example."""
    return rows.unsqueeze(1) if rows.dim() == spatial + 2 else rows


def spread(value: int | tuple[int, ...], spatial: int) -> tuple[int, ...]:
    """One number for each spatial dimension."""
    return (value,) * spatial if isinstance(value, int) else tuple(value) * (spatial if len(value) == 1 else 1)


def factors_of(captured: Captured, geometry: Geometry, pad: Sequence[int] = ()) -> dict[str, Factor]:
    """The weight's patches, of the input after `F.pad`, and the bias's sum over rows and positions."""
    spatial = len(geometry.stride)
    grad = images(captured.grad, spatial)  # (B, R, C_out, *spatial)
    factors: dict[str, Factor] = {}
    if captured.wants("weight"):
        x = images(captured.examples("input"), spatial)
        factors["weight"] = Patches(F.pad(x, list(pad)) if pad else x, grad, geometry)
    if captured.wants("bias"):
        factors["bias"] = Dense(added(grad.flatten(3), (1, 3)))
    return factors


@operator_rule(
    F.conv1d,
    F.conv2d,
    F.conv3d,
    arguments="input weight bias stride padding dilation groups",
    parameters="weight bias",
    saves={"weight": "input"},
    narrow=True,
    multiplies=True,
)
def convolution(captured: Captured) -> dict[str, Factor]:
    """`F.conv1d`, `F.conv2d`, `F.conv3d`, with padding as numbers or by name."""
    weight = captured.shape("weight")
    spatial = len(weight) - 2
    dilation = spread(captured.option("dilation", 1), spatial)
    padding = captured.option("padding", 0)
    sides: list[int] = []
    if padding == "same":  # as torch does: one more on the right where the total is odd
        totals = [d * (k - 1) for d, k in zip(dilation, weight[2:], strict=True)]
        sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    numbers = (0,) * spatial if isinstance(padding, str) else spread(padding, spatial)
    stride = spread(captured.option("stride", 1), spatial)
    groups = captured.option("groups", 1)
    geometry = Geometry(weight, stride, numbers, dilation, False, (0,) * spatial, groups)
    return factors_of(captured, geometry, sides)


@operator_rule(
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    arguments="input weight bias stride padding output_padding groups dilation",
    parameters="weight bias",
    saves={"weight": "input"},
    narrow=True,
    multiplies=True,
)
def transposed_convolution(captured: Captured) -> dict[str, Factor]:
    """`F.conv_transpose1d` and its kin, whose weight is `(C_in, C_out / groups, *kernel)`."""
    weight = captured.shape("weight")
    spatial = len(weight) - 2
    stride, padding, output_padding, dilation = (
        spread(captured.option(name, default), spatial)
        for name, default in (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1))
    )
    geometry = Geometry(weight, stride, padding, dilation, True, output_padding, captured.option("groups", 1))
    return factors_of(captured, geometry)
