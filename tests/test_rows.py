"""Rows that are not examples: routed, permuted, packed and looped over, each traced to the example it belongs to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from oracle import Bare, check, refused
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import perex

B, T, D, E = 5, 4, 3, 3


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Experts(nn.Module):
    """A mixture of experts over tokens; `route` says how rows are moved."""

    def __init__(self, route: Any, top: int = 2, bare: bool = False):
        super().__init__()
        self.route, self.top = route, top
        self.gate = nn.Linear(D, E)
        self.experts = None if bare else nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.weight = nn.Parameter(torch.randn(E, D, D)) if bare else None

    def expert(self, e: Any, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight[e]) if self.experts is None else self.experts[int(e)](rows)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        weights, chosen = self.gate(rows).softmax(-1).topk(self.top, dim=-1)
        out = self.route(self, rows, weights, chosen)
        return out.reshape(x.shape)


def by_mask(m: Experts, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(rows)
    for e in range(E):
        for k in range(m.top):
            mask = chosen[:, k] == e
            out[mask] += weights[mask, k, None] * m.expert(e, rows[mask])
    return out


def by_where(m: Experts, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(rows)
    for e in range(E):
        token, k = torch.where(chosen == e)
        out.index_add_(0, token, m.expert(e, rows[token]) * weights[token, k, None])
    return out


def by_one_hot(m: Experts, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """As transformers' models do: only the experts that some token goes to are called."""
    out = torch.zeros((len(rows), D), dtype=rows.dtype)
    with torch.no_grad():
        mask = F.one_hot(chosen, num_classes=E).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
    for e in hit:
        e = e[0]
        k, token = torch.where(mask[e])
        out.index_add_(0, token, m.expert(e, rows[token]) * weights[token, k, None])
    return out


def by_sorting(m: Experts, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=E).tolist()
    pieces = rows[order // m.top].split(counts)
    done = torch.cat([m.expert(e, piece) for e, piece in enumerate(pieces)])
    back = torch.empty_like(done)
    back[order] = done
    return (back.reshape(len(rows), m.top, D) * weights[..., None]).sum(1)


def by_gather(m: Experts, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    w = m.weight[chosen]  # (N, top, D, D): every token fetches its experts
    return (torch.einsum("nkij,nj->nki", w, rows) * weights[..., None]).sum(1)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("route", [by_mask, by_where])
def test_experts_by_position_are_exact_in_every_way(route, bare):
    check(Experts(route, bare=bare), (data(B, T, D),))


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("route", [by_one_hot, by_sorting])
def test_experts_chosen_over_the_batch(route, bare):
    check(Experts(route, bare=bare), (data(B, T, D),))


def test_experts_gathered_by_token():
    check(Experts(by_gather, bare=True), (data(B, T, D),))


def test_an_expert_is_no_larger_than_its_rows():
    """One expert is used by one example only, another by all."""
    model = Experts(by_mask, top=1)
    x = data(B, T, D)
    check(model, (x,))


def order(x: Tensor, numbers: tuple[int, ...] = (3, 0, 4, 1, 2)) -> Tensor:
    """A permutation of the batch; of one example there is only one."""
    return torch.tensor(numbers) if len(x) == len(numbers) else torch.arange(len(x))


INVERSE = (1, 3, 4, 0, 2)

PERMUTED = {
    "permuted": lambda m, x: m.layer(x[order(x)])[order(x, INVERSE)],
    "index_select": lambda m, x: m.layer(x.index_select(0, order(x)))[order(x, INVERSE)],
    "stays permuted": lambda m, x: m.layer(x[order(x, (1, 0, 2, 4, 3))])[order(x, (1, 0, 2, 4, 3))],
    "flipped": lambda m, x: m.layer(x.flip(0)).flip(0),
    "rolled": lambda m, x: m.layer(x.roll(2, 0)).roll(-2, 0),
    "halves": lambda m, x: torch.cat([m.layer(x[:2]), m.layer(x[2:])]),
    "chunks": lambda m, x: torch.cat([m.layer(c) for c in x.chunk(2)]),
    "split": lambda m, x: torch.cat([m.layer(c) for c in x.split(2)]),
    "every second": lambda m, x: torch.cat([m.layer(x[::2]), m.layer(x[1::2])])[order(x, (0, 3, 1, 4, 2))],
    "narrow": lambda m, x: torch.cat([m.layer(x.narrow(0, 0, 1)), m.layer(x.narrow(0, 1, len(x) - 1))]),
    "stacked loop": lambda m, x: torch.stack([m.layer(row) for row in x]),
    "loop by number": lambda m, x: torch.stack([m.layer(x[i]) for i in range(len(x))]),
    "loop of ones": lambda m, x: torch.cat([m.layer(x[i : i + 1]) for i in range(len(x))]),
    "unbound": lambda m, x: torch.stack([m.layer(row) for row in x.unbind()], dim=1).transpose(0, 1),
    "backwards": lambda m, x: torch.stack([m.layer(row) for row in reversed(list(x))]).flip(0),
    "mixes in an example": lambda m, x: torch.stack([(row.softmax(0) * m.layer(row)).cumsum(0) for row in x]),
    "gathered": lambda m, x: m.layer(x.gather(0, order(x)[:, None, None].expand(x.shape)))[order(x, INVERSE)],
}


@pytest.mark.parametrize("name", PERMUTED)
def test_moved_rows(name):
    model = Bare(PERMUTED[name])
    model.layer = nn.Linear(D, D)
    check(model, (data(B, T, D),))


def test_written_in_a_loop():
    def forward(m: Any, x: Tensor) -> Tensor:
        out = torch.zeros(len(x), T, D, dtype=x.dtype)
        for i in range(len(x)):
            out[i] = m.layer(x[i])
        return out

    model = Bare(forward)
    model.layer = nn.Linear(D, D)
    check(model, (data(B, T, D),))


def test_tokens_under_a_mask():
    def forward(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[mask] = m.second(m.layer(x[mask]).relu())
        return out + m.bias

    model = Bare(forward, bias="3")
    model.layer, model.second = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
    mask = torch.arange(T) < torch.tensor([1, 4, 0, 2, 3])[:, None]
    check(model, (data(B, T, D), mask))


def test_flat_tokens_are_an_output():
    """What the model returns are the tokens under the mask, with the losses made of them by example."""
    mask = torch.arange(T) < torch.tensor([1, 4, 2, 2, 3])[:, None]
    model = Bare(lambda m, x, mask: m.layer(x[mask]))
    model.layer = nn.Linear(D, D)
    owner = torch.arange(B)[:, None].expand(B, T)

    def loss(output: Tensor, index: Tensor) -> Tensor:
        rows = owner[index][mask[index]] if len(index) == B else torch.zeros(len(output), dtype=torch.long)
        return torch.zeros(len(index), dtype=output.dtype).index_add(0, rows, output.sin().sum(1))

    check(model, (data(B, T, D), mask), loss)


LENGTHS = torch.tensor([2, 4, 1, 3, 4])


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}])
@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("from_zeros", [True, False])
def test_packed_sequences(cell, options, is_sorted, from_zeros):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Linear(D, D)
            self.rnn = getattr(nn, cell)(D, 4, batch_first=True, **options)
            self.after = nn.Linear(8 if options else 4, 2)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(self.before(x), lengths.cpu(), batch_first=True, enforce_sorted=is_sorted)
            zeros = x.new_zeros(4 if options else 1, len(x), 4)  # which torch sorts along with the sequences
            first = ((zeros, zeros) if cell == "LSTM" else zeros) if from_zeros else None
            out, state = self.rnn(packed, first)
            state = state[0] if isinstance(state, tuple) else state
            padded, _ = pad_packed_sequence(out, batch_first=True, total_length=T)
            return self.after(padded).sin().sum(1) + state.sum((0, 2))[:, None]

    lengths = LENGTHS.sort(descending=True).values if is_sorted else LENGTHS
    check(Model(), (data(B, T, D), lengths))


def test_a_row_for_the_rank_among_all_is_refused():
    """What an example gets depends on the others' lengths."""
    table = torch.linspace(0, 1, B, dtype=torch.float64)[:, None, None]
    model = Bare(lambda m, x, lengths: m.layer(x + table[lengths.argsort(stable=True)]))
    model.layer = nn.Linear(D, D)
    refused(model, (data(B, T, D), LENGTHS))


def test_a_list_of_sequences():
    def forward(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        rows = pad_sequence([m.layer(row[: int(n)]) for row, n in zip(x, lengths, strict=True)], batch_first=True)
        return m.layer(rows).sum(1)

    model = Bare(forward)
    model.layer = nn.Linear(D, D, bias=False)
    check(model, (data(B, T, D), LENGTHS))


def test_outputs_in_another_order():
    """Row i is of another example than i: whose loss it has, a sum of all losses does not show."""
    model = Bare(lambda m, x: m.layer(x[order(x)]))
    model.layer = nn.Linear(D, D)
    refused(model, (data(B, T, D),), match="order|losses of other examples")


MIXED = {
    "another's row": lambda m, x: m.layer(x) + x[torch.tensor([1, 0, 2, 3, 4])],
    "a sum over two": lambda m, x: m.layer(x[:2].sum(0))[None].expand(x.shape) + x,
    "neighbours": lambda m, x: m.layer(torch.stack([x[i] + x[i - 1] for i in range(len(x))])),
    "rows added up": lambda m, x: torch.zeros_like(x).index_add(0, torch.tensor([0, 0, 1, 1, 2]), m.layer(x)),
    "overwritten": lambda m, x: m.layer(x).index_copy(0, torch.tensor([0]), m.layer(x)[1:2]),
    "scattered": lambda m, x: m.layer(x).scatter(
        0, torch.tensor([1, 0, 2, 3, 4])[:, None, None].expand(x.shape), m.layer(x)
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_rows_of_several_examples_are_refused(name):
    model = Bare(MIXED[name])
    model.layer = nn.Linear(D, D)
    refused(model, (data(B, T, D),))


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_packed_sequences_as_input_and_output(cell, is_sorted):
    """The model takes packed sequences and returns them; losses are made of the unpacked ones."""
    lengths = LENGTHS.sort(descending=True).values if is_sorted else LENGTHS
    x = data(B, T, D)

    class Padded(nn.Module):  # the oracle slices padded tensors: the attached module is the one inside
        def __init__(self) -> None:
            super().__init__()
            self.rnn = getattr(nn, cell)(D, 4, batch_first=True, num_layers=2, bidirectional=True)

    model = Padded().double().rnn
    expected = []
    for b in range(B):
        model.zero_grad()
        out, _ = model(x[b : b + 1, : lengths[b]])
        out.sin().sum().backward()
        expected.append(sum(p.grad.square().sum() for p in model.parameters()).sqrt())
    for call in ("loss", "losses"):
        with perex.attach(model) as px:
            out, _ = model(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=is_sorted))
            losses = pad_packed_sequence(out, batch_first=True)[0].sin().sum((1, 2))
            losses.mean().backward() if call == "loss" else px.backward(losses)
        torch.testing.assert_close(px.norms(), torch.stack(expected))


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout_between_layers(cell, is_packed, batch_first):
    """In training mode: the same outputs as torch's own, and the norms of the masks that were drawn."""
    options = {"num_layers": 3, "bidirectional": True, "dropout": 0.5, "batch_first": batch_first}
    model = getattr(nn, cell)(D, 4, **options).double().train()
    x = data(B, T, D) if batch_first else data(T, B, D)
    lengths = LENGTHS

    def run() -> Tensor:
        torch.manual_seed(5)
        given = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False) if is_packed else x
        out, _ = model(given)
        out = pad_packed_sequence(out, batch_first)[0] if is_packed else out
        return out if batch_first else out.transpose(0, 1)

    expected = []
    for b in range(B):  # one example's loss of the whole batch: the masks are of the batch
        model.zero_grad()
        run()[b].sin().sum().backward()
        expected.append(sum(p.grad.square().sum() for p in model.parameters()).sqrt())
    plain = run()
    with perex.attach(model, batch_dim=0 if batch_first else 1) as px:
        out = run()
        assert torch.equal(out, plain)
        px.backward(out.sin().sum((1, 2)))
    torch.testing.assert_close(px.norms(), torch.stack(expected))


def test_checkpointed_experts():
    """What is recomputed is of the rows that were routed, however many."""
    checkpoint = torch.utils.checkpoint.checkpoint

    def forward(m: Any, x: Tensor) -> Tensor:
        token = torch.where(x[:, 0, 0] > 0)[0]
        routed = checkpoint(lambda rows: torch.tanh(m.layer(rows)), x[token], use_reentrant=False)
        return torch.zeros_like(x).index_add(0, token, routed) + x

    model = Bare(forward)
    model.layer = nn.Linear(D, D)
    check(model, (data(B, T, D),))


def test_a_cell_on_positions_of_all_examples():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(m.cell(x.flatten(0, 1), x.flatten(0, 1).sin()).view_as(x))

    model = Bare(forward)
    model.cell, model.out = nn.GRUCell(4, 4), nn.Linear(4, 2)
    check(model.double(), (torch.randn(3, 5, 4),))
