"""Forward after forward: what is remembered of one call holds for the next that is alike, and for no other."""

from __future__ import annotations

import copy
import gc
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Bare
from torch import Tensor, nn
from torch.nn import functional as F

import perex
from perex.capture.forward import Forward
from perex.capture.parameters import Entry

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "speed"))

from models import CNN, GPT  # noqa: E402

B = 4


def alone(model: nn.Module, inputs: tuple[Tensor, ...], losses: Any) -> Tensor:
    """The norms of a loop, of the parameters that require grad."""
    chosen = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for b in range(len(inputs[0])):
        loss = losses(model(*(x[b : b + 1] for x in inputs))).sum()
        grads = torch.autograd.grad(loss, chosen, allow_unused=True)
        norms.append(sum(g.square().sum() for g in grads if g is not None).sqrt())
    return torch.stack(norms)


def summed(out: Tensor) -> Tensor:
    return out.sin().flatten(1).sum(1)


class Folded(nn.Module):
    """Examples in front, folded with positions, behind positions, normalised, embedded; some weights twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.norm, self.scale = nn.LayerNorm(6), nn.Parameter(torch.rand(6))
        self.conv = nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        h = h + self.a(h.flatten(0, 1)).unflatten(0, (len(ids), -1))
        h = self.b(h.transpose(0, 1)).transpose(0, 1)
        h = self.conv(self.norm(h * self.scale).transpose(1, 2)).transpose(1, 2)
        return F.gelu(self.a(h)) @ self.table.weight.t()


MODELS = {
    "MLP": (lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Dropout(0.0), nn.Linear(7, 3)), lambda n: (n, 5)),
    "CNN": (CNN, lambda n: (n, 3, 32, 32)),
    "GPT": (lambda: GPT(2, 16, 11, 8, heads=2), None),
    "folded": (Folded, None),
}


@pytest.mark.parametrize("param_grads", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_step_after_step(name, param_grads):
    """Other data, batches of other sizes in between, and parameters that are frozen for a while."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().double().eval()
    with perex.attach(model, param_grads=param_grads, audit=False) as px:
        for step, size in enumerate((B, B, B, 2, B, 8, 8, B)):
            x = torch.randint(11, (size, 8)) if shape is None else torch.randn(shape(size)).double()
            first = next(model.parameters())
            first.requires_grad_(step not in (4, 6))
            if step == 5:
                first.data = first.data.clone() * 0.9
            px.backward(summed(model(x)))
            found = px.norms()
            torch.testing.assert_close(found, alone(copy.deepcopy(model), (x,), summed), rtol=1e-9, atol=1e-12)
    assert len(px._session.memo.known) > 1


def test_an_axis_elsewhere_is_another_call():
    """As many positions as examples: shapes say nothing."""

    def forward(m: Bare, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if m.turned else x
        h = m.second(m.first(x).relu())
        return h.transpose(0, 1) if m.turned else h

    model = Bare(forward)
    model.first, model.second, model.turned = nn.Linear(3, 5), nn.Linear(5, 2), False
    model.double()
    with perex.attach(model, audit=False) as px:
        results = []
        x = torch.randn(B, B, 3).double()
        for turned in (False, True, False, True, True, False):
            model.turned = turned
            px.backward(summed(model(x)))
            results.append(px.norms())
    expected = alone(model, (x,), summed)
    for found in results:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_a_constant_that_becomes_a_parameter_and_options_that_change():
    def forward(m: Bare, x: Tensor) -> Tensor:
        return F.softmax(F.linear(m.first(x), m.weight), m.dim).sum(m.dim, keepdim=m.keep) + m.first(x).sum(
            m.dim, m.keep
        )

    model = Bare(forward)
    model.first, model.keep, model.dim = nn.Linear(3, 3), False, 1
    model.register_buffer("weight", torch.randn(3, 3))
    model.double()
    x = torch.randn(B, 3, 3).double()
    with perex.attach(model, audit=False) as px:
        for step in range(12):
            if step == 6:
                weight = model.weight
                del model.weight
                model.weight = nn.Parameter(weight)
            model.dim, model.keep = 1 + step // 2 % 2, step % 3 == 0
            px.backward(summed(model(x)))
            torch.testing.assert_close(px.norms(), alone(copy.deepcopy(model), (x,), summed), rtol=1e-9, atol=0)


def test_pieces_are_known_by_their_axes():
    """Pieces along another dimension than examples; and, between, along that of examples: of a few each."""

    def forward(m: Bare, x: Tensor) -> Tensor:
        h = m.first(x)  # (B, B, 6)
        cut = (lambda: h.split([2, 2, 2], 2), lambda: h.chunk(3, 2), lambda: h.unflatten(2, (2, 3)).unbind(3))
        one, two, three = cut[m.how % 3]()
        if m.how == 3:
            rows = torch.cat([part.roll(1, 1) for part in h.split(2)])
            one = rows[..., :2]
        return m.second(torch.cat((one * two, three), 2).relu())

    model = Bare(forward)
    model.first, model.second = nn.Linear(3, 6), nn.Linear(4, 2)
    model.double()
    with perex.attach(model, audit=False) as px:
        x = torch.randn(B, B, 3).double()
        for how in (0, 1, 2, 3, 0, 3, 1, 2, 3, 0):
            model.how = how
            px.backward(summed(model(x)))
            torch.testing.assert_close(px.norms(), alone(copy.deepcopy(model), (x,), summed), rtol=1e-9, atol=0)
        known = {form[0].__name__: known for form, known in px._session.memo.known.items()}
        assert len(known["chunk"].labels) == len(known["unbind"].labels) == 3


def test_what_values_decide_is_asked_in_every_forward():
    """Sequences of all examples in one, which a mask keeps apart: until it does not."""

    def forward(m: Bare, x: Tensor) -> Tensor:
        size, length, _ = x.shape
        q, k, v = m.first(x.reshape(1, size * length, -1)).chunk(3, -1)
        ids = torch.arange(size).repeat_interleave(length)
        mask = torch.ones(size * length, size * length, dtype=torch.bool) if m.whole else ids[:, None] == ids
        return m.second(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(x.shape))

    model = Bare(forward)
    model.first, model.second, model.whole = nn.Linear(6, 18), nn.Linear(6, 2), False
    model.double()
    with perex.attach(model, param_grads=False) as px:
        for _ in range(3):
            x = torch.randn(B, 4, 6).double()
            px.backward(summed(model(x)))
            torch.testing.assert_close(px.norms(), alone(copy.deepcopy(model), (x,), summed), rtol=1e-9, atol=0)
        model.whole = True
        with pytest.raises(perex.ExamplesMixError, match="attends across the batch"):
            px.backward(summed(model(x)))


def test_mixing_is_seen_in_later_forwards():
    model = Bare(lambda m, x: m.second(m.first(x) - (m.first(x).mean(0) if m.mixes else 0)))
    model.first, model.second, model.mixes = nn.Linear(3, 5), nn.Linear(5, 2), False
    x = torch.randn(B, 3)
    with perex.attach(model, audit=False) as px:
        for _ in range(3):
            px.backward(summed(model(x)))
        model.mixes = True
        with pytest.raises(perex.ExamplesMixError):
            px.backward(summed(model(x)))
            px.norms()


def test_it_holds_on_to_nothing():
    """No tensor, no graph and no forward is kept alive, and ever new shapes do not fill the memory."""
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    with perex.attach(model, audit=False) as px:
        for step in range(116):
            px.backward(summed(model(torch.randn(2 + step // 2, 3))))
        memo = px._session.memo
        assert 0 < len(memo.known) <= 4 * 58
        found = reachable(memo)
        assert not [value for value in found if isinstance(value, (Tensor, Forward))]
        assert [value for value in found if isinstance(value, Entry)]


def test_parameters_that_are_replaced_are_let_go():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    x, gone = torch.randn(B, 3), []
    with perex.attach(model, audit=False) as px:
        for _ in range(9):
            gone.append(weakref.ref(model[2].weight))
            model[2].weight = nn.Parameter(torch.randn(2, 5))
            px.backward(summed(model(x)))
            torch.testing.assert_close(px.norms(), alone(copy.deepcopy(model), (x,), summed))
        gc.collect()
        assert [ref() is not None for ref in gone] == [False] * 9
        assert 0 < sum(len(known.calls) for known in px._session.memo.known.values()) <= 3


def reachable(value: object) -> list[object]:
    """What an object holds on to, not looking into parameters' entries, classes, functions and modules."""
    found, seen, ahead = [], {id(value)}, [value]
    while ahead:
        for held in gc.get_referents(ahead.pop()):
            if id(held) in seen or isinstance(held, (type, types.FunctionType, types.ModuleType)):
                continue
            seen.add(id(held))
            found.append(held)
            if not isinstance(held, Entry):
                ahead.append(held)
    return found
