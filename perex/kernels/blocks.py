"""How many examples to work on at a time."""

from __future__ import annotations

from collections.abc import Iterator

BLOCK = 2**20
"""Elements that a temporary may have: 4 MiB in float32, about what stays in a core's cache."""


SMALL = 2**18
"""What the temporaries of all examples together may have: where that is so little, one call for all is the cheapest."""


def block_size(batch: int, elements: int) -> int:
    """How many examples `example_blocks` takes at a time."""
    if batch * elements <= SMALL:
        return max(1, batch)
    return max(1, min(BLOCK // max(elements, 1), (batch + 1) // 2))


def example_blocks(batch: int, elements: int) -> Iterator[tuple[int, int]]:
    """Split a batch into ranges whose temporaries, of `elements` an example, stay within a block.

    A range never holds the whole batch, unless that is small, so nothing of size batch times `elements` is made.

    Yields:
        `(start, stop)` pairs that cover `range(batch)`; a single `(0, 0)` for an empty batch.
    """
    step = block_size(batch, elements)
    yield from ((start, min(start + step, batch)) for start in range(0, max(batch, 1), step))
