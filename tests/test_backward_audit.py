"""The audit of the backward: custom autograd functions and gradient hooks that work across examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import Bare, check, no_trace
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import perex

B, T, D = 5, 4, 3


def data(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def function(backward: Any) -> Any:
    """An autograd function that gives what it gets, with a backward of its own."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return backward(grad)

    return Custom.apply


def net(between: Any) -> Bare:
    torch.manual_seed(0)
    model = Bare(lambda m, x: m.second(between(m.first(x)).sin()))
    model.first, model.second = nn.Linear(D, D), nn.Linear(D, D)
    return model.double()


def hooked(hook: Any) -> Any:
    def between(h: Tensor) -> Tensor:
        h = h * 1.0
        h.register_hook(hook)
        return h

    return between


MIXING = {
    "centred": lambda g: g - g.mean(0),
    "by the batch's norm": lambda g: g / g.norm(),
    "clipped": lambda g: g.clamp(-1e-3, 1e-3),
    "turned": lambda g: g.flip(0),
    "the largest alone": lambda g: g * (g.abs() == g.abs().max()),
    "noise": lambda g: g + 1e-3 * torch.randn_like(g),
    "only positive": lambda g: g.relu(),
    "cumulative": lambda g: g.cumsum(0),
}


@pytest.mark.parametrize("param_grads", [True, False])
@pytest.mark.parametrize("by", [function, hooked])
@pytest.mark.parametrize("case", MIXING)
def test_a_backward_that_mixes(case, by, param_grads):
    model = net(by(MIXING[case]))
    with no_trace(model), perex.attach(model, param_grads=param_grads) as px:
        with pytest.raises(perex.ExamplesMixError, match="alone"):
            px.backward(model(data(B, T, D)).sin().sum((1, 2)))
        with pytest.raises(perex.PerexError):
            px.norms()
        model(data(B, T, D)).sin().sum((1, 2)).mean().backward()
        with pytest.raises(perex.ExamplesMixError, match="alone"):
            px.norms()


def test_a_hook_of_a_module():
    model = net(lambda h: h)
    model.second.register_full_backward_hook(lambda m, gi, go: (gi[0] - gi[0].mean(0),))
    with perex.attach(model) as px, pytest.raises(perex.ExamplesMixError, match="'second'"):
        px.backward(model(data(B, T, D)).sin().sum((1, 2)))


def kept(statistic: Any) -> Any:
    """An autograd function whose backward uses something of its input, and a hook that does."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.kept = statistic(x)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * ctx.kept

    return Custom.apply


def kept_by_a_hook(statistic: Any) -> Any:
    def between(h: Tensor) -> Tensor:
        h, found = h * 1.0, statistic(h.detach())
        h.register_hook(lambda grad: grad * found)
        return h

    return between


IN_PROPORTION = {
    "above the batch's mean": lambda h: h > h.mean(0),
    "by the batch's mean": lambda h: h.abs().mean(),
    "by the batch's size": lambda h: torch.tensor(1.0 / len(h)),
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("call", ["losses", "loss"])
@pytest.mark.parametrize("by", [kept, kept_by_a_hook])
@pytest.mark.parametrize("case", IN_PROPORTION)
def test_a_backward_in_proportion_that_mixes(case, by, call, dropout):
    """Weights on the losses do not show what the backward has from the forward: examples run alone, and back, do."""
    between = by(IN_PROPORTION[case])
    model = net(lambda h: between(torch.nn.functional.dropout(h, dropout)))
    if (by, call, case) == (kept_by_a_hook, "loss", "by the batch's size"):
        return  # hooks would have to run again, and may count how often they do: a limit that the README names
    with no_trace(model), perex.attach(model) as px:
        losses = model(data(B, T, D)).sin().sum((1, 2))
        if call == "losses":
            with pytest.raises(perex.ExamplesMixError, match="'first'.* alone" if by is kept else "hook .* alone"):
                px.backward(losses)
        else:
            losses.mean().backward()
            with pytest.raises(perex.PerexError, match="'first'.* alone" if by is kept else "hook"):
                px.norms()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("by", [kept, kept_by_a_hook])
def test_a_backward_that_keeps_something_of_each_example(by, dropout):
    between = by(lambda h: h.abs().mean(1, keepdim=True))
    model = net(lambda h: torch.nn.functional.dropout(between(h).relu_(), dropout))
    with no_trace(model), perex.attach(model, audit=True) as px:
        for _ in range(2):
            px.backward(model(data(B, T, D)).sin().sum((1, 2)))
            assert px.norms().shape == (B,)
            model(data(B, T, D)).sin().sum((1, 2)).mean().backward()
            assert px.norms().shape == (B,)


def test_module_hooks_with_a_loss():
    """One that changes gradients is left to losses; one that looks is run as often as without perex."""
    seen: list[int] = []
    model, x = net(lambda h: h), data(B, T, D)
    handle = model.second.register_full_backward_hook(lambda m, gi, go: seen.append(1))
    with perex.attach(model) as px:
        model(x).sin().sum((1, 2)).mean().backward()
        expected = px.norms()
        assert len(seen) == 1
        handle.remove()
        model.second.register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))
        model(x).sin().sum((1, 2)).mean().backward()
        with pytest.raises(perex.UnsupportedError, match="losses"):
            px.norms()
        px.backward(model(x).sin().sum((1, 2)))
        assert bool((px.norms() > expected).all())
        model.second.register_full_backward_hook(lambda m, gi, go: (gi[0] / len(gi[0]),))
        with pytest.raises(perex.ExamplesMixError, match="alone"):
            px.backward(model(data(2 * B, T, D)).sin().sum((1, 2)))


HARMLESS = {
    "passed on": lambda g: g,
    "reversed": lambda g: -0.3 * g,
    "over positions": lambda g: g - g.mean(1, keepdim=True),
    "masked": lambda g: g * (torch.arange(D) != 1),
    "looked at": lambda g: None,
}


@pytest.mark.parametrize("by", [function, hooked])
@pytest.mark.parametrize("case", HARMLESS)
def test_a_backward_that_keeps_examples_apart(case, by):
    backward = HARMLESS[case]
    check(net(by(backward if by is hooked else lambda g: g if backward(g) is None else backward(g))), (data(B, T, D),))


@pytest.mark.parametrize("size", [2, 33, 70])
def test_pairs_far_apart_are_told_apart(size):
    """Weights repeat; the neighbours of an example have others."""
    model = net(function(lambda g: g + 1e-3 * g.roll(1, 0)))
    with perex.attach(model) as px, pytest.raises(perex.ExamplesMixError):
        px.backward(model(data(size, T, D)).sin().sum((1, 2)))


def test_switched_off():
    model = net(function(MIXING["centred"]))
    with perex.attach(model, audit=False) as px:
        px.backward(model(data(B, T, D)).sin().sum((1, 2)))
        assert px.norms().shape == (B,)


def test_hooks_run_once_more_with_losses_and_not_without():
    calls: list[int] = []
    model = net(hooked(lambda g: calls.append(1)))
    with perex.attach(model) as px:
        for _ in range(2):
            px.backward(model(data(B, T, D)).sin().sum((1, 2)))
        assert len(calls) == 3
        model(data(B, T, D)).sin().sum((1, 2)).mean().backward()
        assert len(calls) == 4


def test_gradients_are_as_without():
    """One more backward leaves nothing: not in `.grad`, not in streams of random numbers."""

    def grads(attach: bool) -> list[Tensor]:
        torch.manual_seed(1)
        model = net(lambda h: checkpoint(torch.nn.functional.dropout, h, use_reentrant=False, preserve_rng_state=False))
        x = data(B, T, D).requires_grad_()
        if attach:
            with perex.attach(model, loss_reduction="sum") as px:
                px.backward(model(x).sin().sum((1, 2)))
        else:
            model(x).sin().sum((1, 2)).sum().backward()
        return [x.grad, *(p.grad for p in model.parameters()), torch.rand(3)]

    for ours, theirs in zip(grads(True), grads(False), strict=True):
        assert torch.equal(ours, theirs)


def test_what_can_run_once_only():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.own = x.cos()
            return x.sin()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            own, ctx.own = ctx.own, None
            if own is None:
                raise RuntimeError("gone")
            return grad * own

    model = net(Once.apply)
    with perex.attach(model), pytest.raises(perex.UnsupportedError, match="once only.*audit=False"):
        model(data(B, T, D))
    with perex.attach(model, audit=False) as px:
        px.backward(model(data(B, T, D)).sin().sum((1, 2)))
        assert px.norms().shape == (B,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    for case, exact in (("centred", False), (None, True)):
        model = net(function(MIXING[case] if case else lambda g: g)).float()
        with perex.attach(model) as px:
            with torch.autocast("cpu", dtype):
                losses = model(data(B, T, D).float()).float().sin().sum((1, 2))
            if exact:
                px.backward(losses * 1e-4)
                assert px.norms().shape == (B,)
            else:
                with pytest.raises(perex.ExamplesMixError):
                    px.backward(losses)


def test_gradients_of_zero_are_no_evidence():
    """A head that is zero at first, or a batch that is not a number, says nothing of the batches after it."""
    for spoil in ("head", "batch"):
        model, x = net(function(MIXING["centred"])), data(B, T, D)
        with perex.attach(model) as px:
            if spoil == "head":
                nn.init.zeros_(model.second.weight)
            try:
                px.backward(model(x if spoil == "head" else x * float("nan")).sin().sum((1, 2)))
            except perex.PerexError:
                pass
            nn.init.normal_(model.second.weight)
            with pytest.raises(perex.ExamplesMixError):
                px.backward(model(x).sin().sum((1, 2)))


@pytest.mark.parametrize("case", ["by the batch's norm", "clipped"])
def test_two_examples(case):
    model = net(function(MIXING[case]))
    with perex.attach(model) as px, pytest.raises(perex.ExamplesMixError):
        px.backward(model(data(2, T, D)).sin().sum((1, 2)))


def test_a_forward_that_registers_gradient_hooks():
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            h.register_hook(lambda grad: grad * 2)
            return h

    assert (
        perex.verify(Hooked(), (torch.randn(4, 3), torch.randint(2, (4,))), nn.CrossEntropyLoss()).verdict == "agrees"
    )


class Sized(torch.autograd.Function):
    """Divides gradients by the batch's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / len(grad)


class Pair:
    """An output of a class of the user's own."""

    def __init__(self, out: Tensor) -> None:
        self.out = out


OUTPUTS = {
    "squeezed": lambda m, h: m.second(h)[..., 0].squeeze(),
    "a tensor an example": lambda m, h: tuple(m.second(row) for row in h),
    "an object": lambda m, h: Pair(m.second(h)),
    "a mean": lambda m, h: m.second(h).square().mean(),
    "behind weight norm": lambda m, h: m.normed(h),
    "behind attention's dropout": lambda m, h: torch.nn.functional.scaled_dot_product_attention(h, h, h, dropout_p=0.1),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_a_function_is_looked_at_whatever_is_made_of_it(case):
    model = Bare(lambda m, x: OUTPUTS[case](m, Sized.apply(m.first(x))))
    model.first, model.second = nn.Linear(D, D), nn.Linear(D, D)
    model.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(D, D))
    with perex.attach(model.double()) as px:
        out = model(data(B, T, D))
        tensors = out if isinstance(out, tuple) else [out.out if isinstance(out, Pair) else out]
        sum(t.sin().sum() for t in tensors).backward()
        with pytest.raises(perex.PerexError, match="Sized"):
            px.norms()


def test_a_function_for_each_example():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad

    check(net(lambda h: torch.stack([Twice.apply(row) for row in h])), (data(B, T, D),))


def test_a_hook_that_works_in_place():
    model = net(hooked(lambda g: g.div_(2)))
    with perex.attach(model) as px:
        model(data(B, T, D)).sin().sum((1, 2)).mean().backward()
        with pytest.raises(perex.UnsupportedError, match="in place"):
            px.norms()


def test_the_seventeenth_shape_is_looked_at():
    model = net(lambda h: Sized.apply(h) if h.shape[1] > 17 else h)
    with perex.attach(model) as px:
        for length in range(1, 20):
            model(data(2, length, D)).sum((1, 2)).mean().backward()
            if length <= 17:
                px.norms()
        with pytest.raises(perex.PerexError, match="alone"):
            px.norms()


def test_a_hook_on_a_module_without_gradients():
    model = net(lambda h: h)
    model.second.register_full_backward_hook(lambda m, gi, go: None)
    model.second.requires_grad_(False)
    model.function = lambda m, x: m.first(x) + m.second(x)
    with perex.attach(model) as px:
        px.backward(model(data(B, T, D)).sin().sum((1, 2)))
        assert px.norms().shape == (B,)


def test_a_hook_that_holds_a_number():
    def between(h: Tensor) -> Tensor:
        h, mean = h * 1.0, float(h.detach().abs().numpy().mean())
        h.register_hook(lambda grad: grad * mean)
        return h

    with perex.attach(net(between)) as px:
        px._session.parameters.model(data(B, T, D)).sin().sum((1, 2)).mean().backward()
        with pytest.raises(perex.UnsupportedError, match="losses"):
            px.norms()


def test_batches_of_about_one_size_are_looked_at_once():
    """Poisson sampling makes ever new sizes, each of which would cost a further backward and some forwards."""
    calls = []
    model = net(lambda h: calls.append(len(h)) or h)
    with perex.attach(model) as px:
        for size in (20, 32, 17, 31, 29):  # 32 and less, more than 16
            before = len(calls)
            px.backward(model(data(size, T, D)).sin().sum((1, 2)))
            assert (len(calls) == before + 1) == (size != 20)
        before = len(calls)
        px.backward(model(data(33, T, D)).sin().sum((1, 2)))
        assert len(calls) > before + 1
        px.backward(model(data(19, T + 1, D)).sin().sum((1, 2)))  # another length
        before = len(calls)
        px.backward(model(data(32, 32, D)).sin().sum((1, 2)))  # two dimensions of the batch's size
        assert len(calls) > before + 1
