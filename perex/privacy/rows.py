"""What a criterion is given: from which forward it is, and whose each row is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from perex.capture.axis import Axis, Held
from perex.capture.forward import Forward
from perex.capture.suspects import nodes
from perex.privacy.errors import PrivacyError


class Edges(Protocol):
    """Where the examples are in a model's outputs, by node and place in the graph."""

    def __contains__(self, result: tuple[Any, int]) -> bool: ...

    def __getitem__(self, result: tuple[Any, int]) -> Held: ...


RESHAPES = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
"""Nodes that keep numbers in order, and know the shape they came in."""

ROW_BY_ROW = {
    f"{name}Backward0"
    for name in (
        "ToCopy",
        "Clone",
        "Alias",
        "Neg",
        "Mul",
        "Div",
        "Exp",
        "Log",
        "Clamp",
        "Sigmoid",
        "LogSigmoid",
        "Tanh",
    )
}
"""Nodes that keep rows where they are."""

BY_DIMENSION = ("LogSoftmaxBackward0", "SoftmaxBackward0", "SelectBackward0", "SliceBackward0", "SqueezeBackward1",
                "SumBackward1", "MeanBackward1")  # fmt: skip
"""Nodes that work along dimensions, which they know."""

TOGETHER = ("AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0")
"""Nodes that keep rows where they are, of several tensors."""


def forwards_in(values: Iterable[Tensor], receiver: object) -> Iterator[Forward]:
    """The forwards of one model in the graph of some tensors, one after the other, perhaps several times."""
    for node in nodes(tensor.grad_fn for tensor in values):
        tapped = getattr(node, "tapped", None)
        if tapped is not None and tapped.forward.receiver is receiver:
            yield tapped.forward


def forwards_behind(values: Iterable[Tensor], receiver: object) -> set[Forward]:
    """The forwards of one model that some tensors depend on."""
    return set(forwards_in(values, receiver))


class RowCheck:
    """Finds arguments of a criterion of whose rows perex would have to guess whose they are.

    A tensor with a row for each example is taken for the examples'. One with several for each, one example's after the
    other's, has to be a reshaped tensor of the examples, or to come beside outputs that are.
    """

    def __init__(self) -> None:
        self.known: set[tuple[int, int]] = set()  # places whose tensors have turned out to be of the examples
        self.lengths: dict[int | str, int] = {}  # of lists of numbers among the arguments
        self.doubtful = False  # whether examples may be mixed between the model and the latest arguments

    def refusals(self, values: Sequence[Tensor], batch: int, edges: Edges) -> dict[int, Exception]:
        """Those tensors, by their id, and what their use is to raise.

        Args:
            values: all tensors that the criterion is given.
            batch: number of examples.
            edges: of the model's latest outputs.
        """
        refused: dict[int, Exception] = {}
        self.doubtful = False
        if batch < 2:  # all is the only example's
            return refused
        self.doubtful = not all(is_apart(tensor, batch, edges) for tensor in values if tensor.grad_fn is not None)
        explained: set[int] = set()
        with_rows = [tensor for tensor in values if tensor.dim() and len(tensor) and len(tensor) % batch == 0]
        for tensor in with_rows:
            if tensor.grad_fn is None or len(tensor) == batch and (tensor.grad_fn, tensor.output_nr) not in edges:
                continue
            if in_order(tensor, batch, edges):
                explained.add(len(tensor))
            else:
                refused[id(tensor)] = PrivacyError(unexplained(tensor, batch))
        for tensor in with_rows:
            if tensor.grad_fn is None and len(tensor) > batch and len(tensor) not in explained:
                if not is_reshaped(tensor, batch):
                    refused[id(tensor)] = PrivacyError(unexplained(tensor, batch))
        for place, tensor in enumerate(values):
            if tensor.grad_fn is None and tensor.shape == (batch,) and tensor.is_floating_point():
                if any(batch in other.shape[1:] for other in values if other is not tensor):
                    if (len(values), place) not in self.known:
                        refused[id(tensor)] = PrivacyError(ambiguous(batch))
                else:
                    self.known.add((len(values), place))
        return refused

    def refuse_lists(self, arguments: Iterable[tuple[int | str, Any]], batch: int) -> None:
        """Raise if a list or an array among the arguments may hold a number of each example: all would get all of it.

        One that once had another length than the batch is shared.
        """
        for place, value in arguments:
            count = how_many(value)
            if count is None or batch < 2 or self.lengths.get(place, batch) != batch:
                continue
            if count != batch:
                self.lengths[place] = -1
                continue
            raise PrivacyError(
                f"criterion: a {type(value).__name__} of {batch} numbers, as many as there are examples, would go to "
                "each example as a whole. Hand over a tensor, whose rows are the examples'; if it is shared, make it "
                "part of the criterion (functools.partial, or an attribute)"
            )


def how_many(value: Any) -> int | None:
    """How many numbers a list, tuple or array holds, or rows of them; None of what is neither."""
    if isinstance(value, (list, tuple)) and not any(isinstance(item, Tensor) for item in value):
        return len(value)
    return len(value) if isinstance(value, np.ndarray) and value.ndim else None


def in_order(tensor: Tensor, batch: int, edges: Edges) -> bool:
    """Whether the rows of an output, or of what was made of it, are one example's after the other's."""
    node, number = tensor.grad_fn, tensor.output_nr
    while node is not None:
        if (node, number) in edges:
            return is_grouped(edges[node, number], batch)
        sources = [source for source in node.next_functions if source[0] is not None]
        if len(sources) != 1 or node.name() not in (*RESHAPES, *ROW_BY_ROW) and not is_along_others(node):
            return False
        if node.name() in RESHAPES and sources[0] not in edges:
            if int(node._saved_self_sym_sizes[0]) == batch:  # type: ignore[attr-defined]
                return True
        node, number = sources[0]
    return False


def is_apart(tensor: Tensor, batch: int, edges: Edges) -> bool:
    """Whether each row of an output, or of what was made of it, is certain to be of one example alone."""
    waiting = [(tensor.grad_fn, tensor.output_nr)]
    while waiting:
        node, number = waiting.pop()
        if (node, number) in edges:
            if not is_grouped(edges[node, number], batch):
                return False
            continue
        sources = [source for source in node.next_functions if source[0] is not None] if node is not None else []
        if node is None or not sources or len(sources) > 1 and node.name() not in TOGETHER:
            return False
        shape = shape_of(node, number)
        if not shape or shape[0] % batch:  # a row of several examples'
            return False
        if node.name() in (*ROW_BY_ROW, *TOGETHER):
            others = [shape_of(*source) for source in sources]
            if any(len(other) != len(shape) or other[0] != shape[0] for other in others):  # a row for each column
                return False
        elif node.name() not in RESHAPES and not is_along_others(node):
            return False
        waiting += sources
    return True


def shape_of(node: Any, number: int) -> tuple[int, ...]:
    """The shape of a node's result; of one that does not say, that of a number."""
    known = getattr(node, "_input_metadata", ())
    return tuple(known[number].shape) if number < len(known) else ()


def is_along_others(node: Any) -> bool:
    """Whether a node works along other dimensions than the first."""
    if node.name() not in BY_DIMENSION:
        return False
    dims = node._saved_dim if isinstance(node._saved_dim, tuple) else (node._saved_dim,)
    sizes = node._saved_result.shape if hasattr(node, "_saved_result") else node._saved_self_sym_sizes
    signed = [dim - 2**64 if dim >= 2**63 else dim for dim in dims]
    return bool(dims) and all(dim % len(sizes) for dim in signed)


def is_grouped(axis: Held, batch: int) -> bool:
    """Whether rows are the first example's, then the second's, and so on, as many of each."""
    if not isinstance(axis, Axis) or axis.dim:
        return False
    ids = axis.ids(batch)
    return len(ids) % batch == 0 and torch.equal(
        ids, torch.arange(batch, device="cpu").repeat_interleave(len(ids) // batch)
    )


def is_reshaped(tensor: Tensor, batch: int) -> bool:
    """Whether a tensor without a graph is all of another one, in order, that has a row for each example."""
    base = tensor._base
    if base is None or base.dim() == 0 or len(base) != batch or base.numel() != tensor.numel():
        return False
    return base.is_contiguous() and tensor.is_contiguous()


def unexplained(tensor: Tensor, batch: int) -> str:
    """What to say of one."""
    made = f", made by {tensor.grad_fn.name()}," if tensor.grad_fn is not None else ""
    return (
        f"criterion: a tensor of shape {tuple(tensor.shape)}{made} has not one row for each of the {batch} examples, "
        "in their order, and whose each of its rows is cannot be told: after a selection (`out[mask]`) an example may "
        "have more rows than another. Hand over tensors (B, ...), or flatten these by `.view(-1, ...)`, and leave rows "
        "out by ignore_index or by weights of zero; what all examples share can be part of the criterion"
    )


def ambiguous(batch: int) -> str:
    """What to say of a vector that may be of the examples, or of features of which there are as many."""
    return (
        f"criterion: a tensor of shape ({batch},) may be one number for each of the {batch} examples, or be shared by "
        f"them, for another argument has {batch} columns. If it is shared, make it part of the criterion "
        "(functools.partial, or an attribute); if not, give it a second dimension, `.unsqueeze(1)`, or begin with a "
        "batch of another size"
    )
