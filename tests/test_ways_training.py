"""Training loops as people write them: every batch's norms right, and training itself as it is without perex."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import check, no_trace, scramble
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import perex

B, D = 4, 5
every_way = pytest.mark.parametrize("param_grads", [True, False])
every_call = pytest.mark.parametrize("call", ["loss", "losses"])


class Net(nn.Module):
    """Two layers, a normalisation, an activation in place and a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)
        self.norm, self.act = nn.GroupNorm(1, D), nn.LeakyReLU(0.1, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.twice(self.twice(self.norm(self.first(x))).tanh())))


def net() -> nn.Module:
    return scramble(Net()).double()


def batch(step: int, size: int = B) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, D, generator=generator).double(), torch.randint(3, (size,), generator=generator)


def losses_of(out: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(out, y, reduction="none")


def alone(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Norms from the loop, on a copy of the model that nothing is attached to."""
    model = copy.deepcopy(model)
    tracked, found = [p for p in model.parameters() if p.requires_grad], []
    for i in range(len(x)):
        grads = torch.autograd.grad(losses_of(model(x[i : i + 1]), y[i : i + 1]).sum(), tracked)
        found.append(torch.cat([g.flatten() for g in grads]).norm())
    return torch.stack(found)


def backward(px: perex.Tracker | None, losses: Tensor, call: str, **how: Any) -> None:
    if px is not None and call == "losses" and not how:
        px.backward(losses)
    else:
        losses.mean().backward(**how)


LOOPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grads set to zero": {"set_to_none": False},
    "accumulation": {"accumulate": 3},
    "accumulation, grads set to zero": {"accumulate": 2, "set_to_none": False},
    "clipping by norm": {"clip": lambda ps: nn.utils.clip_grad_norm_(ps, 0.5)},
    "clipping by value": {"clip": lambda ps: nn.utils.clip_grad_value_(ps, 0.05)},
    "schedule": {"schedule": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 3)},
    "adam": {"optimizer": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1)},
    "adam, fused": {"optimizer": lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True)},
    "foreach": {"optimizer": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, foreach=True)},
    "freezing": {"freeze": True},
}


def train(
    attached: bool,
    call: str = "loss",
    param_grads: bool = True,
    accumulate: int = 1,
    set_to_none: bool = True,
    clip: Callable = lambda parameters: None,
    schedule: Callable | None = None,
    optimizer: Callable = lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    freeze: bool = False,
) -> list[Tensor]:
    """All gradients and weights on the way; the norms are checked."""
    model = net()
    optim = optimizer(list(model.parameters()))
    scheduler = schedule(optim) if schedule else None
    px = perex.attach(model, param_grads=param_grads) if attached else None
    seen: list[Tensor] = []
    for step in range(4):
        if freeze:
            model.twice.requires_grad_(step % 2 == 0)
            model.first.weight.requires_grad_(step < 2)
        optim.zero_grad(set_to_none=set_to_none)
        for micro in range(accumulate):
            x, y = batch(10 * step + micro, B - (step == 3))
            backward(px, losses_of(model(x), y), call)
            if px is not None:
                torch.testing.assert_close(px.norms(), alone(model, x, y), rtol=1e-9, atol=0)
            seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        if param_grads:
            clip(model.parameters())
            optim.step()
        if scheduler is not None and param_grads:
            scheduler.step()
    seen += [p.detach().clone() for p in model.parameters()]
    if px is not None:
        px.detach()
    return seen


@every_call
@pytest.mark.parametrize("case", LOOPS)
def test_training(case, call):
    """To the bit."""
    expected = train(False, **LOOPS[case])
    found = train(True, call, **LOOPS[case])
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) if call == "loss" else torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@every_call
def test_statistics_only_while_weights_change(call):
    """`param_grads=False`, and an optimizer that steps by gradients from elsewhere."""
    model = net()
    with perex.attach(model, param_grads=False) as px:
        for step in range(3):
            x, y = batch(step)
            backward(px, losses_of(model(x), y), call)
            torch.testing.assert_close(px.norms(), alone(model, x, y), rtol=1e-9, atol=0)
            assert all(p.grad is None for p in model.parameters())
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.01 * step)
                model.first.weight.data = model.first.weight.data.clone()  # memory of its own


@every_way
def test_dropout_and_eval(param_grads):
    """In training mode the norms are those of the masks that were drawn."""
    model = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(D, 3)).double()
    x, y = batch(0)
    with perex.attach(model, param_grads=param_grads) as px:
        for mode in (True, False, True):
            model.train(mode)
            torch.manual_seed(3)
            backward(px, losses_of(model(x), y), "losses")
            found = px.norms()
            torch.manual_seed(3)
            mask = nn.functional.dropout(torch.ones(B, D).double(), 0.5, mode)
            for i in range(B):
                hidden = model[0].weight, model[0].bias
                out = nn.functional.linear(
                    (nn.functional.linear(x[i : i + 1], *hidden) * mask[i]).relu(), model[3].weight, model[3].bias
                )
                grads = torch.autograd.grad(losses_of(out, y[i : i + 1]).sum(), list(model.parameters()))
                expected = torch.cat([g.flatten() for g in grads]).norm()
                torch.testing.assert_close(found[i], expected, rtol=1e-9, atol=0)


# ------------------------------------------------------------------- backwards


@every_way
def test_retain_graph(param_grads):
    """The same graph twice: the same norms, and twice the gradient."""
    model, plain = net(), net()
    x, y = batch(0)
    with perex.attach(model, param_grads=param_grads) as px:
        losses, expected = losses_of(model(x), y), losses_of(plain(x), y)
        for step in range(2):
            losses.mean().backward(retain_graph=step == 0)
            expected.mean().backward(retain_graph=step == 0)
            torch.testing.assert_close(px.norms(), alone(model, x, y), rtol=1e-9, atol=0)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is None if not param_grads else torch.equal(p.grad, q.grad)


@every_way
def test_two_losses_two_backwards(param_grads):
    """Of one forward: each backward's norms are those of its own loss."""
    model, plain = net(), net()
    x, y = batch(0)
    with perex.attach(model, param_grads=param_grads) as px:
        out, expected = model(x), plain(x)
        losses_of(out, y).mean().backward(retain_graph=True)
        losses_of(expected, y).mean().backward(retain_graph=True)
        torch.testing.assert_close(px.norms(), alone(model, x, y), rtol=1e-9, atol=0)
        out.square().sum(1).mean().backward()
        expected.square().sum(1).mean().backward()
        for i in range(B):
            other = net()
            grads = torch.autograd.grad(other(x[i : i + 1]).square().sum(), list(other.parameters()))
            norm = torch.cat([g.flatten() for g in grads]).norm()
            torch.testing.assert_close(px.norms()[i], norm, rtol=1e-9, atol=0)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is None if not param_grads else torch.equal(p.grad, q.grad)


@every_way
def test_two_models_one_loss(param_grads):
    """Both attached, as a student and a teacher that is trained too."""
    one, two = net(), scramble(Net(), seed=1).double()
    x, y = batch(0)
    with perex.attach(one, param_grads=param_grads) as px, perex.attach(two, param_grads=param_grads) as py:
        (losses_of(one(x), y) + 2 * losses_of(two(x), y)).mean().backward()
        torch.testing.assert_close(px.norms(), alone(one, x, y), rtol=1e-9, atol=0)
        torch.testing.assert_close(py.norms(), 2 * alone(two, x, y), rtol=1e-9, atol=0)


# ------------------------------------------------------------------- copies and averages


@every_way
def test_averaged_copies(param_grads):
    """An EMA model made of an attached one knows nothing of perex, and is what it would be."""

    def run(attached: bool) -> list[Tensor]:
        model = net()
        px = perex.attach(model, param_grads=True) if attached else None
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        by_hand, optim = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            x, y = batch(step)
            optim.zero_grad()
            backward(px, losses_of(model(x), y), "loss")
            if px is not None:
                found = px.norms()
                with torch.no_grad():
                    averaged(x), by_hand(x)
                losses_of(by_hand(x), y).mean().backward()
                by_hand.zero_grad()
                assert torch.equal(px.norms(), found)
            optim.step()
            averaged.update_parameters(model)
            with torch.no_grad():
                for p, q in zip(by_hand.parameters(), model.parameters(), strict=True):
                    p.lerp_(q, 0.1)
        return [*averaged.module.parameters(), *by_hand.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


# ------------------------------------------------------------------- what modules take and return

Pair = namedtuple("Pair", "logits hidden")


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None


class Inner(nn.Module):
    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(D, D), form

    def forward(self, x: Tensor, *, scale: Tensor | None = None, flag: bool = True) -> Any:
        h = self.linear(x) if scale is None else self.linear(input=x) * scale
        return self.form(h, x) if flag else None


class Outer(nn.Module):
    def __init__(self, form: Callable, read: Callable) -> None:
        super().__init__()
        self.inner, self.head, self.read = Inner(form), nn.Linear(D, 3), read

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        assert self.inner(x, flag=False) is None
        h = self.read(self.inner(x=x, scale=scale))
        return self.inner.form(self.head(h.relu_()), x)


RESULTS: dict[str, tuple[Callable, Callable]] = {
    "tuple": (lambda h, x: (h, x), lambda r: r[0]),
    "tuple with None": (lambda h, x: (None, h, 3), lambda r: r[1]),
    "list": (lambda h, x: [h, [x]], lambda r: r[0]),
    "dict": (lambda h, x: {"logits": h, "n": 1}, lambda r: r["logits"]),
    "ordered": (lambda h, x: OrderedDict(logits=h), lambda r: r["logits"]),
    "named tuple": (Pair, lambda r: r.logits),
    "dataclass": (Output, lambda r: r.logits),
    "dataclass, partly": (lambda h, x: Output(h), lambda r: r.logits),
    "nested": (lambda h, x: {"a": (Output(h), [None])}, lambda r: r["a"][0].logits),
}


@pytest.mark.parametrize("form", RESULTS)
def test_arguments_and_results(form):
    make, read = RESULTS[form]
    x, scale = torch.randn(B, D), torch.rand(B, 1)
    for kwargs in ({}, {"scale": scale}):
        model = scramble(Outer(make, read))
        check(model, (x,), lambda out, index: read(out).sin().sum(1) * (index + 1), kwargs=kwargs)


# ------------------------------------------------------------------- hooks, freezing, what is refused


@every_way
def test_hooks_of_the_users_own_see_what_they_see_without_perex(param_grads):
    """Hooks on modules, outputs and parameters that look, and hooks on parameters that change what arrives."""

    def run(attached: bool) -> tuple[list[Tensor], list[Tensor | None]]:
        model, seen = net(), []

        def watch(module: nn.Module, args: tuple, out: Tensor) -> None:
            out.register_hook(lambda g: seen.append(g.clone()))

        def treble(p: Tensor) -> None:
            p.grad.mul_(3)

        model.norm.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].clone()))
        model.last.register_full_backward_pre_hook(lambda m, go: seen.append(go[0].clone()))
        model.norm.register_forward_hook(watch)
        model.last.weight.register_hook(lambda g: g * 2)
        model.last.bias.register_post_accumulate_grad_hook(treble)
        x, y = batch(0)
        px = perex.attach(model, param_grads=param_grads) if attached else None
        losses_of(model(x), y).mean().backward()
        if px is not None:
            torch.testing.assert_close(px.norms(), alone(net(), x, y), rtol=1e-9, atol=0)
            px.detach()
        return seen, [p.grad for p in model.parameters()]

    (seen, grads), (plain_seen, plain_grads) = run(True), run(False)
    assert len(seen) == len(plain_seen) == 3
    for a, b in zip(seen, plain_seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for a, b in zip(grads, plain_grads, strict=True):
        assert a is None if not param_grads else torch.equal(a, b)


@every_way
def test_parameters_that_trade_places(param_grads):
    """Names follow the modules, not the tensors."""
    model = net()
    x, y = batch(0)
    with perex.attach(model, param_grads=param_grads) as px:
        for change in range(3):
            if change == 1:
                model.first.weight, model.twice.weight = model.twice.weight, model.first.weight
            if change == 2:
                model.twice.weight = model.first.weight
                model.first.weight = nn.Parameter(torch.randn(D, D).double())
            losses_of(model(x), y).mean().backward()
            torch.testing.assert_close(px.norms(), alone(model, x, y), rtol=1e-9, atol=0)
            plain = copy.deepcopy(model)
            for name, norm in px.norms(by="parameter").items():
                own = plain.get_parameter(name)
                grad = torch.autograd.grad(losses_of(plain(x[:1]), y[:1]).sum(), own)[0]
                torch.testing.assert_close(norm[0], grad.norm(), rtol=1e-9, atol=0)


def test_data_parallel_is_refused():
    for model in (nn.DataParallel(net()), nn.Sequential(nn.DataParallel(net()))):
        with no_trace(model), pytest.raises(perex.AttachError, match="DataParallel"):
            perex.attach(model)
    inner = net()
    x, y = batch(0)
    with perex.attach(inner) as px:  # on a machine without a GPU it is but a wrapper
        losses_of(nn.DataParallel(inner)(x), y).mean().backward()
        torch.testing.assert_close(px.norms(), alone(inner, x, y), rtol=1e-9, atol=0)
