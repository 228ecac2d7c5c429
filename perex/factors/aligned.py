"""Gradients of a tensor along one dimension of which every example has rows of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from perex.factors.base import Factor
from perex.factors.dense import Dense


@dataclass(eq=False)
class Aligned(Factor):
    """Where a tensor derived from parameters meets examples row by row, as `token.expand(B, -1, -1)` does.

    An example's gradient is zero but for its own rows. Where all rows are one and the same in a parameter, these are
    what the parameter gets, and nothing of size B x B is made.

    Attributes:
        values: each example's own rows, `(B, *shape)` but for dimension `dim`, which has as many as an example has.
        dim: the dimension of the tensor along which the examples' rows lie.
        shape: the tensor's shape.
        own: brings a tensor of that shape to what `values` are.
        spread: makes `(B, *shape)` of these.
    """

    values: Tensor
    dim: int
    shape: torch.Size
    own: Callable[[Tensor], Tensor]
    spread: Callable[[Tensor], Tensor]

    @property
    def batch(self) -> int:  # type: ignore[override]
        """Number of examples."""
        return self.values.shape[0]

    @functools.cached_property
    def whole(self) -> Dense:
        """The same, zeros and all."""
        return Dense(self.spread(self.values))

    @property
    def row(self) -> Dense:
        """What a single row gets that all of them show, `(B, *shape)` with 1 for dimension `dim`."""
        return Dense(self.values.sum(1 + self.dim, keepdim=True))

    def dense(self, start: int, stop: int) -> Tensor:
        """See `Factor.dense`."""
        return self.whole.dense(start, stop)

    def squared_norm(self) -> Tensor:
        """See `Factor.squared_norm`."""
        return self.whole.squared_norm()
