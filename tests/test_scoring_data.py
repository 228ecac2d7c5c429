"""Pools: whichever form they come in, each example once, and its position in the data known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from perex.scoring import ScoringError
from perex.scoring.data import BATCH_SIZE, open_pool

N = 10


class Numbers(Dataset):
    """Example i is 10 * i; counts how often each is asked for."""

    def __init__(self, n: int = N) -> None:
        self.n, self.asked = n, Counter[int]()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Tensor:
        self.asked[i] += 1
        return torch.tensor(10 * i)


class Stream(IterableDataset):
    """The same, one after the other, shared out among the workers."""

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        first, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        return (torch.tensor(10 * i) for i in range(first, N, workers))


def contents(data: Any, batch_size: int | None = None) -> tuple[list[int], list[int]]:
    """Positions as they come, after checking that each belongs to its example; and the batches' sizes."""
    pool = open_pool(data, batch_size)
    found: list[int] = []
    sizes = []
    for positions, batch in pool.batches:
        values = (batch[0] if isinstance(batch, (tuple, list)) else batch).tolist()
        expected = positions if positions is not None else range(len(found), len(found) + len(values))
        assert values == [10 * position for position in expected]
        found += expected
        sizes.append(len(values))
    assert pool.size in (None, len(found))
    return found, sizes


EVERY = list(range(N))


@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        ((10 * torch.arange(N), torch.zeros(N)), [N]),
        (10 * torch.arange(N), [N]),
        ((10 * np.arange(N),), [N]),
        (TensorDataset(10 * torch.arange(N)), [N]),
        (Numbers(), [N]),
        ([10 * i for i in range(N)], [N]),
        (Stream(), [N]),
        (DataLoader(Numbers(), 4), [4, 4, 2]),
        (DataLoader(Numbers(), 4, shuffle=True, drop_last=True), [4, 4, 2]),
        (DataLoader(Numbers(), 3, shuffle=True, num_workers=2, persistent_workers=True), [3, 3, 3, 1]),
        (DataLoader(Numbers(), batch_sampler=BatchSampler(RandomSampler(range(N)), 4, True)), [4, 4, 2]),
        (DataLoader(Numbers(), None, sampler=BatchSampler(RandomSampler(range(N)), 4, True)), None),
        (DataLoader(Stream(), 4, num_workers=2, drop_last=True), [4, 4, 2]),
    ],
    ids=lambda value: type(value).__name__ if value is not None and not isinstance(value, list) else "",
)
def test_every_example_once_and_in_order(data: Any, sizes: list[int] | None) -> None:
    if sizes is None:  # the dataset is asked for a list of positions at once
        data.dataset.__class__ = type("Listed", (Numbers,), {"__getitem__": lambda self, i: 10 * torch.tensor(i)})
        sizes = [4, 4, 2]
    assert contents(data) == (EVERY, sizes)
    assert contents(data, batch_size=6) == (EVERY, [6, 4])


@pytest.mark.parametrize(
    "sampler",
    [
        SubsetRandomSampler([7, 2, 5]),
        SubsetRandomSampler(torch.tensor([7, 2, 5])),
        SubsetRandomSampler(np.array([7, 2, 5])),
        [5, 7, 7, 2, 5],
    ],
    ids=["list", "tensor", "array", "repeated"],
)
def test_a_sampler_decides_which_examples(sampler: Any) -> None:
    dataset = Numbers()
    loader = DataLoader(dataset, 2, sampler=sampler, drop_last=True)
    assert contents(loader) == ([2, 5, 7], [2, 1])
    assert dataset.asked == Counter([2, 5, 7])
    assert open_pool(loader).length == N


def test_a_sampler_of_a_part_is_not_taken_for_one_of_all() -> None:
    assert contents(DataLoader(Numbers(), 4, sampler=SequentialSampler(range(6)))) == (EVERY[:6], [4, 2])
    assert contents(DataLoader(Numbers(), 4, sampler=RandomSampler(range(6)))) == (EVERY[:6], [4, 2])
    few = contents(DataLoader(Numbers(), 4, sampler=RandomSampler(Numbers(), num_samples=3)))
    assert few[1] == [3]


def test_drawing_with_replacement_scores_what_was_drawn_once() -> None:
    dataset = Numbers()
    found, _ = contents(DataLoader(dataset, 4, sampler=WeightedRandomSampler([1.0] * 3 + [0.0] * 7, 50)))
    assert found == [0, 1, 2]
    assert set(dataset.asked.values()) == {1}


class Bucketed:
    """A batch sampler of somebody's own, with an example in two batches."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[9, 0, 4], [4, 4], [1, 8], [9, 2]])


def test_a_batch_sampler_also_decides_which_go_together() -> None:
    loader = DataLoader(Numbers(), batch_sampler=Bucketed())
    assert contents(loader) == ([9, 0, 4, 1, 8, 2], [3, 2, 1])
    assert contents(loader, batch_size=5) == ([0, 1, 2, 4, 8, 9], [5, 1])


def test_the_loader_s_collate_function_is_used() -> None:
    loader = DataLoader(Numbers(), 4, shuffle=True, collate_fn=lambda rows: (torch.stack(rows), "note"))
    assert contents(loader) == (EVERY, [4, 4, 2])


def test_a_dataset_of_batches_is_counted() -> None:
    batches = [10 * torch.arange(0, 3), 10 * torch.arange(3, 4), 10 * torch.arange(4, N)]
    for order in ({}, {"shuffle": True}, {"sampler": [2, 0, 1]}):
        assert contents(DataLoader(batches, None, **order)) == (EVERY, [3, 1, 6])


def test_subsets_have_positions_of_their_own() -> None:
    pool = open_pool(DataLoader(Subset(Numbers(), [3, 1]), 1))
    assert [(positions, batch.tolist()) for positions, batch in pool.batches] == [([0], [30]), ([1], [10])]


def test_the_default_batch_size_and_a_remainder() -> None:
    data = (10 * torch.arange(2 * BATCH_SIZE + 1),)
    assert contents(data)[1] == [BATCH_SIZE, BATCH_SIZE, 1]


def test_mappings_and_nested_tuples_of_tensors_keep_their_form() -> None:
    data = {"x": (torch.arange(3), torch.arange(6).view(3, 2)), "y": torch.zeros(3)}
    (_, first), _ = open_pool(data, 2).batches
    assert first["x"][1].tolist() == [[0, 1], [2, 3]]
    assert isinstance(first["x"], tuple) and len(first["y"]) == 2


class Keyed(Dataset):
    def __getitem__(self, key: str) -> Tensor:
        return torch.zeros(1)

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter([1, 2]), "of type list_iterator; pass a Dataset"),
        (3, "of type int; pass a Dataset"),
        ([torch.zeros(2), torch.zeros(2)], "a list of tensors; pass a tuple"),
        ((torch.zeros(3), torch.zeros(2, 2)), r"their shapes are \[\(3,\), \(2, 2\)\]"),
        ((torch.zeros(()),), r"their shapes are \[\(\)\]"),
        ((torch.zeros(2), "ab"), "a str beside or instead of tensors"),
        ({}, "data must hold tensors"),
        ((), "data must hold tensors"),
        (DataLoader(Keyed(), 2, sampler=["a", "b"]), "yields keys, not positions"),
        (DataLoader(Numbers(), 2, sampler=[]), "data is empty"),
    ],
)
def test_what_is_no_pool(data: Any, message: str) -> None:
    with pytest.raises(ScoringError, match=message):
        open_pool(data)


@pytest.mark.parametrize("data", [DataLoader([torch.zeros(2, 1)], None), DataLoader(Stream(), None)])
def test_batches_that_exist_already_cannot_be_cut_anew(data: DataLoader) -> None:
    with pytest.raises(ScoringError, match="batch_size is given, but the items .* are batches already"):
        open_pool(data, batch_size=2)


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, "8"])
def test_batch_sizes_that_are_none(batch_size: Any) -> None:
    with pytest.raises(ScoringError, match="batch_size must be a positive whole number"):
        open_pool((torch.zeros(3),), batch_size)
