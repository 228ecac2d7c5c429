"""Where the examples of a batch are inside one tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NOBODY = -1
"""The owner of a row that is the same whatever the examples are, such as an empty slot of zeros."""


class Owners:
    """Which example each row belongs to, where no formula says so: routed, packed and permuted rows.

    Args:
        ids: `(N,)` integers, the example of each row, or `NOBODY`.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids.detach().to("cpu", torch.int64)
        self._layouts: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Owners) and torch.equal(self.ids, other.ids)

    def __hash__(self) -> int:
        return hash((len(self.ids), int(self.ids[:64].sum())))

    def __repr__(self) -> str:
        return f"Owners({self.ids.tolist()})"

    @property
    def examples(self) -> list[int]:
        """The examples that own a row, in order."""
        return [int(b) for b in self.ids.unique() if b != NOBODY]

    def layout(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which rows each example owns, `(B, R)` with R the largest number of them, and which entries count.

        Entries that do not count repeat the example's first row.
        """
        found = self._layouts.get((batch, device))
        if found is None:
            sizes = torch.bincount(self.ids[self.ids != NOBODY], minlength=batch)
            order = torch.argsort(self.ids, stable=True)[int((self.ids == NOBODY).sum()) :]
            starts = torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))[:-1]
            steps = torch.arange(int(sizes.max()) if batch else 0, device="cpu")
            present = steps < sizes.unsqueeze(1)
            places = (starts.unsqueeze(1) + torch.where(present, steps, 0)).clamp_max(max(len(order) - 1, 0))
            found = order[places].to(device), present.to(device)
            self._layouts[batch, device] = found
        return found


class Axis(NamedTuple):
    r"""Dimension `dim` of a tensor holds the examples, perhaps folded with others.

    The dimension has size $O \cdot B \cdot I$, and index $(o B + b) I + i$ belongs to example $b$.
    A plain batch axis has $O = I = 1$; folding `(B, T, d)` to `(B*T, d)` gives $I = T$; concatenating
    two batches along it gives $O = 2$. With `owners`, the dimension has a row for each of them instead.
    """

    dim: int
    outer: int = 1
    inner: int = 1
    owners: Owners | None = None

    @property
    def plain(self) -> bool:
        """Whether index $b$ along the dimension is simply example $b$."""
        return self.outer == 1 and self.inner == 1 and self.owners is None

    def size(self, batch: int) -> int:
        """The size that the dimension has for a batch of `batch` examples."""
        return self.outer * batch * self.inner if self.owners is None else len(self.owners)

    def ids(self, batch: int) -> Tensor:
        """The example of each row, `(size,)`."""
        if self.owners is not None:
            return self.owners.ids
        return torch.arange(batch, device="cpu").repeat_interleave(self.inner).repeat(self.outer)

    def moved(self, dim: int) -> Axis:
        """The same arrangement at another dimension."""
        return Axis(dim, self.outer, self.inner, self.owners)

    def front(self, tensor: Tensor, batch: int, repeat: bool = False) -> Tensor:
        """Bring examples to the front: `(B, *rest)`, with folded rows merged into one dimension in place.

        Plain: `rest` is the shape without `dim`. Otherwise `dim` is replaced by the rows of one example, `O * I` of
        them or as many as any example owns. Where an example owns fewer, the others are zero; with `repeat`, they
        repeat its first.
        """
        if self.plain:
            return tensor.movedim(self.dim, 0) if self.dim else tensor
        if self.owners is None:
            rows = tensor.unflatten(self.dim, (self.outer, batch, self.inner)).movedim(self.dim + 1, 0)
            return rows.flatten(self.dim + 1, self.dim + 2)
        order, present = self.owners.layout(batch, tensor.device)
        rows = tensor.movedim(self.dim, 0)[order]  # (B, R, *rest)
        if not repeat and not bool(present.all()):
            rows = rows.masked_fill(~present.reshape(*present.shape, *[1] * (rows.dim() - 2)), 0)
        return rows.movedim(1, self.dim + 1)

    def rows(self, tensor: Tensor, batch: int, repeat: bool = False) -> Tensor:
        """Bring examples to the front and keep a batch-of-one dimension: `(B, *shape with its own rows at dim)`.

        `rows(t)[b]` is what the tensor is when example `b` is alone in the batch; see `front` for `repeat`.
        """
        front = self.front(tensor, batch, repeat)
        return front.unsqueeze(self.dim + 1) if self.plain else front

    def unrows(self, rows: Tensor, batch: int) -> Tensor:
        """Spread `(B, *batch-of-one shape)` to `(B, *full shape)`, zero where row and example differ.

        It is what a gradient with respect to a tensor looks like when example `b` reads its own rows only.
        """
        own = torch.arange(batch, device=rows.device)
        if self.owners is not None:
            order, present = self.owners.layout(batch, rows.device)
            shape = list(rows.shape)
            shape[self.dim + 1] = len(self.owners)
            full = rows.new_zeros(shape)
            examples, places = present.nonzero(as_tuple=True)
            full.movedim(self.dim + 1, 1)[examples, order[examples, places]] = rows.movedim(self.dim + 1, 1)[
                examples, places
            ]
            return full
        shape = list(rows.shape)  # (B, ..., O*I, ...)
        shape[self.dim + 1 : self.dim + 2] = [self.outer, batch, self.inner]
        full = rows.new_zeros(shape)
        diagonal = full.movedim(self.dim + 2, 1)
        split = rows.unflatten(self.dim + 1, (self.outer, self.inner))
        diagonal[own, own] = split
        return full.flatten(self.dim + 1, self.dim + 3)

    def stray(self, grad: Tensor) -> bool:
        """Whether a gradient reaches rows that belong to nobody."""
        if self.owners is None or not bool((self.owners.ids == NOBODY).any()):
            return False
        rows = grad.movedim(self.dim, 0)[(self.owners.ids == NOBODY).to(grad.device)]
        return bool((rows != 0).any())

    def among(self, examples: Sequence[int], batch: int) -> Held:
        """The same rows, with these examples numbered from 0 and all others left out."""
        number = torch.full((batch + 1,), NOBODY, device="cpu")
        number[list(examples)] = torch.arange(len(examples), device="cpu")
        return Axis(self.dim, owners=Owners(number[self.ids(batch)]))


class Single(NamedTuple):
    """All of a tensor belongs to one example: `x[3]`, or anything in a batch of one."""

    example: int

    @property
    def plain(self) -> bool:
        """No dimension holds examples."""
        return False

    def front(self, tensor: Tensor, batch: int, repeat: bool = False) -> Tensor:
        """`(1, *shape)`: there is no other example."""
        return tensor.unsqueeze(0)

    def rows(self, tensor: Tensor, batch: int, repeat: bool = False) -> Tensor:
        """`(1, *shape)`: what the operator got is what it gets when the example is alone."""
        return tensor.unsqueeze(0)

    def unrows(self, rows: Tensor, batch: int) -> Tensor:
        """The example reads all rows."""
        return rows

    def stray(self, grad: Tensor) -> bool:
        """No row belongs to nobody."""
        return False

    def among(self, examples: Sequence[int], batch: int) -> Held:
        """The same example, under its new number."""
        return Single(list(examples).index(self.example))


class Lost(NamedTuple):
    """The examples can no longer be told apart in a tensor.

    `kind` is `"reduced"` (a sum over the batch, as a loss is), `"bent"` (another function of several examples, which
    is no sum of losses), `"mixed"` (a row depends on several examples), `"unknown"` (perex does not know how the
    operator arranges examples), `"refused"` (mixed by a setting of a layer, and refused for a batch of one too),
    `"counted"` (an integer or truth value that depends on several examples: no gradient goes through it, so it matters
    only if it decides what an example gets) or `"compared"` (the same, made from real numbers). `where` is the module
    in which it happened.
    """

    kind: str
    why: str
    where: str | None = None


Held = Axis | Single
Label = Axis | Single | Lost | None


def arranged(dim: int, ids: Tensor, batch: int) -> Held | None:
    """The shortest label for a dimension whose rows belong to these examples; None where all belong to nobody."""
    ids = ids.detach().to("cpu", torch.int64)
    known = ids[ids != NOBODY]
    if len(ids) and not len(known):
        return None
    if not batch:
        return Axis(dim)
    if len(known) == len(ids) > 0 and bool((known == known[0]).all()):
        return Single(int(known[0]))
    if len(known) == len(ids) and len(ids) % batch == 0:
        rest = len(ids) // batch
        for inner in (i for i in range(1, rest + 1) if rest % i == 0):
            axis = Axis(dim, rest // inner, inner)
            if torch.equal(axis.ids(batch), ids):
                return axis
    return Axis(dim, owners=Owners(ids))


def placed(dim: int, ids: Tensor, batch: int) -> Held | None:
    """`arranged` for a tensor into which rows were written: where those of several examples are in the places that a
    batch has, so are the others, of which nothing was written yet."""
    known = ids != NOBODY
    if len(ids) and len(ids[known].unique()) > 1 and len(ids) % batch == 0:
        axis = Axis(dim, 1, len(ids) // batch)
        if torch.equal(axis.ids(batch)[known], ids[known].cpu()):
            return axis
    return arranged(dim, ids, batch)


def agreed(axes: Iterable[Axis], batch: int) -> Axis | None:
    """One label for tensors whose rows are matched; None where a row would belong to two examples.

    A row that belongs to nobody in one tensor may belong to any example in another.
    """
    first, *others = set(axes)
    for other in others:
        if other.dim != first.dim or other.size(batch) != first.size(batch):
            return None
        a, b = first.ids(batch), other.ids(batch)
        if not bool(((a == b) | (a == NOBODY) | (b == NOBODY)).all()):
            return None
        merged = arranged(first.dim, torch.where(a == NOBODY, b, a), batch)
        assert isinstance(merged, Axis)
        first = merged
    return first


def after_reshape(old: Sequence[int], new: Sequence[int], axis: Axis, batch: int) -> Held | None:
    r"""Follow an axis through a reshape; None where rows of different examples end up in one row.

    With everything before and after the axis multiplied in, element $(o B + b) I + i$ of the flattened
    tensor belongs to example $b$. Dimension $k$ of the new shape, with $P$ elements before and $S$ after
    it, holds the axis when $P$ divides $O$, $S$ divides $I$ and its size is $(O/P) B (I/S)$.
    """
    if axis.owners is not None:
        return owners_after_reshape(old, new, axis, batch)
    stand_in = 1_000_003  # an empty dimension keeps its place by a size no other dimension has
    old = [size or stand_in for size in old]
    new = [size or stand_in for size in new]
    examples = batch or stand_in
    outer = math.prod(old[: axis.dim]) * axis.outer
    inner = math.prod(old[axis.dim + 1 :]) * (axis.inner or stand_in)
    best: Axis | None = None
    for k, size in enumerate(new):
        before, after = math.prod(new[:k]), math.prod(new[k + 1 :])
        if outer % before or inner % after:
            continue
        if size == (outer // before) * examples * (inner // after):
            found = Axis(k, outer // before, inner // after)
            if best is None or found.outer * found.inner < best.outer * best.inner:
                best = found
    if best is None and stand_in in new:  # no elements at all: any row will do
        return Axis(new.index(stand_in), 1, 0)
    if best is not None and (best.outer * best.inner) % stand_in == 0:
        return Axis(best.dim, 1, 0)
    return best


def owners_after_reshape(old: Sequence[int], new: Sequence[int], axis: Axis, batch: int) -> Held | None:
    """`after_reshape` row by row: a new dimension holds the axis if each of its rows has one owner."""
    if math.prod(old) == 0:
        place = next((k for k, size in enumerate(new) if size == 0), None)
        return None if place is None else Axis(place, 1, 0)
    before, after = math.prod(old[: axis.dim]), math.prod(old[axis.dim + 1 :])
    ids = axis.ids(batch).repeat(before)  # (P * N,): all rows, each of S elements
    for k, size in enumerate(new):
        outer, inner = math.prod(new[:k]), math.prod(new[k + 1 :])
        if after % inner == 0:  # a row becomes several
            rows = ids.repeat_interleave(after // inner)
            of_rows = rows.reshape(outer, size, 1)
        elif inner % after == 0:  # several rows become one
            of_rows = ids.reshape(outer, size, inner // after)
        else:
            continue
        owner = of_rows.amax((0, 2))
        if bool(((of_rows == owner[:, None]) | (of_rows == NOBODY)).all()):
            return arranged(k, owner, batch)
    return None
