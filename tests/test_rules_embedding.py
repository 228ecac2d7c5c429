"""Embedding and EmbeddingBag, with every option; those that mix examples are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import check, exact_or_refused, grid, place, refused
from torch import Tensor, nn

PLACES = ("alone", "first", "first+inplace")
VOCABULARY = 4

batches = st.integers(1, 4)  # also as large as the vocabulary, and as the number of positions
paddings = st.sampled_from([None, 0, 2, -1])
LAYOUTS = {
    "contiguous": lambda ids: ids,
    "transposed": lambda ids: ids.mT.contiguous().mT if ids.dim() > 1 else ids,
    "strided": lambda ids: torch.stack([ids, ids], -1)[..., 0],
    "repeated": lambda ids: ids[..., :1].expand(ids.shape) if ids.dim() > 1 and ids.shape[-1] else ids,
    "int32": lambda ids: ids.int(),
}


@grid(80)
@given(
    batch=batches,
    middle=st.lists(st.integers(0, 4), max_size=2),
    padding_idx=paddings,
    sparse=st.booleans(),
    layout=st.sampled_from(sorted(LAYOUTS)),
    where=st.sampled_from(PLACES),
)
def test_embedding(batch, middle, padding_idx, sparse, layout, where):
    layer = nn.Embedding(VOCABULARY, 3, padding_idx=padding_idx, sparse=sparse)
    torch.manual_seed(1)
    ids = LAYOUTS[layout](torch.randint(VOCABULARY, (batch, *middle)))
    check(*place(layer, where, ids))


@pytest.mark.parametrize("batch_dim", [0, 1, 2])
def test_embedding_with_the_batch_on_any_axis(batch_dim):
    check(*place(nn.Embedding(5, 3), "first", torch.randint(5, (3, 3, 3))), batch_dim=batch_dim)


@pytest.mark.parametrize(
    "ids", [torch.zeros(3, 7, dtype=torch.long), torch.arange(21).view(3, 7) % 20], ids=["same", "all"]
)
def test_embedding_of_one_id_and_of_many(ids):
    check(*place(nn.Embedding(20, 2), "first", ids))


@pytest.mark.parametrize("embeddings, dim", [(5, 0), (1, 3)])
def test_small_tables(embeddings, dim):
    check(nn.Embedding(embeddings, dim), (torch.zeros(2, 3, dtype=torch.long),))


def test_embedding_from_pretrained():
    table = nn.Embedding.from_pretrained(torch.randn(5, 3), freeze=False, padding_idx=1)
    check(nn.Sequential(table, nn.Linear(3, 2)), (torch.randint(5, (3, 4)),))


@pytest.mark.parametrize("layer", [nn.Embedding(5, 3, max_norm=0.5), nn.EmbeddingBag(5, 3, max_norm=0.5)], ids=repr)
def test_max_norm_is_exact_or_refused(layer):
    """It rewrites rows of the table in the forward."""
    exact_or_refused(nn.Sequential(layer, nn.Linear(3, 2)), (torch.randint(5, (3, 4)),), versions=False)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Embedding(5, 3, scale_grad_by_freq=True),
        nn.EmbeddingBag(5, 3, scale_grad_by_freq=True, mode="sum"),
    ],
    ids=repr,
)
def test_scaling_by_frequency_mixes_examples_and_is_refused(layer):
    ids = torch.tensor([[0, 1, 1], [1, 2, 3], [4, 4, 4]])
    refused(
        nn.Sequential(nn.Identity(), layer),
        (ids,),
        match=r"'?\b1\b.*scale_grad_by_freq|scale_grad_by_freq.*\b1\b",
    )


@grid(60)
@given(
    batch=batches,
    bag=st.integers(1, 4),
    padding_idx=paddings,
    sparse=st.booleans(),
    weighted=st.booleans(),
    mode=st.sampled_from(["sum", "mean", "max"]),
    where=st.sampled_from(PLACES),
)
def test_bags_in_rows(batch, bag, padding_idx, sparse, weighted, mode, where):
    layer = nn.EmbeddingBag(VOCABULARY, 3, mode=mode, padding_idx=padding_idx, sparse=sparse and mode != "max")
    torch.manual_seed(1)
    ids = torch.randint(VOCABULARY, (batch, bag))
    weights = [None, torch.randn(batch, bag)] if weighted and mode == "sum" else []
    layer, inputs = place(layer, where, ids, *weights)
    check(layer, inputs)


def example_of_bags(inputs: tuple, i: int) -> tuple:
    """The ids of bag i alone, from (ids, offsets[, weights])."""
    (ids, offsets, *weights), kwargs = inputs
    ends = [*offsets.tolist(), len(ids)]
    own = slice(ends[i], ends[i + 1])
    return (ids[own], torch.zeros(1, dtype=torch.long), *(w[own] for w in weights)), kwargs


def example_of_closed_bags(inputs: tuple, i: int) -> tuple:
    """The same where the last offset is the end."""
    args, kwargs = example_of_bags(inputs, i)
    return (args[0], torch.tensor([0, len(args[0])]), *args[2:]), kwargs


@grid(60)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    padding_idx=paddings,
    sparse=st.booleans(),
    weighted=st.booleans(),
    closed=st.booleans(),
    mode=st.sampled_from(["sum", "mean", "max"]),
    where=st.sampled_from(PLACES),
)
def test_bags_by_offsets(sizes, padding_idx, sparse, weighted, closed, mode, where):
    """Bags of any size, empty ones among them; the ids' own axis is not the batch."""
    layer = nn.EmbeddingBag(
        VOCABULARY,
        3,
        mode=mode,
        padding_idx=padding_idx,
        sparse=sparse and mode != "max",
        include_last_offset=closed,
    )
    torch.manual_seed(1)
    ids = torch.randint(VOCABULARY, (sum(sizes),))
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    weights = [torch.randn(sum(sizes))] if weighted and mode == "sum" else []
    layer, inputs = place(layer, where, ids, offsets if closed else offsets[:-1], *weights)
    check(layer, inputs, batch_size=len(sizes), example=example_of_closed_bags if closed else example_of_bags)


class Learned(nn.Module):
    """Bags whose per-sample weights are learned, and need gradients of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Embedding(5, 1)
        self.bag = nn.EmbeddingBag(5, 3, mode="sum")

    def forward(self, ids: Tensor) -> Tensor:
        return self.bag(ids, per_sample_weights=self.weight(ids)[..., 0])


def test_learned_sample_weights():
    check(*place(Learned(), "first", torch.randint(5, (3, 4))))


def test_bags_whose_number_equals_the_number_of_ids():
    """Ids and offsets have one length, and id i is not in bag i."""
    ids, offsets = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 3, 4])
    check(nn.EmbeddingBag(4, 3, mode="sum"), (ids, offsets), batch_size=4, example=example_of_bags)
