r"""Squared norms of per-example weight gradients of convolutions, $G_b = \sum_p g_{bp} u_{bp}^\top$.

$u_{bp}$ is the patch of the input under output position $p$. In a transposed convolution, input and output gradient
exchange their roles: *wide* is what the kernel moves over, *narrow* has a row for each place that it takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from perex.kernels import outer
from perex.kernels.blocks import block_size, example_blocks
from perex.kernels.cancellation import recomputed
from perex.kernels.folding import folded
from perex.kernels.geometry import Geometry, measures, options_of, patches, weight_gradient, weight_gradients
from perex.kernels.gpu import seconds
from perex.kernels.outer import whole_squares
from perex.kernels.plan import Plan
from perex.kernels.spot import current
from perex.kernels.strategies import Strategies
from perex.kernels.triton.available import usable
from perex.kernels.triton.tiles import channels_tile, covered, direct_tile, steps, tiles

NORMS = Strategies("convolutions")
"""Ways to $\\|G_b\\|^2$, for `x` of shape `(B, R, C_in, *spatial)` and `grads` `(B, R, C_out, *spatial')`, R images an
example. Their constants were measured on two CPU cores, against a batched weight gradient of the same shapes."""

CALL = 8_000_000
"""What a backend call for one example costs beside its arithmetic, in multiply-adds."""

SCATTERED, FEW_ENTRIES, FEW_POSITIONS = 350, 2**17, 256
"""What a call for several examples costs for each entry of the weight, unless these are few and positions many."""

LENGTHWISE = {"half": 0.6, "TF32": 0.6, "float32": 0.4}
"""What part of a large product's speed a Triton kernel reaches where positions are next to each other."""

GATHERED = {"half": 0.42, "TF32": 0.15, "float32": 0.3}
"""What part of a large product's speed a Triton kernel reaches that looks up where patches lie."""


def squared_norm(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    r"""$\|G_b\|^2$ in the cheapest way.

    Args:
        x: input, `(B, R, C_in, *spatial)`, R rows (images) an example.
        grads: output gradient, `(B, R, C_out, *spatial')`.
        geometry: the convolution's options.

    Returns:
        Tensor `(B,)`.
    """
    if x.numel() == 0 or grads.numel() == 0:
        return grads.new_zeros(x.shape[0])
    return NORMS.run((x.shape, grads.shape, geometry), x, grads, geometry)


def plan(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan:
    """What `squared_norm` does with an input and output gradient of these shapes."""
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
    return Plan("call per example", flops, entries, x[0] * entries, 1.0, x[0] * CALL)


@NORMS.way("call per example", _calls)
def call_per_example(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    """$G_b$ multiplied out by one call of the backend for each example."""
    gradients = (weight_gradient(x[b], grads[b], geometry) for b in range(x.shape[0]))
    return torch.cat([whole_squares(gradient.unsqueeze(0)) for gradient in gradients])


def _grouped(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan | None:
    positions, entries, flops = _multiplied_out(x, grads, geometry)
    block = block_size(x[0], entries)
    few = entries <= FEW_ENTRIES and positions >= FEW_POSITIONS
    calls = x[0] * entries * (0 if few else SCATTERED) + -(-x[0] // block) * CALL
    return Plan("grouped calls", flops, block * entries, 2 * x[0] * entries, 1.1, calls) if x[0] > 1 else None


@NORMS.way("grouped calls", _grouped)
def grouped_calls(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    """$G_b$ of several examples in one call of the backend, each example a group of channels."""
    parts = []
    for i, j in example_blocks(x.shape[0], math.prod(geometry.weight_shape)):
        gradients = weight_gradients(x[i:j], grads[i:j], *options_of(geometry))
        parts.append(whole_squares(gradients))
    return torch.cat(parts)


def in_blocks(x: Tensor, grads: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """$G_b$ of some examples after the other, `(b, *weight_shape)`, in the cheaper of the two ways above."""
    if cheaper_one_by_one(x.shape, grads.shape, geometry):
        yield from (weight_gradient(x[b], grads[b], geometry).unsqueeze(0) for b in range(x.shape[0]))
        return
    for i, j in example_blocks(x.shape[0], math.prod(geometry.weight_shape)):
        yield weight_gradients(x[i:j], grads[i:j], *options_of(geometry))


def cheaper_one_by_one(x: torch.Size, grads: torch.Size, geometry: Geometry) -> bool:
    """Whether a call of the backend for each example costs less than one for several."""
    several = _grouped(x, grads, geometry)
    return several is None or _calls(x, grads, geometry).cost <= several.cost


def multiplied_out(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    """$G_b$ of all examples, `(B, *weight_shape)`."""
    if x.numel() == 0 or grads.numel() == 0:
        return grads.new_zeros(x.shape[0], *geometry.weight_shape)
    return torch.cat(list(in_blocks(x, grads, geometry)))


def summed_plan(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan:
    """What `summed` costs with tensors of these shapes."""
    plan = _calls(x, grads, geometry)
    if not cheaper_one_by_one(x, grads, geometry):
        plan = _grouped(x, grads, geometry) or plan
    return plan._replace(way=f"{plan.way}, with the sum", moved=2 * plan.moved)


def summed(x: Tensor, grads: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    r"""Squared norms `(B,)`, and the sum over examples $\sum_b G_b$, added up while each block is at hand."""
    norms, total = [], grads.new_zeros(geometry.weight_shape)
    for gradients in in_blocks(x, grads, geometry):
        norms.append(whole_squares(gradients))
        total += gradients[0] if len(gradients) == 1 else gradients.sum(0)
    return torch.cat(norms), total


def _unfolded(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan:
    batch, groups = x[0], geometry.groups
    positions, rows, columns = measures(x, grads, geometry)
    inner = outer.plan(torch.Size((batch, groups, positions, rows)), torch.Size((batch, groups, positions, columns)))
    entries = groups * positions * columns
    elements = inner.elements + block_size(batch, entries) * entries
    return Plan(f"unfolded, {inner.way}", inner.flops, elements, inner.moved + 2 * batch * entries, 1.3, inner.calls)


@NORMS.way("unfolded", _unfolded)
def unfolded(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    r"""$\|\sum_p g_p u_p^\top\|^2$ with the patches unfolded, a few examples at a time; see `perex.kernels.outer`."""
    narrow, wide = (x, grads) if geometry.transposed else (grads, x)
    positions, columns = narrow.shape[1] * math.prod(narrow.shape[3:]), math.prod(geometry.weight_shape[1:])
    parts = []
    for i, j in example_blocks(x.shape[0], geometry.groups * positions * columns):
        left = by_group(narrow[i:j], geometry.groups).flatten(2, -2)  # (b, G, T, m)
        parts.append(outer.squared_norm(left, patches(wide[i:j], narrow.shape[3:], geometry)))
    return torch.cat(parts)


def by_group(images: Tensor, groups: int) -> Tensor:
    """`(b, R, C, *spatial)` as `(b, G, R, *spatial, C / G)`."""
    return images.unflatten(2, (groups, -1)).movedim(2, 1).movedim(3, -1)


def _pixel_gram(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan:
    narrow, wide = (x, grads) if geometry.transposed else (grads, x)
    pixels, places = wide[1] * math.prod(wide[3:]), narrow[1] * math.prod(narrow[3:])
    products = geometry.groups * (pixels**2 * (wide[2] // geometry.groups) + places**2 * (narrow[2] // geometry.groups))
    kernel, shifts = geometry.weight_shape[2:], 0
    sides, now = list(wide[3:]), wide[1] ** 2 * math.prod(wide[3:]) ** 2
    for axis, (size, place) in enumerate(zip(kernel, narrow[3:], strict=True)):
        now = now // sides[axis] ** 2 * place**2
        shifts += size * now if size > 1 else 0
    largest = geometry.groups * max(pixels, places) ** 2
    block = block_size(x[0], largest) * largest
    moved = geometry.groups * (pixels**2 + shifts + 2 * places**2) * x[0]
    return Plan("pixel Gram", x[0] * (2 * products + geometry.groups * (shifts + 2 * places**2)), 3 * block, moved, 1.1)


@NORMS.way("pixel Gram", _pixel_gram)
def pixel_gram(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    r"""$\sum_{pq} (g_p \cdot g_q)(u_p \cdot u_q)$, with $u_p \cdot u_q = \sum_k x_{p+k} \cdot x_{q+k}$.

    The Gram matrix of pixels is shifted along both of its sides and added up, one spatial dimension after the other:
    the size of the kernel times channels never appears.
    """
    narrow, wide = (x, grads) if geometry.transposed else (grads, x)
    spatial = wide.dim() - 3
    pixels, places = wide.shape[1] * math.prod(wide.shape[3:]), narrow.shape[1] * math.prod(narrow.shape[3:])
    totals, sizes = [], []
    for i, j in example_blocks(x.shape[0], geometry.groups * max(pixels, places) ** 2):
        rows, columns = by_group(narrow[i:j], geometry.groups), by_group(wide[i:j], geometry.groups)
        flat = columns.flatten(2, -2)
        grams = (flat @ flat.mT).reshape(*columns.shape[:-1], *columns.shape[2:-1])  # (b, G, R, *S, R, *S)
        for axis in range(spatial):
            grams = shifted(grams, 3 + axis, 4 + spatial + axis, narrow.shape[3 + axis], geometry, axis)
        flat = rows.flatten(2, -2)
        product = (flat @ flat.mT).mul_(grams.reshape(*flat.shape[:3], flat.shape[2]))  # (b, G, T, T)
        totals.append(product.sum((1, 2, 3)))
        sizes.append(torch.linalg.vector_norm(product, 1, dim=(1, 2, 3)))
    return recomputed(torch.cat(totals), torch.cat(sizes), lambda b: call_per_example(x[b], grads[b], geometry))


def shifted(grams: Tensor, one: int, other: int, places: int, geometry: Geometry, axis: int) -> Tensor:
    r"""$\sum_k M[ps + k, qs + k]$ along two dimensions, which stand for the same spatial one; zero outside.

    Args:
        grams: products of pixels.
        one: a dimension of it, of pixels.
        other: the other one.
        places: how many places the kernel takes.
        geometry: the convolution's options.
        axis: which of the spatial dimensions it is.

    Returns:
        The same, with places in these dimensions.
    """
    size, step = geometry.weight_shape[2 + axis], geometry.stride[axis]
    pixels = grams.shape[one]
    if size == 1 and step == 1 and not geometry.padding[axis] and pixels == places:
        return grams
    shape = [places if dim in (one, other) else n for dim, n in enumerate(grams.shape)]
    total = grams.new_zeros(shape)
    for k in range(size):
        offset = k * geometry.dilation[axis] - geometry.padding[axis]
        first = max(0, -(offset // step))  # the first place at which the pixel exists
        last = min(places - 1, (pixels - 1 - offset) // step)
        count = last - first + 1
        if count <= 0:
            continue
        start = first * step + offset
        source = grams
        for dim in (one, other):
            source = source.narrow(dim, start, (count - 1) * step + 1)
            if step > 1:
                source = source[(slice(None),) * dim + (slice(None, None, step),)]
        total.narrow(one, first, count).narrow(other, first, count).add_(source)
    return total


def _product(x: torch.Size, grads: torch.Size, geometry: Geometry) -> Plan | None:
    plain, spot = {*geometry.weight_shape[2:], *geometry.stride} == {1} and not any(geometry.padding), current()
    if spot is None or not usable(spot) or not plain:
        return None
    positions, rows, columns = measures(x, grads, geometry)
    _, _, flops = _multiplied_out(x, grads, geometry)
    m, n, several = max(rows, columns), min(rows, columns), x[0] * geometry.groups
    tile = direct_tile(m, n, spot.dtype, True)
    parts = several * tiles(m, tile.rows) * tiles(n, tile.columns)
    products = several * steps(positions, tile) * covered(m, tile.rows) * covered(n, tile.columns)
    return Plan("Triton product", flops, parts, parts, seconds=seconds(spot.dtype, products, parts, 2, LENGTHWISE))


@NORMS.way("Triton product", _product, on_gpu=True)
def triton_product(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    """A kernel of one pixel: its patches are the pixels, so that this is an outer product where it lies."""
    from perex.kernels.triton.outer import direct

    left, right = (by_group(t, geometry.groups).flatten(2, -2) for t in (x, grads))
    return direct(left, right)


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
    products = several * steps(positions, tile) * covered(rows, tile.rows) * covered(channels, tile.columns)
    time = seconds(spot.dtype, products, x.numel() + grads.numel(), 4, GATHERED)
    return Plan("Triton direct", flops, parts, parts, seconds=time)


@NORMS.way("Triton direct", _triton_direct, on_gpu=True)
def triton_direct(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    r"""$\|\sum_p g_p u_p^\top\|^2$, patches read where they lie and each tile of the gradient squared in registers."""
    from perex.kernels.triton.convolution import direct

    return direct(x, grads, geometry)


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
    from perex.kernels.triton.convolution import pixel_gram

    return pixel_gram(x, grads, geometry)
