"""Families of operators on dimensions: views, indexing, concatenation, gathering."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perex.capture.axis import NOBODY, Axis, Label, Single, after_reshape, arranged
from perex.capture.carry import FAMILIES, JOINS, Operation, dims_of, family, normal, result_tensor
from perex.capture.families.elementwise import aligned


def only(op: Operation) -> tuple[Tensor, Axis] | None:
    """The first argument, when it alone has a batch axis."""
    batched = op.batched()
    first = op.args[0] if op.args else op.kwargs.get("input")
    return batched[0] if len(batched) == 1 and batched[0][0] is first else None


@family("reshape view flatten unflatten ravel view_as reshape_as unsafe_view", in_place=False)
def reshape(op: Operation) -> Label:
    """Any change of shape that keeps the order of the elements."""
    source, out = op.args[0], result_tensor(op)
    axis = op.axis(source)
    if axis is None:  # only the shape of the other argument was read
        return None
    if source.numel() != out.numel():
        return op.unknown("reads the bytes as another type")
    return after_reshape(source.shape, out.shape, axis, op.batch) or op.mixed("puts examples into one row")


def permuted(op: Operation, order: list[int]) -> Label:
    """The axis after `permute(order)`."""
    found = only(op)
    return found[1].moved(order.index(found[1].dim)) if found else op.unknown()


@family("transpose swapaxes swapdims", in_place=False)
def transpose(op: Operation) -> Label:
    """`transpose(input, dim0, dim1)`."""
    ndim = op.args[0].dim()
    first = normal(op.arg(1, "dim0", op.kwargs.get("axis0")), ndim)
    second = normal(op.arg(2, "dim1", op.kwargs.get("axis1")), ndim)
    order = list(range(ndim))
    order[first], order[second] = order[second], order[first]
    return permuted(op, order)


@family("t adjoint", in_place=False)
def transpose_last(op: Operation) -> Label:
    """The last two dimensions exchanged."""
    order = list(range(op.args[0].dim()))
    if len(order) > 1:
        order[-1], order[-2] = order[-2], order[-1]
    return permuted(op, order)


for _name in ("mT", "mH", "H"):
    FAMILIES[getattr(Tensor, _name).__get__] = transpose_last


def _reversed(op: Operation) -> Label:
    """`x.T`: all dimensions in reverse."""
    return permuted(op, list(range(op.args[0].dim()))[::-1])


def _same(op: Operation) -> Label:
    """`x.real` and the like."""
    return aligned(op)


FAMILIES[getattr(Tensor, "T").__get__] = _reversed  # noqa: B009  (a descriptor, which types call a Tensor)
for _name in ("real", "imag", "data"):
    FAMILIES[getattr(Tensor, _name).__get__] = _same


@family("permute", in_place=False)
def permute(op: Operation) -> Label:
    """`permute(input, dims)`, or `x.permute(*dims)`."""
    dims = op.arg(1, "dims")
    dims = op.args[1:] if isinstance(dims, int) else dims
    return permuted(op, [normal(int(d), op.args[0].dim()) for d in dims])


@family("movedim moveaxis", in_place=False)
def movedim(op: Operation) -> Label:
    """`movedim(input, source, destination)`."""
    ndim = op.args[0].dim()
    source = dims_of(op.arg(1, "source"), ndim)
    target = dims_of(op.arg(2, "destination"), ndim)
    rest = iter(d for d in range(ndim) if d not in source)
    moved = dict(zip(target, source, strict=True))
    return permuted(op, [moved[d] if d in moved else next(rest) for d in range(ndim)])


@family("unsqueeze", in_place=False)
def unsqueeze(op: Operation) -> Label:
    """A new dimension of size one."""
    found = only(op)
    if found is None:
        return op.unknown()
    dim = normal(op.arg(1, "dim"), result_tensor(op).dim())
    return found[1].moved(found[1].dim + (found[1].dim >= dim))


@family("squeeze", in_place=False)
def squeeze(op: Operation) -> Label:
    """Dimensions of size one dropped; with one example the batch axis itself may go."""
    found = only(op)
    if found is None:
        return op.unknown()
    tensor, axis = found
    dim = op.arg(1, "dim")
    dims = [d for d in dims_of(dim, tensor.dim()) if tensor.size(d) == 1]
    if axis.dim not in dims:
        return axis.moved(axis.dim - sum(d < axis.dim for d in dims))
    return op.reduced()  # there is one example in the batch


@family("repeat tile", in_place=False)
def repeat(op: Operation) -> Label:
    """Whole copies of the tensor side by side."""
    found = only(op)
    if found is None:
        return op.unknown()
    tensor, axis = found
    out = result_tensor(op)
    dim = axis.dim + out.dim() - tensor.dim()
    size = tensor.size(axis.dim)
    times = out.size(dim) // size if size else 1
    if axis.owners is not None:
        return arranged(dim, axis.owners.ids.repeat(times), op.batch)
    return Axis(dim, axis.outer * times, axis.inner)


@family("repeat_interleave", in_place=False)
def repeat_interleave(op: Operation) -> Label:
    """Every row several times in a row: all as often, or each as a tensor says."""
    tensor, repeats, dim = op.arg(0, "input"), op.arg(1, "repeats"), op.arg(2, "dim")
    axis, times = op.axis(tensor), op.axis(repeats)
    if repeats is None:  # row i as often as entry i says, counted from 0
        return op.unknown()
    if dim is None:
        if axis is not None and tensor.dim() > 1:
            return op.unknown()
        dim = 0
    dim = normal(dim, tensor.dim())
    if axis is None or axis.dim != dim:
        return op.mixed() if times is not None else axis
    if times is not None and op.agreed([axis.moved(0), times]) != axis.moved(0):
        return op.mixed()
    if isinstance(repeats, int) and axis.owners is None:
        return axis._replace(inner=axis.inner * repeats)
    count = repeats.cpu() if isinstance(repeats, Tensor) else repeats
    op.sized = isinstance(repeats, Tensor)
    return arranged(dim, axis.ids(op.batch).repeat_interleave(count), op.batch)


def picked(op: Operation, dim: int, index: Any) -> Label:
    """After rows `index` of dimension `dim` were taken, in this order; for a number the dimension is gone."""
    found = only(op)
    if found is None:
        return op.unknown()
    tensor, axis = found
    dim = normal(dim, tensor.dim())
    if axis.dim == dim:
        owners = axis.ids(op.batch)[index]
        return Single(int(owners)) if isinstance(index, int) else arranged(dim, owners, op.batch)
    return axis.moved(axis.dim - 1) if isinstance(index, int) and dim < axis.dim else axis


@family("select", in_place=False)
def select(op: Operation) -> Label:
    """`select(input, dim, index)`."""
    return picked(op, op.arg(1, "dim"), int(op.arg(2, "index")))


@family("narrow", in_place=False)
def narrow(op: Operation) -> Label:
    """`narrow(input, dim, start, length)`."""
    start = int(op.arg(2, "start"))
    size = op.args[0].size(op.arg(1, "dim"))
    start = start + size if start < 0 else start
    return picked(op, op.arg(1, "dim"), slice(start, start + int(op.arg(3, "length"))))


@family("diff", in_place=False)
def diff(op: Operation) -> Label:
    """Differences of neighbours along a dimension."""
    found = only(op)
    if found is None:
        return op.unknown()
    return op.mixed() if normal(op.arg(2, "dim", -1), found[0].dim()) == found[1].dim else found[1]


@family("split chunk tensor_split split_with_sizes unbind", in_place=False)
def split(op: Operation) -> Label | list[Label]:
    """Pieces along a dimension; pieces of the batch axis hold whole batches or are not followed."""
    found = only(op)
    if found is None:
        return op.unknown()
    tensor, axis = found
    position = 1 if op.name == "unbind" else 2
    dim = normal(op.arg(position, "dim", 0), tensor.dim())
    if dim != axis.dim:
        return axis.moved(axis.dim - 1) if op.name == "unbind" and dim < axis.dim else axis
    owners = axis.ids(op.batch)
    if op.name == "unbind":
        return [Single(int(b)) if b != NOBODY else None for b in owners]
    labels: list[Label] = []
    for piece in op.out:
        labels.append(arranged(dim, owners[: piece.size(dim)], op.batch))
        owners = owners[piece.size(dim) :]
    return labels


@family("cat concat concatenate", in_place=False)
def cat(op: Operation) -> Label:
    """Side by side along a dimension; what is put beside examples and is none is nobody's."""
    parts = list(op.arg(0, "tensors"))
    dim = normal(op.arg(1, "dim", 0), result_tensor(op).dim())
    full = [part for part in parts if part.numel()] or parts  # what is empty has nobody's rows
    axes = {axis for part in full if (axis := op.axis(part)) is not None}
    singles = [single for part in full if isinstance(single := op.held(part), Single)]
    if axes and not singles and all(axis.dim != dim for axis in axes):
        return op.agreed(axes)
    if any(axis.dim != dim for axis in axes):
        return op.mixed("pairs examples with each other")
    owners = []
    for part in full:
        held = op.held(part)
        if isinstance(held, Axis):
            owners.append(held.ids(op.batch))
        else:
            owners.append(
                torch.full((part.size(dim),), held.example if isinstance(held, Single) else NOBODY, device="cpu")
            )
    return arranged(dim, torch.cat(owners), op.batch)


@family("stack", in_place=False)
def stack(op: Operation) -> Label:
    """A new dimension, one entry a tensor; each may be of one example."""
    parts = list(op.arg(0, "tensors"))
    axes = {axis for _, axis in op.batched()}
    singles = [op.held(part) for part in parts]
    dim = normal(op.arg(1, "dim", 0), result_tensor(op).dim())
    if not axes:
        owners = [single.example if isinstance(single, Single) else NOBODY for single in singles]
        return arranged(dim, torch.tensor(owners, device="cpu"), op.batch)
    if any(isinstance(single, Single) for single in singles):
        return op.mixed("pairs examples with each other")
    axis = op.agreed(axes)
    return axis.moved(axis.dim + (axis.dim >= dim)) if isinstance(axis, Axis) else axis


def pad_sequence(op: Operation) -> Label:
    """Sequences of different lengths under each other, `(N, T, ...)` or with time first."""
    sequences, batch_first = op.arg(0, "sequences"), op.arg(1, "batch_first", False)
    owners = [held.example if isinstance(held := op.held(t), Single) else NOBODY for t in sequences]
    return (
        op.unknown()
        if op.batched()
        else arranged(0 if batch_first else 1, torch.tensor(owners, device="cpu"), op.batch)
    )


FAMILIES[torch._C._nn.pad_sequence] = pad_sequence
JOINS.update((cat, stack, pad_sequence))


@family("pad", in_place=False)
def pad(op: Operation) -> Label:
    """`pad(input, (left, right, top, bottom, ...))`, from the last dimension on."""
    found = only(op)
    if found is None:
        return op.unknown()
    tensor, axis = found
    sizes = list(op.arg(1, "pad"))
    back = tensor.dim() - 1 - axis.dim
    return op.unknown("pads the batch axis") if any(sizes[2 * back : 2 * back + 2]) else axis


@family("view_as_real view_as_complex", in_place=False)
def complex_view(op: Operation) -> Label:
    """A last dimension of real and imaginary part, added or taken away."""
    tensor, axis = op.batched()[0]
    return op.unknown() if op.name == "view_as_complex" and axis.dim == tensor.dim() - 1 else axis
