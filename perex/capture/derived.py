"""From a tensor derived from parameters back to the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from perex.capture.parameters import Entry, Shared, Source
from perex.errors import UnsupportedError
from perex.factors import Aligned, Dense, Derived, Factor, Part, Place, Pulled, Rows
from perex.factors.part import once_each
from perex.kernels.blocks import block, example_blocks
from perex.kernels.pulling import at_a_time, pulled_back
from perex.rules.embedding import keep


def of_parameters(source: Source, factor: Factor) -> Iterator[tuple[Entry, Factor]]:
    """The gradients of a parameter, or of what is derived from some, as those of the parameters."""
    if not isinstance(source, Shared):
        yield source, factor
        return
    if isinstance(factor, Aligned):
        place = place_of_row(source, factor.dim)
        if place is not None:
            yield source.entries[0], Part(factor.row, place)
            return
        shown = shown_again(source, factor.dim)
        if shown is not None:
            yield from of_parameters(shown, Dense(factor.row.values.reshape(factor.batch, *shown.tensor.shape)))
            return
        rows = looked_up(source, Dense(factor.values), factor.own)
        if rows is not None:
            yield source.entries[0], rows
            return
        factor = factor.whole
    place = place_of(source)
    if place is not None:
        yield source.entries[0], Part(factor, place)
        return
    rows = looked_up(source, factor)
    if rows is not None:
        yield source.entries[0], rows
        return
    yield from through_graph(source, factor)


VIEWS = frozenset(
    f"{name}Backward{number}"
    for name in """Alias AsStrided Expand Permute ReshapeAlias Select Slice Split SplitWithSizes Squeeze T Transpose
    Unbind Unsqueeze UnsafeView View""".split()
    for number in range(4)
)
"""Autograd's names of operators that only show elements at other places."""


def place_of(shared: Shared) -> Place | None:
    """Where in its parameter a derived tensor lies, if it is a view of it that shows no element twice."""
    stand_in, tensor = view_of(shared), shared.tensor
    if stand_in is None or not once_each(tensor.shape, tensor.stride()):
        return None
    return Place(stand_in.shape, tuple(tensor.shape), tensor.stride(), offset_in(stand_in, tensor))


def view_of(shared: Shared) -> Tensor | None:
    """The stand-in of the parameter that a derived tensor is a view of, if it is one."""
    if len(shared.entries) != 1:
        return None
    tensor, (stand_in,) = shared.tensor, shared.stand_ins
    parameter = shared.entries[0].parameter
    if tensor.dtype != stand_in.dtype or tensor.layout != torch.strided or not stand_in.is_contiguous():
        return None
    if (
        parameter.shape != stand_in.shape
        or tensor.untyped_storage().data_ptr() != stand_in.untyped_storage().data_ptr()
    ):
        return None
    node = tensor.grad_fn
    while node is not None and node is not stand_in.grad_fn and node.name() in VIEWS:
        node = node.next_functions[0][0]
    if not begins(node, stand_in):
        return None
    return None if tensor.is_conj() or tensor.is_neg() else stand_in


def begins(node: Any, stand_in: Tensor) -> bool:
    """Whether a node of a graph is where it begins, with a stand-in."""
    if stand_in.grad_fn is None:
        return getattr(node, "variable", None) is stand_in
    return node is stand_in.grad_fn


def offset_in(stand_in: Tensor, view: Tensor) -> int:
    """The element of a stand-in with which a view of it begins."""
    return int(view.storage_offset()) - int(stand_in.storage_offset())


def place_of_row(shared: Shared, dim: int) -> Place | None:
    """Where in its parameter a row of a derived tensor lies along a dimension, if all rows are this one.

    So it is after `expand`, which shows the row again and again, and after `repeat`, or a copy of either.
    """
    tensor, stand_in = shared.tensor, view_of(shared)
    row = torch.Size([1 if d == dim else size for d, size in enumerate(tensor.shape)])
    if stand_in is not None:
        same = tensor.shape[dim] == 1 or tensor.stride(dim) == 0
        found = same and once_each(row, tensor.stride())
        return Place(stand_in.shape, tuple(row), tensor.stride(), offset_in(stand_in, tensor)) if found else None
    if len(shared.entries) != 1 or tensor._version != shared.version:
        return None
    (stand_in,), before = shared.stand_ins, made_from(shared, dim)
    if before is None:
        return None
    in_order = begins(passed(before[0], RESHAPES | COPIES), stand_in) and row.numel() == stand_in.numel()
    if not in_order or shared.entries[0].parameter.shape != stand_in.shape:
        return None
    return Place(stand_in.shape, tuple(row), torch.empty(row, device="meta").stride(), 0)


def shown_again(shared: Shared, dim: int) -> Shared | None:
    """The derived tensor that all rows along a dimension are, if there is one."""
    before, shown = made_from(shared, dim), shared.shown
    if before is None or shown is None or shared.tensor._version != shared.version:
        return None
    whole = shown.tensor.numel() * shared.tensor.shape[dim] == shared.tensor.numel()
    return shown if whole and before == (shown.tensor.grad_fn, shown.tensor.output_nr) else None


def made_from(shared: Shared, dim: int) -> tuple[Any, int] | None:
    """The node, and which of its results, that `expand` or `repeat` shows again in each row along a dimension."""
    node = passed(shared.tensor.grad_fn, COPIES)
    if node is None or node.name() not in ("ExpandBackward0", "RepeatBackward0"):
        return None
    row = [1 if d == dim else size for d, size in enumerate(shared.tensor.shape)]
    before = list(node._saved_self_sym_sizes)
    found: tuple[Any, int] = node.next_functions[0]
    return found if [1] * (len(row) - len(before)) + before == row else None


def passed(node: Any, names: frozenset[str]) -> Any:
    """The first node of a graph, going back, whose name is none of these."""
    while node is not None and node.name() in names:
        node = node.next_functions[0][0]
    return node


COPIES = frozenset({"CloneBackward0", "ToCopyBackward0"})
"""Autograd's names of operators that copy."""

RESHAPES = frozenset(f"{name}Backward0" for name in "Alias ReshapeAlias Squeeze UnsafeView Unsqueeze View".split())
"""Likewise, of those that show all elements in their order."""


def looked_up(shared: Shared, factor: Factor, own: Callable[[Tensor], Tensor] | None = None) -> Rows | None:
    """The gradients of a table of which a derived tensor is rows in some order, as position embeddings are.

    Args:
        shared: the derived tensor.
        factor: its gradients, or those of each example's own rows.
        own: then, what brings a tensor of its shape to `(B, *batch-of-one shape)`.
    """
    if len(shared.entries) != 1 or not isinstance(factor, Dense) or not shared.tensor.is_contiguous():
        return None
    if shared.spared:  # the running backward is to ask for the ids itself
        return None
    node: Any = shared.tensor.grad_fn
    (stand_in,) = shared.stand_ins
    while node is not None and node.name() in RESHAPES:
        node = node.next_functions[0][0]
    if node is None or node.name() != "EmbeddingBackward0" or node._saved_scale_grad_by_freq:
        return None
    table = node.next_functions[0][0]
    if not begins(table, stand_in):
        return None
    ids, (size, width) = node._saved_indices.reshape(1, -1), stand_in.shape
    if ids.numel() * width != shared.tensor.numel() or shared.tensor._version != shared.version:
        return None
    if own is None:
        ids = ids.expand(factor.batch, -1)
    elif shared.tensor.shape[-1] == width:
        ids = own(ids.reshape(*shared.tensor.shape[:-1], 1)).reshape(factor.batch, -1)
    else:
        return None
    padding = node._saved_padding_idx  # 2**64 - 1 where there is none
    grads = factor.values.reshape(factor.batch, ids.shape[1], width)
    return Rows(ids, keep(ids, grads, padding if padding < size else None, size), shared.entries[0].parameter.shape)


def through_graph(shared: Shared, factor: Factor) -> Iterator[tuple[Entry, Factor]]:
    r"""The gradients of a derived tensor $S(\theta)$ as those of its parameters, by the graph of what derived it.

    $\partial \ell_b / \partial \theta = J_S^\top \, \partial \ell_b / \partial S$. What is small is pulled back at
    once, some examples at a time; large parameters' gradients when they are reduced, and no more of them than that.
    """
    tensor, batch = shared.tensor, factor.batch
    if tensor._version != shared.version:
        names = ", ".join(entry.name for entry in shared.entries)
        raise UnsupportedError(
            f"a tensor derived from {names} was changed in place after it had been used: change a clone of it instead"
        )
    sources = list(zip(shared.entries, shared.stand_ins, strict=True))
    small = [source for entry, source in sources if batch * source.numel() <= block()]
    found: dict[int, Tensor] = {}
    if small:
        step = batch if batch * tensor.numel() <= block() else at_a_time(batch, tensor.numel())
        parts = [pulled_back(tensor, small, factor.dense(i, j)) for i, j in example_blocks(batch, 0, step)]
        found = {id(source): torch.cat(grads) for source, grads in zip(small, zip(*parts, strict=True), strict=True)}
    for entry, source in sources:
        if id(source) in found:
            yield entry, Dense(found[id(source)])
        else:
            yield entry, Pulled(factor, Derived(tensor, source), source.shape)
