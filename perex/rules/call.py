"""One operator call in which parameters meet examples, as capture records it and as rules read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from perex.capture.axis import Axis, Held
from perex.factors import Aligned, Dense, Factor
from perex.kernels.products import HALVES, widen

if TYPE_CHECKING:
    from perex.capture.forward import Entry, Site, Source
    from perex.factors.outline import Outline
    from perex.rules.registry import Rule


class Ref(NamedTuple):
    """The place of a tensor in a template of arguments: tensor `number` of the call."""

    number: int


def pack(value: Any, tensors: list[Tensor]) -> Any:
    """Replace the tensors in (nested) arguments by `Ref`s, and list them."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return Ref(len(tensors) - 1)
    if isinstance(value, (list, tuple)):
        return type(value)(pack(item, tensors) for item in value) if type(value) in (list, tuple) else value
    if isinstance(value, dict):
        return {key: pack(item, tensors) for key, item in value.items()}
    return value


def unpack(value: Any, tensors: Sequence[Any]) -> Any:
    """Put tensors back in the places of their `Ref`s."""
    if isinstance(value, Ref):
        return tensors[value.number]
    if type(value) in (list, tuple):
        return type(value)(unpack(item, tensors) for item in value)
    if isinstance(value, dict):
        return {key: unpack(item, tensors) for key, item in value.items()}
    return value


@dataclass(slots=True, eq=False)
class Sharing:
    """Which gradients come with norms, in calls of one form.

    Attributes:
        names: parameters of which the tap is to give `.grad`.
        together: those of them that come out of the same product as their norms.
        decided: whether that has been looked at.
    """

    names: tuple[str, ...] = ()
    together: frozenset[str] = frozenset()
    decided: bool = False


@dataclass(slots=True, eq=False)
class Call:
    """What is known of one operator call when the forward is over; the same for calls that are alike, in any forward.

    `axes[i]` is the batch axis of tensor `i`, or None where it is the same for all examples; `kept` are the numbers of
    the tensors that the rule reads again. `slots` names
    the parameters (or tensors derived from parameters alone) whose gradients are wanted: by argument name
    for an operator with a rule, by attribute name for a module with a rule, by tensor number on the general
    path. There `rows[i]` is the axis of a shared or constant tensor whose rows are aligned with the examples, as
    those of `token.expand(B, -1, -1)` are. `batch` is the number of examples, or of those that have a part in the
    call, `examples`: rows that were routed to an expert are of a few. In all axes these are numbered from 0 then.
    `sharing` says which gradients come with norms; `outlines` what reports say of the gradients that it brought, by the
    forms of the output gradients; `site` what reports say of the call.
    """

    where: str
    func: Callable[..., Any]
    rule: Rule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    axes: list[Held | None]
    slots: dict[Any, Source]
    out_axes: list[Held]
    shapes: list[torch.Size]
    batch: int
    examples: list[int] | None = None
    kept: list[int] = field(default_factory=list)
    rows: dict[int, Held] = field(default_factory=dict)
    sharing: Sharing = field(default_factory=Sharing)
    outlines: dict[Any, list[tuple[Entry, Outline]]] = field(default_factory=dict)
    site: Site | None = None

    @property
    def name(self) -> str:
        """The operator's name."""
        return getattr(self.func, "__name__", str(self.func))

    @property
    def minds(self) -> bool:
        """Whether what the operator does may depend on which of its tensors require grad: it is not torch's own."""
        written_in = getattr(self.func, "__module__", None) or "torch"
        library = written_in.startswith("torch._ops.") and written_in != "torch._ops.aten"
        return library or not written_in.startswith(("torch", "builtins"))

    def template(self, name: str) -> Any:
        """The packed argument called `name`, or None where the call left it out."""
        position = self.rule.arguments.index(name)
        return self.args[position] if position < len(self.args) else self.kwargs.get(name)


class Captured:
    """A call with what its backward brings: the one thing a rule gets to read.

    Half-precision tensors are handed out in float32, so that everything is accumulated in at least that; but as they
    are to rules that say they add up in float32 themselves, on a GPU. These also get what the operator itself read in
    half precision, under autocast.

    Attributes:
        grad: output gradient with examples in front, `(B, *rest)`; see `Axis.front`.
        batch: number of examples, B.
        arrived: the outputs' gradients as they came.
        differentiable: which of the call's tensors gradients went on to, beside parameters.
        left: what running the operator has left, where perex ran it.
    """

    def __init__(
        self, call: Call, saved: Sequence[Tensor], grads: Sequence[Tensor | None], left: object = None
    ) -> None:
        self.call = call
        self.arrived = grads
        self.left = left
        self.batch = call.batch
        self.dtype: torch.dtype | None = None
        if call.rule.narrow:
            first = next((grad for grad in grads if grad is not None), None)
            if first is not None and first.is_cuda and first.dtype in HALVES:
                self.dtype = first.dtype
        self.grads = [None if grad is None else self.read(without_graph(grad)) for grad in grads]
        self.differentiable = [i for i, t in zip(call.kept, saved, strict=True) if t.requires_grad]
        self.tensors: dict[int, Tensor] = {i: without_graph(t) for i, t in zip(call.kept, saved, strict=True)}

    def read(self, tensor: Tensor) -> Tensor:
        """A tensor in the precision that the rule takes."""
        if self.dtype is None:
            return widen(tensor)
        return tensor.to(self.dtype) if tensor.dtype == torch.float32 else tensor

    @property
    def grad(self) -> Tensor:
        """The gradient of the first output, `(B, *rest)`."""
        grad = self.grads[0]
        assert grad is not None
        return self.call.out_axes[0].front(grad, self.batch)

    def examples(self, name: str) -> Tensor:
        """Argument `name` with examples in front, `(B, *rest)`; a constant is given to each example."""
        index = self.call.template(name).number
        axis, value = self.call.axes[index] or self.call.rows.get(index), self.read(self.tensors[index])
        return value.expand(self.batch, *value.shape) if axis is None else axis.front(value, self.batch)

    def rows(self, name: str) -> Tensor:
        """Argument `name` as each example has it when it is alone, `(B, *batch-of-one shape)`."""
        index = self.call.template(name).number
        axis, value = self.call.axes[index] or self.call.rows.get(index), self.read(self.tensors[index])
        return value.expand(self.batch, *value.shape) if axis is None else axis.rows(value, self.batch)

    def value(self, name: str) -> Any:
        """Argument `name` as the operator got it; a tensor must be among those the rule `saves`."""
        template = self.call.template(name)
        if not isinstance(template, Ref):
            return template
        return widen(self.tensors[template.number]) if self.dtype is None else self.tensors[template.number]

    def option(self, name: str, default: Any) -> Any:
        """An argument that is not a tensor, or its default."""
        value = self.call.template(name)
        return default if value is None else value

    def shape(self, name: str) -> torch.Size:
        """The shape of argument `name`, which need not be saved."""
        return self.call.shapes[self.call.template(name).number]

    def wants(self, name: str) -> bool:
        """Whether the gradient of parameter `name` is asked for."""
        return name in self.call.slots


def own_rows(values: Tensor, axis: Held | None, batch: int, shape: torch.Size) -> Factor:
    """The gradients of an argument of which each example reads its own rows, or all (`axis` is None).

    Args:
        values: each example's, as it has the argument when it is alone, `(B, *batch-of-one shape)`.
        axis: where examples are in the argument.
        batch: number of examples, B.
        shape: the argument's shape.
    """
    if axis is None:
        return Dense(values)
    if isinstance(axis, Axis):
        return Aligned(values, axis.dim, shape, partial(axis.rows, batch=batch), partial(axis.unrows, batch=batch))
    return Dense(axis.unrows(values, batch))


def without_graph(tensor: Tensor) -> Tensor:
    """A tensor without gradients."""
    return tensor.detach() if tensor.requires_grad else tensor
