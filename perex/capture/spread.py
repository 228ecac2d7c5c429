"""Parameters that every example is given a row of, and what layers make of these before they meet the examples' own.

`queries.expand(B, -1, -1)` derives from a parameter alone, and so does what a layer makes of it. Only where it meets
examples does it show that row b is read by example b. Pulled back from there, each example's gradient would run through
the rows of all. So the rows are made again, as the examples' own from the start, and layers in between are tapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perex.capture.axis import Axis
from perex.capture.carry import member, tensors_in
from perex.capture.checkpoint import sparing
from perex.capture.labels import SIZED_BY_VALUE, Labels, plain_name
from perex.capture.meeting import Meeting
from perex.capture.parameters import Shared
from perex.capture.record import draws
from perex.errors import PerexError
from perex.rules.broadcast import spread
from perex.rules.call import pack, unpack

SPREADS = frozenset(member("expand expand_as broadcast_to repeat tile embedding".split(), in_place=False))
"""Operators that show a row again and again, or rows as numbers say that may be the same for all examples."""


class Origin(NamedTuple):
    """How rows were made of a parameter.

    Attributes:
        func: the operator whose result they are.
        given: its arguments, and those given by name, with `Ref`s in place of tensors: lists may change.
        tensors: these tensors.
        place: which of its results.
        versions: those of the tensors among the arguments, then.
        version: that of the result, when it was made.
    """

    func: Callable[..., Any]
    given: Any
    tensors: list[Tensor]
    place: int
    versions: list[int]
    version: int = 0


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """What tells whether tensors have been changed in place."""
    return [tensor._version for tensor in tensors]


def origin_of(labels: Labels, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Origin | None:
    """The origin of results that derive from parameters alone, if some are given to every example on the way."""
    if labels.batch == 1 or sparing() or draws(func, args, kwargs) or plain_name(func) in SIZED_BY_VALUE:
        return None
    tensors: list[Tensor] = []
    given = pack((args, kwargs), tensors)
    if func not in SPREADS and not any(known(labels, tensor) for tensor in tensors):
        return None
    if arrays_in(given) or any(tensor.is_inference() for tensor in tensors):  # these do not tell
        return None
    return Origin(func, given, tensors, 0, versions_of(tensors))


def arrays_in(given: Any) -> bool:
    """Whether there are arrays of other libraries among arguments, which may change unseen."""
    if isinstance(given, dict):
        return any(map(arrays_in, given.values()))
    return any(map(arrays_in, given)) if isinstance(given, (list, tuple)) else hasattr(given, "__array__")


def known(labels: Labels, tensor: Tensor) -> Origin | None:
    """The origin of a tensor, if it is rows of a parameter."""
    mark = labels.of(tensor)
    return mark.origin if isinstance(mark, Shared) else None


Made = dict[tuple[int, Axis], tuple[Tensor, Tensor | None]]
"""By a tensor of rows and the axis that they are to have, that tensor, which this keeps, and what was made."""


class Spread:
    """Makes rows of parameters again, as the examples' own.

    Args:
        labels: what is known of the forward's tensors.
        meeting: puts taps behind them.
        run: calls an operator as the model does.
        made: what was made before in this forward.
    """

    def __init__(self, labels: Labels, meeting: Meeting, run: Callable[..., Any], made: Made) -> None:
        self.labels = labels
        self.meeting = meeting
        self.run = run
        self.made = made

    def arguments(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """The arguments of an operator on parameters and examples, with rows that are the examples' made again.

        Returns:
            Arguments, and those given by name; None where there are no such rows.
        """
        tensors: list[Tensor] = []
        template = pack((args, kwargs), tensors)
        rows = [k for k, tensor in enumerate(tensors) if known(self.labels, tensor)]
        forward = self.meeting.forward
        if not rows or forward.record is not None or forward.recomputed or sparing() or draws(func, args, kwargs):
            return None  # examples alone, and recomputations, have to find the same taps
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        with torch.no_grad():
            out = func(*args, **kwargs)
        axes = self.labels.of_results(func, args, kwargs, out, tensors_in(out))
        if not all(isinstance(axis, Axis) for axis in axes):
            return None
        changed = False
        for k in rows:
            axis = self.meeting.aligned_rows(tensors[k], func, args, kwargs, out, axes)
            made = None if axis is None else self.as_examples(tensors[k], axis)
            tensors[k], changed = (tensors[k], changed) if made is None else (made, True)
        return unpack(template, tensors) if changed else None

    def as_examples(self, tensor: Tensor, axis: Axis) -> Tensor | None:
        """Rows of parameters, made again so that they have this axis; None where that cannot be done."""
        for trial in self.trials(tensor, axis):
            try:
                made = self.again(tensor, trial)
            except PerexError:  # what is the same for all examples may be mixed as these may not
                continue
            if made is not None and self.labels.held(made) == axis:
                return made
        return None

    def trials(self, tensor: Tensor, axis: Axis) -> list[Axis]:
        """Where the examples may be in what a parameter was spread to first."""
        origin = known(self.labels, tensor)
        while origin is not None and (before := next(filter(self.is_made, origin.tensors), None)) is not None:
            tensor, origin = before, known(self.labels, before)
        kinds = dict.fromkeys((Axis(0), axis))  # perhaps folded with heads since
        return [
            kind.moved(dim)
            for kind in kinds
            for dim, size in enumerate(tensor.shape)
            if size == kind.size(self.labels.batch)
        ]

    def is_made(self, tensor: Tensor) -> bool:
        """Whether a tensor is rows of a parameter."""
        return known(self.labels, tensor) is not None

    def again(self, tensor: Tensor, axis: Axis) -> Tensor | None:
        """Make rows again, once, from where the parameter was spread to rows with this axis.

        All on the way have to be what they were: layers whose weights are zero make the same of anything.
        """
        key = id(tensor), axis
        if key not in self.made:
            self.made[key] = tensor, self.rows(tensor, axis)
        made = self.made[key][1]
        return made if made is tensor or made is not None and alike(made, tensor) else None

    def rows(self, tensor: Tensor, axis: Axis) -> Tensor | None:
        """The same, anew; what is no rows of a parameter as it is, and None for what has changed since."""
        origin = known(self.labels, tensor)
        if origin is None:
            return tensor
        tensors = origin.tensors
        if versions_of(tensors) != origin.versions or tensor._version != origin.version:
            return None
        if not any(map(self.is_made, tensors)):
            fits = axis.dim < tensor.dim() and tensor.size(axis.dim) == axis.size(self.labels.batch)
            found: Tensor | None = self.meeting.rows(tensor, axis, spread) if fits else None
        else:
            parts = [self.again(given, axis) for given in tensors]
            if any(part is None for part in parts):
                return None
            args, kwargs = unpack(origin.given, parts)
            found = tensors_in(self.run(origin.func, args, kwargs))[origin.place]
        return found


def alike(made: Tensor, tensor: Tensor) -> bool:
    """Whether rows that were made again are what they were, to rounding: else something was changed in place since.

    Versions tell most of that, but not what was done to `tensor.data`, a list among the arguments or an array.
    """
    one, other = made.detach(), tensor.detach()
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.is_set_to(other):  # one memory: nothing to compare, and no device to wait for
        return True
    if not one.is_floating_point():
        return bool(torch.equal(one, other))
    largest = other.abs().amax() if other.numel() else 0.0
    near = (one - other).abs() <= torch.finfo(one.dtype).eps ** 0.5 * largest
    return bool((near | (one == other) | one.isnan() & other.isnan()).all())
