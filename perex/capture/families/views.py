"""Families of operators on dimensions: views, indexing, concatenation, gathering."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perex.capture.axis import Axis, Label, after_reshape
from perex.capture.carry import FAMILIES, Operation, dims_of, family, normal, result_tensor
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
    return Axis(dim, axis.outer * times, axis.inner)


@family("repeat_interleave", in_place=False)
def repeat_interleave(op: Operation) -> Label:
    """Every row several times in a row: with a number of times, or a tensor of them for other dims."""
    found = only(op)
    dim = op.arg(2, "dim")
    if found is None or dim is None or not isinstance(op.arg(1, "repeats"), int):
        return op.unknown()
    tensor, axis = found
    return axis._replace(inner=axis.inner * op.arg(1, "repeats")) if normal(dim, tensor.dim()) == axis.dim else axis


def picked(op: Operation, dim: int, drops: bool) -> Label:
    """After some rows of dimension `dim` were taken; `drops` when the dimension is gone."""
    found = only(op)
    if found is None:
        return op.unknown()
    tensor, axis = found
    dim = normal(dim, tensor.dim())
    if axis.dim == dim:
        return axis if not drops and op.out_is_whole(dim, tensor) else op.unknown("picks examples by position")
    return axis.moved(axis.dim - 1) if drops and dim < axis.dim else axis


@family("select", in_place=False)
def select(op: Operation) -> Label:
    """`select(input, dim, index)`."""
    return picked(op, op.arg(1, "dim"), drops=True)


@family("narrow index_select slice", in_place=False)
def narrow(op: Operation) -> Label:
    """`narrow(input, dim, start, length)`, `index_select(input, dim, index)`."""
    found = only(op)
    ids = op.arg(2, "index")
    own = op.axis(ids)
    if op.name == "index_select" and own is not None and len(op.batched()) == 1:  # a table looked up
        return own.moved(normal(op.arg(1, "dim"), op.args[0].dim()))
    if found is not None and op.name == "index_select" and normal(op.arg(1, "dim"), found[0].dim()) == found[1].dim:
        return op.unknown("picks examples by position")
    return picked(op, op.arg(1, "dim"), drops=False)


@family("diff", in_place=False)
def diff(op: Operation) -> Label:
    """Differences of neighbours along a dimension."""
    found = only(op)
    if found is None:
        return op.unknown()
    return op.mixed() if normal(op.arg(2, "dim", -1), found[0].dim()) == found[1].dim else found[1]


@family("split chunk tensor_split split_with_sizes hsplit vsplit dsplit unbind", in_place=False)
def split(op: Operation) -> Label | list[Label]:
    """Pieces along a dimension; pieces of the batch axis hold whole batches or are not followed."""
    found = only(op)
    if found is None or op.name in ("hsplit", "vsplit", "dsplit"):
        return op.unknown()
    tensor, axis = found
    position = 1 if op.name == "unbind" else 2
    dim = normal(op.arg(position, "dim", 0), tensor.dim())
    if dim != axis.dim:
        return axis.moved(axis.dim - 1) if op.name == "unbind" and dim < axis.dim else axis
    block = op.batch * axis.inner
    if op.name == "unbind" or block == 0 or any(piece.size(dim) % block for piece in op.out):
        return op.unknown("splits the batch")
    return [Axis(dim, piece.size(dim) // block, axis.inner) for piece in op.out]


@family("cat concat concatenate", in_place=False)
def cat(op: Operation) -> Label:
    """Side by side along a dimension; several batches along the batch axis are kept apart."""
    parts = list(op.arg(0, "tensors"))
    dim = op.arg(1, "dim", op.kwargs.get("axis", 0))
    axes = {axis for _, axis in op.batched()}
    out = result_tensor(op)
    dim = normal(dim, out.dim())
    if all(axis.dim != dim for axis in axes):
        return axes.pop() if len(axes) == 1 else op.mixed("pairs examples with each other")
    inner = {(axis.dim, axis.inner) for axis in axes}
    if len(inner) != 1 or any(op.axis(part) is None for part in parts if part.numel()):
        return op.unknown("puts other rows beside the examples")
    return Axis(dim, sum(axis.outer for part in parts if (axis := op.axis(part))), inner.pop()[1])


@family("stack", in_place=False)
def stack(op: Operation) -> Label:
    """A new dimension, one entry a tensor."""
    axes = {axis for _, axis in op.batched()}
    if len(axes) != 1:
        return op.mixed("pairs examples with each other")
    axis = axes.pop()
    return axis.moved(axis.dim + (axis.dim >= normal(op.arg(1, "dim", 0), result_tensor(op).dim())))


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


@family("gather scatter scatter_add scatter_reduce take_along_dim index_add index_copy index_fill")
def gather(op: Operation) -> Label:
    """Positions along one dimension; the other dimensions of all arguments are aligned."""
    dim = op.arg(2 if op.name == "take_along_dim" else 1, "dim")
    out = result_tensor(op)
    if dim is None:
        return op.unknown()
    axes = {axis for _, axis in op.batched()}
    if len(axes) != 1:
        return op.mixed("pairs examples with each other")
    axis = axes.pop()
    if axis.dim == normal(dim, out.dim()) or out.size(axis.dim) != axis.size(op.batch):
        return op.mixed()
    if op.name.startswith("index") and op.axis(op.arg(2, "index")) is not None:
        return op.mixed("picks positions that differ between examples")
    return axis


@family("take", in_place=False)
def take(op: Operation) -> Label:
    """`take(input, ids)`: entries of the flattened input."""
    ids = op.args[1]
    return op.axis(ids) if op.only(ids) else op.unknown()


@family("view_as_real view_as_complex", in_place=False)
def complex_view(op: Operation) -> Label:
    """A last dimension of real and imaginary part, added or taken away."""
    tensor, axis = op.batched()[0]
    return op.unknown() if op.name == "view_as_complex" and axis.dim == tensor.dim() - 1 else axis


@family("getitem", in_place=False)
def getitem(op: Operation) -> Label:
    """`x[index]`, basic and advanced."""
    return indexed(op, op.args[0], op.args[1])


def indexed(op: Operation, source: Tensor, index: Any) -> Label:
    """The axis of `source[index]`.

    Basic entries keep or drop dimensions in order. Advanced entries (tensors of ids) together become one
    block of dimensions, at the place of the first when they are neighbours and in front otherwise.
    """
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(e, Tensor) and e.dtype in (torch.bool, torch.uint8) for e in entries):
        return op.unknown("picks by a mask")
    entries = [torch.as_tensor(e) if isinstance(e, (list, range)) else e for e in entries]
    entries = [int(e) if isinstance(e, Tensor) and e.dim() == 0 and op.label(e) is None else e for e in entries]
    used = sum(e is not None and e is not Ellipsis for e in entries)
    if any(e is Ellipsis for e in entries):
        at = next(i for i, e in enumerate(entries) if e is Ellipsis)
        entries[at : at + 1] = [slice(None)] * (source.dim() - used)
    entries += [slice(None)] * (source.dim() - sum(e is not None for e in entries))
    axis = op.axis(source)
    advanced = [i for i, e in enumerate(entries) if isinstance(e, Tensor)]
    ids = [entries[i] for i in advanced]
    block = torch.broadcast_shapes(*(e.shape for e in ids)) if ids else torch.Size()
    together = bool(ids) and advanced == list(range(advanced[0], advanced[-1] + 1))
    result: list[str | int] = []  # source dimension, "new", or "ids"
    dim = 0
    for position, entry in enumerate(entries):
        if entry is None:
            result.append("new")
            continue
        if isinstance(entry, Tensor):
            if together and position == advanced[0]:
                result.extend(["ids"] * len(block))
        elif isinstance(entry, slice):
            if axis is not None and dim == axis.dim:
                size = source.size(dim)
                if entry.indices(size) != (0, size, 1):
                    return op.unknown("picks examples by position")
            result.append(dim)
        elif axis is not None and dim == axis.dim:
            return op.unknown("picks one example")
        dim += 1
    if ids and not together:
        result[:0] = ["ids"] * len(block)
    places = set()
    for tensor in ids:
        own = op.axis(tensor)
        if own is not None:
            places.add(own.moved(result.index("ids") + own.dim - tensor.dim() + len(block)))
    if axis is not None:
        taken = [e for e in entries if e is not None][axis.dim]
        if not isinstance(taken, Tensor):
            places.add(axis.moved(result.index(axis.dim)))
        else:  # x[arange(B), position]: row b is read by example b
            rows = torch.arange(op.batch, device=taken.device)
            if not axis.plain or op.axis(taken) is not None or not torch.equal(taken.flatten(), rows):
                return op.unknown("picks examples by position")
            first = next(d for d, size in enumerate(taken.shape) if size == op.batch)
            places.add(Axis(result.index("ids") + first - taken.dim() + len(block)))
    return places.pop() if len(places) == 1 else op.mixed("picks rows across examples")
