"""A parameter used several times: a sum of factors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from perex.factors.base import Factor
from perex.factors.dense import Dense
from perex.factors.terms import Terms
from perex.kernels.cancellation import recomputed


class Total(Factor):
    r"""$G_b = \sum_i G^{(i)}_b$, over all uses $i$ of one parameter.

    Uses of the same kind are merged; between kinds, cross terms are inner products of factors.

    Args:
        factors: one or more, of the same parameter and batch.

    Attributes:
        factors: what is left after merging.
        places: for each factor given, which of these it went into.
    """

    def __init__(self, factors: Iterable[Factor]) -> None:
        self.factors: list[Factor] = []
        self.places: list[int] = []
        for factor in factors:
            for place, present in enumerate(self.factors):
                merged = present.merge(factor)
                if merged is not None:
                    self.factors[place] = merged
                    self.places.append(place)
                    break
            else:
                self.places.append(len(self.factors))
                self.factors.append(factor)
        self.batch = self.factors[0].batch
        self.shape = self.factors[0].shape

    def dense(self, start: int, stop: int) -> Tensor:
        """See `Factor.dense`."""
        return torch.stack([factor.dense(start, stop) for factor in self.factors]).sum(0)

    def squared_norm(self) -> Tensor:
        r"""$\sum_i \|G^{(i)}\|^2 + 2 \sum_{i<j} \langle G^{(i)}, G^{(j)} \rangle$."""
        if len(self.factors) == 1:
            return self.factors[0].squared_norm()
        squares = sizes = torch.stack([factor.squared_norm() for factor in self.factors]).sum(0)
        for i, factor in enumerate(self.factors):
            for earlier in self.factors[:i]:
                if not factor.apart(earlier):
                    twice = 2 * factor.dot(earlier)
                    squares, sizes = squares + twice, sizes + twice.abs()
        return squares if squares is sizes else recomputed(squares, sizes, self.multiplied_out)

    def terms(self) -> Terms:
        """See `Factor.terms`."""
        return self.factors[0].terms() if len(self.factors) == 1 else super().terms()

    def multiplied_out(self, examples: Tensor) -> Tensor:
        """Squared norms of some examples, `(n,)`, of gradients that were added up first."""
        return torch.cat([Dense(self.dense(b, b + 1)).squared_norm() for b in examples.tolist()])

    def dot(self, other: Factor) -> Tensor:
        r"""$\sum_i \langle G^{(i)}, H \rangle$."""
        return torch.stack([factor.dot(other) for factor in self.factors]).sum(0)

    def take(self, examples: Tensor) -> Factor:
        """See `Factor.take`."""
        return Total(factor.take(examples) for factor in self.factors)

    def sizes(self) -> Tensor | None:
        """See `Factor.sizes`: several uses of a parameter may cancel each other, too."""
        sizes = [factor.sizes() for factor in self.factors]
        if len(sizes) > 1:
            pairs = zip(self.factors, sizes, strict=True)
            sizes = [factor.squared_norm().sqrt() if size is None else size for factor, size in pairs]
        known = [size for size in sizes if size is not None]
        return torch.stack(known).sum(0) if known else None

    def precise(self, example: int) -> Tensor:
        """See `Factor.precise`."""
        return added(factor.precise(example) for factor in self.factors)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See `Factor.weighted_sum`."""
        return added(factor.weighted_sum(weights) for factor in self.factors)

    def along(self, direction: Tensor) -> Tensor:
        """See `Factor.along`."""
        return added(factor.along(direction) for factor in self.factors)

    def pairs(self, other: Factor) -> Tensor:
        r"""$\sum_{ij} \langle G^{(i)}_b, H^{(j)}_c \rangle$."""
        others = other.factors if isinstance(other, Total) else [other]
        return added(one.pairs(two) for one in self.factors for two in others)

    def project(self, rows: Tensor, columns: Tensor) -> Tensor:
        """See `Factor.project`."""
        return added(factor.project(rows, columns) for factor in self.factors)


def added(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of one or more tensors."""
    first, *others = tensors
    return sum(others, first)
