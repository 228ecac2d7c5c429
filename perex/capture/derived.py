"""From a tensor derived from parameters back to the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from perex.capture.parameters import Entry, Shared, Source
from perex.errors import UnsupportedError
from perex.factors import Aligned, Dense, Factor, Part, Place, Rows
from perex.factors.part import once_each
from perex.kernels.products import widen
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
    with torch.enable_grad():
        pulled = {entry: widen(grad) for entry, grad in pull_back(source, factor.dense(0, factor.batch))}
    for entry in source.entries:
        parameter = entry.parameter
        zeros = parameter.new_zeros(factor.batch, *parameter.shape) if entry not in pulled else None
        yield entry, Dense(pulled[entry] if zeros is None else zeros)


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
    return node is stand_in.grad_fn or stand_in.grad_fn is None and getattr(node, "variable", None) is stand_in


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
    (stand_in,), node = shared.stand_ins, passed(tensor.grad_fn, COPIES)
    if node is None or node.name() not in ("ExpandBackward0", "RepeatBackward0"):
        return None
    before = tuple(node._saved_self_sym_sizes)
    shows_it_again = (1,) * (len(row) - len(before)) + before == tuple(row)
    node = passed(node.next_functions[0][0], RESHAPES | COPIES)
    in_order = begins(node, stand_in) and row.numel() == stand_in.numel()
    if not (shows_it_again and in_order) or shared.entries[0].parameter.shape != stand_in.shape:
        return None
    return Place(stand_in.shape, tuple(row), torch.empty(row, device="meta").stride(), 0)


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
    node: Any = shared.tensor.grad_fn
    (stand_in,) = shared.stand_ins
    while node is not None and node.name() in RESHAPES:
        node = node.next_functions[0][0]
    if node is None or node.name() != "EmbeddingBackward0" or node._saved_scale_grad_by_freq:
        return None
    table = node.next_functions[0][0]
    if table is not stand_in.grad_fn and getattr(table, "variable", None) is not stand_in:
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


def pull_back(shared: Shared, grads: Tensor) -> list[tuple[Entry, Tensor]]:
    r"""Per-example gradients of a derived tensor $S(\theta)$ as those of its parameters.

    $\partial \ell_b / \partial \theta = J_S^\top \, \partial \ell_b / \partial S$, one batched
    vector-Jacobian product through the operators that derived it.

    Args:
        shared: the derived tensor.
        grads: `(B, *S.shape)`.

    Returns:
        A pair of parameter and `(B, *parameter.shape)` for each parameter that S depends on.
    """
    if shared.tensor._version != shared.version:
        names = ", ".join(entry.name for entry in shared.entries)
        raise UnsupportedError(
            f"a tensor derived from {names} was changed in place after it had been used: change a clone of it instead"
        )
    grads = grads.to(shared.tensor.dtype)

    def product(grad: Tensor, batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            shared.tensor,
            shared.stand_ins,
            grad,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )

    try:
        found = product(grads, batched=True)
    except RuntimeError:  # an operator without a batched derivative
        each = [product(grad, batched=False) for grad in grads]
        found = tuple(
            None if any(part is None for part in parts) else torch.stack(parts) for parts in zip(*each, strict=True)
        )
    return [(entry, grad) for entry, grad in zip(shared.entries, found, strict=True) if grad is not None]
