"""Inner products of all pairs of examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from perex.errors import NotReadyError
from perex.factors import Total
from perex.quantities.base import Quantity

if TYPE_CHECKING:
    from perex.gradients import Gradients
    from perex.tracker import Tracker


class Gram(Quantity):
    r"""$K_{bc} = \langle g_b, g_c \rangle$ for all pairs of examples in the batch: the empirical tangent kernel.

    Pairs of two batches: `px.gradients().gram(others)`, with `others` the `px.gradients()` of an earlier backward. In
    `perex.score` it is `(N, N)`, of the whole pool, and the layers' inputs and output gradients of all of it are held
    until then: for pools that are too large for this, `perex.Projections` estimates it.

    Example:
        >>> import torch, perex
        >>> model, gram = torch.nn.Linear(2, 1, bias=False), perex.Gram()
        >>> with perex.attach(model, gram) as px:
        ...     px.backward(model(torch.tensor([[3.0, 1.0], [1.0, -3.0]])).squeeze(1))
        >>> px.read(gram)
        tensor([[10.,  0.],
                [ 0., 10.]])
    """

    degree = 2
    keeps = True

    def reduce(self, name: str, gradient: Total) -> Tensor:
        """See `Quantity.reduce`: `(B, B)`."""
        return gradient.pairs(gradient)

    def attached(self, model: nn.Module, tracked: Mapping[str, nn.Parameter]) -> None:
        """See `Quantity.attached`: a new pool begins."""
        super().attached(model, tracked)
        self._pool: list[Gradients] = []

    def columns(self, px: Tracker) -> dict[str, Tensor]:
        """See `Quantity.columns`: products with all examples of a pool so far, `(B, n)`."""
        gradients = px.gradients()
        blocks = [gradients.gram(earlier) for earlier in self._pool]
        self._pool.append(gradients)
        return {"": torch.cat([*blocks, px.read(self)], 1)}

    def pooled(self, batches: Sequence[Tensor], order: Tensor) -> Tensor:
        """See `Quantity.pooled`: all pairs, `(N, N)`."""
        self._pool.clear()
        count = len(order)
        whole = torch.cat([nn.functional.pad(rows, (0, count - rows.shape[1])) for rows in batches])
        first = 0
        for rows in batches:  # what is above the blocks on the diagonal, by symmetry
            last = first + len(rows)
            whole[:first, first:last] = whole[first:last, :first].T
            first = last
        return whole[order][:, order]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Pairs of examples of two forwards were never met."""
        raise NotReadyError(
            "Gram: several forwards of further examples came before one backward, and pairs of examples of two of them "
            "are not known: run one backward for each, and use px.gradients().gram(others)"
        )
