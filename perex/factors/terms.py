"""Squared norms that are yet to be added up: all at once, when somebody reads them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from perex.errors import UnsupportedError


class Terms(NamedTuple):
    r"""$\|G_b\|^2$ as a sum, of numbers or of their squares.

    On a GPU a step is made of many small kernels, each of which takes longer to start than to run. What they would add
    up parameter by parameter is added up at the end, by one.

    Attributes:
        values: `(B, P)`, or `(B,)` for one each.
        squared: whether they are squares already.
        version: of `values`; should they be changed before they are read, they are no good.
    """

    values: Tensor
    squared: bool
    version: int

    @classmethod
    def of(cls, values: Tensor, squared: bool = True) -> Terms:
        """Terms, and what they are now."""
        return cls(values, squared, values._version)

    def total(self) -> Tensor:
        """Their sum, `(B,)`."""
        return added([self])


def added(terms: Iterable[Terms]) -> Tensor:
    """The sum of all terms, of one parameter or of several, `(B,)`; on the first one's device."""
    alike: dict[tuple[bool, int, torch.dtype, torch.device], list[Tensor]] = {}
    for values, squared, version in terms:
        if values._version != version:
            raise UnsupportedError(
                "a gradient was changed in place in the backward, after perex had taken it up: by a hook, or by a "
                "custom autograd function. Let it return a new tensor"
            )
        alike.setdefault((squared, values.dim(), values.dtype, values.device), []).append(values)
    total: Tensor | None = None
    for (squared, dims, _, _), parts in alike.items():
        values = torch.stack(parts, 1) if dims == 1 else torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        found = values.sum(1) if squared else torch.linalg.vector_norm(values, dim=1).square()
        total = found if total is None else total + found.to(total.device)
    assert total is not None
    return total
