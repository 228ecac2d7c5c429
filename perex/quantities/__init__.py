"""Quantities: what is made of per-example gradients. They read factors and know no layer."""

from perex.quantities.base import Quantity
from perex.quantities.norms import SquaredNorms

__all__ = ["Quantity", "SquaredNorms"]
