"""The per-example gradients of one backward, kept as factors: what is left when the backward is over."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perex.capture.sharding import is_shard
from perex.errors import ArgumentError, NotReadyError
from perex.factors import Total
from perex.quantities.base import added_up
from perex.summing import ALIKE, Doubts, Treatment, sum_of, times, wide


class Kept:
    """Gradients of one parameter over all of its uses, and how often the tensors they are made of had been changed."""

    def __init__(self, total: Total) -> None:
        self.total = total
        self.stamps = [(tensor, tensor._version) for tensor in tensors_of(total)]


class Gradients:
    r"""$g_b$, the gradient of each example's own loss, of each tracked parameter; nothing is multiplied out.

    It holds the layers' inputs and output gradients, so it takes about as much memory as the activations of one
    forward, for as long as it is referred to. `Tracker.gradients` gives it.

    Attributes:
        batch_size: number of examples, B.
        names: of the tracked parameters.
        scale: what the gradients of the loss that was run backward are multiplied by to be the $g_b$.
    """

    def __init__(self, groups: Mapping[str, list[Kept]], scale: float | Tensor) -> None:
        self._groups = groups  # by parameter; for each forward of further examples, one
        self.scale = scale
        self.names = tuple(groups)
        self.batch_size = sum(kept.total.batch for kept in next(iter(groups.values()), []))

    def __repr__(self) -> str:
        return f"Gradients(of {self.batch_size} examples, {len(self.names)} parameters)"

    def totals(self, name: str) -> list[Total]:
        """The gradients of a parameter, $G_b = g_b$ / `scale`, a forward at a time.

        Raises:
            ArgumentError: no such parameter is tracked.
            NotReadyError: an input or output gradient of a layer was changed in place since the backward.
        """
        if name not in self._groups:
            raise ArgumentError(f"parameter '{name}' is not among the tracked ones: {', '.join(self.names[:5])}, ...")
        if any(tensor._version != version for kept in self._groups[name] for tensor, version in kept.stamps):
            raise NotReadyError(
                f"the gradients of parameter '{name}' are lost: an input or output gradient of its layer was changed "
                "in place after the backward. Use the gradients before, or change a clone"
            )
        return [kept.total for kept in self._groups[name]]

    def shares_memory(self, name: str, tensor: Tensor) -> bool:
        """Whether a parameter's gradients are made of a tensor, as an only example's may be of its `.grad`."""
        if is_shard(tensor) or tensor.layout != torch.strided:
            return False
        pointer = tensor.untyped_storage().data_ptr()
        return any(t.untyped_storage().data_ptr() == pointer for kept in self._groups[name] for t, _ in kept.stamps)

    def weighted_sum(self, weights: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        r"""$\sum_b w_b g_b$ of each parameter.

        Args:
            weights: `(B,)`, or a dict of them by parameter.

        Returns:
            A tensor of the parameter's shape for each, by name.
        """
        return dict(self.weighted_sums(weights))

    def weighted_sums(
        self, weights: Tensor | Mapping[str, Tensor], treatment: Treatment = ALIKE
    ) -> Iterator[tuple[str, Tensor]]:
        """`weighted_sum`, one parameter after the other, with some examples treated otherwise."""
        parts: list[tuple[str, Total, Tensor, Treatment]] = []
        doubts, limits = Doubts(), treatment.limits or {}
        for name in self.names:
            own = weights if isinstance(weights, Tensor) else weights[name]
            totals = self.totals(name)
            if own.shape != (self.batch_size,):
                raise ArgumentError(f"weights: of shape {tuple(own.shape)} for {self.batch_size} examples")
            own = times(wide(own), self.scale)
            first = 0
            for total in totals:
                rows = slice(first, first := first + total.batch)
                parts.append((name, total, own[rows], treatment.of(rows)))
                doubts.add(total, own[rows], limits.get(name))
        found = zip(parts, doubts.settled(), strict=True)
        for name, group in itertools.groupby(found, key=lambda one: one[0][0]):
            yield name, added_up(sum_of(total, own, how, doubt).whole() for (_, total, own, how), doubt in group)

    def squares_of(self, examples: Iterable[int]) -> dict[str, Tensor]:
        """Squared norms of some examples' gradients by parameter, multiplied out and in float64, `(n,)` each."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for name in self.names:
            totals = self.totals(name)
            for b in examples:
                place = iter(totals)
                total = next(place)
                while b >= total.batch:
                    b, total = b - total.batch, next(place)
                found[name].append(square_of(total.precise(b), self.scale))
        return {name: torch.stack(each) for name, each in found.items()}

    def materialized(self) -> Iterator[tuple[str, Tensor]]:
        """$g_b$ of each parameter, `(B, *shape)`, one parameter after the other."""
        for name in self.names:
            dense = torch.cat([total.dense(0, total.batch) for total in self.totals(name)])
            yield name, dense * (self.scale.to(dense) if isinstance(self.scale, Tensor) else self.scale)

    def gram(self, other: Gradients | None = None) -> Tensor:
        r"""$\langle g_b, h_c \rangle$ for all pairs of examples, of this and another backward of the same model.

        Args:
            other: gradients $h_c$ of the same parameters; None for these themselves.

        Returns:
            Tensor `(B, C)`, for C examples of `other`.
        """
        other = self if other is None else other
        if set(self.names) != set(other.names):
            odd = sorted(set(self.names) ^ set(other.names))
            raise ArgumentError(f"gram: the other gradients are of other parameters, such as '{odd[0]}'")
        found = added_up(
            torch.cat([torch.cat([one.pairs(two) for two in other.totals(name)], 1) for one in self.totals(name)])
            for name in self.names
        )
        return found * self.scale * other.scale


def square_of(gradient: Tensor, scale: float | Tensor) -> Tensor:
    """The squared norm of a gradient times `scale`, in float64."""
    return (gradient.to(torch.promote_types(gradient.dtype, torch.float64)) * scale).abs().square().sum()


def put(parameter: nn.Parameter, total: Tensor, before: Tensor | None, anew: bool) -> None:
    """Make a parameter's `.grad` a weighted sum, plus what it was before.

    Args:
        parameter: the parameter.
        total: the sum, of this process's examples; of a sharded parameter, all processes' are added up.
        before: what `.grad` held before the backward.
        anew: whether a tensor that is there must not be written to, but replaced.
    """
    if is_shard(parameter):
        total = over_processes(parameter, total)
    total = total.to(parameter.dtype) if before is None else total.to(parameter.dtype) + before  # which may be sparse
    if parameter.grad is None or parameter.grad.layout != torch.strided or anew:
        parameter.grad = total
    else:
        with torch.no_grad():
            parameter.grad.copy_(total)


def over_processes(parameter: Any, total: Tensor) -> Tensor:
    """The sum of all processes' tensors, each keeping what it has of a sharded parameter."""
    from torch.distributed.tensor import DTensor, Partial

    mesh = parameter.device_mesh
    return DTensor.from_local(total, mesh, [Partial()] * mesh.ndim).redistribute(mesh, parameter.placements)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors that factors hold."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Total):
        yield from tensors_of(value.factors)
    elif isinstance(value, list):
        for item in value:
            yield from tensors_of(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))
