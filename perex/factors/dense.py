"""Gradients that are small, or that only the general path knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perex.factors.base import Factor
from perex.factors.terms import Terms
from perex.kernels.outer import lengths, whole_squares
from perex.kernels.plan import Plan
from perex.kernels.products import HALVES

LEFT = 2**18
"""How many numbers are left to be squared later: 1 MiB, of each parameter."""


@dataclass(eq=False)
class Dense(Factor):
    """The gradients themselves: biases, norm layers, scalars, derived weights.

    Attributes:
        values: `(B, *shape)`.
        flops: operations it took to multiply them out.
    """

    values: Tensor
    flops: int = 0

    @property
    def batch(self) -> int:  # type: ignore[override]
        """Number of examples."""
        return self.values.shape[0]

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The parameter's shape."""
        return self.values.shape[1:]

    def dense(self, start: int, stop: int) -> Tensor:
        """See `Factor.dense`."""
        return self.values[start:stop]

    def squared_norm(self) -> Tensor:
        """See `Factor.squared_norm`."""
        return whole_squares(self.values.unsqueeze(1) if self.values.dim() == 1 else self.values)

    def terms(self) -> Terms:
        """See `Factor.terms`: small ones on a GPU are left as they are, to be squared along with others."""
        values = self.values
        if values.dim() != 2 or values.dtype in HALVES:
            return super().terms()
        left = values.is_cuda and 1 < len(values) and values.numel() <= LEFT  # of one, it may be a parameter's `.grad`
        return Terms.of(values if left else lengths(values, 1), squared=False)

    def plan(self) -> Plan:
        """See `Factor.plan`."""
        way = "multiplied out" if self.flops else "dense"
        return Plan(way, self.flops + 2 * self.values.numel(), self.values.numel())

    def condensed(self) -> Factor:
        """See `Factor.condensed`."""
        return self

    def merge(self, other: Factor) -> Factor | None:
        """Two dense factors add up."""
        return Dense(self.values + other.values, self.flops + other.flops) if isinstance(other, Dense) else None

    def take(self, examples: Tensor) -> Factor:
        """See `Factor.take`."""
        return Dense(self.values[examples.to(self.values.device)])

    def beside(self, other: Factor) -> Factor | None:
        """See `Factor.beside`."""
        return Dense(torch.cat((self.values, other.values))) if isinstance(other, Dense) else None

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See `Factor.weighted_sum`."""
        return torch.tensordot(weights.to(self.values), self.values, 1)
