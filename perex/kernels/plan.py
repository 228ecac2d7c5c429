"""What a way to a norm costs."""

from __future__ import annotations

from typing import NamedTuple


class Plan(NamedTuple):
    """One way to the norms of a batch, known from shapes alone.

    Attributes:
        way: what reports call it.
        flops: floating-point operations, a multiply-add being two.
        elements: how many elements its temporaries have at once.
    """

    way: str
    flops: int
    elements: int
