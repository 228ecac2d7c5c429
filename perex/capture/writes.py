"""Writing to parts of a tensor, `target[index] = value`: whose what was written then is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perex.capture.axis import NOBODY, Axis, Held, Label, Lost, Single, agreed, placed
from perex.capture.carry import COUNTS, FAMILIES, Operation, tensors_in
from perex.capture.families.elementwise import aligned
from perex.capture.labels import BATCHED, COUNTED, LOST, Mark, same
from perex.capture.parameters import Shared
from perex.rules.broadcast import fill

if TYPE_CHECKING:
    from perex.capture.mode import Capture


def masked_write(target: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    """What `target` holds after `target[mask] = value`."""
    written = target.clone()
    written[mask] = value
    return written


def put(target: Tensor, index: Any, value: Tensor) -> Tensor:
    """What `target` holds after `target[index] = value`."""
    written = target.clone()
    written[index] = value
    return written


def leading(operation: Operation) -> Label:
    """The axis of a tensor whose leading dimensions are those of a mask."""
    if not operation.only(*operation.args[:2]):
        return operation.mixed("pairs examples with each other")
    return operation.agreed(axis for _, axis in operation.batched())


FAMILIES[fill], FAMILIES[masked_write] = aligned, leading  # operators of perex's own


class Writes:
    """Labels and taps what a forward writes to parts of tensors.

    Args:
        capture: the capture of that forward.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.labels = capture.labels
        self.refuse = capture.refuse

    def item(self, kinds: int, target: Tensor, index: Any, value: Any) -> None:
        """`target[index] = value`: label what is written, and tap it where a parameter is written to examples."""
        shared = self.labels.source(value) is not None
        if torch.is_grad_enabled() and shared and self.labels.kind(target, self.labels.of(target)) == BATCHED:
            if isinstance(index, Tensor) and index.dtype == torch.bool and value.dim() <= target.dim() - index.dim():
                self.where(target, index, value)
                return
            piece = target[index]
            while value.dim() > piece.dim():  # as torch does: leading dimensions of size one may be too many
                value = self.capture.deriving.operator(Tensor.squeeze, (value, 0), {})
            label = self.labels.of_results(Tensor.__getitem__, (target, index), {}, piece, [piece])[0]
            self.labels.mark(piece, label)
            target[index] = self.capture.meet(fill, (piece, value), {})
            return
        held = self.labels.of(target)
        if torch.is_grad_enabled() and isinstance(held, Shared) and not kinds & (BATCHED | LOST):
            self.capture.deriving.operator(Tensor.__setitem__, (target, index, value), {})
            return
        fresh = held is None and not target.requires_grad
        if torch.is_grad_enabled() and shared and fresh and target._base is None and not kinds & (BATCHED | LOST):
            self.labels.written(target, self.capture.deriving.operator(put, (target, index, value), {}))
            return
        if torch.is_grad_enabled() and shared:
            why = "writes a parameter into a tensor that holds no examples"
            raise self.refuse.unsupported(Tensor.__setitem__, why)
        before = self.labels.of(target)
        target[index] = self.labels.stand_in(value)
        found = [label for t in tensors_in(index) if (label := self.labels.batch_label(t)) is not None]
        for label in found:
            if isinstance(label, Lost):
                self.capture.doubts.add("__setitem__", label)
        if any(not isinstance(label, Lost) or label.kind not in COUNTS for label in found):
            self.overwrite(target, before, self.written(target, index, value))
        elif kinds & LOST or isinstance(before, Shared):
            lost = before if isinstance(before, Lost) or not isinstance(value, Tensor) else self.labels.of(value)
            unknown = Lost("unknown", "`__setitem__` writes what perex cannot follow")
            self.overwrite(target, before, lost if isinstance(lost, Lost) else unknown)
        elif kinds & COUNTED and isinstance(value, Tensor) and isinstance(count := self.labels.of(value), Lost):
            if target.is_floating_point():
                count = count._replace(kind="bent")
            self.overwrite(target, before, count if before is None else self.labels.batch_label(target))
            if before is not None:
                self.capture.doubts.add("__setitem__", count)
        elif isinstance(value, Tensor) and self.labels.held(value) is not None:
            self.overwrite(target, before, self.written(target, index, value))

    def overwrite(self, target: Tensor, before: Mark, label: Label) -> None:
        """Label a tensor into which examples were written; an error if that mixes them and the loss depends on it."""
        if isinstance(label, Lost):
            label = self.refuse.placed(label)
        if isinstance(label, Lost) and torch.is_grad_enabled() and target.requires_grad:
            self.capture.watch(target, label)
        if before is None or not same(before, label):
            self.labels.rewrite(target, label)
        if isinstance(label, Lost) and label.kind not in COUNTS:
            self.labels.spoil(target, label)

    def where(self, target: Tensor, mask: Tensor, value: Tensor) -> None:
        """`target[mask] = value` with one value for all positions."""
        before = target.clone()
        self.labels.mark(before, self.labels.of(target))
        target.copy_(self.capture.meet(masked_write, (before, mask, value), {}))

    def written(self, target: Tensor, index: Any, value: Any) -> Label:
        """The label of a tensor after `target[index] = value`, where index or value hold examples.

        A tensor that held none has the axis with which reading `target[index]` would give what was written its own;
        if there is none, the rows that were written are their writers' and the others nobody's.
        """
        before = self.labels.batch_label(target)
        own = self.labels.batch_label(value) if isinstance(value, Tensor) else None
        if self.labels.batch == 1:
            return Single(0)
        if self.labels.blank(target) and isinstance(before, Axis):
            self.labels.mark(target, None)  # for now: what is written decides
            label = self.written(target, index, value)
            self.labels.mark(target, before)
            return label
        if isinstance(before, Lost) or isinstance(own, Lost):
            return before if isinstance(before, Lost) else own
        if isinstance(before, Single):
            return before if own in (None, before) else Lost("mixed", "`__setitem__` pairs examples with each other")
        piece = target[index]
        want = own.moved(own.dim - value.dim() + piece.dim()) if isinstance(own, Axis) else own
        for trial in self.trials(target, own) if before is None else [before]:
            (found,) = self.labels.with_trial(target, trial, Tensor.__getitem__, (target, index), {}, piece)
            if isinstance(found, (Axis, Single)) and (want in (None, found) or self.match(found, want)):
                return trial
        if want is not None and all(self.labels.batch_label(tensor) is None for tensor in tensors_in(index)):
            for dim in range(target.dim()) if before is None else [before.dim]:
                label = self.claimed(target, dim, index, want)
                if label is not None:
                    return label
        kind = "unknown" if before is None and own is not None else "mixed"
        return Lost(kind, "`__setitem__` writes rows of examples where perex cannot follow them")

    def trials(self, target: Tensor, own: Label) -> Iterator[Axis]:
        """The arrangements that a tensor may have before anything is known of it."""
        for dim, size in enumerate(target.shape):
            if size == self.labels.batch:
                yield Axis(dim)
            if isinstance(own, Axis) and size == own.size(self.labels.batch):
                yield own.moved(dim)
            if size % self.labels.batch == 0 and size > self.labels.batch:
                yield Axis(dim, 1, size // self.labels.batch)

    def match(self, one: Label, other: Label) -> bool:
        """Whether two labels of the same tensor agree, some rows being nobody's in one of them."""
        return isinstance(one, Axis) and isinstance(other, Axis) and agreed((one, other), self.labels.batch) is not None

    def claimed(self, target: Tensor, dim: int, index: Any, want: Held) -> Label:
        """The label of `target` along `dim` after its rows at `index` went to the owners of what was written."""
        rows = torch.arange(target.size(dim), device="cpu").reshape(
            [-1 if d == dim else 1 for d in range(target.dim())]
        )
        entries = index if isinstance(index, tuple) else (index,)
        rows = rows.expand(target.shape)[tuple(e.cpu() if isinstance(e, Tensor) else e for e in entries)]
        if isinstance(want, Single):
            writers = torch.full(rows.shape, want.example, device="cpu")
        else:
            shape = [-1 if d == want.dim else 1 for d in range(rows.dim())]
            writers = want.ids(self.labels.batch).reshape(shape).expand(rows.shape)
        before = self.labels.batch_label(target)
        owners = (
            before.ids(self.labels.batch).clone()
            if isinstance(before, Axis)
            else torch.full((target.size(dim),), NOBODY, device="cpu")
        )
        taken = owners[rows]
        if bool(((taken != NOBODY) & (taken != writers)).any()):
            return None
        owners[rows] = writers
        return placed(dim, owners, self.labels.batch) if bool((owners[rows] == writers).all()) else None
