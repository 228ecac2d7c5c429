"""Inner products of all pairs of examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from perex.errors import ArgumentError, NotReadyError
from perex.factors import Total
from perex.quantities.base import Quantity

if TYPE_CHECKING:
    from perex.tracker import Tracker


class Gram(Quantity):
    r"""$K_{bc} = \langle g_b, g_c \rangle$ for all pairs of examples in the batch: the empirical tangent kernel.

    Pairs of two batches: `px.gradients().gram(others)`, with `others` the `px.gradients()` of an earlier backward.

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

    def reduce(self, name: str, gradient: Total) -> Tensor:
        """See `Quantity.reduce`: `(B, B)`."""
        return gradient.pairs(gradient)

    def columns(self, px: Tracker) -> dict[str, Tensor]:
        """Pairs of examples of two batches of a pool are not met."""
        raise ArgumentError(
            "Gram: a pool goes by in batches, and pairs of examples of two of them are not met. Score the pool with "
            "perex.Projections: their inner products estimate all of it"
        )

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Pairs of examples of two forwards were never met."""
        raise NotReadyError(
            "Gram: several forwards of further examples came before one backward, and pairs of examples of two of them "
            "are not known: run one backward for each, and use px.gradients().gram(others)"
        )
