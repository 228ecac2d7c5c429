"""Per-example gradient norms."""

from __future__ import annotations

from typing import Any

from perex.factors import Total
from perex.quantities.base import Quantity


class SquaredNorms(Quantity):
    r"""$\|\partial \ell_b / \partial \theta\|^2$ of each parameter."""

    degree = 2

    def reduce(self, name: str, gradient: Total) -> Any:
        """See `Quantity.reduce`: `Terms`, which are added up when they are read."""
        return gradient.terms()
