"""`torch.compile` around an attached model, inside it, and before or after attaching: exact, or refused aloud.

Inside an attached model compiled code runs as it was written; what is compiled around it is refused. Never may a number
be left over from an earlier batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from oracle import no_trace, scramble
from torch import Tensor, nn

import perex

B, D = 3, 4
pytestmark = pytest.mark.filterwarnings("ignore:::torch")  # by torch's compiler itself
every_way = pytest.mark.parametrize("param_grads", [True, False])
every_backend = pytest.mark.parametrize("backend", ["eager", "aot_eager"])


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def scaled(h: Tensor, w: Tensor) -> Tensor:
    return (h * w).tanh() + h.sin()


class Net(nn.Module):
    def __init__(self, function: Callable = scaled) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, 2)
        self.scale = nn.Parameter(torch.ones(D))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x), self.scale))


def net(function: Callable = scaled) -> nn.Module:
    return scramble(Net(function)).double()


def inputs(step: int = 0, size: int = B) -> Tensor:
    return torch.randn(size, D, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def losses_of(out: Tensor) -> Tensor:
    return out.sin().sum(1)


def expected(x: Tensor, function: Callable = scaled) -> tuple[Tensor, list[Tensor], Tensor]:
    """Output, `.grad` of the mean loss, and norms, of the model as it is written."""
    model = net(function)
    norms = []
    for i in range(len(x)):
        grads = torch.autograd.grad(losses_of(model(x[i : i + 1])).sum(), list(model.parameters()))
        norms.append(torch.cat([g.flatten() for g in grads]).norm())
    out = model(x)
    return out.detach(), list(torch.autograd.grad(losses_of(out).mean(), list(model.parameters()))), torch.stack(norms)


def assert_step(px: perex.Tracker, model: nn.Module, call: Callable, x: Tensor, grads: bool) -> None:
    """One batch: output, norms and `.grad` are those of the model as it is written."""
    output, gradients, norms = expected(x)
    model.zero_grad()
    out = call(x)
    torch.testing.assert_close(out.detach(), output, rtol=1e-12, atol=1e-14)
    px.backward(losses_of(out))
    torch.testing.assert_close(px.norms(), norms, rtol=1e-9, atol=0)
    for p, g in zip(model.parameters(), gradients, strict=True):
        if grads:
            torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)
        else:
            assert p.grad is None


# ------------------------------------------------------------------- compiled code inside the model


@every_way
@every_backend
@pytest.mark.parametrize("warm", [False, True])
def test_a_compiled_function_in_the_forward(warm, backend, param_grads):
    """As it was written while the model runs, whatever had been compiled before; batches of several sizes."""
    model = net(torch.compile(scaled, backend=backend))
    if warm:
        for size in (3, 4):
            model(inputs(9, size)).sum().backward()
        model.zero_grad()
    with perex.attach(model, param_grads=param_grads) as px:
        for step, size in enumerate((3, 3, 4, 1)):
            assert_step(px, model, model, inputs(step, size), param_grads)
    torch.testing.assert_close(model(inputs()).detach(), expected(inputs())[0])  # and compiled again afterwards


def test_compiled_functions_run_compiled_again_after_the_forward():
    runs = []

    def backend(graph, example):
        return lambda *args: runs.append(1) or graph(*args)

    function = torch.compile(lambda h, w: h * w, backend=backend)
    model = net(function)
    with perex.attach(model) as px:
        px.backward(losses_of(model(inputs())))
        assert not runs
        function(inputs(), inputs())
        assert runs
        with pytest.raises(RuntimeError, match="shapes"):
            model(inputs()[:, :2])
        runs.clear()
        function(inputs(), inputs())
        assert runs, "after a forward that failed, too"


MIXING = {
    "mean": lambda h, w: h * w - (h * w).mean(0),
    "detached mean": lambda h, w: h * w * h.detach().mean(0),
    "rolled": lambda h, w: h * w + h.roll(1, 0),
}


@every_way
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("case", MIXING)
def test_a_compiled_function_that_mixes_examples(case, warm, param_grads):
    model = net(torch.compile(MIXING[case], backend="eager"))
    if warm:
        model(inputs()).sum().backward()
    with perex.attach(model, param_grads=param_grads) as px:
        with pytest.raises(perex.PerexError, match="(?i)example|batch"):
            losses_of(model(inputs())).mean().backward()
            px.norms()


AFTER = {
    "in place": lambda model, backend: model.a.compile(backend=backend),
    "replaced": lambda model, backend: setattr(model, "a", torch.compile(model.a, backend=backend)),
}


@every_way
@pytest.mark.parametrize("case", AFTER)
def test_a_layer_compiled_after_attaching(case, param_grads, backend="aot_eager"):
    model = net()
    with perex.attach(model, param_grads=param_grads) as px:
        assert_step(px, model, model, inputs(), param_grads)
        AFTER[case](model, backend)
        for step, size in enumerate((3, 4)):
            assert_step(px, model, model, inputs(step, size), param_grads)


@every_way
def test_a_checkpoint_with_a_compiled_function(param_grads):
    """What is recomputed runs in the same way as the first time."""
    function = torch.compile(scaled, backend="aot_eager")
    model = net(lambda h, w: torch.utils.checkpoint.checkpoint(function, h, w, use_reentrant=False))
    with perex.attach(model, param_grads=param_grads) as px:
        for step in range(2):
            assert_step(px, model, model, inputs(step), param_grads)


def test_a_compiled_loss():
    """Outside the model: as compiled, and audited."""
    model, loss = net(), torch.compile(losses_of, backend="aot_eager")
    mixing = torch.compile(lambda out: losses_of(out - out.mean(0)), backend="aot_eager")
    with perex.attach(model) as px:
        px.backward(loss(model(inputs())))
        torch.testing.assert_close(px.norms(), expected(inputs())[2], rtol=1e-9, atol=0)
    with perex.attach(model) as px, pytest.raises(perex.ExamplesMixError):
        px.backward(mixing(model(inputs())))


# ------------------------------------------------------------------- compiled before attaching

BEFORE = {
    "wrapped": lambda model, backend: torch.compile(model, backend=backend),
    "in place": lambda model, backend: model.compile(backend=backend) or model,
    "a layer wrapped": lambda model, backend: setattr(model, "a", torch.compile(model.a, backend=backend)) or model,
    "a layer in place": lambda model, backend: model.a.compile(backend=backend) or model,
}


@every_backend
@pytest.mark.parametrize("case", BEFORE)
def test_attaching_to_what_is_compiled_is_refused(case, backend):
    model = BEFORE[case](net(), backend)
    with no_trace(model), pytest.raises(perex.AttachError, match="compiled"):
        perex.attach(model)
    model(inputs()).sum().backward()


# ------------------------------------------------------------------- compiled code around the model

AROUND = {
    "wrapper from before": lambda model, early, backend: early,
    "wrapper from after": lambda model, early, backend: torch.compile(model, backend=backend),
    "in place": lambda model, early, backend: model.compile(backend=backend) or model,
    "a step": lambda model, early, backend: torch.compile(lambda x: model(x) * 1, backend=backend),
}


@every_way
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("case", AROUND)
def test_what_is_compiled_around_the_model_is_refused(case, warm, param_grads, backend="aot_eager"):
    """Nothing can be read then, least of all what an earlier batch had left."""
    model = net()
    early = torch.compile(model, backend=backend)
    if warm:
        early(inputs()).sum().backward()
        model.zero_grad()
    with perex.attach(model, param_grads=param_grads) as px:
        assert_step(px, model, model, inputs(), param_grads)
        call = AROUND[case](model, early, backend)
        with pytest.raises(perex.AttachError, match="compiled"):
            losses_of(call(inputs(1))).mean().backward()
            px.norms()
    out = AROUND[case](model, early, backend)(inputs(1))
    torch.testing.assert_close(out.detach(), expected(inputs(1))[0], rtol=1e-12, atol=1e-14)


def test_no_stale_norms_from_a_compiled_copy():
    """A compiled copy of the model is none of the tracker's business; a compiled use of its weights is noticed."""
    model = net()
    weight = model.b.weight
    use = torch.compile(lambda h: h @ weight.t(), backend="eager")
    with perex.attach(model) as px:
        losses_of(model(inputs())).mean().backward()
        found = px.norms()
        twin = torch.compile(copy.deepcopy(model), backend="eager")
        losses_of(twin(inputs(1))).mean().backward()
        assert torch.equal(px.norms(), found)
        (losses_of(model(inputs())) + use(inputs()).sum(1)).mean().backward()
        with pytest.raises(perex.UnsupportedError, match="did not see"):
            px.norms()
