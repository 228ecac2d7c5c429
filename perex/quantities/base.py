"""What a statistic has to say about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from perex.factors import Total


class Quantity(ABC):
    """A statistic that is a sum over parameters of one value an example.

    A new statistic is a subclass with `reduce`; it then works for every layer.
    """

    @abstractmethod
    def reduce(self, name: str, gradient: Total) -> Tensor:
        """One parameter's share.

        Args:
            name: the parameter's name.
            gradient: its per-example gradients, over all of its uses.

        Returns:
            Tensor `(B,)`, of the gradients of the loss that was run backward.
        """
