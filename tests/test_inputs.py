"""Inputs that are not one row an example: positions, masks, packed rows with their sizes beside them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle import WAYS, Bare, Shared, check, exact_or_refused, refused, scramble
from torch import Tensor, nn
from torch.nn import functional as F

import perex

B = T = 4


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(9, 6), nn.Embedding(T, 6)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0)

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.layer(self.token(ids) + self.position(positions), src_mask=mask)


IDS = torch.tensor([[1, 4, 4, 0], [8, 2, 1, 1], [0, 0, 3, 5], [7, 6, 5, 4]])
MASKS = {
    "none": (),
    "added": (Shared(nn.Transformer.generate_square_subsequent_mask(T)),),
    "of truth values": (Shared(torch.ones(T, T, dtype=torch.bool).triu(1)),),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch", [B, 2, 1])
def test_positions_and_masks_without_a_batch_axis(mask, batch):
    """Also where a sequence is as long as the batch."""
    check(scramble(Encoder()), (IDS[:batch], Shared(torch.arange(T)), *MASKS[mask]))


def test_integers_of_the_examples_that_count_up_are_theirs_all_the_same():
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.kind, self.out = nn.Embedding(9, 6), nn.Embedding(B, 6), nn.Linear(6, 3)

        def forward(self, ids: Tensor, kind: Tensor) -> Tensor:
            return self.out((self.token(ids) + self.kind(kind)[:, None]).relu())

    for kinds in (torch.arange(B), torch.tensor([0, 3, 3, 1])):
        check(scramble(Conditioned()), (IDS, kinds))


def test_labels_among_the_inputs():
    model = Bare(lambda m, x, y: F.cross_entropy(x @ m.w, y, reduction="none"), {"D": T}, w="D3")
    check(scramble(model), (torch.randn(B, T), torch.tensor([0, 2, 2, 1])))


SIZES = torch.tensor([3, 1, 4])
GRID = torch.tensor([[1, 3], [1, 1], [2, 2]])
PACKED = {
    "lengths": SIZES,
    "offsets": torch.tensor([0, 3, 4, 8]),
    "grid": GRID,
}


@pytest.mark.parametrize("given", PACKED)
@pytest.mark.parametrize("call", ["loss", "losses"])
def test_packed_rows_with_their_sizes_beside_them(given, call):
    """Rows attend within their example only; the rows themselves come first."""
    rows = torch.randn(8, 5, dtype=torch.float64)

    def forward(m: Any, x: Tensor, sizes: Tensor) -> Tensor:
        counts = sizes.diff() if given == "offsets" else sizes.prod(1) if given == "grid" else sizes
        parts = (x @ m.w).split([int(n) for n in counts] if call == "losses" else [3, 1, 4])
        return torch.cat([F.scaled_dot_product_attention(p[None], p[None], p[None])[0] for p in parts]) @ m.u

    model = Bare(forward, w="53", u="32").double()
    owner = torch.arange(3).repeat_interleave(SIZES)
    out = model(rows, PACKED[given])
    each = torch.zeros(3, dtype=out.dtype).index_add(0, owner, out.sin().sum(1))
    expected = []
    for b in range(3):
        grads = torch.autograd.grad(each[b], list(model.parameters()), retain_graph=True)
        expected.append(sum(g.square().sum() for g in grads).sqrt())
    with perex.attach(model) as px:
        out = model(rows, PACKED[given])
        losses = torch.zeros(3, dtype=out.dtype).index_add(0, owner, out.sin().sum(1))
        if call == "losses":
            px.backward(losses)
            torch.testing.assert_close(px.norms(), torch.stack(expected))
        else:  # eight examples would do as well
            losses.mean().backward()
            with pytest.raises(perex.UnsupportedError, match="suggests 3 examples"):
                px.norms()


def filled(m: Any, x: Tensor) -> Tensor:
    table = torch.zeros(len(x), T, 3, dtype=x.dtype)
    for b in range(len(x)):
        table[b, :2] = m.p.sin()
        table[b, 2:] = m.q
    return x + table


def test_parameters_written_into_a_constant():
    check(Bare(filled, p="23", q="23"), (torch.randn(B, T, 3),))


def test_an_output_of_parameters_alone_that_has_rows_of_the_examples():
    """Whether the loss of an example reads its own row only is for the losses to show."""
    model = Bare(lambda m, x: (x.sum(1) @ m.w, m.p[None].expand(len(x), -1, -1).sigmoid()), p="23", w="32")
    check(model, (torch.randn(B, T, 3),), ways=[way for way in WAYS if way.call == "losses"])
    assert exact_or_refused(model, (torch.randn(B, T, 3),)) == "exact or refused"


def test_an_output_of_parameters_alone_that_every_example_reads():
    model = Bare(lambda m, x: (x.sum(1) @ m.w, m.p.sigmoid()), p="43", w="33")

    def loss(output: Any, index: Tensor) -> Tensor:
        return (output[0] @ output[1].T).sin().sum(1)

    refused(model, (torch.randn(B, T, 3),), loss)


LOOK_UPS: dict[str, Any] = {
    "positions": lambda table, x: x + table(torch.arange(T)),
    "positions (1, T)": lambda table, x: x + table(torch.arange(T)[None]),
    "a new axis": lambda table, x: x + table(torch.arange(T)).unsqueeze(0),
    "rows read twice": lambda table, x: x + table(torch.tensor([3, 1, 3, 0])),
    "a padding row": lambda table, x: x + F.embedding(torch.tensor([3, 1, 2, 1]), table.weight, padding_idx=1),
    "the last row for padding": lambda table, x: x + F.embedding(torch.arange(1, 1 + T), table.weight, padding_idx=-1),
    "scaled by frequency": lambda table, x: (
        x + F.embedding(torch.tensor([3, 1, 3, 0]), table.weight, scale_grad_by_freq=True)
    ),
    "a piece": lambda table, x: x + table(torch.arange(T + 1))[:T],
    "turned around": lambda table, x: x + table(torch.arange(T)).flip(0),
    "transposed": lambda table, x: x + table(torch.arange(6).clamp(max=T)).T[:T],
    "scaled": lambda table, x: x + 2 * table(torch.arange(T)),
    "expanded": lambda table, x: x + table(torch.tensor([2])).expand(T, 6),
    "as weights": lambda table, x: F.linear(x, table(torch.arange(T))) @ table(torch.arange(T)),
    "of a tied table": lambda table, x: F.linear(x, table.weight) @ table.weight + table(torch.arange(T)),
}


@pytest.mark.parametrize("how", LOOK_UPS)
def test_tables_of_which_constants_read_rows(how):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.table = nn.Linear(6, 6), nn.Embedding(T + 1, 6)

        def forward(self, x: Tensor) -> Tensor:
            return LOOK_UPS[how](self.table, self.first(x))

    check(scramble(Net()), (torch.randn(3, T, 6),))


def test_position_tables_are_not_multiplied_out():
    model = Encoder()
    with perex.attach(model, param_grads=False) as px:
        px.backward(model(IDS, torch.arange(T)).sum((1, 2)))
    assert next(row.way for row in px.report().rows if row.parameters == ("position.weight",)) == "segments"


HOOKS = {"a lambda": lambda grad: 2 * grad, "a function of torch": F.hardtanh, "a built-in of torch": torch.relu}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("derived", ["rows of a table", "a scaled weight"])
def test_gradient_hooks_on_derived_tensors_are_refused(derived, hook):
    """Their gradients are worked out for each example, where no hook runs."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.table = nn.Linear(6, 6), nn.Embedding(T, 6)

        def forward(self, x: Tensor) -> Tensor:
            tensor = self.table(torch.arange(T)) if derived == "rows of a table" else self.table.weight * 2
            tensor.register_hook(HOOKS[hook])
            return self.first(x) + tensor

    model = Net()
    with perex.attach(model), pytest.raises(perex.UnsupportedError, match="derived from parameters alone"):
        model(torch.randn(3, T, 6))


class Matched(nn.Module):
    """Examples beside a table that they share."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.query(x) @ self.key(table).T


@pytest.mark.parametrize("way", ["losses", "loss"])
def test_a_batch_of_one_beside_what_all_share(way):
    """Once a larger batch has shown what is shared."""
    model, table = Matched(), torch.randn(7, 3)
    alone = copy.deepcopy(model)
    with perex.attach(model, param_grads=False) as px:
        for count in (4, 1, 5, 1):
            x = torch.randn(count, 3)
            losses = model(x, table).square().sum(1)
            px.backward(losses) if way == "losses" else losses.mean().backward()
            found = px.norms()
            for b in range(count):
                grads = torch.autograd.grad(alone(x[b : b + 1], table).square().sum(), list(alone.parameters()))
                expected = torch.cat([grad.flatten() for grad in grads]).norm()
                torch.testing.assert_close(found[b], expected, rtol=1e-4, atol=1e-5)


def test_a_first_batch_of_one_beside_what_all_share():
    model = Matched()
    with (
        perex.attach(model, param_grads=False) as px,
        pytest.raises(perex.LossError, match="a larger batch came before"),
    ):
        px.backward(model(torch.randn(1, 3), torch.randn(7, 3)).square().sum(1))
