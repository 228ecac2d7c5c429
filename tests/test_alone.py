"""The audit: a few examples are run alone, and what parameters meet there is compared with the batch."""

from __future__ import annotations

import copy
import functools
import random
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Bare, check, no_trace, scramble
from torch import Tensor, nn
from torch.nn import functional as F

import perex

B, T, D = 5, 4, 3


def data(*shape: int, seed: int = 0) -> Tensor:
    """One example is much larger than all others."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[1] *= 20
    return x


def net(function: Any) -> Bare:
    torch.manual_seed(0)
    model = Bare(function, w=f"{D}{D}")
    model.first, model.second = nn.Linear(D, D), nn.Linear(D, D)
    return model.double()


def scaled_up(x: Tensor) -> Tensor:
    return x * 2 if bool(x.abs().max() > 9) else x


MIXING = {
    "numpy": lambda m, x: m.second(m.first(x - torch.from_numpy(x.detach().numpy().mean(0)))),
    "a list": lambda m, x: m.second(m.first(x) / max(max(map(abs, row)) for row in x[:, 0].tolist())),
    "an item of a row": lambda m, x: m.second(m.first(x) * float(x[0, 0, 0].detach())),
    "a branch": lambda m, x: m.second(m.first(scaled_up(x))),
    "a branch inside": lambda m, x: m.second(m.first(x) if (m.first(x).abs() > 9).any() else m.first(x) * 3),
    "experts have room for two": lambda m, x: m.second(capacity(m.first(x))),
}


def capacity(h: Tensor) -> Tensor:
    """Only the first two tokens of the whole batch that choose the last expert get it."""
    chosen = h.reshape(-1, D).argmax(-1)
    place = (chosen == 2).long().cumsum(0)
    keep = (chosen != 2) | (place <= 2)
    return h * keep.reshape(h.shape[:-1])[..., None]


@pytest.mark.parametrize("case", MIXING)
@pytest.mark.parametrize("param_grads", [True, False])
def test_mixing_that_no_label_shows(case, param_grads):
    model = net(MIXING[case])
    with no_trace(model), perex.attach(model, param_grads=param_grads) as px:
        with pytest.raises(perex.PerexError):
            px.backward(model(data(B, T, D)).sin().sum((1, 2)))
            px.norms()
        with pytest.raises(perex.PerexError):  # nor without losses
            model(data(B, T, D)).sin().sum((1, 2)).mean().backward()
            px.norms()


def test_the_first_module_is_named():
    model = nn.Sequential(nn.Linear(D, D), net(MIXING["an item of a row"]), nn.Linear(D, D)).double()
    with perex.attach(model) as px, pytest.raises(perex.ExamplesMixError, match="'1.second'"):
        px.backward(model(data(B, T, D)).sum((1, 2)))


def test_it_can_be_switched_off():
    model = net(MIXING["an item of a row"])
    with perex.attach(model, audit=False) as px:
        px.backward(model(data(B, T, D)).sin().sum((1, 2)))
        assert px.norms().shape == (B,)


HARMLESS = {
    "a length": lambda m, x: m.second(m.first(x)[:, : int((x[..., 0] > -1e9).sum(1).max())]),
    "a check": lambda m, x: m.second(m.first(x)) if not torch.isnan(x).any() else x,
    "all of a mask": lambda m, x: m.second(m.first(x)) if (x[..., 0] > -1e9).all() else m.second(m.first(x) * 1.0),
    "sorted and back": lambda m, x: (lambda o: m.second(m.first(x[o]))[o.argsort()])(x[:, 0, 0].argsort()),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_only_looks_like_mixing(case):
    check(net(HARMLESS[case]), (data(B, T, D),))


RANDOM = {
    "dropout": nn.Dropout(0.5),
    "dropout in place": nn.Dropout(0.5, inplace=True),
    "feature dropout": nn.Dropout1d(0.5),
    "alpha dropout": nn.AlphaDropout(0.3),
    "rrelu": nn.RReLU(),
    "noise": lambda x: x + torch.randn_like(x),
    "noise of a shape": lambda x: x * torch.rand(x.shape[0], 1, x.shape[2], dtype=x.dtype),
    "one number": lambda x: x * torch.rand((), dtype=x.dtype),
    "stochastic depth": lambda x: x * x.new_empty(len(x), 1, 1).bernoulli_(0.5),
    "gumbel": lambda x: F.gumbel_softmax(x),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "Python's": lambda x: x * random.random() + float(np.random.rand()),
    "a layer dropped": lambda x: x if torch.rand(()) < 0.5 else x * 2,
    "multinomial": lambda x: x * torch.multinomial(x.softmax(-1).reshape(-1, D), 1).reshape(*x.shape[:-1], 1),
}


@pytest.mark.parametrize("case", RANDOM)
def test_randomness_does_not_trip_it(case):
    model = net(lambda m, x: m.second(m.random(m.first(x)))).train()
    function = RANDOM[case]
    model.random = function if not isinstance(function, nn.Module) else function.train()
    with perex.attach(model) as px:
        for seed in range(3):
            torch.manual_seed(seed)
            x = data(B + seed, T, D)
            px.backward(model(x).sin().sum((1, 2)))
            assert px.norms().shape == (B + seed,)


@pytest.mark.parametrize("case", ["dropout", "noise", "stochastic depth", "Python's"])
def test_the_streams_of_random_numbers_go_on_as_without(case):
    def state(attach: bool) -> Any:
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        model = net(lambda m, x: m.second(m.random(m.first(x)))).train()
        model.random = RANDOM[case]
        if attach:
            with perex.attach(model) as px:
                px.backward(model(data(B, T, D)).sin().sum((1, 2)))
        else:
            model(data(B, T, D)).sin().sum((1, 2)).mean().backward()
        return torch.rand(3), random.random(), np.random.rand()

    with_perex, without = state(True), state(False)
    assert torch.equal(with_perex[0], without[0]) and with_perex[1:] == without[1:]


def test_mixing_behind_dropout_is_found():
    model = net(lambda m, x: m.second(F.dropout(m.first(x) * float(x[0, 0, 0].detach()), 0.5))).train()
    with perex.attach(model) as px, pytest.raises(perex.ExamplesMixError):
        px.backward(model(data(B, T, D)).sum((1, 2)))


def test_buffers_are_as_after_one_forward():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(x)

    model = Counts().double()
    with perex.attach(model) as px:
        px.backward(model(data(B, D)).sum(1))
    assert model.calls == 1


def test_once_for_each_shape():
    calls: list[int] = []
    model = net(lambda m, x: calls.append(1) or m.second(m.first(x)))
    with perex.attach(model) as px:
        for size in (B, B, 2 * B, B + 1):
            px.backward(model(data(size, T, D)).sum((1, 2)))
        assert len(calls) == 4 + 4 + 2
        calls.clear()
        for size in (7, 8, 9):
            model(data(size, T, D)).mean().backward()
        assert len(calls) == 3  # nobody asked
        px.backward(model(data(4 * B, T, D)).sum((1, 2)))
        px.backward(model(data(4 * B, T, D)).sum((1, 2)))
        assert len(calls) == 3 + 2 + 2


def test_score_can_do_without():
    model = scramble(net(MIXING["an item of a row"])).double()
    pool = (data(9, T, D), torch.zeros(9))

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return out.sin().sum()

    with pytest.raises(perex.PerexError):
        perex.score(model, pool, loss, batch_size=3)
    assert len(perex.score(model, pool, loss, batch_size=3, audit=False)) == 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_repeated(dtype):
    """The backward comes after the context, as torch advises; the examples alone run in it all the same."""
    model = net(lambda m, x: m.second(m.first(x).relu())).float()
    with perex.attach(model) as px:
        with torch.autocast("cpu", dtype):
            losses = model(data(B, T, D).float()).sin().sum((1, 2))
        px.backward(losses)
        assert px.norms().shape == (B,)


def scripted(function: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(function)


def minus_mean(x: Tensor) -> Tensor:
    return x - x.mean(0)


def centred(x: Tensor) -> Tensor:
    return scripted(minus_mean)(x)


def behind_the_back(x: Tensor) -> Tensor:
    y = x.clone()
    y.data = x.detach() - x.detach().mean(0)
    return y


UNSEEN = {
    "scripted": lambda m, x: m.second(m.first(centred(x))),
    "vmapped": lambda m, x: m.second(m.first(torch.vmap(lambda c: c - c.mean(), 1, 1)(x[..., 0])[..., None] * x)),
    "data is set": lambda m, x: m.second(m.first(behind_the_back(x))),
    "digits": lambda m, x: m.second(m.first(x) * float(f"{x[0, 0, 0].detach()}")),
    "written from there": lambda m, x: m.second(m.first(torch.zeros_like(x[0]).expand_as(x).clone().copy_(centred(x)))),
}


@pytest.mark.parametrize("case", UNSEEN)
def test_constants_of_unknown_origin(case):
    model = net(UNSEEN[case])
    x = data(B, T, D)
    with perex.attach(model) as px:
        with pytest.raises(perex.PerexError):
            px.backward(model(x).sin().sum((1, 2)))
            px.norms()
    with perex.attach(model) as px:
        model(x).sin().sum((1, 2)).mean().backward()
        with pytest.raises(perex.PerexError):
            px.norms()


KNOWN = {
    "attribute": lambda m, x: m.second(m.first(x) * m.scale),
    "NumPy's": lambda m, x: m.second(m.first(x) * torch.from_numpy(np.arange(1.0, D + 1))),
    "scripted": lambda m, x: m.second(m.first(x) + scripted(abs_twice)(x)),
    "kept from the call before": lambda m, x: m.second(m.first(x) * kept_scale(m)),
}


def abs_twice(x: Tensor) -> Tensor:
    return x.abs() * 2


def kept_scale(m: Any) -> Tensor:
    if m.cache is None:
        m.cache = torch.arange(1, D + 1, dtype=torch.float64)
    return m.cache


@pytest.mark.parametrize("case", KNOWN)
def test_constants_of_unknown_origin_that_do_no_harm(case):
    model = net(KNOWN[case])
    model.scale, model.cache = torch.rand(D, dtype=torch.float64) + 1, None
    check(model, (data(B, T, D),))


def test_what_modules_keep_is_as_after_one_forward():
    """Examples alone start from the state before the forward, and leave the one after it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.count, m.total = m.count + 1, m.total + m.count
        m.seen.append(len(x))
        m.by_name["last"] = len(x)
        m.in_place += 1
        return m.second(m.first(x) * m.count * m.in_place)

    model = net(forward)
    model.count, model.total, model.seen, model.by_name = 0, 0, [], {}
    model.in_place = torch.zeros(D, dtype=torch.float64)
    held = model.in_place
    with perex.attach(model) as px:
        for calls in (1, 2):
            px.backward(model(data(B, T, D)).sin().sum((1, 2)))
            assert px.norms().shape == (B,)
            assert (model.count, model.seen, model.by_name) == (calls, [B] * calls, {"last": B})
            assert model.in_place is held and bool((held == calls).all())


def test_a_container_that_is_not_to_be_written_to():
    class Frozen(dict):
        def update(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("frozen")

    model = net(lambda m, x: m.second(m.first(x)) * m.config["scale"])
    model.config = Frozen(scale=2.0)
    check(model, (data(B, T, D),))
    assert model.config == {"scale": 2.0}


def test_states_of_every_kind_are_put_back():
    def forward(m: Any, x: Tensor) -> Tensor:
        m.nested["counts"]["calls"] += 1
        m.names.calls += 1
        m.array += 1
        m.inner[0].append(1)
        noise = torch.rand(D, generator=m.generator, dtype=torch.float64) + float(m.numpy.random())
        return m.second(m.first(x) * noise * m.nested["counts"]["calls"] * float(m.array[0]))

    model = net(forward)
    model.nested, model.names, model.array = {"counts": {"calls": 0}}, SimpleNamespace(calls=0), np.zeros(1)
    model.inner = ([],)
    model.generator, model.numpy = torch.Generator().manual_seed(0), np.random.default_rng(0)
    twin = copy.deepcopy(model)
    twin(data(B, T, D))
    with perex.attach(model) as px:
        px.backward(model(data(B, T, D)).sin().sum((1, 2)))
        assert px.norms().shape == (B,)
    assert model.nested == twin.nested and model.names == twin.names and model.inner == twin.inner
    assert model.array == twin.array and model.numpy.random() == twin.numpy.random()
    assert torch.equal(torch.rand(3, generator=model.generator), torch.rand(3, generator=twin.generator))


feature: Tensor | None = None


def test_what_hooks_keep_is_of_the_batch():
    """In a list, a variable, an object, a global: a loss may be of it, and has to be of the batch's own."""
    global feature

    class Store:
        last: Tensor | None = None

        def keep(self, module: nn.Module, args: Any, out: Tensor) -> None:
            self.last = out

    store, parts, kept, variable = Store(), SimpleNamespace(), {}, None
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double(), torch.randn(5, 3).double()

    def into(store: Any, module: nn.Module, args: Any, out: Tensor) -> None:
        store.part = out

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        nonlocal variable
        global feature
        variable = feature = kept["out"] = out

    def read(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out if out.abs().max() < 1e9 else out * 2  # has to be looked at by running examples alone

    model[0].register_forward_hook(keep)
    model[0].register_forward_hook(functools.partial(into, parts))
    model[0].register_forward_hook(store.keep)
    model[1].register_forward_hook(read)
    with perex.attach(model) as px:
        out = model(x)
        losses = out.sin().sum(1)
        for hidden in (store.last, parts.part, kept["out"], variable, feature):
            losses = losses + hidden.square().sum(1)
        losses.mean().backward()
        found = px.norms()
    for b in range(5):
        model.zero_grad()
        hidden = model[0](x[b : b + 1])
        (model[1](hidden).sin().sum() + 5 * hidden.square().sum()).backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        torch.testing.assert_close(found[b], expected, rtol=1e-9, atol=0)


def test_hooks_that_log_and_count():
    """They get nothing back: examples alone show that, and what they keep is as without perex."""

    class Meter:
        calls = 0

        def __init__(self) -> None:
            self.count, self.means, self.random = 0, [], random.Random(3)

    def counts(attach: bool) -> list[Any]:
        torch.manual_seed(0)
        model, meter, total = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double(), Meter(), torch.zeros(())

        def log(module: nn.Module, args: Any, out: Tensor, seen: list[int] = []) -> None:  # noqa: B006
            meter.count += 1
            meter.means.append(tuple(out.shape[1:]))
            meter.random.random()
            total.add_(1)
            seen.append(1)
            log.last = len(seen)

        model[0].register_forward_hook(log)
        x = torch.randn(5, 3).double()
        if attach:
            with perex.attach(model) as px:
                for _ in range(2):
                    px.backward(model(x).sin().sum(1))
                    px.norms()
        else:
            for _ in range(2):
                model(x).sin().sum(1).mean().backward()
        return [meter.count, meter.means, meter.random.random(), float(total), log.last]

    assert counts(True) == counts(False)


@pytest.mark.parametrize("audit", [True, False])
def test_a_mean_that_leaves_torch(audit):
    """Examples alone are samples, and would not show what happens to one example only."""
    model = Bare(lambda m, x: m.second(m.first(x) * (m.first(x) > m.first(x).quantile(0.99).item())))
    model.first, model.second = nn.Linear(3, 4), nn.Linear(4, 2)
    with perex.attach(model.double(), audit=audit) as px, pytest.raises(perex.ExamplesMixError):
        px.backward(model(torch.randn(64, 3).double()).sum(1))
