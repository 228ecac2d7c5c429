"""Gradients that are made some examples at a time, as they are reduced."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from perex.factors.base import Factor
from perex.factors.dense import Dense
from perex.kernels.blocks import example_blocks
from perex.kernels.plan import Plan
from perex.kernels.pulling import at_a_time


class Piecewise(Factor):
    """Gradients of which some examples' are made at a time.

    So where they are reduced at once, nothing of the size of batch times parameter is.
    """

    @abstractmethod
    def made(self, start: int, stop: int) -> Tensor:
        """$G_b$ of a few examples, `(n, *shape)`."""

    @property
    def step(self) -> int:
        """How many examples' are made at a time."""
        return at_a_time(self.batch, math.prod(self.shape))

    def dense(self, start: int, stop: int) -> Tensor:
        """See `Factor.dense`."""
        ranges = example_blocks(stop - start, 0, self.step)
        parts = [self.made(start + i, start + j) for i, j in ranges]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def squared_norm(self) -> Tensor:
        """See `Factor.squared_norm`."""
        ranges = example_blocks(self.batch, 0, self.step)
        return torch.cat([Dense(self.made(i, j)).squared_norm() for i, j in ranges])

    def lasting(self) -> Factor:
        """See `Factor.lasting`: later, what they are made of may be gone, or may have changed."""
        return Dense(self.dense(0, self.batch))

    def condensed(self) -> Factor:
        """See `Factor.condensed`."""
        return self.lasting()

    def pairs(self, other: Factor) -> Tensor:
        """See `Factor.pairs`: each is made once."""
        return Dense(self.dense(0, self.batch)).pairs(other)


@dataclass(eq=False)
class Mapped(Piecewise):
    """Gradients of an operator that nothing more is known of than how to run it backward, example by example.

    Attributes:
        batch: number of examples, B.
        shape: the parameter's shape.
        run: runs it for examples from one to another; None where only shapes are left.
    """

    batch: int
    shape: torch.Size
    run: Callable[[int, int], Tensor] | None

    def made(self, start: int, stop: int) -> Tensor:
        """See `Piecewise.made`."""
        assert self.run is not None
        return self.run(start, stop)

    def plan(self) -> Plan:
        """See `Factor.plan`."""
        entries = math.prod(self.shape)
        return Plan("a few at a time", 2 * self.batch * entries, 3 * self.step * entries)
