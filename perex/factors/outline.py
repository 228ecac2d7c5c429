"""What is left of a factor when its numbers are gone: enough to say how its norm is computed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from perex.factors.base import Factor
from perex.factors.dense import Dense
from perex.factors.few import Few
from perex.factors.narrow import Narrow
from perex.factors.outer import Outer
from perex.factors.part import Part
from perex.factors.patches import Patches
from perex.factors.piecewise import Mapped
from perex.factors.pulled import Derived, Pulled
from perex.factors.rows import Rows
from perex.kernels.spot import Spot

KINDS: tuple[Any, ...] = (Dense, Few, Mapped, Narrow, Outer, Part, Patches, Pulled, Rows)


class Spec(NamedTuple):
    """A tensor without its numbers."""

    shape: torch.Size
    dtype: torch.dtype
    device: str


class Outline(NamedTuple):
    """A factor without its numbers.

    Attributes:
        kind: its class.
        fields: its attributes, tensors and factors among them outlined; empty for a kind of somebody else's.
    """

    kind: type[Factor]
    fields: dict[str, Any]

    def factor(self) -> Factor | None:
        """A factor of tensors that have shapes only, to be asked for its plan; None for an unknown kind."""
        fields: dict[str, Any] = {}
        for name, value in self.fields.items():
            if isinstance(value, Spec):
                value = torch.empty(value.shape, dtype=value.dtype, device="meta")
            elif isinstance(value, Outline):
                value = value.factor()
                if value is None:
                    return None
            fields[name] = value
        return next((kind(**fields) for kind in KINDS if kind is self.kind), None)

    def spot(self) -> Spot | None:
        """Where its floating-point tensors were, for plans; None if there were none."""
        for value in self.fields.values():
            if isinstance(value, Spec) and value.dtype.is_floating_point:
                return Spot(value.device, value.dtype)
            if isinstance(value, Outline):
                return value.spot()
        return None


def outline(factor: Factor) -> Outline:
    """Forget a factor's numbers; called in every backward, so it does next to nothing.

    Example:
        >>> outline(Dense(torch.zeros(5, 3))).factor().plan().flops
        30
    """
    kind: Any = type(factor)
    if kind not in KINDS:
        return Outline(kind, {})
    fields: dict[str, Any] = {}
    for name in kind.__dataclass_fields__:  # not what its norm has left, or was asked to leave
        value = getattr(factor, name)
        if isinstance(value, Tensor):
            value = Spec(value.shape, value.dtype, value.device.type)
        elif isinstance(value, Factor):
            value = outline(value)
        elif isinstance(value, Derived) or callable(value):
            value = None
        fields[name] = value
    return Outline(kind, fields)
