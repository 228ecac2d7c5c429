"""Gradients that touch a few rows of a table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perex.factors.base import Factor
from perex.kernels import segments
from perex.kernels.outer import lengths
from perex.kernels.plan import Plan


@dataclass(eq=False)
class Rows(Factor):
    r"""$G_b = \sum_t e_{id_{bt}} g_{bt}^\top$, with $e_v$ the unit vector of row $v$: embeddings.

    Attributes:
        ids: `(B, T)` integers; a position that must not count has a zero gradient.
        grads: `(B, T, d)`.
        shape: the table's shape, `(V, d)`.
    """

    ids: Tensor
    grads: Tensor
    shape: torch.Size

    @property
    def batch(self) -> int:  # type: ignore[override]
        """Number of examples."""
        return self.ids.shape[0]

    def dense(self, start: int, stop: int) -> Tensor:
        """See `Factor.dense`."""
        ids, grads = self.ids[start:stop].long(), self.grads[start:stop]
        table = grads.new_zeros(stop - start, *self.shape)
        return table.scatter_add_(1, ids.unsqueeze(2).expand_as(grads), grads)

    def squared_norm(self) -> Tensor:
        """See `Factor.squared_norm`."""
        return segments.squared_norm(self.ids, self.grads, self.shape[0])

    def plan(self) -> Plan:
        """See `Factor.plan`."""
        return segments.plan(self.grads.shape)

    def dense_flops(self) -> int:
        """See `Factor.dense_flops`."""
        return self.grads.numel()

    def merge(self, other: Factor) -> Factor | None:
        """Uses of one table are further positions."""
        if not isinstance(other, Rows):
            return None
        ids, grads = torch.cat((self.ids, other.ids), 1), torch.cat((self.grads, other.grads), 1)
        return Rows(ids, grads, self.shape)

    def take(self, examples: Tensor) -> Factor:
        """See `Factor.take`."""
        examples = examples.to(self.ids.device)
        return Rows(self.ids[examples], self.grads[examples], self.shape)

    def beside(self, other: Factor) -> Factor | None:
        """See `Factor.beside`: of as many positions."""
        if not isinstance(other, Rows) or self.ids.shape[1] != other.ids.shape[1]:
            return None
        return Rows(torch.cat((self.ids, other.ids)), torch.cat((self.grads, other.grads)), self.shape)

    def sizes(self) -> Tensor | None:
        r"""See `Factor.sizes`: $\sum_t \|g_t\| \le \sqrt T \|g\|$."""
        return lengths(self.grads, (1, 2)) * self.grads.shape[1] ** 0.5

    def weighted_sum(self, weights: Tensor) -> Tensor:
        r"""$\sum_{bt} w_b e_{id_{bt}} g_{bt}^\top$, added up row by row."""
        grads = self.grads * weights.to(self.grads)[:, None, None]
        return grads.new_zeros(self.shape).index_add_(0, self.ids.flatten().long(), grads.flatten(0, 1))

    def along(self, direction: Tensor) -> Tensor:
        r"""$\sum_t g_t \cdot V[id_t]$."""
        return (direction.to(self.grads)[self.ids.long()] * self.grads).sum((1, 2))

    def project(self, rows: Tensor, columns: Tensor) -> Tensor:
        r"""$\sum_t a_k[id_t] (b_k \cdot g_t)$."""
        return (rows.to(self.ids.device)[self.ids.long()].to(self.grads) * (self.grads @ columns.to(self.grads))).sum(1)
