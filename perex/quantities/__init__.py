"""Quantities: what is made of per-example gradients. They read factors and know no layer."""

from perex.quantities.base import By, Quantity, added_up, grouped
from perex.quantities.dots import Dots
from perex.quantities.grads import Grads
from perex.quantities.gram import Gram
from perex.quantities.noise import NoiseScale
from perex.quantities.norms import SquaredNorms
from perex.quantities.projections import Projections

__all__ = [
    "By",
    "Dots",
    "Grads",
    "Gram",
    "NoiseScale",
    "Projections",
    "Quantity",
    "SquaredNorms",
    "added_up",
    "grouped",
]
