"""The per-example gradients themselves."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from perex.errors import AttachError
from perex.factors import Total
from perex.quantities.base import Quantity

if TYPE_CHECKING:
    from perex.tracker import Tracker


class Grads(Quantity):
    r"""$g_b$ itself, multiplied out: as much memory as the batch size times the chosen parameters.

    Args:
        params: names or globs of the parameters to keep, such as `["head.*"]`; None for all that are tracked.

    Raises:
        AttachError: from `attach`, if a name or glob matches no tracked parameter.

    Example:
        >>> import torch, perex
        >>> model, grads = torch.nn.Linear(2, 1), perex.Grads("bias")
        >>> with perex.attach(model, grads) as px:
        ...     px.backward(3 * model(torch.ones(4, 2)).squeeze(1))
        >>> {name: gradient.shape for name, gradient in px.read(grads).items()}
        {'bias': torch.Size([4, 1])}
    """

    degree = 1

    def __init__(self, params: str | Iterable[str] | None = None) -> None:
        self.patterns = None if params is None else [params] if isinstance(params, str) else list(params)

    def attached(self, model: nn.Module, tracked: Mapping[str, nn.Parameter]) -> None:
        """See `Quantity.attached`."""
        super().attached(model, tracked)
        for pattern in self.patterns or ():
            if not any(fnmatch.fnmatchcase(name, pattern) for name in tracked):
                raise AttachError(f"Grads: {pattern!r} matches no tracked parameter of the model")

    def reduce(self, name: str, gradient: Total) -> Tensor | None:
        """See `Quantity.reduce`: `(B, *shape)`."""
        wanted = self.patterns is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)
        return gradient.dense(0, gradient.batch) if wanted else None

    def combined(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """They are of different shapes, so a dict of them."""
        return dict(values)

    def columns(self, px: Tracker) -> dict[str, Tensor]:
        """See `Quantity.columns`: one for each parameter."""
        found: dict[str, Tensor] = px.read(self)
        return found
