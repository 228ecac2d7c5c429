"""How operators carry the batch axis from their arguments to their results: the look-up.

`carry` answers, for one operator call, where the examples are in its results. What it knows is a table of
families (`perex.capture.families`), each a short function; an operator in no family loses the axis, and
perex then refuses rather than guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from perex.capture.axis import Axis, Held, Label, Lost, Single, agreed

Handler = Callable[["Operation"], Any]


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors among arguments or results, also those in (nested) lists, tuples and dicts."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


@dataclass(slots=True)
class Operation:
    """One operator call, as the families see it.

    Attributes:
        name: the operator's name, without what marks dunder and in-place forms.
        args: its arguments by position.
        kwargs: its arguments by name.
        out: what it returned.
        results: the tensors in that.
        inputs: its tensor arguments, each with what is known of its examples.
        batch: number of examples, B.
        func: the operator itself.
        sized: whether the size of the result depends on values of several examples.
        valued: whether values, and not shapes and options alone, decide where the examples are.
        trial: whether this is a question of what would be; then an operator is not tried on values.
        doubt: a count over several examples that had a say in what the examples get, if one had.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    results: list[Tensor]
    inputs: list[tuple[Tensor, Label]]
    batch: int
    func: Any = None
    doubt: Lost | None = None
    sized: bool = False
    valued: bool = False
    trial: bool = False

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at `position`, or called `name`."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def label(self, value: Any) -> Label:
        """What is known of the examples in an argument."""
        return next((label for tensor, label in self.inputs if tensor is value), None)

    def axis(self, value: Any) -> Axis | None:
        """The batch axis of an argument; None for what is the same for all examples."""
        label = self.label(value)
        return label if isinstance(label, Axis) else None

    def held(self, value: Any) -> Held | None:
        """The batch axis of an argument, or the one example that it belongs to."""
        label = self.label(value)
        return label if isinstance(label, (Axis, Single)) else None

    def agreed(self, axes: Iterable[Axis]) -> Label:
        """One label for rows that are matched, if each has one example."""
        return agreed(axes, self.batch) or self.mixed("pairs examples with each other")

    def batched(self) -> list[tuple[Tensor, Axis]]:
        """The tensor arguments that have a batch axis, with it."""
        return [(tensor, label) for tensor, label in self.inputs if isinstance(label, Axis)]

    def only(self, *allowed: Any) -> bool:
        """Whether no other arguments than these have a batch axis: one that is given twice is two."""
        return len(self.batched()) == len(self.batched_among(allowed))

    def batched_among(self, arguments: Iterable[Any]) -> list[tuple[Tensor, Axis]]:
        """Those of some arguments that have a batch axis, with it."""
        return [(one, axis) for one in arguments if (axis := self.axis(one)) is not None]

    def out_is_whole(self, dim: int, tensor: Tensor) -> bool:
        """Whether a dimension of the result is as long as in the argument."""
        return result_tensor(self).size(dim) == tensor.size(dim)

    def reduced(self) -> Lost:
        """The label of a result that sums over the batch."""
        return Lost("reduced", f"`{self.name}` reduces the batch axis")

    def bent(self, how: str) -> Lost:
        """The label of a value over the batch that is no sum of the examples' own."""
        return Lost("bent", f"`{self.name}` {how}")

    def contracted(self) -> Lost:
        """The label of a product that sums over the batch: a loss if a number, and a mixture otherwise."""
        return self.mixed("sums over the batch") if result_tensor(self).dim() else self.reduced()

    def refused(self, why: str) -> Lost:
        """The label of a result of a layer that is set to mix examples."""
        return Lost("refused", f"`{self.name}` {why}")

    def mixed(self, how: str = "works along the batch axis") -> Lost:
        """The label of a result in which one row depends on several examples."""
        return Lost("mixed", f"`{self.name}` {how}")

    def unknown(self, how: str = "arranges the rows in a way perex does not follow") -> Lost:
        """The label of a result whose rows perex cannot tell apart."""
        return Lost("unknown", f"`{self.name}` {how}")


FAMILIES: dict[Any, Handler] = {}

DECIDES: set[Handler] = set()
"""Handlers that find the batch axis even where no argument has one."""

JOINS: set[Handler] = set()
"""Handlers that put tensors of single examples together."""

REORDERS: set[Handler] = set()
"""Handlers that tell whether constants with a row for each example are put in an order that counts decide."""

REFUSES: set[Handler] = set()
"""Handlers of layers with settings that are refused for a batch of one too."""


def known(func: Any) -> bool:
    """Whether an operator belongs to a family."""
    return func in FAMILIES


def carry(operation: Operation, func: Any) -> Label | list[Label]:
    """Say where the examples are in the result of an operator.

    Args:
        operation: the call, with at least one argument that carries a label.
        func: the operator, as a `TorchFunctionMode` receives it.

    Returns:
        One label for a single tensor, or for all tensors of the result; a list for a tuple whose entries
        differ.
    """
    lost: Lost | None = None
    single: Single | None = None
    batched = counted = False
    for _, label in operation.inputs:
        if isinstance(label, Axis):
            batched = True
        elif isinstance(label, Single):
            batched = batched or single not in (None, label)
            single = label
        elif isinstance(label, Lost):
            if label.kind in COUNTS:
                counted = True
            if lost is None or lost.kind in ("reduced", *COUNTS):
                lost = label
    handler = FAMILIES.get(func)
    if handler is factory:
        operation.doubt = lost if counted else None
        values = operation.inputs[1:] if operation.name.startswith("new_") else operation.inputs
        numbers = [tensor for tensor, label in values if label is not None and tensor.is_floating_point()]
        if numbers and not isinstance(single, Single):
            return operation.bent("makes a tensor of values of several examples")
        return None if not numbers else single
    if counted and lost is not None and lost.kind in COUNTS:
        if not batched and single is None:
            found = answer(handler, replace(operation, trial=True)) if handler in REORDERS else None
            return found if isinstance(found, Axis) else counts(operation, lost)
        lost = chooses(operation, lost)
    adds = operation.name in ("add", "sub") and operation.results and operation.results[0].dim() == 0
    if lost is not None:
        if lost.kind == "reduced" and single is not None and not any(isinstance(x, Axis) for _, x in operation.inputs):
            if adds:  # one loss after the other is added up
                return lost
        if lost.kind in ("reduced", "bent") and (batched or single is not None):
            return Lost("mixed", f"{lost.why}, and `{operation.name}` gives the outcome back to every example")
        if lost.kind == "reduced" and not keeps_sums(operation):
            return Lost("bent", f"{lost.why}, and `{operation.name}` makes of the outcome what is no sum over examples")
        return lost
    if single is not None and batched and operation.name in SIZED:
        sizes = [t for t, label in operation.inputs if isinstance(label, Single)]
        if not any(t.is_floating_point() for t in sizes):  # an example's own number says how long its piece is
            operation.inputs = [(t, None if isinstance(label, Single) else label) for t, label in operation.inputs]
            operation.doubt = Lost("counted", "an example's own number is a size")
            single = None
    if single is not None and not batched:
        found = handler(operation) if handler in REFUSES else None
        return found if isinstance(found, Lost) and found.kind == "refused" else single
    if single is not None and adds and not operation.batched():
        return operation.reduced()
    if single is not None and handler not in JOINS:
        return operation.mixed("pairs examples with each other")
    if not batched and handler not in DECIDES:
        return None
    if handler is None:
        found = None if operation.trial else TRY[0](operation)
        return found or operation.unknown("is an operator perex does not know")
    return answer(handler, operation)


def answer(handler: Handler, operation: Operation) -> Label | list[Label]:
    """What a handler says; where the call has a form that it was not made for, what trying the operator shows."""
    try:
        return handler(operation)
    except (
        IndexError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
    ):
        found = None if operation.trial else TRY[0](operation)
        return found or operation.unknown("is called in a form that perex does not follow")


TRY: list[Callable[[Operation], Label | list[Label] | None]] = []
"""What finds labels by trying an operator that no handler knows; see `families.trials`."""

COUNTS = ("counted", "compared")
"""The kinds of what is lost, but no gradient goes through."""

CHOOSES = frozenset(
    """
    getitem index_select gather take take_along_dim where masked_fill masked_select masked_scatter nonzero index_add
    index_copy index_fill scatter scatter_add scatter_reduce repeat_interleave one_hot embedding split
    split_with_sizes tensor_split narrow index_put put setitem _grouped_mm grouped_mm
    _pack_padded_sequence _pad_packed_sequence lstm gru rnn_tanh rnn_relu
    """.split()
)
"""Operators of which an integer argument says what to pick, and enters no sum."""


SIZED = frozenset("split split_with_sizes tensor_split narrow repeat_interleave".split())
"""Operators of which integers say how long pieces are."""


def counts(operation: Operation, lost: Lost) -> Lost:
    """The label of what is made of counts and constants alone."""
    return lost if operation.results and not operation.results[0].is_floating_point() else lost._replace(kind="bent")


def chooses(operation: Operation, lost: Lost) -> Lost | None:
    """What to make of counts beside examples: nothing, where they only choose; capture notes a doubt."""
    if operation.name in CHOOSES or not any(result.is_floating_point() for result in operation.results):
        operation.inputs = [
            (tensor, None if isinstance(label, Lost) and label.kind in COUNTS else label)
            for tensor, label in operation.inputs
        ]
        operation.doubt = lost
        return None
    return lost._replace(kind="bent")


LINEAR = frozenset(
    """
    add sub subtract rsub neg negative clone contiguous to type type_as float double half bfloat16 detach view reshape
    flatten squeeze unsqueeze expand expand_as repeat sum mean stack cat getitem select unbind requires_grad sum_to_size
    zeros_like ones_like empty_like full_like transpose permute t
    """.split()
)
"""Operators that turn sums over the batch into sums over the batch."""


def keeps_sums(operation: Operation) -> bool:
    """Whether an operator is linear in arguments that are sums over the batch."""
    sums = [isinstance(label, Lost) for _, label in operation.inputs]
    if operation.name in ("mul", "multiply", "rmul"):
        return sum(sums) == 1
    if operation.name in ("div", "divide", "true_divide", "truediv"):
        return sums[0] and sum(sums) == 1
    return operation.name in LINEAR


def factory(operation: Operation) -> Label:
    """Operators that read only a size: nothing of the examples is in the result."""
    return None


def result_tensor(operation: Operation) -> Tensor:
    """The result, or its first tensor."""
    return operation.results[0]


def normal(dim: int, ndim: int) -> int:
    """A dimension counted from the front."""
    return dim + ndim if dim < 0 else dim


def dims_of(value: Any, ndim: int) -> list[int]:
    """A `dim` argument as dimensions counted from the front; all of them for None."""
    if value is None or value == () or value == []:
        return list(range(ndim))
    if isinstance(value, int):
        return [normal(value, ndim)]
    return [normal(int(d), ndim) for d in value]


def member(names: list[str], in_place: bool) -> Iterator[Any]:
    """Every torch callable of these names: functions, methods, dunder and perhaps in-place forms."""
    functional = torch.nn.functional
    spaces = (torch, Tensor, functional, torch._C._nn, torch.special, torch.linalg, torch.fft)
    for name in names:
        forms = [name, f"__{name}__", f"__r{name}__"] + [f"{name}_", f"__i{name}__"] * in_place
        for space in spaces:
            for form in forms:
                found = getattr(space, form, None)
                if found is not None and callable(found):
                    yield found


def family(names: str, in_place: bool = True) -> Callable[[Handler], Handler]:
    """Enter a handler for all operators of these names, in all their forms; each is in one family.

    Args:
        names: the operators' names, separated by spaces.
        in_place: whether the handler holds for in-place forms too: not where they change the shape of the
            argument, which is looked at after the call.
    """

    def enter(handler: Handler) -> Handler:
        for func in member(names.split(), in_place):
            try:
                present = FAMILIES.setdefault(func, handler)
            except TypeError:  # not hashable: never handed to a mode
                continue
            if present is not handler:
                raise ValueError(f"{func} is in two families: {present.__name__} and {handler.__name__}")
        return handler

    return enter
