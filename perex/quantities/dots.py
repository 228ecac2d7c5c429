"""Inner products of each example's gradient with a given one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perex.errors import ArgumentError, AttachError, NotReadyError
from perex.factors import Total
from perex.quantities.base import By, Quantity, added_up, grouped

if TYPE_CHECKING:
    from perex.tracker import Tracker


class Dots(Quantity):
    r"""$\langle g_b, V \rangle$: how a step along $V$ changes the loss of each example, to first order.

    $g_b$ is the gradient of example b's own loss, and $V$ one of the same parameters: a validation set's, an
    optimizer's momentum, or the batch's own. Nothing of the size of the batch times the parameters is made.

    Args:
        direction: $V$: tensors by parameter name, or one for each of `model.parameters()`, in order; None stands for
            zeros. They are read where they are in each backward, so a momentum buffer may go on changing. `"grad"` is
            the gradient of the very loss that is run backward, the one that `.grad` gets. Parameters' own `.grad`
            tensors, which a backward may change, are copied by `attach`.

    Raises:
        AttachError: from `attach`, if a tracked parameter has no direction, or one of another shape.

    Example:
        >>> import torch, perex
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> dots = perex.Dots({"weight": torch.tensor([[1.0, -1.0]])})
        >>> with perex.attach(model, dots) as px:
        ...     px.backward(model(torch.tensor([[3.0, 1.0], [2.0, 2.0]])).squeeze(1))
        >>> px.read(dots)
        tensor([2., 0.])
        >>> dots.cosines(px)
        tensor([0.4472, 0.0000])

    References:
        Pruthi et al., "Estimating Training Data Influence by Tracing Gradient Descent", 2020 (TracIn): with the
        gradients of test examples as directions.
    """

    degree = 1

    def __init__(self, direction: Mapping[str, Tensor | None] | Iterable[Tensor | None] | str) -> None:
        if isinstance(direction, str) and direction != "grad":
            raise ArgumentError(f"direction={direction!r}: it is tensors, by parameter name or in order, or 'grad'")
        self.own = isinstance(direction, str)
        self.copies: dict[str, Tensor] = {}
        self.lengths: dict[str, Tensor] = {}  # squared, as in the last backward
        self.given: Any = direction if isinstance(direction, (str, Mapping)) else list(direction)

    def attached(self, model: nn.Module, tracked: Mapping[str, nn.Parameter]) -> None:
        """See `Quantity.attached`."""
        super().attached(model, tracked)
        if isinstance(self.given, list):
            names = [name for name, _ in model.named_parameters()]
            if len(names) != len(self.given):
                raise AttachError(f"Dots: {len(self.given)} directions for a model of {len(names)} parameters")
            self.given = dict(zip(names, self.given, strict=True))
        self.copies, self.lengths = {}, {}
        for name, parameter in {} if self.own else tracked.items():
            tensor = self.direction(name)
            if tensor is not None and (tensor is parameter.grad or tensor.layout != torch.strided):
                tensor = self.copies[name] = tensor.detach().to_dense().clone()
            if tensor is not None and tensor.shape != parameter.shape:
                shapes = f"{tuple(tensor.shape)}, and the parameter has {tuple(parameter.shape)}"
                raise AttachError(f"Dots: the direction of parameter '{name}' has shape {shapes}")

    def direction(self, name: str) -> Tensor | None:
        """The given direction of a parameter."""
        if name not in self.given:
            raise AttachError(f"Dots: there is no direction for parameter '{name}'; None would stand for zeros")
        tensor: Tensor | None = self.copies.get(name, self.given[name])
        return tensor

    def length(self, name: str) -> Tensor:
        """The squared length of the direction that a parameter's gradients were compared with."""
        if name in self.lengths:
            return self.lengths[name]
        direction = self.direction(name)  # the last backward did not come by that parameter
        return torch.zeros((), device="cpu") if direction is None else squared_length(direction.detach())

    def reduce(self, name: str, gradient: Total) -> Tensor:
        """See `Quantity.reduce`."""
        if self.own:
            return gradient.along(gradient.weighted_sum(torch.ones(gradient.batch, device="cpu")))
        direction = self.direction(name)
        if direction is None:
            return gradient.squared_norm().zero_()
        self.lengths[name] = squared_length(direction.detach())
        return gradient.along(direction.detach())

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """See `Quantity.joined`: the gradient of all forwards together was never met."""
        if self.own:
            raise NotReadyError(
                "Dots('grad'): several forwards of further examples came before one backward, and each was compared "
                "with its own part of the gradient only: run one backward for each"
            )
        return super().joined(parts)

    def columns(self, px: Tracker) -> dict[str, Tensor]:
        """See `Quantity.columns`: the inner products, and the cosines beside them."""
        cosines = self.cosines(px)
        assert isinstance(cosines, Tensor)
        return {"": px.read(self), "cosine": cosines}

    def cosines(self, px: Tracker, by: By | None = None) -> Tensor | dict[str, Tensor]:
        r"""$\langle g_b, V \rangle / (\|g_b\| \|V\|)$ of the last backward, over the tracked parameters.

        Args:
            px: the tracker that this quantity was given to.
            by: None for all tracked parameters together, `"parameter"` or `"module"` for each.

        Returns:
            Tensor `(B,)`, or a dict of them; 0 where either gradient is zero.
        """
        dots, norms = px.read(self, by="parameter"), px.norms(by="parameter")
        assert isinstance(norms, dict)
        if self.own:  # as <g_b, V> adds up to scale * ||V||^2
            lengths = {name: value.sum() / px.scale for name, value in dots.items()}
        else:
            lengths = {name: self.length(name) for name in dots}
        triples = {name: (dots[name], norms[name].square(), lengths[name]) for name in dots}
        found: Tensor | dict[str, Tensor] = grouped(triples, by, cosine)
        return found


def cosine(parts: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """From the inner products and both squared lengths, of each of some parameters."""
    dots, squares, lengths = (added_up(column) for column in zip(*parts.values(), strict=True))
    size = squares.sqrt() * lengths.to(squares).sqrt()
    return torch.where(size == 0, torch.zeros_like(size), dots / size)


def squared_length(direction: Tensor) -> Tensor:
    """Of a direction, at least in float32: halves' squares overflow, and integers'."""
    wide = direction.abs()  # of complex numbers too
    return wide.to(torch.promote_types(wide.dtype, torch.float32)).square().sum()
