"""From a tensor derived from parameters back to the parameters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from perex.capture.parameters import Entry, Shared, Source
from perex.errors import UnsupportedError
from perex.factors import Dense, Factor, Part, Place
from perex.factors.part import once_each
from perex.kernels.products import widen


def of_parameters(source: Source, factor: Factor) -> Iterator[tuple[Entry, Factor]]:
    """The gradients of a parameter, or of what is derived from some, as those of the parameters."""
    if not isinstance(source, Shared):
        yield source, factor
        return
    place = place_of(source)
    if place is not None:
        yield source.entries[0], Part(factor, place)
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
    if node is not stand_in.grad_fn and not (stand_in.grad_fn is None and getattr(node, "variable", None) is stand_in):
        return None
    if tensor.is_conj() or tensor.is_neg() or not once_each(tensor.shape, tensor.stride()):
        return None
    offset = int(tensor.storage_offset()) - int(stand_in.storage_offset())
    return Place(stand_in.shape, tuple(tensor.shape), tensor.stride(), offset)


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
