"""Families of operators that pick and place rows by number or mask."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from perex.capture.axis import NOBODY, Axis, Label, Lost, Owners, Single, arranged, placed
from perex.capture.carry import JOINS, REORDERS, Operation, family, normal, result_tensor
from perex.capture.families.elementwise import aligned


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
    if any(isinstance(e, bool) for e in entries):
        return op.unknown("picks by a truth value")
    known = (int, slice, Tensor, type(None), type(Ellipsis))
    entries = [e if isinstance(e, known) else torch.as_tensor(e, device="cpu") for e in entries]
    entries = [int(e) if isinstance(e, Tensor) and single_number(op, e) else e for e in entries]
    labels = {id(e): op.axis(e) for e in entries if isinstance(e, Tensor)}
    for at, entry in reversed(list(enumerate(entries))):  # a mask stands for the positions at which it is true
        if isinstance(entry, Tensor) and entry.dtype in (torch.bool, torch.uint8):
            found = entry.detach().nonzero(as_tuple=True)
            own = labels.pop(id(entry))
            if own is not None:
                op.sized = True
                owner = arranged(0, own.ids(op.batch)[found[own.dim].cpu()], op.batch)
                if isinstance(owner, Single):
                    owner = Axis(0, owners=Owners(torch.full((len(found[0]),), owner.example, device="cpu")))
                labels.update({id(f): owner for f in found})
            entries[at : at + 1] = found
    used = sum(e is not None and e is not Ellipsis for e in entries)
    if any(e is Ellipsis for e in entries):
        at = next(i for i, e in enumerate(entries) if e is Ellipsis)
        entries[at : at + 1] = [slice(None)] * (source.dim() - used)
    entries += [slice(None)] * (source.dim() - sum(e is not None for e in entries))
    axis = op.axis(source) or row_for_each(op, source, entries)
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
            rows = axis.ids(op.batch)
            held = along_one(rows[taken.cpu().long()].expand(block), op.batch)
            if op.doubt is not None and torch.equal(
                taken.flatten().sort().values.cpu(), torch.arange(len(rows), device="cpu")
            ):
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


def row_for_each(op: Operation, source: Tensor, entries: list[Any]) -> Axis | None:
    """The axis of a constant with a row for each example, if counts over the batch put these rows in another order.

    So `pack_padded_sequence` sorts first states along with the sequences.
    """
    taken = [entry for entry in entries if entry is not None]
    tensors = [dim for dim, entry in enumerate(taken) if isinstance(entry, Tensor)]
    if len(tensors) != 1 or op.label(source) is not None or not source.is_floating_point():
        return None
    (dim,) = tensors
    index = taken[dim]
    label, rows = op.label(index), torch.arange(op.batch, device="cpu")
    if not isinstance(label, Lost) or index.dim() != 1 or source.size(dim) != op.batch:
        return None
    return Axis(dim) if torch.equal(index.sort().values.cpu(), rows) else None


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


@family("index_select", in_place=False)
def index_select(op: Operation) -> Label:
    """`index_select(input, dim, index)`: as `input[:, index]`."""
    x, dim, index = op.arg(0, "input"), op.arg(1, "dim"), op.arg(2, "index")
    return of_one(op, indexed(op, x, (slice(None),) * normal(dim, x.dim()) + (index,)))


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
    ones = [1] * (source.dim() if isinstance(source, Tensor) else 0)
    table = op.axis(x)
    place = index.detach().cpu()
    if op.name.startswith("index"):
        place = place.reshape([-1 if d == dim else 1 for d in range(max(x.dim(), 1))])
    here = owners_of(op, index, place, dim)
    if isinstance(held, Single):
        here = merged(here, torch.full(ones, held.example, device="cpu"))
    elif isinstance(held, Axis):
        if held.dim != dim:
            return op.mixed()
        here = merged(here, held.ids(op.batch).reshape([-1 if d == dim else 1 for d in range(len(ones))]))
    if here is None or table is not None and table.dim != dim:
        return op.mixed("picks positions that differ between examples")
    size = x.size(dim)
    owners = table.ids(op.batch) if table is not None else torch.full((size,), NOBODY, device="cpu")
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
    return placed(dim, after, op.batch)


def owners_of(op: Operation, index: Tensor, place: Tensor, dim: int) -> Tensor | None:
    """The example of each entry of an index in `place`'s shape; None where it is not along `dim`."""
    axis = op.held(index)
    if not isinstance(axis, Axis):
        return torch.full([1] * place.dim(), NOBODY if axis is None else axis.example, device="cpu")
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
    axis = aligned(op, op.batched_among((x, mask)))
    own = op.axis(source)
    if isinstance(axis, Axis) and own is None:
        op.valued = True
        if not bool((source != source.flatten()[:1]).any()):
            return axis  # it is the same number everywhere
        return op.mixed("gives an example what others before it leave of a constant")
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


JOINS.update((getitem, index_select, gather))
REORDERS.update((getitem, index_select))
