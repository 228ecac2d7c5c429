"""Gradients of a part of a parameter: an expert's slice, a transposed or sliced tie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perex.factors.base import Factor
from perex.factors.terms import Terms
from perex.kernels.plan import Plan


@dataclass(frozen=True)
class Place:
    """Where a view's elements are in a contiguous parameter.

    Attributes:
        shape: the parameter's shape.
        size: the view's shape.
        stride: the view's strides, in elements.
        offset: the parameter's element that is the view's first.
    """

    shape: torch.Size
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def last(self) -> int:
        """The view's last element."""
        return self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))

    def apart(self, other: Place) -> bool:
        """Whether the two surely share no element."""
        return self.last < other.offset or other.last < self.offset or 0 in (*self.size, *other.size)


def once_each(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether no element is in a view twice, as it is after `expand`: sufficient, and true of all ordinary views."""
    reach = 0
    for step, length in sorted((s, n) for s, n in zip(stride, size, strict=True) if n != 1):
        if step <= reach:
            return False
        reach += step * (length - 1)
    return True


@dataclass(eq=False)
class Part(Factor):
    r"""The gradient of `factor` in one place of the parameter, and zero elsewhere; $\|G_b\|$ is the same.

    Attributes:
        factor: gradients of the view.
        place: where its elements are.
    """

    factor: Factor
    place: Place

    @property
    def batch(self) -> int:  # type: ignore[override]
        """Number of examples."""
        return self.factor.batch

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The parameter's shape."""
        return self.place.shape

    def dense(self, start: int, stop: int) -> Tensor:
        """See `Factor.dense`."""
        values, entries = self.factor.dense(start, stop), math.prod(self.shape)
        full = values.new_zeros(stop - start, entries)
        full.as_strided(values.shape, (entries, *self.place.stride), self.place.offset).copy_(values)
        return full.reshape(stop - start, *self.shape)

    def squared_norm(self) -> Tensor:
        """See `Factor.squared_norm`."""
        return self.factor.squared_norm()

    def terms(self) -> Terms:
        """See `Factor.terms`."""
        return self.factor.terms()

    def plan(self) -> Plan | None:
        """See `Factor.plan`."""
        return self.factor.plan()

    def dense_flops(self) -> int:
        """See `Factor.dense_flops`."""
        return self.factor.dense_flops()

    def dot_plan(self, other: Factor) -> Plan:
        """See `Factor.dot_plan`."""
        if isinstance(other, Part) and self.place.apart(other.place):
            return Plan("apart", 0, 0)
        if isinstance(other, Part) and self.place == other.place:
            return self.factor.dot_plan(other.factor)
        return super().dot_plan(other)

    def merge(self, other: Factor) -> Factor | None:
        """Uses of the same part, where their factors merge."""
        if not isinstance(other, Part) or self.place != other.place:
            return None
        merged = self.factor.merge(other.factor)
        return None if merged is None else Part(merged, self.place)

    def apart(self, other: Factor) -> bool:
        """See `Factor.apart`: parts that do not overlap."""
        return isinstance(other, Part) and self.place.apart(other.place)

    def dot(self, other: Factor) -> Tensor:
        """See `Factor.dot`."""
        if isinstance(other, Part) and self.place == other.place:
            return self.factor.dot(other.factor)
        return self.blockwise_dot(other)

    def take(self, examples: Tensor) -> Factor:
        """See `Factor.take`."""
        return Part(self.factor.take(examples), self.place)

    def beside(self, other: Factor) -> Factor | None:
        """See `Factor.beside`."""
        joined = self.factor.beside(other.factor) if isinstance(other, Part) and self.place == other.place else None
        return None if joined is None else Part(joined, self.place)

    def condensed(self) -> Factor:
        """See `Factor.condensed`."""
        return Part(self.factor.condensed(), self.place)

    def sizes(self) -> Tensor | None:
        """See `Factor.sizes`."""
        return self.factor.sizes()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See `Factor.weighted_sum`: written to its place."""
        values = self.factor.weighted_sum(weights)
        full = values.new_zeros(self.shape)
        full.as_strided(values.shape, self.place.stride, self.place.offset).copy_(values)
        return full

    def along(self, direction: Tensor) -> Tensor:
        """See `Factor.along`: what is read of the direction is in the same place."""
        whole = direction.contiguous()
        offset = whole.storage_offset() + self.place.offset
        return self.factor.along(whole.as_strided(self.place.size, self.place.stride, offset))

    def pairs(self, other: Factor) -> Tensor:
        """See `Factor.pairs`."""
        if isinstance(other, Part) and self.place == other.place:
            return self.factor.pairs(other.factor)
        return self.blockwise_pairs(other)
