"""Parameters that are given to every example as a row of its own: class tokens, queries, first states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from oracle import Bare, scramble
from test_cost_guards import peak
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import perex

T, D = 4, 3

Make = Callable[[Any, Tensor], Tensor]
SPREADS: dict[str, tuple[Make, str]] = {
    "expand": (lambda q, x: q.expand(len(x), -1, -1), "12D"),
    "expand of two dimensions": (lambda q, x: q.expand(len(x), -1, -1), "2D"),
    "expand_as": (lambda q, x: q.expand_as(x[:, :2]), "12D"),
    "broadcast_to": (lambda q, x: torch.broadcast_to(q, (len(x), 2, 3)), "12D"),
    "a part": (lambda q, x: q[1:3].expand(len(x), -1, -1), "5D"),
    "of one vector": (lambda q, x: q.expand(len(x), 2, -1), "D"),
    "transposed": (lambda q, x: q.mT.expand(len(x), -1, -1), "D2"),
    "and transposed": (lambda q, x: q.expand(len(x), -1, -1).mT, "D2"),
    "time first": (lambda q, x: q.expand(-1, len(x), -1).transpose(0, 1), "21D"),
    "repeat": (lambda q, x: q.repeat(len(x), 1, 1), "12D"),
    "repeat of two dimensions": (lambda q, x: q.repeat(len(x), 1, 1), "2D"),
    "repeat a part": (lambda q, x: q[:, :1].repeat(len(x), 2, 1), "13D"),
    "repeat rows": (lambda q, x: q.repeat(len(x), 2, 1), "11D"),
    "tile": (lambda q, x: q.tile((len(x), 1, 1)), "12D"),
    "contiguous": (lambda q, x: q.expand(len(x), -1, -1).contiguous(), "12D"),
    "unsqueezed": (lambda q, x: q[None].expand(len(x), -1, -1).clone(), "2D"),
    "viewed": (lambda q, x: q.view(1, 2, 3).repeat(len(x), 1, 1), "6"),
    "looked up": (lambda q, x: F.embedding(torch.tensor([1, 3]).expand(len(x), -1), q), "5D"),
    "looked up, time first": (
        lambda q, x: F.embedding(torch.tensor([[1], [1]]).expand(-1, len(x)), q).transpose(0, 1),
        "5D",
    ),
    "padded": (lambda q, x: F.embedding(torch.tensor([1, 3]).expand(len(x), -1), q, padding_idx=3), "5D"),
    "repeat_interleave": (lambda q, x: q.repeat_interleave(len(x), 0), "12D"),
    "scaled": (lambda q, x: (2 * q).expand(len(x), -1, -1), "12D"),
    "and scaled": (lambda q, x: q.expand(len(x), -1, -1) * 2, "12D"),
    "indexed": (lambda q, x: q[torch.zeros(len(x), dtype=torch.long)], "12D"),
    "columns": (lambda q, x: q.expand(2, len(x), 3).transpose(0, 1), "1D"),
    "of two": (lambda q, x: torch.cat([q, q.sin()], 1).expand(len(x), -1, -1), "11D"),
    "twice": (lambda q, x: q.expand(len(x), -1, -1) + q.repeat(len(x), 1, 1), "12D"),
}
MEETS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "cat": lambda m, q, x: torch.cat([q, x], 1),
    "add": lambda m, q, x: q + x[:, :2],
    "attention": lambda m, q, x: F.scaled_dot_product_attention(q, x, x),
    "bmm": lambda m, q, x: torch.bmm(q, x.mT),
    "written": lambda m, q, x: x.index_copy(1, torch.tensor([1, 3]), q),
    "multiplied": lambda m, q, x: q * x[:, 1:3],
}


def check(model: nn.Module, inputs: tuple[Tensor], **options: Any) -> None:
    """As the oracle does, with first batches; and unaudited, when rows are made again."""
    oracle.check(model, inputs, **options)
    model, (x,) = model.double(), inputs
    x = x.double()
    expected: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for b in range(len(x)):
        grads = torch.autograd.grad(
            losses(model(x[b : b + 1])).sum(), list(model.parameters()), allow_unused=True, materialize_grads=True
        )
        for found, grad in zip(expected.values(), grads, strict=True):
            found.append(grad)
    out = model(x)
    for param_grads in (True, False):
        with perex.attach(model, audit=False, loss_reduction="sum", param_grads=param_grads, memory="high") as px:
            for _ in range(3):
                model.zero_grad()
                again = model(x)
                losses(again).sum().backward()
                torch.testing.assert_close(again, out, rtol=1e-12, atol=1e-12)
                norms = px.norms(by="parameter")
                for name, parameter in model.named_parameters():
                    each = torch.stack(expected[name])
                    found = norms.get(name, torch.zeros(len(x), dtype=x.dtype))
                    torch.testing.assert_close(found, each.flatten(1).norm(dim=1), rtol=1e-9, atol=1e-12)
                    if param_grads and parameter.grad is not None:
                        torch.testing.assert_close(parameter.grad, each.sum(0), rtol=1e-9, atol=1e-10)
            model.zero_grad()
            px.clip_(0.5)
            total = torch.stack([torch.stack(each).flatten(1).square().sum(1) for each in expected.values()]).sum(0)
            weights = 0.5 / total.sqrt().clamp(min=0.5)
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    clipped = torch.tensordot(weights, torch.stack(expected[name]), 1)
                    torch.testing.assert_close(parameter.grad, clipped, rtol=1e-9, atol=1e-10)


def losses(out: Tensor) -> Tensor:
    scale = torch.arange(1, out[0].numel() + 1, dtype=out.dtype).sin()
    return (out.sin().flatten(1) * scale).sum(1)


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("spread", SPREADS)
def test_rows_of_one_parameter(spread, batch):
    make, shape = SPREADS[spread]
    model = scramble(Bare(lambda m, x: torch.cat([make(m.q, x), x * m.a], 1), {"D": D}, q=shape, a="D"))
    check(model, (torch.randn(batch, T, D),))


@pytest.mark.parametrize("spread", ["expand", "repeat", "contiguous", "of one vector", "scaled"])
@pytest.mark.parametrize("meets", MEETS)
def test_wherever_they_meet_examples(meets, spread):
    make, shape = SPREADS[spread]
    model = scramble(Bare(lambda m, x: MEETS[meets](m, make(m.q, x), x * m.a), {"D": D}, q=shape, a="D"))
    check(model, (torch.randn(3, T, D),))


def test_rows_of_examples_that_are_folded():
    """Two rows an example show the parameter."""

    def forward(m: Any, x: Tensor) -> Tensor:
        rows = (x * m.a).flatten(0, 1)  # (2 B, T, D)
        return torch.cat([m.q.expand(len(rows), -1, -1), rows], 1).unflatten(0, (len(x), 2)).flatten(1)

    check(scramble(Bare(forward, {"D": D}, q="12D", a="D")), (torch.randn(3, 2, T, D),))


def test_a_row_that_was_changed_in_place():
    def forward(m: Any, x: Tensor) -> Tensor:
        rows = m.q.repeat(len(x), 1, 1)
        rows[:, 0] *= 2
        return torch.cat([rows, x * m.a], 1)

    check(scramble(Bare(forward, {"D": D}, q="12D", a="D")), (torch.randn(3, T, D),))


@pytest.mark.parametrize("spread", ["expand", "repeat", "contiguous"])
def test_memory_does_not_grow_with_the_square_of_the_batch(spread):
    make, _ = SPREADS[spread]
    model = Bare(lambda m, x: torch.cat([make(m.q, x), m.layer(x)], 1))
    model.q, model.layer = nn.Parameter(torch.randn(1, 16, 128)), nn.Linear(128, 128)
    x = torch.randn(64, 16, 128)
    with perex.attach(model, param_grads=False) as px:

        def step() -> None:
            px.backward(model(x).square().mean((1, 2)))
            assert px.norms().shape == (64,)

        for _ in range(2):
            step()
        assert peak(step) < 16 * x.nbytes  # all examples' gradients of all rows would take 64 of them


class Attends(nn.Module):
    """Queries go through layers of their own, as in a Perceiver, a detector or an attention pool."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.queries = how, nn.Parameter(torch.randn(1, 2, D))
        self.table = nn.Embedding(5, D)
        self.norm, self.layer = nn.LayerNorm(D), nn.Linear(D, D)
        self.attention = nn.MultiheadAttention(D, 3, batch_first=True)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q = self.queries.repeat(len(x), 1, 1) if "repeat" in self.how else self.queries.expand(len(x), -1, -1)
        if "table" in self.how:
            q = q + self.table(torch.arange(2).expand(len(x), -1))
        if "norm" in self.how:
            q = self.norm(q)
        if "layer" in self.how:
            q = self.layer(q).relu() + q
        if "self" in self.how:
            q = q + self.attention(q, q, q)[0]
        if "split" in self.how:
            q = torch.cat(q.chunk(2, 1)[::-1], 1)
        if "first" in self.how:
            q = q.transpose(0, 1).contiguous().transpose(0, 1)
        if "in place" in self.how:
            q = q.clone()
            q.mul_(2)
        if "relu" in self.how:
            q = F.relu(q, inplace=True)
        if "rows changed" in self.how:
            q[:, 0].mul_(2)
        if "data" in self.how:
            q.data.mul_(2)
        if "written" in self.how:
            q = q.clone()
            before = q + 1
            q[:, 0] = 0
            q = q + before
        if "centred" in self.how:  # over rows that are all the same
            q = q - 0.5 * q.mean(0)
        if "sorted" in self.how:
            q = q.flip(0) + q.cumsum(0)[:1]
        if "drop" in self.how:
            q = self.drop(q)
        if "both" in self.how:  # once for all, and once for each
            q = q + q[:1].sum()
        h = self.attention(q, self.layer(x), x, need_weights="heads" in self.how)[0]
        return torch.cat([h, self.layer(q)], 1) if "again" in self.how else h


LAYERS = [
    "norm", "repeat, norm, layer", "layer, self", "table, norm", "layer, split", "repeat, layer, first",
    "layer, in place", "layer, written", "layer, both", "norm, layer, again", "table, self, again",
    "layer, relu", "repeat, relu", "repeat, layer, rows changed", "layer, data", "repeat, norm, relu, again",
    "self, both, again", "heads", "repeat, norm, heads, again", "layer, centred", "layer, sorted",
    "norm, centred, layer, again",
]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("how", LAYERS)
def test_layers_of_their_own(how, batch):
    check(scramble(Attends(how)), (torch.randn(batch, T, D),))


def test_dropout_on_queries():
    """Its masks are drawn once: norms are those of the masks that the output has."""
    model, x = scramble(Attends("layer, drop")).double().train(), torch.randn(3, T, D, dtype=torch.float64)
    expected = []
    for b in range(3):
        torch.manual_seed(1)
        grads = torch.autograd.grad(model(x)[b].sum(), list(model.parameters()), allow_unused=True)
        expected.append(sum(g.square().sum() for g in grads if g is not None).sqrt())
    with perex.attach(model, audit=False, loss_reduction="sum") as px:
        torch.manual_seed(1)
        model(x).sum().backward()
    torch.testing.assert_close(px.norms(), torch.stack(expected))


def test_layers_on_queries_are_tapped():
    model = Attends("norm, layer")
    with perex.attach(model, audit=False) as px:
        px.backward(model(torch.randn(3, T, D)).sum((1, 2)))
    ways = {way for row in px.report().rows for way in row.ways}
    assert "pulled back" not in ways


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_rows_that_are_not_the_examples(batch):
    """As many as there are examples, along time, heads, or both."""

    def forward(m: Any, x: Tensor) -> Tensor:
        size = x.shape[1]  # positions
        along = m.layer(m.p.expand(size, -1))  # (T, D)
        heads = m.layer(m.p.expand(size, 2, -1)).mean(0)  # (2, D)
        table = m.layer(m.p.expand(size, size, -1)).sum(-1)  # (T, T)
        rows = m.layer(m.p.expand(len(x), size, -1))  # (B, T, D): these are
        h = x * m.a + along + along[:1]
        h = h + (h @ h.mT + table).softmax(-1) @ h
        return h + rows + heads.sum(0)

    model = Bare(forward, {"D": D}, p="D", a="D")
    model.layer = nn.Linear(D, D)
    check(scramble(model), (torch.randn(batch, batch, D),))


@pytest.mark.parametrize("how", ["repeat, relu", "layer, relu", "repeat, norm, relu"])
def test_slopes_at_zero(how):
    """Changing zeros in place leaves them what they were, and their gradients not."""
    model = Attends(how)
    with torch.no_grad():
        for parameter in (model.queries, model.norm.weight, model.norm.bias, *model.layer.parameters()):
            parameter.zero_()
    check(model, (torch.randn(3, T, D),))


def test_an_array_that_is_changed():
    def forward(m: Any, x: Tensor) -> Tensor:
        shift = torch.zeros(3, T, D, dtype=x.dtype)[: len(x)]
        rows = m.layer(m.q.expand(len(x), T, D) + shift)
        shift.numpy()[:] = 1
        chosen = [0, 1]
        rows = rows[:, chosen]
        chosen[0] = 2
        return torch.cat([rows, x * m.a], 1)

    model = Bare(forward, {"D": D}, q="D", a="D")
    model.layer = nn.Linear(D, D)
    check(scramble(model), (torch.randn(3, T, D),))


@pytest.mark.parametrize("positions", [2, 4])
def test_a_layer_on_queries_and_then_on_examples(positions):
    model = Bare(lambda m, x: torch.cat([m.layer(m.q.expand(len(x), -1, -1)), m.layer(x)], 1), {"D": D}, q="12D")
    model.layer = nn.Linear(D, D)
    check(scramble(model), (torch.randn(3, positions, D),))


@pytest.mark.parametrize("how", ["rows", "numbers"])
def test_what_zeros_do_not_tell(how):
    """A layer of zeros makes the same of rows that were changed unseen, and its gradient is another."""

    def forward(m: Any, x: Tensor) -> Tensor:
        rows = m.q.repeat(len(x), 1, 1) * 1
        first = rows * x[:, :2]
        chosen = [0, 1]
        if how == "rows":
            rows.data.mul_(2)
            rows = m.layer(rows)
        else:
            rows = m.layer(rows)[:, chosen] * m.a
            chosen[0] = 1
        return torch.cat([first, rows, x], 1)

    model = Bare(forward, {"D": D}, q="12D", a="D")
    model.layer = nn.Linear(D, D)
    model = scramble(model)
    with torch.no_grad():
        for parameter in model.layer.parameters():
            parameter.zero_()
    check(model, (torch.randn(3, T, D),))


def test_constants_of_inference_mode():
    with torch.inference_mode():
        shift = torch.ones(D, dtype=torch.float64)
    model = Bare(
        lambda m, x: torch.cat([m.layer(m.q.expand(len(x), -1, -1) + shift), x * m.a], 1), {"D": D}, q="12D", a="D"
    )
    model.layer = nn.Linear(D, D)
    check(scramble(model), (torch.randn(3, T, D),))


def saved(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    out: Tensor = checkpoint(function, *args, use_reentrant=False)
    return out


CHECKPOINTED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "made and met": lambda m, x: saved(lambda y: torch.cat([m.layer(rows(m, y)), y], 1), x),
    "made": lambda m, x: torch.cat([saved(lambda y: m.layer(rows(m, y)), x), x], 1),
    "given and met": lambda m, x: saved(lambda q, y: torch.cat([m.layer(q).relu(), y], 1), rows(m, x), x),
    "given derived and met": lambda m, x: saved(lambda q, y: q.sin() + y, m.layer(rows(m, x)), x),
    "given alone": lambda m, x: torch.cat([saved(lambda q: m.layer(q).relu(), rows(m, x)), x], 1),
    "given a parameter": lambda m, x: torch.cat([saved(lambda q: m.layer(q).relu(), m.q).expand(len(x), -1, -1), x], 1),
}


def rows(m: Any, x: Tensor) -> Tensor:
    return m.q.expand(len(x), -1, -1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", CHECKPOINTED)
def test_queries_in_a_checkpoint(case, batch):
    """Sizes are the same everywhere: nothing but numbers would tell one saved tensor from another."""
    model = Bare(lambda m, x: CHECKPOINTED[case](m, x * m.a), {"D": D}, q="1DD", a="D")
    model.layer = nn.Linear(D, D)
    check(scramble(model), (torch.randn(batch, D, D),), again=False)
