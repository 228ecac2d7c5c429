"""What is known of each tensor in one forward: batched, shared, lost, or a constant."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from perex.capture.axis import NOBODY, Axis, Held, Label, Lost, Single, placed
from perex.capture.carry import COUNTS, Operation, carry, known, tensors_in
from perex.capture.parameters import Entry, Parameters, Shared, Source
from perex.capture.places import memory, place_in, storage, whole_view
from perex.errors import UnsupportedError
from perex.rules.registry import OPERATORS

BATCHED, SHARED, LOST, STRANGER, UNTRACKED, COUNTED, FOREIGN = 1, 2, 4, 8, 16, 32, 64
"""Kinds of tensors, as bits; a constant has none. What is untracked requires grad, but nobody asks for its
per-example gradients: other parameters, and what derives from them. A stranger requires grad and comes from nowhere
that perex saw. What is counted is an integer or truth value over several examples. What is foreign is a constant that
comes from nowhere that perex saw."""

UNMARKED = (None, None, False, -1)

SIZED_BY_VALUE = frozenset(
    "nonzero argwhere masked_select unique unique_consecutive pad_sequence _pad_packed_sequence sort argsort".split()
)
"""Operators that tell something of the whole batch by the size or the order of their result."""

CHECKS = ("isnan", "isinf", "isfinite")

CONSTANT = "constant"
"""The label of what derives from untracked parameters, and is not a stranger for that."""


EARLIER_VIEW = Lost("unknown", "examples were written into the memory of a tensor by way of another one, as a view")

EARLIER_VIEW_OF_PARAMETERS = Lost("unknown", "parameters were written into a tensor after a view of it was taken")

BETWEEN = Lost(
    "unknown", "a tensor was kept from one call of a part of the model to the next, and changed between them"
)

Mark = Axis | Single | Lost | Shared | str | None


class Labels:
    """The labels of one forward, kept on the tensors themselves.

    Args:
        parameters: the model's parameters, which need no label.
        key: the attribute under which tensors carry their label.
        number: the forward's number: labels of other forwards do not count.
        batch: number of examples, B.
        doubtful: called with the name of an operator that lets a count over several examples decide what the examples
            get, and that count's label.
    """

    def __init__(
        self,
        parameters: Parameters,
        key: str,
        number: int,
        batch: int,
        doubtful: Callable[..., None] = lambda name, lost, strength=3: None,
    ) -> None:
        self.parameters = parameters
        self.key = key
        self.number = number
        self.batch = batch
        self.doubtful = doubtful
        self.valued = 0  # in how many operators values had a say in where the examples are
        self.marked: list[weakref.ref[Tensor]] = []
        self.kept: list[
            tuple[weakref.ref[Tensor], Axis | Single | Lost | str, bool, int]
        ] = []  # behind an earlier call
        self.derived: dict[Entry, Tensor] = {}  # what derived tensors were made of, over the whole forward
        self.rewritten = False  # whether one of them was changed in place
        self.spoiled: dict[int, tuple[Lost, Tensor]] = {}  # memory into which a mixture of examples was written
        self.blanks: dict[int, StorageWeakRef] = {}  # memory made like a batch, with nothing of it in there yet
        self.apart: dict[int, tuple[StorageWeakRef, weakref.ref[Tensor]]] = {}  # see `written`
        self.clock = 0  # how often a memory's label was changed
        self.changes: dict[
            int, tuple[int, StorageWeakRef]
        ] = {}  # when that was, last; held weakly, it stays one memory

    def of(self, tensor: Tensor) -> Mark:
        """The label of a tensor in this forward."""
        number, label, _, when = getattr(tensor, self.key, UNMARKED)
        if self.changes and self.outdated(tensor, when if number == self.number else -1):
            return self.anew(tensor)
        if self.spoiled and not isinstance(label, Lost) and (found := self.spoiled.get(memory(tensor))):
            return found[0]
        if number == self.number:
            return label
        base = tensor._base  # a view taken before examples were written into what it is a view of
        number, label, _, _ = UNMARKED if base is None else getattr(base, self.key, UNMARKED)
        if base is None or number != self.number:
            return None
        if isinstance(label, Shared):
            return EARLIER_VIEW_OF_PARAMETERS
        return label if isinstance(label, Axis) and whole_view(tensor, base) else EARLIER_VIEW

    def outdated(self, tensor: Tensor, when: int) -> bool:
        """Whether other examples than a tensor's label says were written into its memory since that was put on it."""
        changed = self.changes.get(storage(tensor))
        return changed is not None and when < changed[0]

    def anew(self, tensor: Tensor) -> Mark:
        """The label of a tensor whose memory was written to by way of another one."""
        base = tensor._base
        number, label, _, when = UNMARKED if base is None else getattr(base, self.key, UNMARKED)
        if base is None or number != self.number or self.outdated(base, when):
            return EARLIER_VIEW
        if isinstance(label, (Single, Lost)):
            return label
        place = place_in(tensor, base) if isinstance(label, Axis) else None
        if place is None or not isinstance(label, Axis):
            return EARLIER_VIEW
        dims, starts = place
        whole = [d for d, dim in enumerate(dims) if dim == label.dim and tensor.size(d) == base.size(dim)]
        return label.moved(whole[0]) if whole and starts[label.dim] == 0 else EARLIER_VIEW

    def batch_label(self, tensor: Tensor) -> Label:
        """The label, as far as examples are concerned."""
        label = self.of(tensor)
        return label if isinstance(label, (Axis, Single, Lost)) else None

    def held(self, tensor: Tensor) -> Held | None:
        """The batch axis of a tensor, or the one example that it belongs to, if it has one."""
        label = self.of(tensor)
        return label if isinstance(label, (Axis, Single)) else None

    def plain(self, dim: int) -> Held:
        """The label of a tensor whose dimension `dim` is the batch as it is."""
        return Single(0) if self.batch == 1 else Axis(dim)

    def real(self, tensor: Tensor) -> bool:
        """Whether a tensor is of real numbers, or of integers or truth values that were made from such."""
        return tensor.is_floating_point() or bool(getattr(tensor, self.key, UNMARKED)[2])

    def mark(self, tensor: Tensor, label: Mark, real: bool = False) -> None:
        """Give a tensor its label; `real` for integers and truth values made from real numbers of examples."""
        if label is not None:
            if not hasattr(tensor, self.key):
                self.marked.append(weakref.ref(tensor))
            if isinstance(label, Shared):
                label = label._replace(memory=memory(tensor))
            setattr(tensor, self.key, (self.number, label, real, self.clock))
            if type(tensor) is not Tensor and (base := tensor._base) is not None and whole_view(tensor, base):
                self.mark(base, label, real)  # what torch made, before it became one of another class
        elif hasattr(tensor, self.key):
            delattr(tensor, self.key)

    def spoil(self, tensor: Tensor, label: Lost) -> None:
        """Remember a mixture of examples written into memory that other tensors may share: views, `x.detach()`."""
        if tensor.layout == torch.strided:
            self.spoiled[memory(tensor)] = label, tensor

    def spoils(self, label: Label) -> bool:
        """Whether this is the label of spoiled memory, whose tensors nobody watches."""
        return any(found is label for found, _ in self.spoiled.values())

    def written(self, target: Tensor, result: Tensor) -> None:
        """Write what derives from parameters over a constant, which derives from them then, in memory of its own."""
        target.copy_(result)
        label = self.of(result)
        self.mark(target, label)
        if isinstance(label, Shared) and (key := storage(label.tensor)) >= 0:
            self.apart[key] = StorageWeakRef(label.tensor.untyped_storage()), weakref.ref(target)

    def bring_up(self, tensor: Tensor) -> None:
        """What stands for a tensor was changed in place: bring the memory of such a constant up to that."""
        label = self.of(tensor)
        known = self.apart.get(storage(label.tensor)) if isinstance(label, Shared) else None
        target = None if known is None else known[1]()
        if target is not None and isinstance(whole := self.of(target), Shared):
            target.detach().copy_(whole.tensor.detach())

    def blanked(self, tensor: Tensor) -> None:
        """Remember that a tensor was made like a batch, as by `zeros_like`, and holds nothing of it."""
        if (key := storage(tensor)) >= 0:
            self.blanks[key] = StorageWeakRef(tensor.untyped_storage())

    def blank(self, tensor: Tensor) -> bool:
        """Whether a tensor was made like that and holds nothing of a batch yet; asked when it is written to."""
        return bool(self.blanks) and self.blanks.pop(storage(tensor), None) is not None

    def rewrite(self, tensor: Tensor, label: Mark) -> None:
        """Label a tensor that was changed in place, and the tensor that it is a view of."""
        base = tensor._base
        held = None if base is None else self.of(base)
        if not same(self.of(tensor), label) and (key := storage(tensor)) >= 0:
            self.clock += 1
            self.changes[key] = self.clock, StorageWeakRef(tensor.untyped_storage())
        self.mark(tensor, label)
        if base is None:
            return
        examples = label is not None and not isinstance(label, Shared)
        if examples and (held is None or base.numel() and isinstance(held, Axis) and not same(held, label)):
            self.mark(base, self.of_base(tensor, base, label, held))
        elif held is not None:
            self.mark(base, held)  # as of now

    def of_base(self, view: Tensor, base: Tensor, label: Mark, held: Mark) -> Label:
        """The label of a tensor, `held` before, after examples were written into a view of it."""
        lost = Lost("unknown", "a view of a constant was overwritten with examples")
        if self.batch == 1:
            return Single(0)
        if not isinstance(label, (Axis, Single)):
            return lost
        found = place_in(view, base)
        if found is None:
            return lost
        dims, starts = found
        before = held if isinstance(held, (Axis, Single, Lost)) else None
        if isinstance(label, Axis):
            dim, ids = dims[label.dim], label.ids(self.batch)
        else:
            chosen = [d for d in range(base.dim()) if d not in dims and base.size(d) > 1]
            if len(chosen) != 1:
                return lost
            dim, ids = chosen[0], torch.tensor([label.example], device="cpu")
        if dim is None or isinstance(before, (Lost, Single)) or isinstance(before, Axis) and before.dim != dim:
            return lost
        owners = (
            torch.full((base.size(dim),), NOBODY, device="cpu") if before is None else before.ids(self.batch).clone()
        )
        rows = slice(starts[dim], starts[dim] + len(ids))
        if bool(((owners[rows] != NOBODY) & (owners[rows] != ids)).any()):
            return lost
        owners[rows] = ids
        return placed(dim, owners, self.batch)

    def clean(self) -> None:
        """Take the labels off all tensors that are still alive; what these are is kept, should the forward go on."""
        self.kept = []
        for ref in self.marked:
            tensor = ref()
            if tensor is None:
                continue
            label = self.of(tensor)
            if label is not None and not isinstance(label, Shared) and not tensor.is_inference():
                self.kept.append((ref, label, self.real(tensor), tensor._version))
            self.mark(tensor, None)
        self.marked.clear()
        self.spoiled.clear()
        self.changes.clear()

    def take_up(self) -> set[int]:
        """Put the labels of an earlier call of the same forward back, where tensors have been kept; which these are."""
        kept, self.kept = self.kept, []
        found = set()
        for ref, label, real, version in kept:
            if (tensor := ref()) is not None:
                self.mark(tensor, label if tensor._version == version else BETWEEN, real)
                found.add(id(tensor))
        return found

    def batched(self) -> list[weakref.ref[Tensor]]:
        """What is of examples."""
        return [ref for ref in self.marked if (tensor := ref()) is not None and self.held(tensor) is not None]

    def shared(self) -> list[tuple[weakref.ref[Tensor], Shared]]:
        """What derives from parameters alone, and its labels."""
        alive = ((ref, ref()) for ref in self.marked)
        found = [(ref, self.of(tensor)) for ref, tensor in alive if tensor is not None]
        return [(ref, label) for ref, label in found if isinstance(label, Shared)]

    def kind(self, tensor: Tensor, label: Mark) -> int:
        """One of the kinds above for a tensor with this label, or 0 for a constant."""
        if label is not None:
            if isinstance(label, (Axis, Single)):
                return BATCHED
            if isinstance(label, Lost):
                return COUNTED if label.kind in COUNTS else LOST
            return SHARED if isinstance(label, Shared) else UNTRACKED
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
        made = tuple(made_of), tuple(made_of.values())
        return Shared(label.tensor, *made, label.tensor._version, shown=label.shown, spared=label.spared)

    def stand_in(self, value: Any) -> Any:
        """What an operator gets for an argument that may be a parameter, or derived from some."""
        if not isinstance(value, Tensor):
            return value
        entry = self.parameters.entries.get(id(value))
        if entry is not None:
            return self.parameters.read(entry)
        label = self.of(value)
        if not isinstance(label, Shared):
            return value
        if memory(value) != label.memory:
            names = ", ".join(entry.name for entry in label.entries)
            raise UnsupportedError(
                f"a tensor derived from {names} was given other data, by `tensor.data = ...` or `set_`, which perex "
                "does not follow. Say `w + (q - w).detach()` where a gradient is to pass a rounded value q by"
            )
        return label.tensor

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
        inputs = [(tensor, mark if isinstance(mark, (Axis, Single, Lost)) else None) for tensor, mark in marks]
        operation = Operation(plain_name(func), args, renamed(kwargs), out, produced, inputs, self.batch, func)
        if func in OPERATORS and not known(func):  # a user's rule, for an operator that keeps the axis
            held = (label for _, label in inputs if isinstance(label, (Axis, Single)))
            found: Label | list[Label] = next(held, None)
        else:
            found = carry(operation, func)
        self.valued += operation.valued
        if operation.doubt is not None:
            self.doubtful(operation.name, operation.doubt)
        if (operation.sized or operation.name in SIZED_BY_VALUE) and self.batch > 1:
            self.doubtful(operation.name, Lost("counted", "the size of a result depends on values"), 2)
        labels = found if isinstance(found, list) else [found] * len(produced)
        return [self.checked(tensor, label, operation) for tensor, label in zip(produced, labels, strict=True)]

    def checked(self, tensor: Tensor, label: Label, operation: Operation) -> Label:
        """A label, if the tensor has a dimension of the size it says; what is lost in integers is but counted."""
        if isinstance(label, Axis):
            fits = 0 <= label.dim < tensor.dim() and tensor.size(label.dim) == label.size(self.batch)
            if not fits:
                why = f"`{operation.name}` has a result of an unexpected shape, {tuple(tensor.shape)}"
                label = Lost("unknown", why)
        if not isinstance(label, Lost) or label.kind in ("refused", *COUNTS):
            return label
        if tensor.is_floating_point() or tensor.is_complex():
            return label
        real = self.from_real(operation.name, operation.inputs)
        return label._replace(kind="compared" if real else "counted")

    def from_real(self, name: str, inputs: Sequence[tuple[Tensor, Mark]]) -> bool:
        """Whether real numbers of examples decide what an operator gives; not where it only looks for NaN."""
        return name not in CHECKS and any(self.real(t) for t, found in inputs if found is not None)

    def with_trial(self, tensor: Tensor, trial: Axis, func: Any, args: Any, kwargs: Any, out: Any) -> list[Label]:
        """What the labels of an operator's results would be if `tensor` had the batch axis `trial`."""
        inputs = [(t, trial if t is tensor else self.batch_label(t)) for t in tensors_in(*args, kwargs)]
        produced = tensors_in(out)
        operation = Operation(plain_name(func), args, renamed(kwargs), out, produced, inputs, self.batch, func)
        operation.trial = True
        found = carry(operation, func)
        return found if isinstance(found, list) else [found] * len(produced)


def same(one: Mark, other: Mark) -> bool:
    """Whether two labels say the same; of what derives from parameters, only the same one does."""
    return one is other or not isinstance(one, Shared) and not isinstance(other, Shared) and one == other


OTHER_NAMES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "x1": "input", "x2": "other"}


def renamed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by torch's own names, where the call used NumPy's."""
    return {OTHER_NAMES.get(name, name): value for name, value in kwargs.items()}


def plain_name(func: Any) -> str:
    """An operator's name, without what marks dunder and in-place forms."""
    return plain(getattr(func, "__name__", str(func)))


@functools.cache
def plain(name: str) -> str:
    """The same of a name: operators are not to be kept alive."""
    for space in ("fft_", "linalg_", "special_"):
        name = name.removeprefix(space)
    return name.strip("_") if name.startswith("__") else name.rstrip("_")
