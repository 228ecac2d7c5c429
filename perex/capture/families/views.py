"""Families of operators on dimensions: views, indexing, concatenation, gathering."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from perex.capture.axis import NOBODY, Axis, Label, Lost, Owners, Single, after_reshape, arranged
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


@family("index_select", in_place=False)
def index_select(op: Operation) -> Label:
    """`index_select(input, dim, index)`: as `input[:, index]`."""
    x, dim, index = op.arg(0, "input"), op.arg(1, "dim"), op.arg(2, "index")
    return of_one(op, indexed(op, x, (slice(None),) * normal(dim, x.dim()) + (index,)))


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
    axes = {axis for _, axis in op.batched()}
    singles = [single for part in parts if isinstance(single := op.held(part), Single)]
    if axes and not singles and all(axis.dim != dim for axis in axes):
        return op.agreed(axes)
    if any(axis.dim != dim for axis in axes):
        return op.mixed("pairs examples with each other")
    owners = []
    for part in parts:
        held = op.held(part)
        if isinstance(held, Axis):
            owners.append(held.ids(op.batch))
        elif part.numel() or part.dim() > 1:
            owners.append(torch.full((part.size(dim),), held.example if isinstance(held, Single) else NOBODY))
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
        return arranged(dim, torch.tensor(owners), op.batch)
    if any(isinstance(single, Single) for single in singles):
        return op.mixed("pairs examples with each other")
    axis = op.agreed(axes)
    return axis.moved(axis.dim + (axis.dim >= dim)) if isinstance(axis, Axis) else axis


def pad_sequence(op: Operation) -> Label:
    """Sequences of different lengths under each other, `(N, T, ...)` or with time first."""
    sequences, batch_first = op.arg(0, "sequences"), op.arg(1, "batch_first", False)
    owners = [held.example if isinstance(held := op.held(t), Single) else NOBODY for t in sequences]
    return op.unknown() if op.batched() else arranged(0 if batch_first else 1, torch.tensor(owners), op.batch)


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


@family("gather take_along_dim scatter scatter_add scatter_reduce index_add index_copy index_fill index_reduce")
def gather(op: Operation) -> Label:
    """Positions along one dimension; the other dimensions of all arguments are aligned."""
    dim = op.arg(2 if op.name == "take_along_dim" else 1, "dim")
    out = result_tensor(op)
    if dim is None:
        return op.unknown()
    dim = normal(dim, out.dim())
    if any(not isinstance(held, Axis) or held.dim == dim or flat(op, t) for t, held in op.inputs if held is not None):
        return routed(op, dim)
    if not op.batched():
        return None
    axis = op.agreed(axis for _, axis in op.batched())
    if not isinstance(axis, Axis) or out.size(axis.dim) != axis.size(op.batch):
        return axis if isinstance(axis, Lost) else op.mixed()
    return axis


def flat(op: Operation, tensor: Tensor) -> bool:
    """Whether a tensor is the `(N,)` index of `index_add` and its kin, which is not aligned with the others."""
    return op.name.startswith("index") and tensor is op.arg(2, "index")


def routed(op: Operation, dim: int) -> Label:
    """Rows that go to, or come from, other places along the batch axis: each must stay with its example."""
    x = op.arg(0, "input")
    reads = op.name in ("gather", "take_along_dim")
    index = op.arg(1, "indices") if op.name == "take_along_dim" else op.arg(2, "index")
    source = None if reads or op.name == "index_fill" else op.arg(3, "src", op.kwargs.get("source"))
    held = op.held(source) if isinstance(source, Tensor) else None
    table = op.axis(x)
    place = index.detach().cpu()
    if op.name.startswith("index"):
        place = place.reshape([-1 if d == dim else 1 for d in range(max(x.dim(), 1))])
    here = owners_of(op, index, place, dim)
    if isinstance(held, Single):
        here = merged(here, torch.full([1] * source.dim(), held.example))
    elif isinstance(held, Axis):
        if held.dim != dim:
            return op.mixed()
        here = merged(here, held.ids(op.batch).reshape([-1 if d == dim else 1 for d in range(source.dim())]))
    if here is None or table is not None and table.dim != dim:
        return op.mixed("picks positions that differ between examples")
    size = x.size(dim)
    owners = table.ids(op.batch) if table is not None else torch.full((size,), NOBODY)
    there = owners[place]
    here = here.expand(torch.broadcast_shapes(here.shape, there.shape))
    if bool(((there != here) & (there != NOBODY) & (here != NOBODY)).any()):
        return op.mixed("moves rows between examples")
    if reads:
        rows = by_row(torch.where(here == NOBODY, there, here), dim)
        return arranged(dim, rows.amax(1), op.batch) if one_owner(rows) else op.mixed("picks rows across examples")
    claims = here.movedim(dim, 0).flatten()
    rows = place.expand(here.shape).movedim(dim, 0).flatten()
    after = owners.clone()
    after[rows] = torch.where(claims == NOBODY, after[rows], claims)
    if bool(((after[rows] != claims) & (claims != NOBODY)).any()):
        return op.mixed("puts rows of several examples into one")
    return arranged(dim, after, op.batch)


def owners_of(op: Operation, index: Tensor, place: Tensor, dim: int) -> Tensor | None:
    """The example of each entry of an index in `place`'s shape; None where it is not along `dim`."""
    axis = op.held(index)
    if not isinstance(axis, Axis):
        return torch.full([1] * place.dim(), NOBODY if axis is None else axis.example)
    if flat(op, index):
        return axis.ids(op.batch).reshape(place.shape)
    if axis.dim != dim:
        return None
    return axis.ids(op.batch).reshape([-1 if d == dim else 1 for d in range(place.dim())])


def merged(one: Tensor | None, other: Tensor) -> Tensor | None:
    """Owners where two tensors say whose a row is; None where they disagree."""
    if one is None or bool(((one != other) & (one != NOBODY) & (other != NOBODY)).any()):
        return None
    return torch.where(one == NOBODY, other, one)


def by_row(owners: Tensor, dim: int) -> Tensor:
    """Dimension `dim` in front, and all others in one."""
    front = owners.movedim(dim, 0)
    return front.reshape(len(front), math.prod(front.shape[1:]))


def one_owner(rows: Tensor) -> bool:
    """Whether each row `(N, n)` of owners has one, beside nobody."""
    return not rows.numel() or bool(((rows == rows.amax(1, keepdim=True)) | (rows == NOBODY)).all())


@family("masked_scatter")
def masked_scatter(op: Operation) -> Label:
    """The elements of a source, in order, at the places where a mask is true: each must be of that place's example."""
    x, mask, source = op.args[:3]
    axis = aligned(op, [(tensor, held) for tensor, held in op.batched() if tensor is not source])
    own = op.axis(source)
    if not isinstance(axis, Axis) or own is None:
        return axis
    places = axis.ids(op.batch)[mask.detach().expand(x.shape).nonzero()[:, axis.dim].cpu()]
    shape = [-1 if d == own.dim else 1 for d in range(source.dim())]
    owners = own.ids(op.batch).reshape(shape).expand(source.shape).flatten()[: len(places)]
    return axis if torch.equal(owners, places) else op.mixed("scatters rows of one example to another")


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
    return of_one(op, indexed(op, op.args[0], op.args[1]))


def of_one(op: Operation, label: Label) -> Label:
    """The label of what is picked by an index that is of one example alone: it must be that example's."""
    singles = {held for _, held in op.inputs if isinstance(held, Single)}
    if not singles or isinstance(label, Lost) or label is None and op.axis(op.args[0]) is None:
        return singles.pop() if len(singles) == 1 and label is None else label
    if isinstance(label, Axis):
        label = arranged(label.dim, label.ids(op.batch), op.batch)
    empty = isinstance(label, Axis) and not label.size(op.batch)
    return label if {label} == singles or empty else op.mixed("picks rows across examples")


def indexed(op: Operation, source: Tensor, index: Any) -> Label:
    """The axis of `source[index]`.

    Basic entries keep or drop dimensions in order. Advanced entries (tensors of ids) together become one
    block of dimensions, at the place of the first when they are neighbours and in front otherwise.
    """
    entries = list(index) if isinstance(index, tuple) else [index]
    entries = [torch.as_tensor(e) if isinstance(e, (list, range)) else e for e in entries]
    entries = [int(e) if isinstance(e, Tensor) and single_number(op, e) else e for e in entries]
    labels = {id(e): op.axis(e) for e in entries if isinstance(e, Tensor)}
    for at, entry in reversed(list(enumerate(entries))):  # a mask stands for the positions at which it is true
        if isinstance(entry, Tensor) and entry.dtype in (torch.bool, torch.uint8):
            found = entry.detach().nonzero(as_tuple=True)
            own = labels.pop(id(entry))
            if own is not None:
                owner = arranged(0, own.ids(op.batch)[found[own.dim].cpu()], op.batch)
                if isinstance(owner, Single):
                    owner = Axis(0, owners=Owners(torch.full((len(found[0]),), owner.example)))
                labels.update({id(f): owner for f in found})
            entries[at : at + 1] = found
    used = sum(e is not None and e is not Ellipsis for e in entries)
    if any(e is Ellipsis for e in entries):
        at = next(i for i, e in enumerate(entries) if e is Ellipsis)
        entries[at : at + 1] = [slice(None)] * (source.dim() - used)
    entries += [slice(None)] * (source.dim() - sum(e is not None for e in entries))
    axis = op.axis(source)
    dropped: int | None = None
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
                    held = arranged(dim, axis.ids(op.batch)[entry], op.batch)
                    if isinstance(held, Single):
                        dropped = held.example
                        held = axis._replace(owners=Owners(axis.ids(op.batch)[entry]))
                    if held is None:
                        return None
                    axis = held
            result.append(dim)
        elif axis is not None and dim == axis.dim:
            dropped = int(axis.ids(op.batch)[int(entry)])
        dim += 1
    if ids and not together:
        result[:0] = ["ids"] * len(block)
    first = result.index("ids") if ids else 0
    places = set()
    for tensor in ids:
        own = labels.get(id(tensor))
        if own is not None:
            places.add(own.moved(first + own.dim - tensor.dim() + len(block)))
    if dropped is not None:
        return op.mixed("picks rows across examples") if places else Single(dropped) if dropped != NOBODY else None
    if axis is not None:
        taken = [e for e in entries if e is not None][axis.dim]
        if isinstance(taken, Tensor):  # x[ids]: a row is whose it was
            ids = axis.ids(op.batch)
            owners = ids[taken.cpu().long()].expand(block)
            held = along_one(owners, op.batch)
            if op.doubt is not None and torch.equal(taken.flatten().sort().values.cpu(), torch.arange(len(ids))):
                op.doubt = None  # all rows in another order: whoever chose it, every example is served
            if held is None:
                return op.mixed("picks rows across examples")
            if isinstance(held, Single):
                if all(bool((place.ids(op.batch) == held.example).all()) for place in places):
                    return held
                return op.mixed("picks rows across examples")
            places.add(held.moved(first + held.dim))
        else:
            places.add(axis.moved(result.index(axis.dim)))
    return places.pop() if len(places) == 1 else op.agreed(places) if places else None


def single_number(op: Operation, entry: Tensor) -> bool:
    """Whether an index entry is one number that is the same for all examples."""
    return entry.dim() == 0 and entry.dtype not in (torch.bool, torch.uint8) and op.label(entry) is None


def along_one(owners: Tensor, batch: int) -> Axis | Single | None:
    """The axis of a block of rows with these owners, if they change along one dimension only."""
    if owners.dim() == 0:
        return Single(int(owners)) if int(owners) != NOBODY else None
    for dim in range(owners.dim()):
        rows = by_row(owners, dim)
        if one_owner(rows) and (rows.numel() or not owners.size(dim)):
            return arranged(dim, rows.amax(1) if rows.numel() else rows.reshape(-1), batch)
    return None


JOINS.update((getitem, index_select, gather))
