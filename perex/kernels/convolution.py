r"""Squared norms of per-example weight gradients of convolutions, $G_b = \sum_p g_{bp} u_{bp}^\top$.

$u_{bp}$ is the patch of the input under output position $p$. In a transposed convolution, input and output gradient
exchange their roles: *wide* is what the kernel moves over, *narrow* has a row for each place that it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from perex.kernels import outer, pixels
from perex.kernels.blocks import block_size, example_blocks
from perex.kernels.cancellation import recomputed
from perex.kernels.compiled import direct as compiled_product
from perex.kernels.compiled import gram as compiled_pixels
from perex.kernels.compiled.library import runnable
from perex.kernels.folding import folded
from perex.kernels.geometry import (
    Geometry,
    by_group,
    measures,
    options_of,
    patches,
    weight_gradient,
    weight_gradients,
)
from perex.kernels.gpu import seconds
from perex.kernels.outer import whole_squares
from perex.kernels.plan import Plan
from perex.kernels.spot import current, plain
from perex.kernels.strategies import Strategies
from perex.kernels.triton.available import usable
from perex.kernels.triton.tiles import channels_tile, direct_tile, tiles, work

NORMS = Strategies("convolutions")
"""Ways to $\\|G_b\\|^2$, for `x` of shape `(B, R, C_in, *spatial)` and `grads` `(B, R, C_out, *spatial')`, R images an
example. Their constants were measured on two CPU cores, against a batched weight gradient of the same shapes."""

# What follows was measured on two cores of an AMD EPYC of the fifth generation, where oneDNN's convolutions do twice as
# many operations a second as MKL's matrix products. Elsewhere `attach(autotune=True)` is for those who mind.

BACKEND = 0.55
"""What a multiply-add of the backend's own weight gradient costs, in those of a large matrix product."""

UNBLOCKED = 6
"""By how much it is slower for several examples at once, if their channels are no multiple of 16."""

LANES = 16
"""Channels that the backend's kernels work on together."""

CALL, GROUPED_CALL = 6_000_000, 8_000_000
"""What a backend call for one or for several examples costs beside its arithmetic, in multiply-adds."""

GRAM_CALLS = 6_000_000
"""What the operators of a Gram matrix of positions cost beside their arithmetic, likewise."""

FRESH = 2
"""By how much less than a block patches take: memory that is new to the process costs more than copying into it."""

NARROW = 48
"""Matrix products with a side that is shorter take longer, and twice as long if neither is a multiple of `LANES`."""

LENGTHWISE = {"half": 0.6, "TF32": 0.6, "float32": 0.4}
"""What part of a large product's speed a Triton kernel reaches where positions are next to each other."""

GATHERED = {"half": 0.42, "TF32": 0.15, "float32": 0.3}
"""What part of a large product's speed a Triton kernel reaches that looks up where patches lie."""


def squares_of(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    r"""$\|G_b\|^2$ in the cheapest way, or terms of it.

    Args:
        x: input, `(B, R, C_in, *spatial)`, R rows (images) an example.
        grads: output gradient, `(B, R, C_out, *spatial')`.
        geometry: the convolution's options.

    Returns:
        Tensor `(B,)` or `(B, P)`.
    """
    if x.numel() == 0 or grads.numel() == 0:
        return grads.new_zeros(x.shape[0])
    return NORMS.run((x.shape, grads.shape, geometry), x, grads, geometry)


def plan(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan:
    """What `squares_of` does with an input and output gradient of these shapes."""
    if x.numel() == 0 or grads.numel() == 0:
        return Plan("nothing", 0, 0)
    return NORMS.choose(x, grads, geometry)


def _multiplied_out(x: torch.Size, grads: torch.Size, geometry: Geometry) -> tuple[int, int, int]:
    """Positions, entries of the weight, and operations to multiply all examples out and square them."""
    positions, rows, columns = measures(x, grads, geometry)
    entries = geometry.groups * rows * columns
    return positions, entries, 2 * x[0] * entries * (positions + 1)


def _calls(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan:
    _, entries, flops = _multiplied_out(x, grads, geometry)
    return Plan("call per example", flops, entries, 3 * x[0] * entries, 1.05 * BACKEND, x[0] * CALL)


def one_by_one(x: Tensor, grads: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """$G_b$ of one example after the other, `(1, *weight_shape)`, each by a call of the backend."""
    yield from (weight_gradient(x[b], grads[b], geometry).unsqueeze(0) for b in range(len(x)))


@NORMS.way("call per example", _calls)
def call_per_example(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    """$G_b$ multiplied out by one call of the backend for each example."""
    return torch.cat([whole_squares(gradient) for gradient in one_by_one(x, grads, geometry)])


def _grouped(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan | None:
    if x[0] == 1:
        return None
    _, rows, columns = measures(x, grads, geometry)
    _, entries, flops = _multiplied_out(x, grads, geometry)
    block, kernel = block_size(x[0], entries), math.prod(geometry.weight_shape[2:])
    blocked = rows % LANES == columns // kernel % LANES == 0
    slack = 1.1 * BACKEND * (1 if blocked else UNBLOCKED)
    moved = 4 * x[0] * entries + (x.numel() + grads.numel()) // 2  # brought into the order of the backend's kernels
    return Plan("grouped calls", flops, block * entries, moved, slack, -(-x[0] // block) * GROUPED_CALL)


def several_at_once(x: Tensor, grads: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """$G_b$ of several examples, `(b, *weight_shape)`, from one call of the backend; each is a group of channels."""
    for i, j in example_blocks(len(x), geometry.weight_shape.numel()):
        yield weight_gradients(x[i:j], grads[i:j], *options_of(geometry))


@NORMS.way("grouped calls", _grouped)
def grouped_calls(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    """$G_b$ of several examples in one call of the backend, each example a group of channels."""
    return torch.cat([whole_squares(gradients) for gradients in several_at_once(x, grads, geometry)])


def _unfolded(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan:
    inner = _of_patches(x, grads, geometry)
    found = _patches_multiplied(x, grads, geometry)
    if inner.way != "direct":
        found = _with_patches(x, grads, geometry, inner)
        found = found._replace(calls=found.calls + GRAM_CALLS)
    return found._replace(way=f"unfolded, {inner.way}")


def _of_patches(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan:
    """What `perex.kernels.outer` does with patches that are unfolded."""
    positions, rows, columns = measures(x, grads, geometry)
    stacked = torch.Size((x[0], geometry.groups, positions))
    return outer.plan(torch.Size((*stacked, rows)), torch.Size((*stacked, columns)))


def _with_patches(x: torch.Size, grads: torch.Size, geometry: Geometry, product: Plan) -> Plan:
    """What a product of output gradients and patches costs along with copying these, a few examples at a time."""
    positions, rows, columns = measures(x, grads, geometry)
    entries = geometry.groups * positions * columns
    runs = 1 if geometry.stride[-1] == 1 else 4  # pixel by pixel, where they are not neighbours
    return product._replace(
        elements=product.elements + block_size(x[0], FRESH * entries) * entries,
        moved=product.moved + runs * x[0] * entries,
        slack=1.1 if min(rows, columns) >= NARROW else 1.5 if 0 in (rows % LANES, columns % LANES) else 2.2,
    )


def rows_and_patches(x: Tensor, grads: Tensor, geometry: Geometry) -> Iterator[tuple[Tensor, Tensor]]:
    """What goes with each place of the kernel, `(b, G, T, m)`, and the patch under it, `(b, G, T, n)`."""
    narrow, wide = (x, grads) if geometry.transposed else (grads, x)
    positions, columns = narrow.shape[1] * math.prod(narrow.shape[3:]), math.prod(geometry.weight_shape[1:])
    for i, j in example_blocks(len(x), FRESH * geometry.groups * positions * columns):
        rows = by_group(narrow[i:j], geometry.groups).flatten(2, -2)
        yield rows, patches(wide[i:j], narrow.shape[3:], geometry)


@NORMS.way("unfolded", _unfolded)
def unfolded(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    r"""$\|\sum_p g_p u_p^\top\|^2$ with the patches unfolded, a few examples at a time; see `perex.kernels.outer`."""
    if _of_patches(x.shape, grads.shape, geometry).way == "direct":
        return torch.cat([whole_squares(product) for product, _ in products(x, grads, geometry)])
    return torch.cat([outer.squared_norm(*both) for both in rows_and_patches(x, grads, geometry)])


def compiled_plan(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan | None:
    """What `compiled_direct` does with tensors of these shapes; None where there is no kernel."""
    return compiled_product.plan(x, grads, geometry) if plain() else None


def _compiled_gram(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan | None:
    return compiled_pixels.plan(x, grads, geometry) if plain() else None


@NORMS.way("compiled direct", compiled_plan)
def compiled_direct(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    """$G_b$ multiplied out and squared tile by tile, in registers; `unfolded` where autograd or vmap follow tensors."""
    if not runnable(x, grads):
        return unfolded(x, grads, geometry)
    return compiled_product.squares_and_sum(x, grads, geometry, summing=False)[0].sum(1)


@NORMS.way("compiled pixel Gram", _compiled_gram)
def compiled_pixel_gram(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    """`pixel_gram`, with an example's matrices in a thread's cache."""
    if not runnable(x, grads):
        return unfolded(x, grads, geometry)
    totals, sizes = compiled_pixels.inner_products(x, grads, geometry)
    return recomputed(totals, sizes, lambda b: compiled_direct(x[b], grads[b], geometry))


@NORMS.way("pixel Gram", pixels.plan)
def pixel_gram(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    r"""$\sum_{pq} (g_p \cdot g_q)(u_p \cdot u_q)$, with the inner products of patches from those of pixels."""
    totals, sizes = pixels.inner_products(x, grads, geometry)
    return recomputed(totals, sizes, lambda b: call_per_example(x[b], grads[b], geometry))


def _patches_multiplied(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan:
    positions, rows, columns = measures(x, grads, geometry)
    _, entries, flops = _multiplied_out(x, grads, geometry)
    several = block_size(x[0], max(entries, FRESH * geometry.groups * positions * columns))
    return _with_patches(x, grads, geometry, Plan("unfolded", flops, several * entries, x[0] * entries))


def products(x: Tensor, grads: Tensor, geometry: Geometry) -> Iterator[tuple[Tensor, bool]]:
    r"""$\sum_p g_p u_p^\top$ of some examples, `(b, G, m, n)`, from unfolded patches; and whether it is transposed.

    So it is where the product is faster that way round.
    """
    for rows, columns in rows_and_patches(x, grads, geometry):
        transposed = columns.shape[-1] % LANES > 0 and rows.shape[-1] % LANES == 0
        left, right = (columns, rows) if transposed else (rows, columns)
        step = block_size(len(x), geometry.weight_shape.numel())
        for one, other in zip(left.split(step), right.split(step), strict=True):
            yield one.mT @ other, transposed


def patches_multiplied(x: Tensor, grads: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """$G_b$ of some examples, `(b, *weight_shape)`, from unfolded patches."""
    for product, transposed in products(x, grads, geometry):
        yield (product.mT if transposed else product).reshape(-1, *geometry.weight_shape)


Multiplied = Callable[[Tensor, Tensor, Geometry], Iterator[Tensor]]

MULTIPLIED: dict[str, tuple[Callable[..., Plan | None], Multiplied]] = {
    "call per example": (_calls, one_by_one),
    "grouped calls": (_grouped, several_at_once),
    "unfolded": (_patches_multiplied, patches_multiplied),
}
"""Ways to $G_b$ itself, of some examples after the other, with their plans."""


def cheapest(x: torch.Size, grads: torch.Size, geometry: Geometry) -> tuple[Plan, Multiplied]:
    """The way to $G_b$ that is taken with tensors of these shapes, and what it costs."""
    plans = [(way(x, grads, geometry), run) for way, run in MULTIPLIED.values()]
    return min(((plan, run) for plan, run in plans if plan is not None), key=lambda found: found[0].cost)


def in_blocks(x: Tensor, grads: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """$G_b$ of some examples after the other, `(b, *weight_shape)`."""
    return cheapest(x.shape, grads.shape, geometry)[1](x, grads, geometry)


def multiplied_out(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    """$G_b$ of all examples, `(B, *weight_shape)`."""
    if x.numel() == 0 or grads.numel() == 0:
        return grads.new_zeros(x.shape[0], *geometry.weight_shape)
    return torch.cat(list(in_blocks(x, grads, geometry)))


def _product(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan | None:
    of_pixels, spot = {*geometry.weight_shape[2:], *geometry.stride} == {1} and not any(geometry.padding), current()
    if spot is None or not usable(spot) or not of_pixels:
        return None
    positions, rows, columns = measures(x, grads, geometry)
    _, _, flops = _multiplied_out(x, grads, geometry)
    m, n, several = max(rows, columns), min(rows, columns), x[0] * geometry.groups
    tile = direct_tile(m, n, spot.dtype, several, True)
    parts = several * tiles(m, tile.rows) * tiles(n, tile.columns)
    time = seconds(spot.dtype, work(parts, positions, tile), parts, 2, LENGTHWISE)
    return Plan("Triton product", flops, parts, parts, seconds=time)


@NORMS.way("Triton product", _product, on_gpu=True)
def triton_product(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    """A kernel of one pixel: its patches are the pixels, so that this is an outer product where it lies."""
    from perex.kernels.triton.outer import direct_terms

    left, right = (by_group(t, geometry.groups).flatten(2, -2) for t in (x, grads))
    return direct_terms(left, right)


def _whole_unfolded(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan | None:
    spot, plan = current(), _unfolded(x, grads, geometry)
    if spot is None or not usable(spot):
        return None
    positions, rows, columns = measures(x, grads, geometry)
    left, right = (torch.Size((x[0], geometry.groups, positions, size)) for size in (rows, columns))
    inner, entries = outer.plan(left, right), x[0] * geometry.groups * positions * columns
    return plan._replace(
        way=f"whole unfolded, {inner.way}", seconds=inner.seconds + seconds(spot.dtype, 0, 4 * entries, 8, GATHERED)
    )


@NORMS.way("whole unfolded", _whole_unfolded, on_gpu=True)
def whole_unfolded(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    """`unfolded`, for GPUs, in larger pieces."""
    return unfolded(x, grads, geometry)


def _triton_direct(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan | None:
    spot, counted = current(), 2**31 - 1  # positions and columns are counted in 32 bits
    if spot is None or not usable(spot) or max(x[1:].numel(), grads[1:].numel()) > counted:
        return None
    positions, rows, _ = measures(x, grads, geometry)
    _, _, flops = _multiplied_out(x, grads, geometry)
    geometry = folded(geometry)
    channels, places = geometry.weight_shape[1], math.prod(geometry.weight_shape[2:])
    tile, several = channels_tile(rows, channels, spot.dtype), x[0] * geometry.groups * places
    parts = several * tiles(rows, tile.rows) * tiles(channels, tile.columns)
    time = seconds(spot.dtype, work(parts, positions, tile), x.numel() + grads.numel(), 4, GATHERED)
    return Plan("Triton direct", flops, parts, parts, seconds=time)


@NORMS.way("Triton direct", _triton_direct, on_gpu=True)
def triton_direct(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    r"""$\|\sum_p g_p u_p^\top\|^2$, patches read where they lie and each tile of the gradient squared in registers."""
    from perex.kernels.triton.convolution import direct_terms

    return direct_terms(x, grads, geometry)


def _triton_pixel_gram(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan | None:
    spot = current()
    if spot is None or _triton_direct(x, grads, geometry) is None:
        return None
    narrow, wide = (x, grads) if geometry.transposed else (grads, x)
    pixels, places = wide[1] * math.prod(wide[3:]), narrow[1] * math.prod(narrow[3:])
    products = pixels**2 * wide[2] + places**2 * narrow[2]  # over all groups
    grams = x[0] * geometry.groups * (pixels**2 + places**2)
    shifted = x[0] * geometry.groups * places**2 * math.prod(geometry.weight_shape[2:]) // 2
    time = seconds(spot.dtype, x[0] * products, 2 * grams + shifted, 12, outer.BACKEND)
    return Plan("Triton pixel Gram", 2 * x[0] * products, grams, grams + shifted, seconds=time)


@NORMS.way("Triton pixel Gram", _triton_pixel_gram, on_gpu=True)
def triton_pixel_gram(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    """`pixel_gram`, shifted copies of the Gram matrix of pixels added up, multiplied and summed in registers."""
    from perex.kernels.triton.convolution import pixel_gram_terms

    return pixel_gram_terms(x, grads, geometry)
