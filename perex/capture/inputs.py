"""Where the examples are in a model's inputs: what their shapes, and sometimes their integers, tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from perex.capture.axis import Axis, Held, Single, arranged


def about(size: int) -> int:
    """The next power of two: what was seen of a batch of some size is taken to hold for others of about that size.

    Poisson sampling makes batches of ever new sizes; sequences of a new length, though, are inputs of another kind.
    """
    return 1 << max(size - 1, 0).bit_length()


def kind_of(tensor: Tensor, batch: int) -> tuple[object, ...]:
    """What tells inputs of one kind from others: the type, and all sizes, that of the batch only about."""
    return tensor.dtype, *(-about(size) if size == batch else size for size in tensor.shape)


Layout = tuple[torch.Size | None, ...]
"""Of the inputs of a forward, the shapes of those that all examples share; None for those that hold examples."""


def of_one(inputs: Sequence[Tensor], layout: Layout, batch_dim: int) -> bool:
    """Whether inputs are of one example, if they are as those of a forward of several were."""
    return len(inputs) == len(layout) and all(
        tensor.shape == shape if shape is not None else tensor.dim() > batch_dim and tensor.size(batch_dim) == 1
        for tensor, shape in zip(inputs, layout, strict=True)
    )


def batch_size(inputs: Sequence[Tensor], batch_dim: int, layouts: Iterable[Layout] = ()) -> int | None:
    """Number of examples, B: rows of the first input, or of those that it holds for each example.

    A first input with one row may be shared by all examples, as position ids are: then another with more rows
    decides, unless it was shared in an earlier forward of several examples (`layouts`). One whose rows are packed, with
    another input to say how many belong to each example, is of as many examples as that says.
    """
    candidates = [tensor for tensor in inputs if tensor.dim() > batch_dim]
    if not candidates:
        return None
    first = candidates[0]
    batch = first.size(batch_dim)
    if batch == 1 and not any(of_one(inputs, layout, batch_dim) for layout in layouts):
        square = {first.shape[d : d + 1] * 2 for d in range(first.dim())}  # masks of positions, `(T, T)`
        more = (t for t in candidates if t.dim() >= first.dim() and t.shape not in square)
        rows = (t.size(batch_dim) for t in more if t.size(batch_dim) > 1)
        batch = next(rows, 1)
    if batch_dim == 0 and first.is_floating_point() and all(len(t) != batch for t in candidates if t is not first):
        counts = next((found for t in candidates[1:] if (found := counts_of(t, batch)) is not None), None)
        batch = batch if counts is None else len(counts)
    return batch


def packed_in(value: Any) -> Iterator[PackedSequence]:
    """The packed sequences in what a module takes."""
    if isinstance(value, PackedSequence):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from packed_in(item)
    elif not isinstance(value, Tensor) and isinstance(value, Mapping):
        yield from packed_in(list(value.values()))


def packed_label(sequence: PackedSequence) -> Held | None:
    """Whose each row of packed data is: at every step, the first `batch_sizes[t]` sequences, longest first."""
    batch = int(sequence.batch_sizes[0])
    order = torch.arange(batch, device="cpu") if sequence.sorted_indices is None else sequence.sorted_indices.cpu()
    return arranged(0, torch.cat([order[:size] for size in sequence.batch_sizes.tolist()]), batch)


def counts_of(tensor: Tensor, rows: int) -> Tensor | None:
    """How many of `rows` packed rows belong to each example, if integers say so.

    They are offsets from 0 to `rows`, lengths that add up to `rows`, or sizes (of a grid of patches, say) whose
    products do: `(B + 1,)`, `(B,)` or `(B, k)`.
    """
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool or not 1 <= tensor.dim() <= 2:
        return None
    values = tensor.detach().cpu()
    if values.dim() == 2:
        counts = values.prod(1)
        return counts if len(counts) > 1 and values.size(1) > 1 and int(counts.sum()) == rows else None
    if len(values) > 2 and int(values[0]) == 0 and int(values[-1]) == rows and bool((values.diff() >= 0).all()):
        return values.diff()
    return values if len(values) > 1 and int(values.sum()) == rows and bool((values >= 0).all()) else None


def input_label(tensor: Tensor, inputs: Sequence[Tensor], batch: int, batch_dim: int) -> Held | None:
    """The batch axis of an input: `batch_dim`, or dimension 0 of one that has fewer dimensions or packed rows."""
    if of_positions(tensor, inputs[0], batch, batch_dim):
        return None
    dim = batch_dim if tensor.dim() > batch_dim else 0
    if tensor.dim() <= dim:
        return None
    if tensor.size(dim) == batch:
        return Single(0) if batch == 1 else Axis(dim)
    if dim == 0 and tensor.is_floating_point() and tensor.size(0) > batch > 1:
        for other in inputs:
            counts = counts_of(other, tensor.size(0)) if other.dim() and len(other) in (batch, batch + 1) else None
            if counts is not None and len(counts) == batch:
                return arranged(0, torch.arange(batch, device="cpu").repeat_interleave(counts), batch)
    return None


def of_positions(tensor: Tensor, first: Tensor, batch: int, batch_dim: int) -> bool:
    """Whether an input that could be of the examples is of positions, where a sequence is as long as the batch.

    Integers `(T,)` that count up by one are taken for positions beside a first input `(B, T)` of ids or `(B, T, ...)`:
    should they be of the examples after all, their rows are still matched where they are used. A square mask is one
    of positions if it is triangular.
    """
    others = [size for dim, size in enumerate(first.shape) if dim != batch_dim]
    if tensor is first or batch < 2 or batch not in others[:1]:
        return False
    if tensor.dim() == 1:
        whole = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
        sequence = first.dim() > 2 or not first.is_floating_point()
        return whole and sequence and bool((tensor.diff() == 1).all())
    if tensor.shape != (batch, batch):
        return False
    blocked = tensor if tensor.dtype == torch.bool else tensor == float("-inf")
    upper, lower = blocked.triu(1), blocked.tril(-1)
    return bool(upper.sum() == batch * (batch - 1) // 2) != bool(lower.sum() == batch * (batch - 1) // 2)
