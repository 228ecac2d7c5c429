"""Pools: whatever holds the examples, as batches that know which examples they hold."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from perex.scoring.errors import ScoringError
from perex.scoring.nest import leaves, map_leaves

BATCH_SIZE = 64
FORMS = "a Dataset, an IterableDataset, a DataLoader or a tuple of tensors such as (X, y)"


@dataclass(frozen=True)
class Pool:
    """Batches of examples, each example once.

    Attributes:
        batches: pairs `(positions, batch)`: where in the data each example of the batch stands, or None where
            only counting can tell; and the batch as the data yields it.
        size: how many examples the batches hold; None where that is not known before the end.
        length: how many examples the data hold, or None. More than `size` under a sampler that picks some.
    """

    batches: Iterable[tuple[Sequence[int] | None, Any]]
    size: int | None
    length: int | None


def open_pool(data: Any, batch_size: int | None = None) -> Pool:
    """Turn `data` into batches that hold each example once and say where it stands.

    A DataLoader is not iterated itself. Its dataset is, with the loader's collate function, workers and
    further settings, but in order and to the end, so that neither `shuffle` nor `drop_last` shows. A sampler
    that picks some examples decides which are scored, each once; a batch sampler of another class than
    torch's also decides which go together. An iterable dataset is read by one worker at most: several would
    interleave its examples, or repeat them.

    Args:
        data: map-style or iterable dataset, DataLoader, or tensors `(N, ...)`: one, or a tuple or mapping
            of them.
        batch_size: examples in a batch; None for the loader's own, or 64.

    Returns:
        The pool.

    Raises:
        ScoringError: `data` has another form, is empty, or its tensors differ in length; `batch_size` is not
            a positive whole number, or is given for data that come in batches of their own.

    Example:
        >>> pool = open_pool((torch.arange(5.0), torch.arange(5)), batch_size=4)
        >>> [positions for positions, batch in pool.batches], pool.size
        ([[0, 1, 2, 3], [4]], 5)
    """
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ScoringError(f"batch_size must be a positive whole number or None, not {batch_size!r}")
    pool = _open(data, batch_size)
    if pool.size == 0:
        raise ScoringError("data is empty: there is no example to score")
    return pool


def _open(data: Any, batch_size: int | None) -> Pool:
    if isinstance(data, DataLoader):
        if isinstance(data.dataset, IterableDataset):
            return _from_iterable(data, batch_size)
        return _from_loader(data, batch_size)
    if isinstance(data, IterableDataset):
        return _from_iterable(DataLoader(data, batch_size or BATCH_SIZE), batch_size)
    if type(data) is TensorDataset:
        return _from_tensors(data.tensors, batch_size)
    if isinstance(data, Mapping):
        return _from_tensors(dict(data), batch_size)
    if isinstance(data, (Tensor, tuple)):
        return _from_tensors(data, batch_size)
    if isinstance(data, list) and data and all(isinstance(item, Tensor) for item in data):
        raise ScoringError("data is a list of tensors; pass a tuple (X, y), or a list of examples (x, y)")
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return _from_loader(DataLoader(data, batch_size or BATCH_SIZE), batch_size)
    raise ScoringError(f"data is of type {type(data).__name__}; pass {FORMS}")


class _Slices:
    """The positions 0 to N-1 in order, cut into batches; can be iterated again and again."""

    def __init__(self, length: int, batch_size: int) -> None:
        self.length, self.batch_size = length, batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.length, self.batch_size):
            yield list(range(start, min(start + self.batch_size, self.length)))

    def __len__(self) -> int:
        return -(-self.length // self.batch_size)


def _from_tensors(data: Any, batch_size: int | None) -> Pool:
    """Cut batches out of tensors `(N, ...)`, which needs no collating."""
    data = map_leaves(lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, data)
    found = leaves(data)
    strangers = [type(leaf).__name__ for leaf in found if not isinstance(leaf, Tensor)]
    if strangers:
        raise ScoringError(f"data holds a {strangers[0]} beside or instead of tensors; pass {FORMS}")
    shapes = [tuple(tensor.shape) for tensor in found]
    if len({shape[:1] for shape in shapes}) != 1 or () in shapes:
        raise ScoringError(f"data must hold tensors with a row for each example; their shapes are {shapes}")
    slices = _Slices(shapes[0][0], batch_size or BATCH_SIZE)

    def rows(positions: list[int]) -> Any:
        return map_leaves(lambda leaf: leaf[positions[0] : positions[-1] + 1], data)

    return Pool(((positions, rows(positions)) for positions in slices), slices.length, slices.length)


def _from_iterable(loader: DataLoader, batch_size: int | None) -> Pool:
    """Read an iterable dataset from its start to its end."""
    if loader.batch_size is None and batch_size is not None:
        raise ScoringError("batch_size is given, but the items of the loader's dataset are batches already")
    settings = _settings(loader, min(loader.num_workers, 1))
    return _counted(DataLoader(loader.dataset, batch_size or loader.batch_size, **settings))


def _from_loader(loader: DataLoader, batch_size: int | None) -> Pool:
    """Read what a loader's sampler names from its map-style dataset, by position."""
    dataset: Any = loader.dataset
    settings = _settings(loader, loader.num_workers)
    at_once = loader.batch_sampler is None  # the sampler names, or the dataset holds, whole batches
    sampler: Any = loader.sampler if at_once else loader.batch_sampler
    groups: _Slices | list[list[int]]

    if type(sampler) is BatchSampler:  # torch's own: cut its batches anew
        batch_size = batch_size or sampler.batch_size
        if _takes_all(sampler.sampler, len(dataset)):
            groups = _Slices(len(dataset), batch_size)
        else:
            groups = _cut(_once([sampler.sampler]), batch_size)
    elif not at_once:  # somebody's own: keep its batches
        groups = _once(sampler) if batch_size is None else _cut(_once(sampler), batch_size)
    elif batch_size is None:
        items = sorted(item for group in _once([sampler]) for item in group)
        return _counted(DataLoader(dataset, None, sampler=items, **settings))
    else:
        raise ScoringError("batch_size is given, but the items of the loader's dataset are batches already")

    how: dict[str, Any] = {"batch_size": None, "sampler": groups} if at_once else {"batch_sampler": groups}
    size = groups.length if isinstance(groups, _Slices) else sum(map(len, groups))
    return Pool(zip(groups, DataLoader(dataset, **how, **settings), strict=True), size, len(dataset))


def _counted(loader: DataLoader) -> Pool:
    """Read batches whose examples can only be counted."""
    return Pool(((None, batch) for batch in loader), None, None)


def _takes_all(sampler: Any, length: int) -> bool:
    """Tell whether a sampler names each of `length` positions once, in whatever order."""
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source) == length
    return type(sampler) is SequentialSampler and len(sampler.data_source) == length


def _once(groups: Iterable[Iterable[Any]]) -> list[list[int]]:
    """List groups of positions without those named before, and without groups that this empties."""
    seen: set[int] = set()
    fresh_groups = []
    for group in groups:
        try:
            fresh = [position for position in dict.fromkeys(map(operator.index, group)) if position not in seen]
        except TypeError:
            raise ScoringError(
                "data: the loader's sampler yields keys, not positions; pass a sampler of positions"
            ) from None
        seen.update(fresh)
        if fresh:
            fresh_groups.append(fresh)
    return fresh_groups


def _cut(groups: list[list[int]], batch_size: int) -> list[list[int]]:
    """Cut all positions of `groups`, in order, into batches."""
    positions = sorted(position for group in groups for position in group)
    return [positions[start : start + batch_size] for start in range(0, len(positions), batch_size)]


def _settings(loader: DataLoader, workers: int) -> dict[str, Any]:
    """List how a loader fetches, apart from which examples and in what order.

    The generator is one of our own: every pass over a DataLoader draws a seed, and the user's random numbers
    shall come out the same whether or not a pool was scored in between.
    """
    settings: dict[str, Any] = {
        "num_workers": workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "worker_init_fn": loader.worker_init_fn,
        "generator": torch.Generator(),
    }
    if workers:
        settings["timeout"] = loader.timeout
        settings["prefetch_factor"] = loader.prefetch_factor
        settings["multiprocessing_context"] = loader.multiprocessing_context
    return settings
