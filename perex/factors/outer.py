"""Gradients that are sums of outer products over positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perex.factors.base import Factor, double
from perex.factors.terms import Terms
from perex.kernels import outer as kernel
from perex.kernels import sums
from perex.kernels.large import SLACK, faster, multiplied
from perex.kernels.plan import Plan
from perex.kernels.readers import current


@dataclass(eq=False)
class Outer(Factor):
    r"""$G_b = \sum_t l_{bt} r_{bt}^\top$: linear layers, projections, HF's Conv1D.

    Attributes:
        left: `(B, T, m)`, what indexes the weight's first dimension: the output gradient of a linear layer.
        right: `(B, T, n)`, what indexes the second: the activation.
        shape: the weight's shape, of $m n$ elements; `(m, n)` where it has two dimensions.
    """

    left: Tensor
    right: Tensor
    shape: torch.Size
    summing: bool = False
    repeats: bool = False
    """Whether another layer had read `right` before, and left something that the norm was spared."""

    @property
    def batch(self) -> int:  # type: ignore[override]
        """Number of examples."""
        return self.left.shape[0]

    def dense(self, start: int, stop: int) -> Tensor:
        """See `Factor.dense`."""
        return (self.left[start:stop].mT @ self.right[start:stop]).reshape(stop - start, *self.shape)

    def squared_norm(self) -> Tensor:
        """See `Factor.squared_norm`."""
        if self.summing:
            norms, total = sums.of_outer(self.left, self.right)
            self.total = total.reshape(self.shape)
            return norms
        return self.terms().total()

    def terms(self) -> Terms:
        """See `Factor.terms`."""
        if self.summing:
            return super().terms()
        readers = current()
        before = readers.hits
        found = kernel.squares_of(self.left.unsqueeze(1), self.right.unsqueeze(1))
        self.repeats = readers.hits > before
        return Terms.of(found)

    def plan(self) -> Plan:
        """See `Factor.plan`."""
        if self.summing:
            return self.summed_plan()
        return kernel.plan(self.left.unsqueeze(1).shape, self.right.unsqueeze(1).shape, self.repeats)

    def summed_plan(self) -> Plan:
        """See `Factor.summed_plan`."""
        return sums.plan_of_outer(self.left.shape, self.right.shape)

    def dense_flops(self) -> int:
        """See `Factor.dense_flops`."""
        return 2 * self.left.numel() * self.right.shape[2]

    def merge(self, other: Factor) -> Factor | None:
        """Uses of one weight are further positions."""
        if not isinstance(other, Outer):
            return None
        left, right = torch.cat((self.left, other.left), 1), torch.cat((self.right, other.right), 1)
        return Outer(left, right, self.shape)

    def take(self, examples: Tensor) -> Factor:
        """See `Factor.take`."""
        examples = examples.to(self.left.device)
        return Outer(self.left[examples], self.right[examples], self.shape)

    def beside(self, other: Factor) -> Factor | None:
        """See `Factor.beside`: of as many positions."""
        if not isinstance(other, Outer) or self.left.shape[1] != other.left.shape[1]:
            return None
        return Outer(torch.cat((self.left, other.left)), torch.cat((self.right, other.right)), self.shape)

    def sizes(self) -> Tensor | None:
        r"""See `Factor.sizes`: $\sum_t \|l_t\| \|r_t\| \le \|l\| \|r\|$."""
        if self.left.shape[1] == 1:
            return None
        return kernel.lengths(self.left, (1, 2)) * kernel.lengths(self.right, (1, 2))

    def precise(self, example: int) -> Tensor:
        """See `Factor.precise`."""
        one = slice(example, example + 1)
        return Outer(double(self.left[one]), double(self.right[one]), self.shape).dense(0, 1)[0]

    def weighted_sum(self, weights: Tensor) -> Tensor:
        r"""$\sum_{bt} w_b l_{bt} r_{bt}^\top$, one matrix product; the narrower side takes the weights."""
        weights = weights.to(self.left)[:, None, None]
        left, right = self.left, self.right
        if left.shape[2] <= right.shape[2]:
            left = left * weights
        else:
            right = right * weights
        return multiplied(left.flatten(0, 1).T, right.flatten(0, 1)).reshape(self.shape)

    def summed(self) -> Tensor:
        """See `Factor.summed`."""
        if self.total is not None:
            return super().summed()
        return multiplied(self.left.flatten(0, 1).T, self.right.flatten(0, 1)).reshape(self.shape)

    def sum_cost(self) -> float:
        """See `Factor.sum_cost`."""
        fast = faster(self.left.flatten(0, 1).T, self.right.flatten(0, 1))
        return (SLACK if fast else 1.0) * self.product_cost()

    def along(self, direction: Tensor) -> Tensor:
        r"""$\sum_t l_t^\top V r_t$."""
        matrix = direction.to(self.left).reshape(self.left.shape[2], self.right.shape[2])
        return (flat_product(self.left, matrix) * self.right).sum((1, 2))

    def project(self, rows: Tensor, columns: Tensor) -> Tensor:
        r"""$\sum_t (a_k \cdot l_t)(b_k \cdot r_t)$: both sides are projected, and nothing is multiplied out."""
        if len(rows) != self.left.shape[2]:  # a weight whose first dimension is not the outer product's
            return super().project(rows, columns)
        left, right = flat_product(self.left, rows.to(self.left)), flat_product(self.right, columns.to(self.right))
        return (left * right).sum(1)


def flat_product(rows: Tensor, matrix: Tensor) -> Tensor:
    """`(B, T, m)` times `(m, n)`: all rows in one product."""
    return multiplied(rows.flatten(0, 1), matrix).view(*rows.shape[:2], matrix.shape[1])
