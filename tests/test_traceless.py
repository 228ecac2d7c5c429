"""Attached or not, the model is the user's: copies, pickles, exceptions, and what is left after detaching."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from oracle import no_trace, scramble, traces
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import perex

B, D = 3, 4
x = torch.randn(B, D)


class Net(nn.Module):
    """Something of everything: tied, bare, frozen and parametrized weights, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
        self.b.weight = self.a.weight
        self.scale = nn.Parameter(torch.ones(D))
        self.normed = parametrizations.weight_norm(nn.Linear(D, 2))
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        self.register_buffer("steps", torch.zeros(()))
        self.frozen = nn.Linear(D, D).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).tanh()) * self.scale + self.frozen(x)
        return self.normed(self.conv(h[:, None])[:, 0].relu_())


def net() -> nn.Module:
    return scramble(Net())


def loss(out: Tensor) -> Tensor:
    return out.sin().sum(1)


def gradients(model: nn.Module) -> list[Tensor | None]:
    model.zero_grad()
    loss(model(x)).mean().backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return found


STATES = {
    "attached": lambda model, px: None,
    "after a forward": lambda model, px: model(x),
    "after a backward": lambda model, px: loss(model(x)).mean().backward(),
    "after reading": lambda model, px: (loss(model(x)).mean().backward(), px.norms()),
    "after two batches": lambda model, px: [loss(model(x)).mean().backward() for _ in range(2)],
}
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": lambda model: saved(model),
}


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


every_way = pytest.mark.parametrize("param_grads", [True, False])


def shape_of_traces(model: nn.Module) -> dict:
    """`traces`, less what no copy can share."""
    found = traces(model)
    del found["globals"]
    for name, seen in found.items():
        if name.startswith("parameter"):
            found[name] = {k: v for k, v in seen.items() if k not in ("id", "pointer", "version")}
        elif name.startswith("module"):
            found[name] = {k: v for k, v in seen.items() if k not in ("parameters", "children", "type", "methods")}
            found[name]["hooks"] = {k: [type(h).__name__ for h in v.values()] for k, v in seen["hooks"].items()}
            found[name]["class"] = str(seen["type"])  # a parametrized module has a class of its own
    return found


class Unparametrized(Net):
    """Torch does not pickle parametrized modules."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.Linear(D, 2)


@every_way
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("state", STATES)
def test_a_copy_is_the_model_without_perex(state, how, param_grads):
    make = (lambda: scramble(Unparametrized())) if how != "deepcopy" else net
    untouched, model = make(), make()
    expected = gradients(untouched)
    with perex.attach(model, param_grads=param_grads) as px:
        STATES[state](model, px)
        twin = COPIES[how](model)
    twin.zero_grad()
    assert twin.b.weight is twin.a.weight
    for p, q in zip(gradients(twin), expected, strict=True):
        assert (p is None) == (q is None) and (p is None or torch.equal(p, q))


@every_way
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_has_no_trace_of_perex(how, param_grads):
    make = (lambda: scramble(Unparametrized())) if how != "deepcopy" else net
    with perex.attach(model := make(), param_grads=param_grads):
        model(x)
        twin = shape_of_traces(COPIES[how](model))
    expected = shape_of_traces(COPIES[how](make()))
    assert {name for name in twin if twin[name] != expected[name]} == set()


def test_a_pickle_can_be_read_where_perex_is_not_installed():
    model = scramble(Unparametrized())
    with perex.attach(model):
        loss(model(x)).mean().backward()
        assert b"perex" not in pickle.dumps(model)


def test_using_a_copy_does_not_disturb_the_original():
    model = net()
    with perex.attach(model) as px:
        loss(model(x)).mean().backward()
        expected = px.norms()
        twin = copy.deepcopy(model)
        loss(twin(torch.randn(5, D))).mean().backward()
        assert torch.equal(px.norms(), expected) and px.batch_size == B
        with perex.attach(twin) as other:  # a copy can be attached to as well
            loss(twin(x)).mean().backward()
            torch.testing.assert_close(other.norms(), expected)


@every_way
def test_state_dict_while_attached(param_grads):
    model, untouched = net(), net()
    with perex.attach(model, param_grads=param_grads):
        out = model(x)
        assert list(model.state_dict()) == list(untouched.state_dict())
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in untouched.named_parameters()]
        assert [n for n, _ in model.named_modules()] == [n for n, _ in untouched.named_modules()]
        assert [str(type(m)) for m in model.modules()] == [str(type(m)) for m in untouched.modules()]
        loss(out).mean().backward()
        model.load_state_dict(untouched.state_dict())


@every_way
def test_parameters_are_the_users_own_all_the_time(param_grads):
    """An optimiser made before or during holds the very same tensors, all of them leaves."""
    model = net()
    own = list(model.parameters())
    with perex.attach(model, param_grads=param_grads):
        for _ in range(2):
            out = model(x)
            assert all(p is q for p, q in zip(model.parameters(), own, strict=True))
            loss(out).mean().backward()
            assert all(p is q and p.is_leaf for p, q in zip(model.parameters(), own, strict=True))


ERRORS = {
    "before a forward": lambda model, px: 1 / 0,
    "after a forward": lambda model, px: (model(x), 1 / 0),
    "after a backward": lambda model, px: (loss(model(x)).mean().backward(), 1 / 0),
}


@every_way
@pytest.mark.parametrize("case", ERRORS)
def test_an_exception_in_the_body(case, param_grads):
    model = net()
    with no_trace(model):
        with pytest.raises(ZeroDivisionError):
            with perex.attach(model, param_grads=param_grads) as px:
                ERRORS[case](model, px)
        model.zero_grad()


class Fails(nn.Module):
    """Raises in the middle of a forward, or of a backward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
        self.where = "forward"

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.where == "forward":
            raise ZeroDivisionError
        if self.where == "backward" and h.requires_grad:
            h.register_hook(lambda g: 1 / 0)
        return self.b(h.tanh())


@every_way
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_in_the_model(where, param_grads):
    """The next batch is right, and nothing stays switched on in between."""
    model = scramble(Fails())
    model.where = ""
    with perex.attach(model, param_grads=param_grads) as px:
        loss(model(x)).mean().backward()
        expected = px.norms()
    model.zero_grad()
    with no_trace(model):
        with perex.attach(model, param_grads=param_grads) as px:
            model.where = where
            with pytest.raises(ZeroDivisionError):
                out = model(x.clone().requires_grad_())
                loss(out).mean().backward()
            assert torch._C._len_torch_function_stack() == 0 and torch._C._len_torch_dispatch_stack() == 0
            with pytest.raises(perex.PerexError):
                px.norms()
            model.where = ""
            model.zero_grad()
            loss(model(x)).mean().backward()
            torch.testing.assert_close(px.norms(), expected)


@every_way
def test_detaching_between_forward_and_backward(param_grads):
    """With `param_grads=True` the backward that follows is the plain one."""
    model, untouched = net(), net()
    expected = gradients(untouched)
    with no_trace(model):
        with perex.attach(model, param_grads=param_grads):
            out = model(x)
        if param_grads:
            loss(out).mean().backward()
            for p, q in zip(model.parameters(), expected, strict=True):
                assert (p.grad is None) == (q is None) and (q is None or torch.equal(p.grad, q))
    gradients_after = gradients(model)
    assert all(p is None or torch.equal(p, q) for p, q in zip(gradients_after, expected, strict=True))


@every_way
def test_hooks_of_the_users_own_run_as_before(param_grads):
    """Forward, backward and parameter hooks, and those that were there before come back after."""
    model, seen = net(), []
    model.a.register_forward_hook(lambda m, args, out: seen.append("forward"))
    model.a.register_forward_pre_hook(lambda m, args: seen.append("before"))
    model.normed.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    model.conv.weight.register_post_accumulate_grad_hook(lambda p: seen.append("gradient"))
    loss(model(x)).mean().backward()
    model.zero_grad()
    plain, seen[:] = sorted(seen), []
    with no_trace(model):
        with perex.attach(model, param_grads=param_grads) as px:
            loss(model(x)).mean().backward()
            assert px.norms().shape == (B,)
        expected = plain if param_grads else [s for s in plain if s != "gradient"]
        assert sorted(seen) == expected
        model.zero_grad()


@every_way
def test_a_forward_hook_that_changes_the_output(param_grads):
    """Part of the model's function like any other."""
    model = scramble(nn.Sequential(nn.Linear(D, D), nn.Linear(D, 2))).double()
    model[0].register_forward_hook(lambda m, args, out: out * model[1].weight[0])
    model[1].register_forward_pre_hook(lambda m, args: (args[0].sin(),))
    data, expected = x.double(), []
    for i in range(B):
        grads = torch.autograd.grad(loss(model(data[i : i + 1])).sum(), list(model.parameters()))
        expected.append(torch.stack([g.square().sum() for g in grads]).sum().sqrt())
    with perex.attach(model, param_grads=param_grads) as px:
        loss(model(data)).mean().backward()
        torch.testing.assert_close(px.norms(), torch.stack(expected), rtol=1e-9, atol=0)


@every_way
def test_nothing_is_kept_alive(param_grads):
    """Activations go with the backward, and the model with its last user."""
    model = net()
    px = perex.attach(model, param_grads=param_grads)
    alive = []

    def watch(module: nn.Module, args: tuple, out: Tensor) -> None:
        alive.append(weakref.ref(out))

    handle = model.frozen.register_forward_hook(watch)
    out = model(x)
    loss(out).mean().backward()
    px.norms()
    del out
    gc.collect()
    assert [r() for r in alive] == [None]
    handle.remove()
    px.detach()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None or px is not None
    del px
    gc.collect()
    assert gone() is None


@every_way
@pytest.mark.parametrize("memory", ["auto", "low", "high"])
def test_what_a_dropped_tracker_has_kept_goes_with_it(memory, param_grads):
    """A graph that leads back to the tracker's results is nothing that the collector sees."""
    model, counts = net(), []
    for _ in range(4):
        with perex.attach(model, param_grads=param_grads, memory=memory) as px:
            px.backward(loss(model(x)))
            px.norms()
        model.zero_grad()
        del px
        gc.collect()
        counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
    assert counts[-1] == counts[1]


def test_dropping_the_handle_without_detaching():
    """Forgotten, not detached: the model can still be used, and pickled."""
    model, untouched = net(), net()
    perex.attach(model)
    gc.collect()
    expected = gradients(untouched)
    for p, q in zip(gradients(model), expected, strict=True):
        assert (p is None) == (q is None) and (q is None or torch.equal(p, q))
    copy.deepcopy(model)


def test_another_model_in_the_same_forward_is_left_alone():
    """A teacher, or any other computation in the body, is no business of perex."""
    model, teacher = net(), net()
    with no_trace(teacher), no_trace(model):
        with perex.attach(model) as px:
            with torch.no_grad():
                target = teacher(torch.randn(7, D))
            loss(teacher(x)).mean().backward()
            loss(model(x)).mean().backward()
            assert px.norms().shape == (B,) and target.shape == (7, 2)
        for p in [*model.parameters(), *teacher.parameters()]:
            p.grad = None


def test_another_thread_is_left_alone():
    """Another model in another thread runs while this one is attached to, and keeps its own results."""
    model, other = net(), net()
    expected, results = gradients(other), []
    with perex.attach(model) as px:
        thread = threading.Thread(target=lambda: results.append(gradients(other)))
        thread.start()
        loss(model(x)).mean().backward()
        thread.join()
        assert px.norms().shape == (B,)
    assert all(p is None or torch.equal(p, q) for p, q in zip(results[0], expected, strict=True))


def test_attaching_many_times():
    model = net()
    with no_trace(model):
        for param_grads in (True, False) * 3:
            with perex.attach(model, param_grads=param_grads) as px:
                loss(model(x)).mean().backward()
                px.norms(by="module")
            model.zero_grad()


def test_the_checker_notices_what_is_left():
    """The test of the tests: each kind of trace is seen."""
    leave = {
        "hook": lambda m: m.a.register_forward_hook(print),
        "attribute": lambda m: setattr(m.conv, "extra", 1),
        "attribute of a parameter": lambda m: setattr(m.scale, "extra", 1),
        "parameter hook": lambda m: m.scale.register_hook(print),
        "accumulation hook": lambda m: m.scale.register_post_accumulate_grad_hook(print),
        "flag": lambda m: m.scale.requires_grad_(False),
        "mode": lambda m: m.a.eval(),
        "parameter replaced": lambda m: setattr(m.a, "bias", nn.Parameter(m.a.bias.detach().clone())),
        "parameter written": lambda m: m.a.bias.detach().add_(1),
        "buffer": lambda m: m.register_buffer("more", torch.zeros(())),
        "class": lambda m: setattr(m.a, "__class__", nn.Identity),
        "method": lambda m: setattr(m.a, "forward", print),
    }
    for what, change in leave.items():
        with pytest.raises(AssertionError, match="left behind"):
            model = net()
            with no_trace(model):
                change(model)
            pytest.fail(f"{what} went unnoticed")
