"""How a forward may be written and called: arguments and results of any form, checkpoints, transforms."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from oracle import WAYS, Bare, check, exact_or_refused, no_trace, projection, scramble
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import perex

B, T, D = 3, 3, 4
Point = namedtuple("Point", "x y")


@dataclass
class Output:
    """Not a pytree: perex must find its way without looking into results."""

    logits: Tensor


class Net(nn.Module):
    """Two layers, called by a function of (net, inputs)."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.a, self.b = nn.Linear(D, 5), nn.Linear(5, 2)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def plain(m: Net, x: Tensor) -> Tensor:
    return m.b(m.a(x).tanh())


def net(function=plain) -> nn.Module:
    return scramble(Net(function))


x, y = torch.randn(B, T, D), torch.randn(B, T, D)

ARGUMENTS = {
    "keyword": (lambda m, x: plain(m, x), (), {"x": x}),
    "keyword only, layers too": (lambda m, *, x: m.b(input=m.a(input=x)), (), {"x": x}),
    "both": (lambda m, x, y: plain(m, x) * plain(m, y), (x,), {"y": y}),
    "tuple": (lambda m, pair: plain(m, pair[0] + pair[1]), ((x, y),), {}),
    "list": (lambda m, pair: plain(m, pair[0] + pair[1]), ([x, y],), {}),
    "dict": (lambda m, batch: plain(m, batch["x"]) * plain(m, batch["y"]), ({"x": x, "y": y},), {}),
    "named tuple": (lambda m, p: plain(m, p.x * p.y), (Point(x, y),), {}),
    "None and numbers": (lambda m, x, mask, n: plain(m, x) * n, (x, None, 3), {}),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case):
    function, args, kwargs = ARGUMENTS[case]
    check(net(function), args, kwargs=kwargs)


RESULTS = {
    "tuple": lambda m, x: (plain(m, x), m.a(x)),
    "list in dict": lambda m, x: {"logits": plain(m, x), "hidden": [m.a(x), x]},
    "named tuple": lambda m, x: Point(plain(m, x), m.a(x).sum(1)),
    "one of several": lambda m, x: (plain(m, x), None, 7),
    "one number for each example": lambda m, x: plain(m, x).sum((1, 2)),
    "one column": lambda m, x: plain(m, x).sum((1, 2))[:, None],
    "input returned": lambda m, x: (x, plain(m, x)),
}


@pytest.mark.parametrize("case", RESULTS)
def test_results(case):
    check(net(RESULTS[case]), (x,))


class Own(Tensor):
    """A class of the user's: nobody sees how a tensor becomes one."""


def written_to_later(m: Net, x: Tensor) -> Tensor:
    whole = torch.zeros_like(x)
    early = whole.view(x.shape)
    whole[:] = x
    return plain(m, early)


WHOLE_VIEWS = {
    "of another class": lambda m, x: m.b(m.a(x).as_subclass(Own).tanh()).as_subclass(Tensor),
    "of another class, of the input": lambda m, x: plain(m, x.as_subclass(Own)).as_subclass(Tensor),
    "taken before it was written to": written_to_later,
}


@pytest.mark.parametrize("case", WHOLE_VIEWS)
def test_views_that_show_all_of_a_tensor(case):
    check(net(WHOLE_VIEWS[case]), (x,), loss=projection())


def test_result_of_an_unknown_class():
    check(net(lambda m, x: Output(plain(m, x))), (x,), lambda out, index: projection()(out.logits, index))


def test_an_intermediate_result_in_the_loss():
    """Kept aside by the model, not returned."""

    def keeps(m: Net, x: Tensor) -> Tensor:
        m.function.kept = h = m.a(x)
        return m.b(h.tanh())

    model = net(keeps)
    check(model, (x,), lambda out, index: projection()([out, keeps.kept], index))


PARTS = {
    "part without grad": lambda m, x: m.b(no_grad_part(m, x)),
    "detached": lambda m, x: m.b(m.a(x).detach()) + m.a(x).sum(-1, keepdim=True),
    "stop and go": lambda m, x: m.b(m.a(x) - m.a(x).detach() + m.a(x).tanh()),
    "unused layer": lambda m, x: m.a(x),
    "result thrown away": lambda m, x: (m.b(m.a(x)), m.a(x))[1],
    "straight through": lambda m, x: m.b(m.a(x) + (m.a(x).round() - m.a(x)).detach()),
}


def no_grad_part(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.a(x)


@pytest.mark.parametrize("case", PARTS)
def test_parts_without_gradient(case):
    check(net(PARTS[case]), (x,))


CHECKPOINTS = {
    "one layer": lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False).tanh()),
    "all": lambda m, x: checkpoint(lambda z: plain(m, z), x, use_reentrant=False),
    "last layer": lambda m, x: checkpoint(m.b, m.a(x).tanh(), use_reentrant=False),
    "two": lambda m, x: checkpoint(m.b, checkpoint(m.a, x, use_reentrant=False).tanh(), use_reentrant=False),
    "nested": lambda m, x: checkpoint(
        lambda z: m.b(checkpoint(m.a, z, use_reentrant=False).tanh()), x, use_reentrant=False
    ),
    "a bare parameter": lambda m, x: checkpoint(lambda z: z @ m.a.weight.t() * m.b.weight[0], x, use_reentrant=False),
    "called twice": lambda m, x: (
        checkpoint(m.a, x, use_reentrant=False) * checkpoint(m.a, x.sin(), use_reentrant=False)
    ),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoint(case, requires_grad):
    check(net(CHECKPOINTS[case]), (x.clone().requires_grad_(requires_grad),))


def test_checkpoint_sequential():
    layers = scramble(nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)))
    model = Bare(lambda m, x: checkpoint_sequential(m.layers, 2, x, use_reentrant=False))
    model.layers = layers
    check(model, (x,))


@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("case", ["first", "last"])
def test_reentrant_checkpoint_is_exact_or_refused(case, requires_grad):
    functions = {
        "first": lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=True).tanh()),
        "last": lambda m, x: checkpoint(m.b, m.a(x).tanh(), use_reentrant=True),
    }
    if case == "first" and not requires_grad:  # torch itself drops the gradient: the norm of `a` is then 0
        exact_or_refused(net(functions[case]), (x,), params=["b.*"])
    else:
        exact_or_refused(net(functions[case]), (x.clone().requires_grad_(requires_grad),))


def functional(m: Net, x: Tensor) -> Tensor:
    doubled = {name: p * 2 for name, p in m.a.named_parameters()}
    return m.b(torch.func.functional_call(m.a, doubled, (x,)))


def mapped(m: Net, x: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: plain(m, row))(x)


def jacobian(m: Net, x: Tensor) -> Tensor:
    """An inner derivative, as in physics-informed networks."""
    return torch.func.jvp(lambda z: plain(m, z), (x,), (torch.ones_like(x),))[1]


def inner_gradient(m: Net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        return torch.autograd.grad(plain(m, z).sum(), z, create_graph=True)[0]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # by torch itself
@pytest.mark.parametrize("function", [functional, mapped, jacobian, inner_gradient], ids=lambda f: f.__name__)
def test_transforms_inside_the_forward_are_exact_or_refused(function):
    exact_or_refused(net(function), (x,))


def test_gradient_penalty_is_exact_or_refused():
    """A loss that holds the gradient of the output with respect to the input."""
    z = x.clone().requires_grad_()

    def forward(m: Net, z: Tensor) -> tuple[Tensor, Tensor]:
        return plain(m, z), z

    def loss(out: tuple[Tensor, Tensor], index: Tensor) -> Tensor:
        slope = torch.autograd.grad(out[0].sin().sum(), out[1], create_graph=True)[0]
        return out[0].square().sum((1, 2)) + slope.square().sum((1, 2)) * (1 + index)

    whole = [way for way in WAYS if way.call == "loss"]
    exact_or_refused(net(forward), (z,), loss, ways=whole)


@pytest.mark.filterwarnings("ignore:::torch")
@pytest.mark.parametrize("which", ["model", "layer", "attached first"])
def test_compiled_model_is_exact_or_refused(which):
    """`torch.compile` may hide the forward from perex; a wrong number it may not give."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    data = x.double()
    weights = torch.arange(1.0, B + 1).double()
    expected = []
    for i in range(B):
        grads = torch.autograd.grad(inner(data[i : i + 1]).sum() * weights[i], list(inner.parameters()))
        expected.append(torch.stack([g.square().sum() for g in grads]).sum().sqrt())
    torch._dynamo.reset()
    if which == "layer":
        inner[0].compile(backend="eager")
    subject = torch.compile(inner, backend="eager") if which == "model" else inner
    for param_grads in (True, False):
        try:
            with perex.attach(subject, param_grads=param_grads) as px:
                called = torch.compile(inner, backend="eager") if which == "attached first" else subject
                px.backward(called(data).sum((1, 2)) * weights)
            torch.testing.assert_close(px.norms(), torch.stack(expected), rtol=1e-9, atol=0)
        except perex.PerexError as error:
            assert str(error)


@pytest.mark.parametrize("param_grads", [True, False])
def test_autocast(param_grads):
    """Outputs and `.grad` as without perex; norms in float32, near those of the float32 model."""
    model = scramble(nn.Sequential(nn.Linear(D, 50), nn.ReLU(inplace=True), nn.LayerNorm(50), nn.Linear(50, 2)))

    def backward(px=None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        out.float().sin().sum((1, 2)).mean().backward()
        return out

    expected = backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with no_trace(model):
        with perex.attach(model, param_grads=param_grads) as px:
            assert torch.equal(backward(), expected) and px.norms().dtype == torch.float32
    if param_grads:
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    double = scramble(nn.Sequential(nn.Linear(D, 50), nn.ReLU(), nn.LayerNorm(50), nn.Linear(50, 2))).double()
    with perex.attach(double) as exact:
        double(x.double()).sin().sum((1, 2)).mean().backward()
    torch.testing.assert_close(px.norms().double(), exact.norms(), rtol=0.1, atol=0)
