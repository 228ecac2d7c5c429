"""What a way to a norm costs."""

from __future__ import annotations

from typing import NamedTuple

MOVE = 16
"""What reading and writing an element of a temporary costs, in multiply-adds of a matrix product (two CPU cores)."""


class Plan(NamedTuple):
    """One way to the norms of a batch, known from shapes alone.

    Attributes:
        way: what reports call it.
        flops: floating-point operations, a multiply-add being two.
        elements: how many elements its temporaries have at once.
        moved: how many elements of temporaries are written, and read again, in all.
        slack: by how much its arithmetic is slower than a large matrix product's.
        calls: what calls of the backend cost beside their arithmetic, in multiply-adds.
        seconds: how long it takes on a GPU, for ways that are for GPUs.
    """

    way: str
    flops: int
    elements: int
    moved: int = 0
    slack: float = 1.0
    calls: int = 0
    seconds: float = 0.0

    @property
    def cost(self) -> float:
        """Time, in multiply-adds of a large matrix product."""
        return self.slack * self.flops / 2 + MOVE * self.moved + self.calls
