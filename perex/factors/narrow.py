"""Gradients made of tensors in half precision."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from perex.factors.base import Factor
from perex.factors.dense import Dense
from perex.factors.terms import Terms
from perex.kernels.plan import Plan
from perex.kernels.products import HALVES, widen


@dataclass(eq=False)
class Narrow(Factor):
    r"""The gradients of `factor`, whose tensors are as the backward left them: half as many bytes to be read.

    Norms take them so, and multiply exactly and add up in float32. All else is asked of the same factor in float32.

    Attributes:
        factor: of tensors in half precision.
    """

    factor: Any

    @property
    def batch(self) -> int:  # type: ignore[override]
        """Number of examples."""
        return int(self.factor.batch)

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The parameter's shape."""
        return torch.Size(self.factor.shape)

    def wide(self) -> Factor:
        """The same in float32."""
        fields = vars(self.factor).items()
        wide: Factor = replace(
            self.factor, **{name: widen(value) for name, value in fields if isinstance(value, Tensor)}
        )
        return wide

    def dense(self, start: int, stop: int) -> Tensor:
        """See `Factor.dense`."""
        return self.wide().dense(start, stop)

    def squared_norm(self) -> Tensor:
        """See `Factor.squared_norm`."""
        return self.factor.squared_norm()

    def terms(self) -> Terms:
        """See `Factor.terms`."""
        found: Terms = self.factor.terms()
        return found

    def plan(self) -> Plan | None:
        """See `Factor.plan`."""
        return self.factor.plan()

    def dense_flops(self) -> int:
        """See `Factor.dense_flops`."""
        return self.factor.dense_flops()

    def merge(self, other: Factor) -> Factor | None:
        """As in float32 if only one of them is narrow."""
        return self.joined(other, "merge")

    def beside(self, other: Factor) -> Factor | None:
        """See `Factor.beside`."""
        return self.joined(other, "beside")

    def joined(self, other: Factor, how: str) -> Factor | None:
        """One factor for both, made of what is under them."""
        if not isinstance(other, Narrow):  # of another kind, there is nothing to be widened for
            return getattr(self.wide(), how)(other) if type(other) is type(self.factor) else None
        found = getattr(self.factor, how)(other.factor)
        return None if found is None else narrow(found)

    def take(self, examples: Tensor) -> Factor:
        """See `Factor.take`."""
        return Narrow(self.factor.take(examples))

    def dot(self, other: Factor) -> Tensor:
        """See `Factor.dot`."""
        from perex.factors.products import NARROW, closed_form

        under = other.factor if isinstance(other, Narrow) else other
        form = closed_form(type(self.factor), type(under), NARROW)
        if form is not None and under.shape == self.shape:
            return form(self.factor, under)
        return self.wide().dot(other.wide() if isinstance(other, Narrow) else other)

    def dot_plan(self, other: Factor) -> Plan:
        """See `Factor.dot_plan`."""
        return self.factor.dot_plan(other.factor if isinstance(other, Narrow) else other)

    def condensed(self) -> Factor:
        """See `Factor.condensed`."""
        held = sum(value.numel() for value in vars(self.factor).values() if isinstance(value, Tensor))
        if self.batch * math.prod(self.shape) > held:
            return self
        return Dense(self.dense(0, self.batch), self.dense_flops())

    def sizes(self) -> Tensor | None:
        """See `Factor.sizes`."""
        found: Tensor | None = self.factor.sizes()
        return found

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See `Factor.weighted_sum`."""
        return self.wide().weighted_sum(weights)

    def along(self, direction: Tensor) -> Tensor:
        """See `Factor.along`."""
        return self.wide().along(direction)

    def pairs(self, other: Factor) -> Tensor:
        """See `Factor.pairs`."""
        return self.wide().pairs(other.wide() if isinstance(other, Narrow) else other)

    def project(self, rows: Tensor, columns: Tensor) -> Tensor:
        """See `Factor.project`."""
        return self.wide().project(rows, columns)


def narrow(factor: Factor) -> Factor:
    """The factor, marked if any of its tensors is in half precision."""
    tensors = [value for value in vars(factor).values() if isinstance(value, Tensor)]
    return Narrow(factor) if any(tensor.dtype in HALVES for tensor in tensors) else factor
