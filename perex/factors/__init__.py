"""Factors: what a per-example gradient is before it is multiplied out.

Rules make them, quantities consume them; neither knows the other.
"""

from perex.factors.aligned import Aligned
from perex.factors.base import Factor
from perex.factors.dense import Dense
from perex.factors.few import Few
from perex.factors.narrow import Narrow
from perex.factors.outer import Outer
from perex.factors.part import Part, Place
from perex.factors.patches import Patches
from perex.factors.piecewise import Mapped, Piecewise
from perex.factors.pulled import Derived, Pulled
from perex.factors.rows import Rows
from perex.factors.total import Total

__all__ = [
    "Aligned",
    "Dense",
    "Derived",
    "Factor",
    "Few",
    "Mapped",
    "Narrow",
    "Outer",
    "Part",
    "Patches",
    "Piecewise",
    "Place",
    "Pulled",
    "Rows",
    "Total",
]
