"""What a statistic has to say about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from perex.errors import ArgumentError, AttachError
from perex.factors import Total
from perex.factors.terms import Terms, added

if TYPE_CHECKING:
    from perex.tracker import Tracker

By = Literal["parameter", "module"]
T = TypeVar("T")


class Quantity(ABC):
    """A statistic of per-example gradients: a tensor for each parameter, added up over parameters.

    A new statistic is a subclass with `degree` and `reduce`; it then works for every layer.

    Attributes:
        degree: how it grows with the gradients: 1 for what is linear in each example's gradient, 2 for squares and
            products of two. Gradients are of the mean of losses that was run backward, or of a scaled one; by `degree`,
            values are made those of each example's own loss. 0 leaves them as they are.
        keeps: whether `columns` reads `px.gradients()`, so that `perex.score` has to keep these.
    """

    degree: int
    keeps: bool = False

    @abstractmethod
    def reduce(self, name: str, gradient: Total) -> Tensor | None:
        """One parameter's share, called once for each parameter, when the last of its uses is in.

        Args:
            name: the parameter's name.
            gradient: its per-example gradients, over all of its uses.

        Returns:
            Tensor `(B, ...)`, a row for each example; None if this parameter has no part in it.
        """

    def attached(self, model: nn.Module, tracked: Mapping[str, nn.Parameter]) -> None:
        """Called by `attach`, with the tracked parameters by name: the place to check arguments.

        Raises:
            AttachError: an argument does not go with this model.
        """
        if not isinstance(getattr(self, "degree", None), int):
            raise AttachError(f"{type(self).__name__}: a quantity says its `degree`: 1, 2 or 0; see perex.Quantity")

    def columns(self, px: Tracker) -> dict[str, Tensor]:
        """What `perex.score` keeps of it for each example of a batch.

        Args:
            px: the tracker that this quantity was given to, after a backward.

        Returns:
            Tensors `(B, ...)`; the key is what follows the quantity's name in the name of the column, if anything.
        """
        return {"": px.read(self)}

    def pooled(self, batches: Sequence[Tensor], order: Tensor) -> Tensor:
        """What `perex.score` makes of one column, when the pool has gone by.

        Args:
            batches: what `columns` said of each batch.
            order: the place of each example of the data among those of the batches, `(N,)`.

        Returns:
            Tensor `(N, ...)`, in the order of the data.
        """
        return torch.cat(list(batches))[order]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Values of further examples, from several forwards before one backward, as those of one batch."""
        return torch.cat(list(parts))

    def combined(self, values: Mapping[str, Tensor]) -> Any:
        """Values of several parameters as one: their sum."""
        return added_up(values.values())


def finished(value: Any) -> Any:
    """A value of one parameter, added up if it was yet to be."""
    return value.total() if isinstance(value, Terms) else value


def added_up(values: Iterable[Tensor | Terms]) -> Tensor:
    """The sum of tensors, on the first one's device."""
    parts = list(values)
    terms = [value for value in parts if isinstance(value, Terms)]
    if terms and len(terms) == len(parts):
        return added(terms)
    total, *others = map(finished, parts)
    if others and len({(value.dtype, value.device) for value in (total, *others)}) == 1:
        return torch.stack([total, *others]).sum(0)
    for value in others:
        total = total + value.to(total.device)
    return total


def grouped(values: Mapping[str, T], by: By | None, combined: Callable[[Mapping[str, T]], Any]) -> Any:
    """Values by parameter as those of all together, of each parameter, or of each module's own parameters.

    Raises:
        ArgumentError: `by` is none of these.
    """
    if by is None:
        return combined(values)
    if by == "parameter":
        return {name: combined({name: value}) for name, value in values.items()}
    if by != "module":
        raise ArgumentError(f"by={by!r}: it is None, 'parameter' or 'module'")
    modules: dict[str, dict[str, T]] = {}
    for name, value in values.items():
        modules.setdefault(name.rpartition(".")[0], {})[name] = value
    return {path: combined(own) for path, own in modules.items()}
