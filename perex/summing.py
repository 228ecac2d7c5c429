r"""Weighted sums over examples, $\sum_b w_b G_b$, some of whom are treated otherwise than the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perex.factors import Factor

ALL = -1
"""In place of an example's number: all that are taken apart."""

SLACK = 1e-4
"""By what part of a clip bound the rounding of one example's terms may move a sum."""


@dataclass(frozen=True)
class Treatment:
    """Who is treated otherwise.

    Attributes:
        skip: booleans `(B,)`, of examples that have no part in the sum, whatever their gradients are: zero times
            what is no number is not zero.
        apart: likewise, of those whose gradient is multiplied out by itself, and added when that is done.
        limits: by parameter, the length that no example's share in the sum exceeds. One product for all examples adds
            up their terms one by one, and rounds each to the size of what is there already: terms that cancel, being
            long where their sum is short, would leave their rounding in everybody's sum. Examples of which more than
            `SLACK` of the limit could be left so are taken apart. None not to care.
    """

    skip: Tensor | None = None
    apart: Tensor | None = None
    limits: Mapping[str, Any] | None = None

    def of(self, examples: slice) -> Treatment:
        """That of some of the examples."""
        skip, apart = (None if who is None else who[examples] for who in (self.skip, self.apart))
        return Treatment(skip, apart, self.limits)


ALIKE = Treatment()
"""Nobody is."""


@dataclass
class Doubts:
    """Factors whose terms may be too long, looked at together, so that a device is asked once.

    Attributes:
        found: for each factor that was asked about, who is in doubt.
    """

    found: list[Tensor | None] = field(default_factory=list)

    def add(self, factor: Factor, weights: Tensor, limit: Any, several: bool = False) -> None:
        """Look at one more; it may be one of several that make up a gradient, and cancel each other."""
        sizes = None if limit is None else factor.sizes()
        if sizes is None and several and limit is not None:
            sizes = factor.squared_norm().sqrt()
        if sizes is None:
            self.found.append(None)
            return
        eps = torch.finfo(sizes.dtype).eps
        limit = limit.to(sizes.device) if isinstance(limit, Tensor) else limit
        few = eps * weights.to(sizes).abs() * sizes <= SLACK * limit
        self.found.append(~few)  # and where there is no number to compare

    def settled(self) -> list[Tensor | None]:
        """Who is in doubt, by factor; None if nobody is."""
        asked = [doubts for doubts in self.found if doubts is not None]
        some = torch.stack([doubts.any().to(asked[0].device) for doubts in asked]).tolist() if asked else []
        answers = iter(some)
        return [doubts if doubts is not None and next(answers) else None for doubts in self.found]


def sum_of(
    factor: Factor,
    weights: Tensor,
    treatment: Treatment = ALIKE,
    doubts: Tensor | None = None,
    several: bool = False,
    first: int = 0,
) -> Sum:
    r"""$\sum_b w_b G_b$.

    Args:
        factor: the gradients.
        weights: `(B,)`.
        treatment: of these examples.
        doubts: booleans `(B,)`, of further examples to be taken apart.
        several: whether there are further uses of the parameter, which may cancel this one.
        first: the number of the first example.
    """
    skip, apart = treatment.skip, together(treatment.apart, doubts)
    if skip is None and apart is None:
        return Sum(factor.weighted_sum(weights), {})
    if apart is not None and skip is not None:
        apart = apart & ~skip.to(apart.device)
    out = together(skip, apart)
    assert out is not None
    others = (~out).nonzero().flatten()
    total = torch.zeros(factor.shape, dtype=weights.dtype, device=weights.device)
    if others.numel():
        total = factor.take(others).weighted_sum(weights[others.to(weights.device)])
    numbers = [] if apart is None else apart.nonzero().flatten().tolist()
    aside: dict[int, Tensor] = {}
    for b in numbers:
        key, share = first + b if several else ALL, factor.precise(b) * weights[b].double()
        aside[key] = aside[key] + share if key in aside else share
    return Sum(total, aside)


class Sum(NamedTuple):
    """A sum in the making.

    Attributes:
        total: of most examples.
        aside: of the others, in float64, added when all uses of the parameter are in. Where there are several, each
            example's share by its number, since they may cancel each other; else all of them together, under `ALL`.
    """

    total: Tensor
    aside: dict[int, Tensor]

    def plus(self, other: Sum) -> Sum:
        """Both."""
        aside = dict(self.aside)
        for key, share in other.aside.items():
            aside[key] = aside[key] + share if key in aside else share
        return Sum(self.total + other.total, aside)

    def whole(self) -> Tensor:
        """All of it."""
        total = self.total
        for share in self.aside.values():
            total = total + share.to(total)
        return total


def together(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Who is in either."""
    if one is None or other is None:
        return other if one is None else one
    return one | other.to(one.device)


def wide(weights: Tensor) -> Tensor:
    """Weights at least in float32: times a batch's size, halves overflow, or lose what they are."""
    return weights.detach().to(torch.promote_types(weights.dtype, torch.float32))


def times(value: Tensor, scale: float | Tensor) -> Tensor:
    """A value times a number, from wherever that is."""
    return value * (scale.to(value) if isinstance(scale, Tensor) else scale)
