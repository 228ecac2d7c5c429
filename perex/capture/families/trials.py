"""Operators that are followed by trying them: on the examples' numbers, or on each example alone."""

from __future__ import annotations

import torch
from torch import Tensor

from perex.capture.axis import NOBODY, Axis, Label, Single, arranged
from perex.capture.carry import JOINS, TRY, Operation, family, tensors_in
from perex.capture.families.indexing import by_row, one_owner
from perex.capture.precision import precision
from perex.rules.call import pack, unpack

FEW = 16
"""Up to so many examples an operator is tried on all of them, and from there on at both ends and in the middle."""


@family(
    """
    as_strided diagonal rot90 atleast_1d atleast_2d atleast_3d hstack vstack dstack column_stack row_stack
    broadcast_tensors meshgrid cartesian_prod block_diag combinations tril_indices hsplit vsplit dsplit
    """,
    in_place=False,
)
def moves(op: Operation) -> Label | list[Label]:
    """Operators that only move elements: run on whose each element is, they say whose each element of a result is."""
    tensors: list[Tensor] = []
    args, kwargs = pack((op.args, op.kwargs), tensors)
    if op.name == "as_strided":
        return strided(op, tensors[0], op.results[0])
    numbers = [owners(op, tensor) for tensor in tensors]
    with torch._C.DisableTorchFunction(), torch.no_grad():
        found = tensors_in(op.func(*unpack(args, numbers), **unpack(kwargs, numbers)))
    return [whose(op, result.cpu() - 1) for result in found]


def strided(op: Operation, tensor: Tensor, result: Tensor) -> Label:
    """The label of a view with strides of its own, which must stay within the memory that `tensor` itself fills."""
    start = int(result.storage_offset()) - int(tensor.storage_offset())
    reach = sum(stride * (size - 1) for size, stride in zip(result.shape, result.stride(), strict=True))
    if not fills_memory(tensor) or start < 0 or start + reach >= tensor.numel():
        return op.unknown("reads memory that other tensors share")
    with torch._C.DisableTorchFunction(), torch.no_grad():
        memory = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.int64).copy_(owners(op, tensor))
        return whose(op, memory.as_strided(result.shape, result.stride(), start) - 1)


def fills_memory(tensor: Tensor) -> bool:
    """Whether a tensor's elements lie side by side, in whatever order of dimensions."""
    dense = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != dense:
            return False
        dense *= size
    return True


def owners(op: Operation, tensor: Tensor) -> Tensor:
    """The example of each element, counted from 1, in a tensor of the same shape; 0 is nobody's."""
    held = op.held(tensor)
    numbers = torch.empty(tensor.size(), dtype=torch.int64, device="cpu")
    if isinstance(held, Axis):
        shape = [-1 if d == held.dim else 1 for d in range(tensor.dim())]
        return numbers.copy_(held.ids(op.batch).reshape(shape) + 1)
    return numbers.fill_(0 if held is None else held.example + 1)


def whose(op: Operation, numbers: Tensor) -> Label:
    """The label of a tensor from the example of each of its elements."""
    if not bool((numbers != NOBODY).any()):
        return None
    if numbers.dim() == 0:
        return Single(int(numbers))
    for dim in range(numbers.dim()):
        rows = by_row(numbers, dim)
        if one_owner(rows):
            return arranged(dim, rows.amax(1), op.batch)
    return op.mixed("puts examples into one row")


JOINS.add(moves)


def tried(op: Operation) -> Label | list[Label] | None:
    """Run an operator that is in no family on single examples: where these give their rows of the result, follow it.

    Returns:
        Labels of the results; None where they are not the rows of the examples alone, or cannot be compared.
    """
    op.valued = True
    tensors: list[Tensor] = []
    args, kwargs = pack((op.args, op.kwargs), tensors)
    name: str = getattr(op.func, "__name__", "")
    if not op.results or not tensors or kwargs.get("out") is not None or name.endswith("_"):
        return None
    examples = range(op.batch) if op.batch <= FEW else (0, 1, op.batch // 2, op.batch - 2, op.batch - 1)
    try:
        labels: list[set[Axis]] = [candidates(op, result) for result in op.results]
        with torch._C.DisableTorchFunction(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            rows = [held.rows(t.detach(), op.batch) if (held := op.axis(t)) else t.detach() for t in tensors]
            for b in examples:
                own = [r[b] if op.axis(t) else r for r, t in zip(rows, tensors, strict=True)]
                alone = tensors_in(op.func(*unpack(args, own), **unpack(kwargs, own)))
                if len(alone) != len(op.results):
                    return None
                for place, (one, result) in enumerate(zip(alone, op.results, strict=True)):
                    fits = {axis for axis in labels[place] if same(axis.rows(result.detach(), op.batch)[b], one)}
                    labels[place] = fits
    except Exception:  # whatever it raises where it is called in another way than it was made for
        return None
    if not all(labels):
        return None
    return [min(found) for found in labels]


def candidates(op: Operation, result: Tensor) -> set[Axis]:
    """Where the examples may be in a result: one row each, or several in a run."""
    sizes = enumerate(result.shape)
    return {Axis(dim, 1, size // op.batch) for dim, size in sizes if size and size % op.batch == 0}


def same(own: Tensor, alone: Tensor) -> bool:
    """Whether an example's rows of a result are what it gets alone, to rounding."""
    if own.shape != alone.shape or own.dtype != alone.dtype:
        return False
    if not own.is_floating_point() and not own.is_complex():
        return torch.equal(own, alone)
    finest = precision(own)
    size = float(alone.abs().nan_to_num(0, 0, 0).max()) if alone.numel() else 0.0
    return torch.allclose(own, alone, rtol=finest**0.75, atol=finest**0.75 * (size or 1), equal_nan=True)


TRY.append(tried)
