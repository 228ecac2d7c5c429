"""Gradients that touch a few rows of a table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perex.factors.base import Factor
from perex.kernels import segments


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

    def merge(self, other: Factor) -> Factor | None:
        """Uses of one table are further positions."""
        if not isinstance(other, Rows):
            return None
        ids, grads = torch.cat((self.ids, other.ids), 1), torch.cat((self.grads, other.grads), 1)
        return Rows(ids, grads, self.shape)
