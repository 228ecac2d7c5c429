r"""Squared norms and inner products of sums of outer products, $G_b = \sum_t l_{bt} r_{bt}^\top$."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from perex.kernels import large, readers
from perex.kernels.blocks import block, block_size, example_blocks, pair_block_size
from perex.kernels.cancellation import recomputed
from perex.kernels.compiled import outer as compiled
from perex.kernels.compiled import pairs as compiled_pairs
from perex.kernels.compiled.library import runnable
from perex.kernels.gpu import seconds
from perex.kernels.plan import Plan
from perex.kernels.products import HALVES
from perex.kernels.spot import current, plain
from perex.kernels.strategies import Strategies
from perex.kernels.triton.available import tensor_cores, usable
from perex.kernels.triton.tiles import copied_at_once, direct_tile, gram_tile, tiles, work, worth_aligning
from perex.kernels.triton.tiles import pairs as pairs_of_tiles

NORMS = Strategies("outer products")
"""Ways to $\\|G_b\\|^2$, for `left` of shape `(B, G, T, m)` and `right` `(B, G, T, n)`, with G independent groups."""

PIECES, SHORTEST = 4, 16
"""Into how many pieces positions are cut that cannot be halved any more, for products of all pairs, and how short runs
of them may be."""


BLOCK, PIECE = 8_000_000, 15_000_000
"""What the calls for a block of gradients cost beside their arithmetic, and those for a piece of a Gram matrix."""

SLACK = 1.25
"""What a multiply-add of the Gram matrix's products costs, which are small."""


DIRECT = {"half": 0.82, "TF32": 0.75, "float32": 0.4}
GRAM = {"half": 0.55, "TF32": 0.4, "float32": 0.4}
BACKEND = {"half": 0.85, "TF32": 0.47, "float32": 0.85}
"""What part of a large product's speed Triton's kernels reach on a GPU, and the backend's batched products."""


UNALIGNED = 3
"""By how much the backend's products are slower where rows begin at odd places."""


def squared_norm(left: Tensor, right: Tensor) -> Tensor:
    r"""$\|G_b\|^2$ in the cheapest form.

    Args:
        left: `(B, G, T, m)`, for G independent groups.
        right: `(B, G, T, n)`.

    Returns:
        Tensor `(B,)`.
    """
    found = squares_of(left, right)
    return found if found.dim() == 1 else found.sum(1)


def squares_of(left: Tensor, right: Tensor) -> Tensor:
    """The same, or terms of it: `(B,)` or `(B, P)`."""
    return NORMS.run((left.shape, right.shape), left, right)


def plan(left: torch.Size, right: torch.Size, repeats: bool = False) -> Plan:
    """What `squared_norm` does with tensors of these shapes; with `repeats`, after another layer that read `right`."""
    plan = NORMS.choose(left, right)
    if repeats and plan.way in ("Gram", "compiled Gram"):
        batch, groups, positions, _ = left
        pairs = products(positions)[0] if plan.way == "Gram" else positions * (positions + 1) // 2
        spared = 2 * batch * groups * pairs * right[3]
        return plan._replace(way=f"{plan.way}, of a shared input", flops=plan.flops - spared)
    return plan


def _one_position(left: torch.Size, right: torch.Size) -> Plan | None:
    batch, groups, positions, m = left
    elements = batch * groups * (m + right[3])
    return Plan("one position", 2 * elements + 2 * batch * groups, elements) if positions == 1 else None


@NORMS.way("one position", _one_position, narrow=True)
def one_position(left: Tensor, right: Tensor) -> Tensor:
    r"""$\|l\|^2 \|r\|^2$ of each group."""
    return (lengths(left, (2, 3)) * lengths(right, (2, 3))).square()


def direct_plan(left: torch.Size, right: torch.Size) -> Plan:
    """What `direct` does with tensors of these shapes."""
    batch, groups, positions, m = left
    entries = groups * m * right[3]
    flops = 2 * batch * entries * (positions + 1)
    several = block_size(batch, entries)
    held = min(several * entries, max(block(), groups * right[3]))
    calls = BLOCK * -(-batch // max(1, several))
    spot, one = current(), min(block(), m * right[3]) * positions
    slack = large.slack(one, flops // max(1, 2 * one)) if spot is None or spot.device == "cpu" else 1.0
    return Plan("direct", flops, held, batch * entries, slack, calls)


@NORMS.way("direct", direct_plan, narrow=True)
def direct(left: Tensor, right: Tensor) -> Tensor:
    r"""$\|\sum_t l_t r_t^\top\|^2$, a few examples at a time, or a few rows of one: $2 T m n$ operations an example."""
    groups, _, m = left.shape[1:]
    step = max(1, block() // max(1, groups * right.shape[3]))  # of rows
    parts = []
    for i, j in example_blocks(left.shape[0], groups * m * right.shape[3]):
        rows = (large.multiplied(left[i:j, ..., k : k + step].mT, right[i:j]) for k in range(0, max(m, 1), step))
        parts.append(sum(whole_squares(found.flatten(1, 2)) for found in rows))
    return joined(parts)


def _compiled(left: torch.Size, right: torch.Size) -> Plan | None:
    return compiled.plan(stacked(left), stacked(right)) if plain() and left[2] > 1 else None


@NORMS.way("compiled direct", _compiled)
def compiled_direct(left: Tensor, right: Tensor) -> Tensor:
    """`direct`, each tile of the gradient squared in registers; or as it is, where autograd or vmap follow tensors."""
    if not runnable(left, right):
        return direct(left, right)
    squares, _ = compiled.squares_and_sum(left.flatten(0, 1), right.flatten(0, 1), summing=False)
    return squares.view(len(left), left.shape[1] * squares.shape[1])


def pairs(x: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Runs of positions to be multiplied with each other, so that all pairs of positions are covered.

    The later half meets the earlier one, likewise in each half, and so on while positions can be halved. What is left
    is cut into pieces, each of which meets those before it and itself. All runs that meet at once have one length, so
    that they are one batch of matrices.

    Args:
        x: `(N, T, m)`, contiguous.

    Yields:
        `(N R, t, m)`, `(N R, s, m)`, and how many of the s positions come before the t: their products count twice.
    """
    width = x.shape[1]
    while width % 2 == 0 and width >= 2 * SHORTEST:
        width //= 2
        halves = x.view(-1, width, x.shape[2])
        yield halves[1::2], halves[::2], width
    runs = x.view(-1, width, x.shape[2])
    step = max(2 * SHORTEST, -(-width // PIECES))
    for start in range(0, width, step):
        whole = step >= width
        yield (runs, runs, 0) if whole else (runs[:, start : start + step], runs[:, : start + step], start)


@functools.cache
def products(positions: int) -> tuple[int, int, int]:
    """How many products of positions `pairs` asks for, in all and at once, and how often it does."""
    found = [
        one.shape[:-1].numel() * other.shape[-2] for one, other, _ in pairs(torch.empty(1, positions, 1, device="cpu"))
    ]
    return sum(found), max(found), len(found)


def grams(x: Tensor) -> list[Tensor]:
    r"""$x_t \cdot x_s$ of all `pairs` of `(b, G, T, m)`, `(b G R, t, s)` each."""
    return [large.multiplied(later, earlier.mH) for later, earlier, _ in pairs(x.flatten(0, 1).contiguous())]


def _gram(left: torch.Size, right: torch.Size) -> Plan | None:
    batch, groups, positions, m = left
    if positions < 2 or not m * right[3]:
        return None
    total, largest, pieces = products(positions)
    total, largest = groups * total, groups * largest
    several = pair_block_size(batch, largest)
    calls = PIECE * pieces * -(-batch // max(1, several))
    flops, moved = 2 * batch * total * (m + right[3] + 1), 2 * batch * total
    return Plan("Gram", flops, 2 * several * largest, moved, SLACK, calls)


@NORMS.way("Gram", _gram)
def gram(left: Tensor, right: Tensor) -> Tensor:
    r"""$\sum_{ts} (l_t \cdot l_s)(r_t \cdot r_s)$: about $T^2 (m + n)$ operations an example, as it is symmetric."""
    batch, groups, positions, _ = left.shape
    count, largest, _ = products(positions)
    blocks = list(example_blocks(batch, groups * largest, pair_block_size(batch, groups * largest)))
    elements = batch * groups * count
    of_right = readers.current().once(right, "Gram", elements, lambda: (grams(right[i:j]) for i, j in blocks))
    totals, sizes = [], []
    for (i, j), rights in zip(blocks, of_right, strict=True):
        total, size = (left.new_zeros(j - i).real for _ in range(2))
        lefts = left[i:j].flatten(0, 1).contiguous()
        for (later, earlier, twice), of_rights in zip(pairs(lefts), rights, strict=True):
            product = large.multiplied(later, earlier.mH).mul_(of_rights)
            product = product.real if product.is_complex() else product
            if twice < product.shape[2]:
                total += product[..., twice:].reshape(j - i, -1).sum(1)
            if twice:
                total.add_(product[..., :twice].reshape(j - i, -1).sum(1), alpha=2)
            size.add_(product.view(j - i, -1).abs_().sum(1), alpha=1 + bool(twice))
        totals.append(total)
        sizes.append(size)
    return recomputed(joined(totals), joined(sizes), lambda b: direct(left[b], right[b]))


def _compiled_gram(left: torch.Size, right: torch.Size) -> Plan | None:
    return compiled_pairs.plan(stacked(left), stacked(right)) if plain() and left[2] > 1 else None


@NORMS.way("compiled Gram", _compiled_gram)
def compiled_gram(left: Tensor, right: Tensor) -> Tensor:
    """`gram`, an example's matrices in a thread's cache; or as it is, where autograd or vmap follow tensors."""
    if not runnable(left, right):
        return gram(left, right)
    rights, known, shared = right.flatten(0, 1), None, readers.current()
    if shared.several(right) and (numbers := compiled_pairs.numbers_of_one(rights)) <= right.numel():
        (known,) = shared.once(right, "compiled Gram", numbers, lambda: [compiled_pairs.of_one(rights)])
    squares, sizes = compiled_pairs.inner_products(left.flatten(0, 1), rights, known)
    if left.shape[1] > 1:
        squares, sizes = (found.view(left.shape[:2]).sum(1) for found in (squares, sizes))
    return recomputed(squares, sizes, lambda b: direct(left[b], right[b]))


def _triton_direct(left: torch.Size, right: torch.Size) -> Plan | None:
    (batch, groups, positions, m), n, spot = left, right[3], current()
    if spot is None or not usable(spot) or positions == 1:
        return None
    m, n, several = max(m, n), min(m, n), batch * groups
    tile = direct_tile(m, n, spot.dtype, several)
    parts = several * tiles(m, tile.rows) * tiles(n, tile.columns)
    turned = spot.dtype == torch.float32 and tensor_cores(spot.dtype)  # see perex.kernels.triton.turning
    copied = groups * positions * (m + n) if turned else aligning(left, right) // max(1, batch)  # of an example
    held = parts + min(batch, copied_at_once(copied) if turned else batch) * copied
    flops, moved = 2 * several * m * n * (positions + 1), parts + 2 * batch * copied
    time = seconds(spot.dtype, work(parts, positions, tile), moved, 4 if turned else 2, DIRECT)
    return Plan("Triton direct", flops, held, moved, seconds=time)


def aligning(*shapes: torch.Size) -> int:
    """Elements of the stacks that Triton's kernels would rather read from a copy with aligned rows."""
    return sum(shape.numel() for shape in shapes if worth_aligning(shape))


@NORMS.way("Triton direct", _triton_direct, on_gpu=True)
def triton_direct(left: Tensor, right: Tensor) -> Tensor:
    """`direct`, each tile of the gradient squared in registers."""
    from perex.kernels.triton.outer import direct_terms

    return direct_terms(left, right)


def _triton_gram(left: torch.Size, right: torch.Size) -> Plan | None:
    (batch, groups, positions), width, spot = left[:3], left[3] + right[3], current()
    if spot is None or not usable(spot) or positions == 1:
        return None
    tile = gram_tile(positions, spot.dtype, batch * groups)
    pairs = batch * groups * pairs_of_tiles(positions, tile.rows)
    flops = 2 * pairs * min(tile.rows, positions) ** 2 * (width + 1)
    copied = aligning(left, right)
    held, moved = 2 * pairs + copied, 2 * pairs + 2 * copied
    time = seconds(spot.dtype, work(pairs, width, tile), moved, 5, GRAM)
    return Plan("Triton Gram", flops, held, moved, seconds=time)


@NORMS.way("Triton Gram", _triton_gram, on_gpu=True)
def triton_gram(left: Tensor, right: Tensor) -> Tensor:
    """`gram`, both Gram matrices and their product in registers, a pair of tiles of positions at a time."""
    from perex.kernels.triton.outer import gram_terms

    return gram_terms(left, right)


def _whole_direct(left: torch.Size, right: torch.Size) -> Plan | None:
    (batch, groups, positions, m), n, spot = left, right[3], current()
    if spot is None or not usable(spot) or positions == 1:
        return None
    entries, calls = batch * groups * m * n, -(-batch // block_size(batch, groups * m * n))
    products = entries * positions * (UNALIGNED if aligning(left, right) else 1)
    time = seconds(spot.dtype, products, 2 * entries, 4 * calls + 1, BACKEND)
    return Plan("whole direct", 2 * entries * (positions + 1), block(), entries, seconds=time)


@NORMS.way("whole direct", _whole_direct, on_gpu=True)
def whole_direct(left: Tensor, right: Tensor) -> Tensor:
    """`direct`, for GPUs: a few large products and passes over them."""
    return direct(left, right)


def gram_dot(left: Tensor, right: Tensor, other_left: Tensor, other_right: Tensor) -> Tensor:
    r"""$\langle G_b, H_b \rangle = \sum_{ts} (l_t \cdot l'_s)(r_t \cdot r'_s)$, position pair by position pair.

    Args:
        left: `(B, G, T, m)`.
        right: `(B, G, T, n)`.
        other_left: `(B, G, S, m)`.
        other_right: `(B, G, S, n)`.

    Returns:
        Tensor `(B,)`.
    """
    elements = left.shape[1] * left.shape[2] * other_left.shape[2]
    parts = []
    for i, j in example_blocks(left.shape[0], elements):
        lefts = left[i:j] @ other_left[i:j].mT  # (b, G, T, S)
        rights = right[i:j] @ other_right[i:j].mT
        parts.append(lefts.mul_(rights).sum((1, 2, 3)))
    return joined(parts)


def lengths(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    r"""$(\sum |x|^2)^{1/2}$ over some dimensions, in float32 or better."""
    return torch.linalg.vector_norm(x, dim=dim, dtype=torch.float32 if x.dtype in HALVES else None)


def squares(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    r"""$\sum |x|^2$ over some dimensions, without a tensor of squares."""
    return lengths(x, dim).square()


def whole_squares(x: Tensor) -> Tensor:
    """$\\sum |x_b|^2$ over all but the first dimension, row by row: long sums of float32 numbers lose digits."""
    return squares(x, 1) if x.dim() == 2 else squares(x.flatten(2), 2).sum(1)


def stacked(shape: torch.Size) -> torch.Size:
    """`(B G, T, m)`, the shape of one stack of matrices."""
    return torch.Size((shape[:2].numel(), *shape[2:]))


def joined(parts: list[Any]) -> Tensor:
    """One after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
