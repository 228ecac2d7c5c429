"""How many examples to work on at a time."""

from __future__ import annotations

from collections.abc import Iterator

from perex.kernels.spot import current

BLOCK, BLOCK_ON_GPU = 2**20, 2**24
"""Elements that a temporary may have: 4 MiB in float32, about what stays in a core's cache, or 64 MiB on a GPU."""


def block() -> int:
    """Elements that a temporary may have where plans are for."""
    spot = current()
    return BLOCK if spot is None or spot.device != "cuda" else BLOCK_ON_GPU


SMALL = 2**18
"""Elements that temporaries of all examples together may have, for one call to do."""


def block_size(batch: int, elements: int) -> int:
    """How many examples `example_blocks` takes at a time."""
    return max(1, min(block() // max(elements, 1), (batch + 1) // 2))


def pair_block_size(batch: int, pairs: int) -> int:
    """How many examples are taken at a time where temporaries are of pairs of positions: all, if these are few."""
    return max(1, batch) if batch * pairs <= SMALL else block_size(batch, pairs)


def example_blocks(batch: int, elements: int, step: int | None = None) -> Iterator[tuple[int, int]]:
    """Split a batch into ranges whose temporaries, of `elements` an example, stay within a block.

    A range never holds the whole batch (unless that is one example), so nothing of size batch times
    `elements` is ever made.

    Yields:
        `(start, stop)` pairs that cover `range(batch)`; a single `(0, 0)` for an empty batch.
    """
    step = step or block_size(batch, elements)
    yield from ((start, min(start + step, batch)) for start in range(0, max(batch, 1), step))
