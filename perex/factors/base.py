"""What every factor answers, with exact fallbacks for what a kind has no closed form for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from perex.factors.terms import Terms
from perex.kernels.blocks import block_size, example_blocks
from perex.kernels.plan import Plan

WORTH_SHARING = 2**22
"""How many multiply-adds a weight gradient has to have for its sum to be taken over from autograd."""


class Factor(ABC):
    r"""The gradients $G_b$ of one parameter, one for each example $b$ of a batch, not multiplied out.

    Attributes:
        batch: number of examples, B.
        shape: the parameter's shape, which every $G_b$ has.
    """

    batch: int
    shape: torch.Size
    summing: bool = False
    """Whether the sum over examples is wanted too, so that `squared_norm` is to leave it in `total`."""
    total: Tensor | None = None

    @abstractmethod
    def dense(self, start: int, stop: int) -> Tensor:
        r"""$G_b$ for $b$ from `start` to `stop`, multiplied out.

        Returns:
            Tensor `(stop - start, *shape)`.
        """

    @abstractmethod
    def squared_norm(self) -> Tensor:
        r"""$\|G_b\|^2$, the sum of squares over all entries.

        Returns:
            Tensor `(B,)`.
        """

    def terms(self) -> Terms:
        """`squared_norm`, of which something may be left to be added up."""
        return Terms.of(self.squared_norm())

    def plan(self) -> Plan | None:
        """How `squared_norm` is computed and what it costs, by shapes alone; None where that is not known."""
        return None

    def summed_plan(self) -> Plan | None:
        """What `squared_norm` costs if it leaves the sum over examples; None where it does not."""
        return None

    def sums_with_norms(self) -> bool:
        """Whether norms and sum are cheaper together, by multiplying out, than each in its own way; on CPUs."""
        together, norms = self.summed_plan(), self.plan()
        return together is not None and norms is not None and together.cost < norms.cost + self.sum_cost()

    def sums_cheaply(self) -> bool:
        """Whether the sum, or norms and sum, cost less than they do where autograd computes the sum; on CPUs."""
        if self.dense_flops() // 2 < WORTH_SHARING:
            return False
        return self.sum_cost() < self.product_cost() or self.sums_with_norms()

    def sizes(self) -> Tensor | None:
        r"""At least $\sum_t \|G_{bt}\|$ over the terms that `weighted_sum` adds to those of other examples, `(B,)`.

        None if each $G_b$ is added up by itself first.
        """
        return None

    def precise(self, example: int) -> Tensor:
        """One example's $G_b$ in float64, multiplied out in it where that is how it is made: terms may cancel."""
        return double(self.dense(example, example + 1)[0])

    def summed(self) -> Tensor:
        r"""$\sum_b G_b$, if `squared_norm` has left it there, or else multiplied out.

        Returns:
            Tensor `shape`.
        """
        total, self.total = self.total, None
        if total is not None:
            return total
        device = next((value.device for value in vars(self).values() if isinstance(value, Tensor)), None)
        return self.weighted_sum(torch.ones(self.batch, device=device))

    def dense_flops(self) -> int:
        """Operations to multiply out the whole batch."""
        return 0

    def product_cost(self) -> float:
        """What that costs in autograd, as the sum over examples, in multiply-adds of a large matrix product."""
        return self.dense_flops() / 2

    def sum_cost(self) -> float:
        """What `summed` costs, likewise."""
        return self.product_cost()

    def merge(self, other: Factor) -> Factor | None:
        """One factor for the sum of both, or None where that is no simpler than keeping two."""
        return None

    def apart(self, other: Factor) -> bool:
        """Whether the two surely have no entry in common, so that their inner product is zero."""
        return False

    def take(self, examples: Tensor) -> Factor:
        """The gradients of some examples: `(n,)` numbers, in this order."""
        from perex.factors.dense import Dense

        return Dense(torch.cat([self.dense(b, b + 1) for b in examples.tolist()] or [self.dense(0, 0)]))

    def beside(self, other: Factor) -> Factor | None:
        """One factor for these examples and then those of `other`, or None where the two do not fit together."""
        return None

    def dot(self, other: Factor) -> Tensor:
        r"""$\langle G_b, H_b \rangle$ with another factor of the same parameter.

        Kinds register closed forms with `perex.factors.products.product`; without one, both sides are
        multiplied out a few examples at a time.

        Returns:
            Tensor `(B,)`.
        """
        from perex.factors.products import closed_form

        if type(other).dot is not Factor.dot:  # it knows how to go into itself
            return other.dot(self)
        form = closed_form(type(self), type(other))
        return self.blockwise_dot(other) if form is None else form(self, other)

    def blockwise_dot(self, other: Factor) -> Tensor:
        """`dot`, both sides multiplied out a few examples at a time."""
        parts = []
        for i, j in self.blocks():
            product = self.dense(i, j) * other.dense(i, j).conj()
            parts.append(product.real.unsqueeze(-1).flatten(1).sum(1))
        return torch.cat(parts)

    def dot_plan(self, other: Factor) -> Plan:
        """How `dot` is computed and what it costs, by shapes alone."""
        from perex.factors.products import closed_cost

        cost = closed_cost(self, other)
        if cost is not None:
            return cost
        entries = math.prod(self.shape)
        flops = self.dense_flops() + other.dense_flops() + 2 * self.batch * entries
        return Plan("multiplied out", flops, 3 * block_size(self.batch, entries) * entries)

    def lasting(self) -> Factor:
        """The same gradients to be reduced when the backward is over: multiplied out, if they could not be then."""
        return self

    def condensed(self) -> Factor:
        """The same gradients to be kept: multiplied out, where these are no larger than what they are made of."""
        from perex.factors.dense import Dense

        held = sum(value.numel() for value in vars(self).values() if isinstance(value, Tensor))
        if self.batch * math.prod(self.shape) > held:
            return self
        return Dense(self.dense(0, self.batch), self.dense_flops())

    def weighted_sum(self, weights: Tensor) -> Tensor:
        r"""$\sum_b w_b G_b$.

        Args:
            weights: `(B,)`.

        Returns:
            Tensor `shape`.
        """
        total: Any = 0
        for i, j in self.blocks():
            gradients = self.dense(i, j)
            total = total + torch.tensordot(weights[i:j].to(gradients), gradients, 1)
        return total

    def along(self, direction: Tensor) -> Tensor:
        r"""$\langle G_b, V \rangle$ with one tensor $V$; the real part, for complex parameters.

        Args:
            direction: `shape`.

        Returns:
            Tensor `(B,)`.
        """
        parts = []
        for i, j in self.blocks():
            gradients = self.dense(i, j).reshape(j - i, direction.numel())
            parts.append((gradients @ direction.to(gradients).flatten().conj()).real)
        return torch.cat(parts)

    def pairs(self, other: Factor) -> Tensor:
        r"""$\langle G_b, H_c \rangle$ for all pairs of examples of two batches; the parameter is the same.

        Returns:
            Tensor `(B, C)`, for C examples of `other`.
        """
        from perex.factors.products import all_pairs

        if type(other).pairs is not Factor.pairs:  # it knows how to go into itself
            return other.pairs(self).mT
        form = all_pairs(type(self), type(other))
        return self.blockwise_pairs(other) if form is None else form(self, other)

    def blockwise_pairs(self, other: Factor) -> Tensor:
        """`pairs`, both sides multiplied out a few examples at a time."""
        rows = []
        for i, j in self.blocks():
            own = self.dense(i, j).reshape(j - i, math.prod(self.shape))
            blocks = (other.dense(k, m).reshape(m - k, math.prod(self.shape)) for k, m in other.blocks())
            rows.append(torch.cat([(own @ block.mH).real for block in blocks], 1))
        return torch.cat(rows)

    def project(self, rows: Tensor, columns: Tensor) -> Tensor:
        r"""$a_k^\top G_b b_k$ for several pairs of vectors, $G_b$ taken as a matrix of its first dimension by the rest.

        Args:
            rows: $a_k$ as columns, `(m, K)`, with m the parameter's first dimension.
            columns: $b_k$ as columns, `(n, K)`, with n the product of its other dimensions; twice that for complex
                parameters, of which real and imaginary parts are two columns.

        Returns:
            Tensor `(B, K)`.
        """
        parts = []
        for i, j in self.blocks():
            gradients = self.dense(i, j)
            gradients = torch.view_as_real(gradients) if gradients.is_complex() else gradients
            matrices = gradients.reshape(j - i, len(rows), len(columns))
            parts.append(((matrices @ columns.to(matrices)) * rows.to(matrices)).sum(1))
        return torch.cat(parts)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of examples whose multiplied-out gradients fit in one block."""
        return example_blocks(self.batch, math.prod(self.shape))


def double(tensor: Tensor) -> Tensor:
    """A tensor in float64, or the complex numbers of it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64))
