"""Gradients of a large parameter that come through a tensor derived from it, as those of a normalized weight do."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from perex.factors.base import Factor
from perex.factors.piecewise import Piecewise
from perex.kernels.plan import Plan
from perex.kernels.pulling import at_a_time, pulled_back


@dataclass(eq=False)
class Derived:
    """A tensor that derives from parameters alone, with the graph that says how.

    Attributes:
        tensor: the tensor, S.
        source: what its graph begins with in the parameter's place.
    """

    tensor: Tensor
    source: Tensor


@dataclass(eq=False)
class Pulled(Piecewise):
    r"""$G_b = J^\top H_b$, with H the gradients of a derived tensor and J its derivative by the parameter.

    They are pulled back some examples at a time, so that where they are reduced at once, nothing of the size of batch
    times parameter is made.

    Attributes:
        factor: H.
        derived: the tensor; None where only shapes are left.
        shape: the parameter's shape.
    """

    factor: Factor
    derived: Derived | None
    shape: torch.Size

    @property
    def batch(self) -> int:  # type: ignore[override]
        """Number of examples."""
        return self.factor.batch

    def pull(self, grads: Tensor) -> Tensor:
        r"""$J^\top H_b$, `(n, *S.shape)` to `(n, *shape)`."""
        assert self.derived is not None
        return pulled_back(self.derived.tensor, [self.derived.source], grads)[0]

    @property
    def step(self) -> int:
        """How many examples are pulled back at a time."""
        return at_a_time(self.batch, max(math.prod(self.shape), math.prod(self.factor.shape)))

    def made(self, start: int, stop: int) -> Tensor:
        """See `Piecewise.made`."""
        return self.pull(self.factor.dense(start, stop))

    def plan(self) -> Plan:
        """See `Factor.plan`."""
        entries = math.prod(self.shape)
        return Plan("pulled back", self.factor.dense_flops() + 2 * self.batch * entries, 3 * self.step * entries)

    def dense_flops(self) -> int:
        """See `Factor.dense_flops`: of the derived tensor's gradients."""
        return self.factor.dense_flops()

    def take(self, examples: Tensor) -> Factor:
        """See `Factor.take`."""
        return Pulled(self.factor.take(examples), self.derived, self.shape)

    def sizes(self) -> Tensor | None:
        """See `Factor.sizes`: how much J stretches the terms of H is not known, so they may be as long as can be."""
        sizes = self.factor.sizes()
        return None if sizes is None else torch.full_like(sizes, torch.inf)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        r"""See `Factor.weighted_sum`: $J^\top \sum_b w_b H_b$."""
        return self.pull(self.factor.weighted_sum(weights).unsqueeze(0)).squeeze(0).contiguous()
