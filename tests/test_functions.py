"""Autograd functions of the user's own that take parameters: operators like any other."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from oracle import Bare, check, refused
from torch import Tensor, nn
from torch.autograd.function import _SingleLevelFunction
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import perex

B, T, D = 4, 3, 5


def left_alone() -> bool:
    """Whether torch's autograd functions are as they were."""
    return "apply" not in vars(_SingleLevelFunction)


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Sign(torch.autograd.Function):
    """Straight through, within limits, as in binary networks."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.limit = limit
        return weight.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return grad * (weight.abs() < ctx.limit), None


class Steps(torch.autograd.Function):
    """Learned step sizes: two parameters, neither with the gradient that the forward has."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor) -> Tensor:
        ctx.save_for_backward(weight, step)
        return (weight / step).round() * step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, step = ctx.saved_tensors
        return grad, (grad * ((weight / step).round() - weight / step)).sum().reshape(step.shape)


class Linear(torch.autograd.Function):
    """The layer of torch's own tutorial, for any number of positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows, grads = x.flatten(0, -2), grad.flatten(0, -2)
        return grad @ weight, grads.T @ rows, grads.sum(0) if ctx.biased else None


class Norm(torch.autograd.Function):
    """RMS norm with a scale, as fused kernels write it; it returns its statistics, too."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        inverse = x.square().mean(-1, keepdim=True).add(eps).rsqrt()
        return x * inverse * scale, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, scale, _ = inputs
        ctx.save_for_backward(x, scale, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        x, scale, inverse = ctx.saved_tensors
        normal, scaled = x * inverse, grad * scale
        to_x = inverse * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
        return to_x, (grad * normal).flatten(0, -2).sum(0), None


class Mapped(torch.autograd.Function):
    """One that says how to be mapped."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor) -> Tensor:
        return x * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale = ctx.saved_tensors
        return grad * scale, (grad * x).sum_to_size(scale.shape)


class Table(torch.autograd.Function):
    """A look-up."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = len(table)
        return table[ids]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        return None, grad.new_zeros(ctx.rows, grad.shape[-1]).index_add(0, ids.flatten(), flat)


linear = Linear.apply  # as torch's tutorial has it

MODELS: dict[str, Any] = {
    "straight through": (lambda m, x: F.linear(x, Sign.apply(m.w, 1.0)), {"w": "55"}),
    "behind an operator": (lambda m, x: F.linear(x, Sign.apply(m.w.tanh() * 2, 1.0)), {"w": "55"}),
    "in front of one": (lambda m, x: F.linear(x, Sign.apply(m.w, 1.0) * m.s), {"w": "55", "s": "51"}),
    "two parameters": (lambda m, x: F.linear(x, Steps.apply(m.w, m.s)), {"w": "55", "s": "1"}),
    "linear": (lambda m, x: Linear.apply(x.sin(), m.w, m.b), {"w": "55", "b": "5"}),
    "no bias": (lambda m, x: linear(x, m.w, None), {"w": "55"}),
    "a derived weight": (lambda m, x: Linear.apply(x, m.w * m.s, m.b), {"w": "55", "b": "5", "s": "51"}),
    "twice": (lambda m, x: Linear.apply(Linear.apply(x, m.w, m.b).tanh(), m.w, m.b), {"w": "55", "b": "5"}),
    "tied": (lambda m, x: F.linear(Linear.apply(x, m.w, m.b).tanh(), m.w), {"w": "55", "b": "5"}),
    "norm": (lambda m, x: Norm.apply(x, m.s, 1e-6)[0], {"s": "5"}),
    "norms in a row": (
        lambda m, x: Norm.apply(F.linear(Norm.apply(x, m.s, 1e-6)[0], m.w), m.s, 0.1)[0],
        {"w": "55", "s": "5"},
    ),
    "mapped": (lambda m, x: Mapped.apply(x, m.s), {"s": "5"}),
    "one number": (lambda m, x: Mapped.apply(x.sin(), m.s), {"s": ""}),
    "in a checkpoint": (
        lambda m, x: checkpoint(lambda h: Linear.apply(h, m.w, m.b).sin(), x * 2, use_reentrant=False),
        {"w": "55", "b": "5"},
    ),
}


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_functions_that_take_parameters(name, positions):
    forward, shapes = MODELS[name]
    model = Bare(lambda m, x: m.last(forward(m, x)), **shapes)
    model.last = nn.Linear(D, 2)
    check(model, (data(B, T, D) if positions else data(B, D),))
    assert left_alone()


def test_a_look_up():
    model = Bare(lambda m, ids: m.last(Table.apply(ids, m.table).tanh()), table="75")
    model.last = nn.Linear(D, 2)
    check(model, (torch.randint(0, 7, (B, T)),))


class Averaged(Linear):
    """Its input's gradient is of the whole batch."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        found = Linear.backward(ctx, grad)
        return found[0] - found[0].mean(0), *found[1:]


class Clipped(Linear):
    """Its weight's gradient is not in proportion to the loss."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        found = Linear.backward(ctx, grad)
        return found[0], found[1].clamp(-0.01, 0.01), *found[2:]


class Sized(Linear):
    """Its weight's gradient depends on how many examples there are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, count: int) -> Tensor:
        ctx.count = count
        return Linear.forward(ctx, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        to_x, to_weight, to_bias = Linear.backward(ctx, grad)
        return to_x, to_weight / ctx.count, to_bias, None


class CentredGradients(Linear):
    """Its weight's gradient mixes examples."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad @ ctx.saved_tensors[1], *Linear.backward(ctx, grad - grad.mean(0))[1:]


class Counting(torch.autograd.Function):
    """It keeps a statistic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, seen: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        seen += 1
        return x * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale = ctx.saved_tensors
        return grad * scale, (grad * x).sum(0), None


class ClippedSign(Sign):
    """The same, of a parameter alone."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return Sign.backward(ctx, grad)[0].clamp(-0.01, 0.01), None


class Centred(torch.autograd.Function):
    """It mixes examples in the forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        return x - x.mean(0) + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad - grad.mean(0), grad.sum(0)


class Checkpoint(torch.autograd.Function):
    """It runs a part of the model, and is given that part's parameters so that these get their gradients."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run, ctx.x, ctx.parameters = run, x, parameters
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            found = ctx.run(x)
        return None, *torch.autograd.grad(found, [x, *ctx.parameters], grad, allow_unused=True)


class Added(torch.autograd.Function):
    """It works in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, grad.sum(0)


REFUSED: dict[str, Any] = {
    "mixes gradients": lambda m, x: Averaged.apply(m.first(x), m.w, m.b),
    "clips": lambda m, x: Clipped.apply(m.first(x), m.w, m.b),
    "clips, first of all": lambda m, x: Clipped.apply(x, m.w, m.b),
    "clips a parameter's": lambda m, x: F.linear(m.first(x), ClippedSign.apply(m.w, 1.0)),
    "mixes examples": lambda m, x: Centred.apply(m.first(x), m.b),
    "minds how many there are": lambda m, x: Sized.apply(m.first(x), m.w, m.b, len(x)),
    "mixes a weight's gradients": lambda m, x: CentredGradients.apply(m.first(x), m.w, m.b),
    "keeps a statistic": lambda m, x: Counting.apply(m.first(x), m.b, torch.zeros(())),
    "writes into a list": lambda m, x: Leaving.apply(m.first(x), m.w, [x]) + m.b,
    "reads others": lambda m, x: Checkpoint.apply(m.first, x, *m.first.parameters()) + m.b,
    "a derived weight in place": lambda m, x: F.linear(m.first(x), Added.apply(m.w * 2, m.b)),
    "in place": lambda m, x: Added.apply(m.first(x), m.b),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    model = Bare(lambda m, x: m.last(REFUSED[name](m, x)), w="55", b="5")
    model.first, model.last = nn.Linear(D, D), nn.Linear(D, 2)
    refused(model, (data(B, D),))
    assert left_alone()


def test_a_forward_that_fails_leaves_torch_as_it_was():
    class Failing(Linear):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            raise ValueError("in the forward")

    model = Bare(lambda m, x: Failing.apply(x, m.w, None), w="55").double()
    with perex.attach(model), pytest.raises(ValueError, match="in the forward"):
        model(data(B, D))
    assert left_alone()


def test_functions_in_other_threads_are_none_of_its_business():
    """While a forward runs here, another thread trains a model of its own."""
    seen, other = [], Bare(lambda m, x: Linear.apply(x, m.w, None), w="55").double()

    def elsewhere() -> None:
        other(data(B, D)).sum().backward()
        seen.append(other.w.grad is not None)

    def forward(m: Any, x: Tensor) -> Tensor:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return Linear.apply(x, m.w, None)

    check(Bare(forward, w="55"), (data(B, D),))
    assert seen and all(seen)


def test_clipping_with_functions():
    def forward(m: Any, x: Tensor) -> Tensor:
        return Linear.apply(Norm.apply(x, m.s, 1e-6)[0], Sign.apply(m.w, 1.0), m.b)

    model = Bare(forward, w="55", s="5", b="5")
    model, x = model.double(), data(B, D)
    rows = [torch.autograd.grad(model(x[b : b + 1]).sin().sum(), list(model.parameters())) for b in range(B)]
    norms = torch.stack([sum(g.square().sum() for g in row).sqrt() for row in rows])
    with perex.attach(model, param_grads=False) as px:
        px.backward(model(x).sin().sum(1))
        px.clip_(max_norm=1.0)
        torch.testing.assert_close(px.norms(), norms)
    for place, parameter in enumerate(model.parameters()):
        clipped = sum(row[place] * (1 / norm).clamp_max(1) for row, norm in zip(rows, norms, strict=True))
        torch.testing.assert_close(parameter.grad, clipped)


def test_a_rule_for_a_function():
    """Users of fused kernels can say how these go backward, as for any operator."""

    class Fused(Linear):
        pass

    @perex.operator_rule(Fused.apply, arguments="x weight bias", parameters="weight bias", saves={"weight": "x"})
    def fused(captured: Any) -> dict[str, Any]:
        grads = captured.grad.flatten(1, -2)
        factors = {"bias": perex.factors.Dense(grads.sum(1))}
        if captured.wants("weight"):
            rows = captured.examples("x").flatten(1, -2)
            factors["weight"] = perex.factors.Outer(grads, rows, captured.shape("weight"))
        return factors

    model = Bare(lambda m, x: m.last(Fused.apply(x, m.w, m.b).tanh()), w="55", b="5")
    model.last = nn.Linear(D, 2)
    check(model, (data(B, T, D),))
    with perex.attach(model.double()) as px:
        model(data(B, T, D)).sum((1, 2)).mean().backward()
        assert "fused" in str(px.report())


class Held:
    """A weight that is not a tensor yet, as quantized ones are: torch's operators ask it what it is."""

    def __init__(self, value: Tensor, scale: Tensor) -> None:
        self.value, self.scale = value, scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def tensor(given: Any) -> Any:
            return given.value * given.scale if isinstance(given, cls) else given

        return func(*map(tensor, args), **{name: tensor(given) for name, given in (kwargs or {}).items()})


def test_objects_that_hold_parameters():
    model = Bare(lambda m, x: F.linear(m.first(x), Held(m.w, m.s), bias=Held(m.b, m.s[0])).tanh(), w="55", s="5", b="5")
    model.first = nn.Linear(D, D)
    check(model, (data(B, D),))
    model = Bare(lambda m, x: F.dropout(m.first(x) + Held(m.b, m.b), 0.5, training=False) * Held(x, m.b), b="5")
    model.first = nn.Linear(D, D)
    check(model, (data(B, D),))


class Minding(Linear):
    """Its weight's gradient is made only where its input's is wanted, as fused losses do it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.wanted = x.requires_grad and ctx.needs_input_grad[0]
        return Linear.forward(ctx, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return Linear.backward(ctx, grad) if ctx.wanted else (None, None, None)


class Again(torch.autograd.Function):
    """It runs its forward again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight).tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(F.linear(x, weight).tanh(), [x, weight], grad)


class Overwriting(Norm):
    """It writes the gradient of its input over that of its output."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        found = Norm.backward(ctx, grad, _)
        return grad.copy_(found[0]), *found[1:]


class OneOfMany(torch.autograd.Function):
    """A weight in a list gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: list[Tensor]) -> Tensor:
        ctx.save_for_backward(weights[0])
        return x @ weights[0].T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad @ ctx.saved_tensors[0], None


class Twofold(torch.autograd.Function):
    """It takes no parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return 2 * grad


class Leaving(torch.autograd.Function):
    """It leaves its input behind, which the model reads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, left: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        left[:] = [x.detach().clone()]
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x, None


def read_behind(m: Any, x: Tensor) -> Tensor:
    """What a function has left is of all examples."""
    left: list[Tensor] = []
    return Leaving.apply(m.first(x), m.w, left) * (1 + left[0].sin()) + m.b


PARTICULAR: dict[str, Any] = {
    "leaves something": read_behind,
    "only statistics": lambda m, x: m.first(Twofold.apply(Norm.apply(x, m.b, 1e-6)[1] * x)),
    "minds what is wanted": lambda m, x: Minding.apply(m.first(x), m.w, m.b),
    "minds it, first of all": lambda m, x: Minding.apply(x, m.w, m.b) + m.first(x),
    "runs again": lambda m, x: Again.apply(m.first(x), m.w) + m.b,
    "overwrites": lambda m, x: Overwriting.apply(F.linear(m.first(x), m.w), m.b, 1e-6)[0],
    "in a list": lambda m, x: OneOfMany.apply(m.first(x), [m.w]) + m.b,
}


@pytest.mark.parametrize("name", PARTICULAR)
def test_particular_functions(name):
    model = Bare(lambda m, x: m.last(PARTICULAR[name](m, x)), w="55", b="5")
    model.first, model.last = nn.Linear(D, D), nn.Linear(D, 2)
    check(model, (data(B, D),))


@pytest.mark.parametrize("width", [256, 1024])
def test_rounding_does_not_hide_the_examples(width):
    """One row of a wide layer is added up in another order alone than among others."""
    model = Bare(lambda m, x: Linear.apply(m.first(x), m.w, None), {"W": width}, w="WW")
    model.first, x = nn.Linear(width, width), torch.randn(8, width)
    with perex.attach(model) as px:
        px.backward(model(x).square().mean(1))
        found = px.norms()
    for b in range(8):
        grads = torch.autograd.grad(model(x[b : b + 1]).square().mean(), list(model.parameters()))
        assert float(found[b]) == pytest.approx(float(sum(g.square().sum() for g in grads).sqrt()), rel=1e-4)


def test_classes_made_in_a_forward_are_let_go():
    made: list[Any] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        kind = type("Made", (Linear,), {"__module__": "somewhere"})
        made.append(weakref.ref(kind))
        return kind.apply(x, m.w, None)

    model = Bare(forward, w="55").double()
    with perex.attach(model) as px:
        for _ in range(3):
            px.backward(model(data(B, D)).sum(1))
            px.norms()
    gc.collect()
    assert len(made) > 3 and not any(ref() for ref in made)


class Nested(torch.autograd.Function):
    """It finds a parameter by itself, and runs a backward inside the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Any) -> Tensor:
        ctx.x, ctx.run = x.detach(), run
        return run(ctx.x).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            ctx.run(x).backward(grad)
        return x.grad, None


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("way", ["checkpoint", "function"])
def test_backwards_inside_a_backward(way, behind):
    """What they bring to parameters by ways that perex does not see is refused, whatever comes before and after."""

    def forward(m: Any, x: Tensor) -> Tensor:
        def run(h: Tensor) -> Tensor:
            return F.linear(h, m.w * 2)

        first = m.first(x)
        h = checkpoint(run, first, use_reentrant=True) if way == "checkpoint" else Nested.apply(first, run)
        return m.last(h) if behind else h

    model = Bare(forward, w="55")
    model.first, model.last = nn.Linear(D, D), nn.Linear(D, 2)
    refused(model, (data(B, D),))


@pytest.mark.parametrize("attached", [False, True])
def test_another_model_that_runs_backward_inside_a_backward(attached):
    """A hook may train something else: what this backward brings, before it and after, is one result."""
    model, other = (nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 2)).double() for _ in range(2))
    x = data(B, D)
    rows = [torch.autograd.grad(model(row[None]).sin().sum(), list(model.parameters())) for row in x]
    expected = torch.stack([sum(g.square().sum() for g in row).sqrt() for row in rows])

    def train(grad: Tensor) -> None:
        with torch.enable_grad():
            other(x).sum().backward()

    with perex.attach(model) as px, perex.attach(other) if attached else contextlib.nullcontext():
        for hooked in (False, True, False):
            out = model(x)
            if hooked:
                out.register_hook(train)
            out.sin().sum(1).mean().backward()
            torch.testing.assert_close(px.norms(), expected)


def test_what_is_wrong_with_one_of_several_backwards_inside_a_backward():
    """Another of them comes later, and nothing is wrong with that one."""
    earlier: list[Tensor] = []

    class Training(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            if earlier:
                earlier.pop().backward()
            return grad

    def forward(m: Any, x: Tensor) -> Tensor:
        h = Training.apply(m.first(x))
        return m.last(checkpoint(lambda h: F.linear(h, m.w), h, use_reentrant=True)) if earlier else m.last(h)

    model = Bare(forward, w="55")
    model.first, model.last = nn.Linear(D, D), nn.Linear(D, 2)
    model, x = model.double(), data(B, D)
    with perex.attach(model, forwards="same", audit=False) as px:
        earlier.append(model(x).sum())
        model(x).sin().sum(1).mean().backward()
        with pytest.raises(perex.PerexError, match="use that perex did not see"):
            px.norms()
