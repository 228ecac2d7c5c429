"""Gradients of which only some examples have one that is not zero."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from perex.factors.base import Factor
from perex.kernels.plan import Plan


@dataclass(eq=False)
class Few(Factor):
    r"""$G_b$ is the gradient of `factor`'s example $k$ where $b$ is `examples[k]`, and zero elsewhere.

    It is what a use leaves that only some examples reach: an expert, or a layer called on one example.

    Attributes:
        factor: the gradients of those examples.
        examples: which they are, in order.
        batch: number of examples in the batch, B.
    """

    factor: Factor
    examples: list[int]
    batch: int

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The parameter's shape."""
        return self.factor.shape

    def dense(self, start: int, stop: int) -> Tensor:
        """See `Factor.dense`."""
        first, last = bisect_left(self.examples, start), bisect_left(self.examples, stop)
        values = self.factor.dense(first, last)
        full = values.new_zeros(stop - start, *self.shape)
        full[self.numbers(full.device)[first:last] - start] = values
        return full

    def squared_norm(self) -> Tensor:
        """See `Factor.squared_norm`."""
        return self.spread(self.factor.squared_norm(), self.examples)

    def plan(self) -> Plan | None:
        """See `Factor.plan`."""
        return self.factor.plan()

    def dense_flops(self) -> int:
        """See `Factor.dense_flops`."""
        return self.factor.dense_flops()

    def dot_plan(self, other: Factor) -> Plan:
        """See `Factor.dot_plan`: as if the examples of one were among those of the other."""
        theirs = other.examples if isinstance(other, Few) else range(self.batch)
        if set(self.examples).isdisjoint(theirs):
            return Plan("apart", 0, 0)
        return self.factor.dot_plan(other.factor if isinstance(other, Few) else other)

    def sizes(self) -> Tensor | None:
        """See `Factor.sizes`."""
        sizes = self.factor.sizes()
        return None if sizes is None else self.spread(sizes, self.examples)

    def spread(self, values: Tensor, examples: list[int]) -> Tensor:
        """Values of some examples as `(B,)`, zero for all others."""
        return values.new_zeros(self.batch).index_copy(
            0, torch.tensor(examples, device=values.device, dtype=torch.long), values
        )

    def merge(self, other: Factor) -> Factor | None:
        """Uses by the same examples, where their factors merge; uses by others are further examples."""
        if not isinstance(other, Few):
            return None
        if self.examples == other.examples:
            merged = self.factor.merge(other.factor)
            return None if merged is None else Few(merged, self.examples, self.batch)
        if set(self.examples).isdisjoint(other.examples):
            joined = self.factor.beside(other.factor)
            if joined is not None:
                both = self.examples + other.examples
                order = sorted(range(len(both)), key=both.__getitem__)
                return Few(joined.take(torch.tensor(order, device="cpu")), [both[i] for i in order], self.batch)
        return None

    def apart(self, other: Factor) -> bool:
        """See `Factor.apart`: of no common example, or apart for these."""
        if not isinstance(other, Few):
            return self.factor.apart(other)
        return set(self.examples).isdisjoint(other.examples) or self.factor.apart(other.factor)

    def dot(self, other: Factor) -> Tensor:
        """See `Factor.dot`: between the examples that both have."""
        theirs = other.examples if isinstance(other, Few) else list(range(self.batch))
        common = sorted(set(self.examples).intersection(theirs))
        if not common:
            return self.spread(self.factor.squared_norm()[:0], [])
        own = self.factor.take(torch.tensor([bisect_left(self.examples, b) for b in common], device="cpu"))
        inner = other.factor if isinstance(other, Few) else other
        return self.spread(
            own.dot(inner.take(torch.tensor([bisect_left(theirs, b) for b in common], device="cpu"))), common
        )

    def take(self, examples: Tensor) -> Factor:
        """See `Factor.take`."""
        wanted = examples.tolist()
        found = [(place, bisect_left(self.examples, b)) for place, b in enumerate(wanted) if b in self.examples]
        inner = self.factor.take(torch.tensor([k for _, k in found], dtype=torch.long, device="cpu"))
        return Few(inner, [place for place, _ in found], len(wanted))

    def lasting(self) -> Factor:
        """See `Factor.lasting`."""
        return Few(self.factor.lasting(), self.examples, self.batch)

    def condensed(self) -> Factor:
        """See `Factor.condensed`."""
        return Few(self.factor.condensed(), self.examples, self.batch)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See `Factor.weighted_sum`."""
        return self.factor.weighted_sum(weights[self.numbers(weights.device)])

    def along(self, direction: Tensor) -> Tensor:
        """See `Factor.along`."""
        return self.spread(self.factor.along(direction), self.examples)

    def pairs(self, other: Factor) -> Tensor:
        """See `Factor.pairs`: zero for all others."""
        found = self.factor.pairs(other)
        return found.new_zeros(self.batch, other.batch).index_copy(0, self.numbers(found.device), found)

    def project(self, rows: Tensor, columns: Tensor) -> Tensor:
        """See `Factor.project`."""
        found = self.factor.project(rows, columns)
        return found.new_zeros(self.batch, found.shape[1]).index_copy(0, self.numbers(found.device), found)

    def numbers(self, device: torch.device) -> Tensor:
        """Which examples have a gradient, as a tensor."""
        return torch.tensor(self.examples, device=device, dtype=torch.long)
