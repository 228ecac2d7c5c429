"""What is known of each tensor in one forward: batched, shared, lost, or a constant."""

from __future__ import annotations

import functools
import weakref
from typing import Any

from torch import Tensor, nn

from perex.capture.axis import Axis, Label, Lost
from perex.capture.carry import Operation, carry, known, tensors_in
from perex.capture.parameters import Entry, Parameters, Shared, Source
from perex.rules.registry import OPERATORS

BATCHED, SHARED, LOST, STRANGER, UNTRACKED = 1, 2, 4, 8, 16
"""Kinds of tensors, as bits; a constant has none. What is untracked requires grad, but nobody asks for its
per-example gradients: other parameters, and what derives from them. A stranger requires grad and comes from nowhere
that perex saw."""

CONSTANT = "constant"
"""The label of what derives from untracked parameters, and is not a stranger for that."""


EARLIER_VIEW = Lost("unknown", "a view was taken of a tensor before examples were written into it")

Mark = Axis | Lost | Shared | str | None


class Labels:
    """The labels of one forward, kept on the tensors themselves.

    Args:
        parameters: the model's parameters, which need no label.
        key: the attribute under which tensors carry their label.
        number: the forward's number: labels of other forwards do not count.
        batch: number of examples, B.
    """

    def __init__(self, parameters: Parameters, key: str, number: int, batch: int) -> None:
        self.parameters = parameters
        self.key = key
        self.number = number
        self.batch = batch
        self.marked: list[weakref.ref[Tensor]] = []
        self.derived: dict[Entry, Tensor] = {}  # what derived tensors were made of, over the whole forward
        self.rewritten = False  # whether one of them was changed in place

    def of(self, tensor: Tensor) -> Mark:
        """The label of a tensor in this forward."""
        number, label = getattr(tensor, self.key, (None, None))
        if number == self.number:
            return label
        base = tensor._base  # a view taken before examples were written into what it is a view of
        return EARLIER_VIEW if base is not None and getattr(base, self.key, (None,))[0] == self.number else None

    def batch_label(self, tensor: Tensor) -> Label:
        """The label, as far as examples are concerned."""
        label = self.of(tensor)
        return label if isinstance(label, (Axis, Lost)) else None

    def axis(self, tensor: Tensor) -> Axis | None:
        """The batch axis of a tensor, if it has one."""
        label = self.of(tensor)
        return label if isinstance(label, Axis) else None

    def mark(self, tensor: Tensor, label: Mark) -> None:
        """Give a tensor its label."""
        if label is not None:
            if not hasattr(tensor, self.key):
                self.marked.append(weakref.ref(tensor))
            setattr(tensor, self.key, (self.number, label))
        elif hasattr(tensor, self.key):
            delattr(tensor, self.key)

    def rewrite(self, tensor: Tensor, label: Mark) -> None:
        """Label a tensor that was changed in place, and the tensor that it is a view of."""
        self.mark(tensor, label)
        base = tensor._base
        if base is not None and label is not None and self.of(base) is None:
            self.mark(base, Lost("unknown", "a view of a constant was overwritten with examples"))

    def clean(self) -> None:
        """Take the labels off all tensors that are still alive."""
        for ref in self.marked:
            tensor = ref()
            if tensor is not None:
                self.mark(tensor, None)
        self.marked.clear()

    def kind(self, tensor: Tensor, label: Mark) -> int:
        """One of the kinds above for a tensor with this label, or 0 for a constant."""
        if label is not None:
            if isinstance(label, Axis):
                return BATCHED
            return LOST if isinstance(label, Lost) else SHARED if isinstance(label, Shared) else UNTRACKED
        if not tensor.requires_grad:
            return 0
        entry = self.parameters.entries.get(id(tensor))
        if entry is None and isinstance(tensor, nn.Parameter) and self.parameters.knows(tensor):
            entry = self.parameters.entries[id(tensor)]
        if entry is not None:
            return SHARED if entry.tracked else UNTRACKED
        return STRANGER if tensor.grad_fn is not None else UNTRACKED

    def source(self, value: Any) -> Source | None:
        """The tracked parameter, or derived tensor, that an argument is."""
        if not isinstance(value, Tensor):
            return None
        entry = self.parameters.entries.get(id(value))
        if entry is not None:
            return entry if entry.tracked else None
        label = self.of(value)
        if not isinstance(label, Shared):
            return None
        made_of = self.derived if self.rewritten else dict(zip(label.entries, label.stand_ins, strict=True))
        return Shared(label.tensor, tuple(made_of), tuple(made_of.values()), label.tensor._version)

    def stand_in(self, value: Any) -> Any:
        """What an operator gets for an argument that may be a parameter, or derived from some."""
        if not isinstance(value, Tensor):
            return value
        entry = self.parameters.entries.get(id(value))
        if entry is not None:
            return self.parameters.read(entry)
        label = self.of(value)
        return label.tensor if isinstance(label, Shared) else value

    def of_results(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        produced: list[Tensor],
        marks: list[tuple[Tensor, Mark]] | None = None,
    ) -> list[Label]:
        """One label for each tensor that an operator produced, from those of its arguments (looked up if not given)."""
        if not produced:
            return []
        if marks is None:
            marks = [(tensor, self.of(tensor)) for tensor in tensors_in(*args, kwargs)]
        inputs = [(tensor, mark if isinstance(mark, (Axis, Lost)) else None) for tensor, mark in marks]
        operation = Operation(plain_name(func), args, renamed(kwargs), out, produced, inputs, self.batch)
        if func in OPERATORS and not known(func):  # a user's rule, for an operator that keeps the axis
            found: Label | list[Label] = next((axis for _, axis in operation.batched()), None)
        else:
            found = carry(operation, func)
        labels = found if isinstance(found, list) else [found] * len(produced)
        return [self.checked(tensor, label, operation.name) for tensor, label in zip(produced, labels, strict=True)]

    def checked(self, tensor: Tensor, label: Label, name: str) -> Label:
        """A label, if the tensor has a dimension of the size it says."""
        if isinstance(label, Axis):
            fits = 0 <= label.dim < tensor.dim() and tensor.size(label.dim) == label.size(self.batch)
            if not fits:
                return Lost("unknown", f"`{name}` has a result of an unexpected shape, {tuple(tensor.shape)}")
        return label

    def with_trial(self, tensor: Tensor, trial: Axis, func: Any, args: Any, kwargs: Any, out: Any) -> list[Label]:
        """What the labels of an operator's results would be if `tensor` had the batch axis `trial`."""
        inputs = [(t, trial if t is tensor else self.batch_label(t)) for t in tensors_in(*args, kwargs)]
        produced = tensors_in(out)
        found = carry(Operation(plain_name(func), args, renamed(kwargs), out, produced, inputs, self.batch), func)
        return found if isinstance(found, list) else [found] * len(produced)

    def written(self, target: Tensor, index: Any, value: Any) -> Label:
        """The label of a tensor after `target[index] = value`, where index or value hold examples.

        A tensor that held none has the axis with which reading `target[index]` would give what was written its own.
        """
        piece = target[index]
        own, before = self.axis(value) if isinstance(value, Tensor) else None, self.batch_label(target)
        want = None if own is None else own.moved(own.dim - value.dim() + piece.dim())
        for dim, size in enumerate(target.shape):
            trial = Axis(dim) if own is None else own.moved(dim)
            if size != trial.size(self.batch) or (before is not None and before != trial):
                continue
            (found,) = self.with_trial(target, trial, Tensor.__getitem__, (target, index), {}, piece)
            if isinstance(found, Axis) and want in (None, found):
                return trial
        if self.batch == 1 and target.dim():
            return Axis(0, 1, target.size(0))
        kind = "unknown" if before is None and own is not None else "mixed"
        return Lost(kind, "`__setitem__` writes rows of examples where perex cannot follow them")


OTHER_NAMES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "x1": "input", "x2": "other"}


def renamed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by torch's own names, where the call used NumPy's."""
    return {OTHER_NAMES.get(name, name): value for name, value in kwargs.items()}


@functools.cache
def plain_name(func: Any) -> str:
    """An operator's name, without what marks dunder and in-place forms."""
    name: str = getattr(func, "__name__", str(func))
    for space in ("fft_", "linalg_", "special_"):
        name = name.removeprefix(space)
    return name.strip("_") if name.startswith("__") else name.rstrip("_")
