"""What `.grad` held before a backward: sums of its gradients are added to that, as a backward's are."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import Tensor, nn


class Accumulated:
    """What `.grad` of parameters was, by name, unless the user has cleared it since.

    Attributes:
        grads: copies of it; None where there was no gradient.
        seen: the gradient that was there when perex looked last, its version, and whether it was other than zero: what
            has become zero since was cleared, and what was zero then came out as that.
    """

    def __init__(self) -> None:
        self.grads: dict[str, Tensor | None] = {}
        self.seen: dict[str, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def remember(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Copy the gradients of those of which nothing is known yet."""
        for name, parameter in parameters.items():
            if name not in self.grads:
                self.grads[name] = None if parameter.grad is None else parameter.grad.clone()

    def look(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take notice of gradients as perex or a backward that it knows of has left them."""
        for name, parameter in parameters.items():
            if self.grads.get(name) is not None and (grad := parameter.grad) is not None:
                self.seen[name] = weakref.ref(grad), grad._version, other_than_zero(grad)

    def before(self, name: str, parameter: nn.Parameter) -> Tensor | None:
        """What a sum is to be added to."""
        if self.grads[name] is not None and self.cleared(name, parameter.grad):
            self.grads[name] = None
        return self.grads[name]

    def cleared(self, name: str, grad: Tensor | None) -> bool:
        """Whether the user has called `zero_grad`, which leaves no gradient, or one of zeros."""
        if grad is None:
            return True
        if bool(other_than_zero(grad)):
            return False
        known = self.seen.get(name)
        unchanged = known is not None and known[0]() is grad and known[1] == grad._version
        return known is None or not unchanged or bool(known[2])  # `grad.data.zero_()` changes no version


def other_than_zero(grad: Tensor) -> Tensor:
    """Whether any number of a gradient is not zero, on its device."""
    return (grad.detach().coalesce().values() if grad.is_sparse else grad.detach()).any()
