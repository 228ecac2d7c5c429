"""Where the examples of a batch are inside one tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Axis(NamedTuple):
    r"""Dimension `dim` of a tensor holds the examples, perhaps folded with others.

    The dimension has size $O \cdot B \cdot I$, and index $(o B + b) I + i$ belongs to example $b$.
    A plain batch axis has $O = I = 1$; folding `(B, T, d)` to `(B*T, d)` gives $I = T$; concatenating
    two batches along it gives $O = 2$.
    """

    dim: int
    outer: int = 1
    inner: int = 1

    @property
    def plain(self) -> bool:
        """Whether index $b$ along the dimension is simply example $b$."""
        return self.outer == 1 and self.inner == 1

    def size(self, batch: int) -> int:
        """The size that the dimension has for a batch of `batch` examples."""
        return self.outer * batch * self.inner

    def moved(self, dim: int) -> Axis:
        """The same arrangement at another dimension."""
        return Axis(dim, self.outer, self.inner)

    def front(self, tensor: Tensor, batch: int) -> Tensor:
        """Bring examples to the front: `(B, *rest)`, with folded rows merged into one dimension in place.

        Plain: `rest` is the shape without `dim`. Folded: `dim` is replaced by the rows of one example,
        `O * I` of them.
        """
        if self.plain:
            return tensor.movedim(self.dim, 0)
        rows = tensor.unflatten(self.dim, (self.outer, batch, self.inner)).movedim(self.dim + 1, 0)
        return rows.flatten(self.dim + 1, self.dim + 2)

    def rows(self, tensor: Tensor, batch: int) -> Tensor:
        """Bring examples to the front and keep a batch-of-one dimension: `(B, *shape with O*I at dim)`.

        `rows(t)[b]` is what the tensor is when example `b` is alone in the batch.
        """
        front = self.front(tensor, batch)
        return front.unsqueeze(self.dim + 1) if self.plain else front

    def unrows(self, rows: Tensor, batch: int) -> Tensor:
        """Spread `(B, *batch-of-one shape)` to `(B, *full shape)`, zero where row and example differ.

        It is what a gradient with respect to a tensor looks like when example `b` reads its own rows only.
        """
        shape = list(rows.shape)  # (B, ..., O*I, ...)
        shape[self.dim + 1 : self.dim + 2] = [self.outer, batch, self.inner]
        full = rows.new_zeros(shape)
        own = torch.arange(batch, device=rows.device)
        diagonal = full.movedim(self.dim + 2, 1)
        split = rows.unflatten(self.dim + 1, (self.outer, self.inner))
        diagonal[own, own] = split
        return full.flatten(self.dim + 1, self.dim + 3)


class Lost(NamedTuple):
    """The examples can no longer be told apart in a tensor.

    `kind` is `"reduced"` (a sum over the batch, as a loss is), `"bent"` (another function of several examples, which
    is no sum of losses), `"mixed"` (a row depends on several examples), `"unknown"` (perex does not know how the
    operator arranges examples) or `"refused"` (mixed by a setting of a layer, and refused for a batch of one too).
    """

    kind: str
    why: str


Label = Axis | Lost | None


def after_reshape(old: Sequence[int], new: Sequence[int], axis: Axis, batch: int) -> Axis | None:
    r"""Follow an axis through a reshape; None where rows of different examples end up in one row.

    With everything before and after the axis multiplied in, element $(o B + b) I + i$ of the flattened
    tensor belongs to example $b$. Dimension $k$ of the new shape, with $P$ elements before and $S$ after
    it, holds the axis when $P$ divides $O$, $S$ divides $I$ and its size is $(O/P) B (I/S)$.
    """
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
