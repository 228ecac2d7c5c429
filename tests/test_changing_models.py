"""Models that are changed while perex is attached: the next forward goes by what is there then."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import perex

B = 3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(1)


def looped(model: nn.Module, x: Tensor) -> Tensor:
    """Norms over all parameters that require grad, of a copy, so that nobody watches."""
    model = copy.deepcopy(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for row in x:
        grads = torch.autograd.grad(losses_of(model, row[None]).sum(), parameters, allow_unused=True)
        found.append(torch.cat([grad.flatten() for grad in grads if grad is not None]).norm())
    return torch.stack(found)


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("param_grads", [False, True])
def test_swapped_tensors_are_watched_again(swapping, param_grads):
    model, x = net(), torch.randn(B, 4).double()
    with perex.attach(model, param_grads=param_grads) as px:
        model.double()
        px.backward(losses_of(model, x))
        torch.testing.assert_close(px.norms(), looped(model, x))
        penalty = sum(p.square().sum() for p in model.parameters())
        (losses_of(model, x).mean() + penalty).backward()
        with pytest.raises(perex.UnsupportedError, match="from a use that perex did not see"):
            px.norms()


@pytest.mark.parametrize("param_grads", [False, True])
def test_weights_loaded_by_swapping(swapping, param_grads):
    model, x = net(), torch.randn(B, 4)
    with perex.attach(model, param_grads=param_grads) as px:
        for _ in range(3):
            px.backward(losses_of(model, x))
            torch.testing.assert_close(px.norms(), looped(model, x))
            model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()})


def test_nothing_left_to_track():
    model, x = net(), torch.randn(B, 4)
    with perex.attach(model) as px:
        px.backward(losses_of(model, x))
        model.requires_grad_(False)
        px.backward(losses_of(model, x.clone().requires_grad_()))
        assert px.norms().tolist() == [0.0] * B
        assert px.norms(by="parameter") == {}
        model.requires_grad_(True)
        px.backward(losses_of(model, x))
        torch.testing.assert_close(px.norms(), looped(model, x))


class Named(nn.Module):
    """A block and a head, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return (self.head if hasattr(self, "head") else self.neck)(self.body(x).tanh())


def test_renamed_modules_go_by_their_new_names():
    model, x = Named(), torch.randn(B, 4)
    with perex.attach(model) as px:
        px.backward(losses_of(model, x))
        model.neck = model.head
        del model.head
        px.backward(losses_of(model, x))
        assert set(px.norms(by="module")) == {"body", "neck"}
        torch.testing.assert_close(px.norms(), looped(model, x))


class Two(nn.Module):
    """A bias that belongs to one of two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Module()

    def forward(self, x: Tensor) -> Tensor:
        bias = self.two.b if hasattr(self.two, "b") else self.one.bias
        return x @ self.one.weight.T + bias


def test_a_parameter_that_moves_to_another_module():
    model, x = Two(), torch.randn(B, 4)
    with perex.attach(model) as px:
        px.backward(losses_of(model, x))
        assert set(px.norms(by="module")) == {"one"}
        model.two.b = model.one.bias
        del model.one.bias
        px.backward(losses_of(model, x))
        assert set(px.norms(by="parameter")) == {"one.weight", "two.b"}


def test_a_predicate_is_asked_in_each_forward():
    model, x, wanted = net(), torch.randn(B, 4), {"0", "2"}
    with perex.attach(model, params=lambda name, _: name.split(".")[0] in wanted) as px:
        for left in ({"0", "2"}, {"2"}, {"0"}):
            wanted.clear()
            wanted.update(left)
            px.backward(losses_of(model, x))
            assert {name.split(".")[0] for name in px.norms(by="parameter")} == left


class Adapted(nn.Module):
    """Says which of its parameters there are."""

    only = False

    def __init__(self) -> None:
        super().__init__()
        self.base, self.adapter = nn.Linear(4, 2), nn.Linear(4, 2)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        found = super().named_parameters(*args, **kwargs)
        yield from ((name, p) for name, p in found if not self.only or name.startswith("adapter"))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.adapter(x)


def test_named_parameters_of_the_model_s_own():
    model, x = Adapted(), torch.randn(B, 4)
    with perex.attach(model, param_grads=False) as px:
        for only in (False, True, False):
            model.only = only
            px.backward(losses_of(model, x))
            assert set(px.norms(by="module")) == ({"adapter"} if only else {"base", "adapter"})


def test_a_module_that_was_taken_out_is_not_the_model():
    model, x = net(), torch.randn(B, 4)
    with perex.attach(model) as px:
        old = model[2]
        model[2] = nn.Linear(4, 2)
        px.backward(losses_of(model, x))
        expected = px.norms()
        old(torch.randn(5, 4))
        assert torch.equal(px.norms(), expected) and px.batch_size == B


def test_copies_of_what_was_parametrized_while_attached():
    model, x = net(), torch.randn(B, 4)
    with perex.attach(model) as px:
        parametrizations.weight_norm(model[0])
        copied = copy.deepcopy(model)
        assert not copied[0]._forward_pre_hooks and "__reduce_ex__" not in vars(copied[0])
        assert "__deepcopy__" not in vars(copied[0]) and torch.equal(copied(x), model(x))
        px.backward(losses_of(model, x))
        torch.testing.assert_close(px.norms(), looped(model, x))
    assert not any("__deepcopy__" in vars(module) for module in model.modules())


def test_a_lazy_module_put_in_while_attached():
    model, x = net(), torch.randn(B, 4)
    with perex.attach(model):
        model[2] = nn.LazyLinear(2)
        with pytest.raises(perex.AttachError, match="module '2' has no parameters yet"):
            model(x)


# What else was found beside these


def test_an_empty_batch_in_float16():
    model = net()
    with perex.attach(model) as px:
        with torch.autocast("cpu", torch.float16):
            losses = losses_of(model, torch.randn(0, 4)).float()
        px.backward(losses)
        assert px.norms().shape == (0,)


@pytest.mark.parametrize("param_grads", [False, True])
def test_an_input_read_twice_under_autocast(param_grads):
    """Autocast makes one half-precision copy of a leaf: gradients of its uses add up in half precision."""
    one, two, leaf = nn.Linear(16, 16), nn.Linear(16, 16), torch.randn(5, 16, requires_grad=True)

    def gradient(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        (grad,) = torch.autograd.grad(out.float().square().sum(), x)
        return grad

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = one, two

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) * self.two(x)

    model = Both()
    expected = gradient(leaf)
    with perex.attach(model, param_grads=param_grads):
        for _ in range(3):
            assert torch.equal(gradient(leaf), expected)


class Uses(perex.Quantity):
    """One for each example and parameter."""

    degree = 0

    def reduce(self, name: str, gradient: Any) -> Tensor:
        return torch.ones(gradient.batch)


def test_what_is_read_may_be_changed():
    model, quantity = nn.Linear(4, 2, bias=False), Uses()
    with perex.attach(model, quantity) as px:
        px.backward(losses_of(model, torch.randn(B, 4)))
        px.read(quantity).zero_()
        px.read(quantity, by="parameter")["weight"].zero_()
        assert px.read(quantity).tolist() == [1.0] * B


def test_parameters_that_change_after_a_forward_that_used_none_of_them():
    """Its losses need no gradient: it is over, and not looked at later, with other parameters."""
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    model.forward = lambda x: model["used"](x).tanh()
    with perex.attach(model, params=["unused.*"], param_grads=False) as px:
        for _ in range(2):
            px.backward(model(torch.randn(3, 4)).sum(1))
            assert not px.norms().any()
            with torch.no_grad():
                model["used"].weight.add_(1)
        px.backward(model(torch.randn(3, 4, requires_grad=True)).sum(1))
        assert not px.norms().any()


def test_views_of_parameters_are_not_detached_in_place():
    """Torch refuses that, and so it does where perex has something else in the view's place."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.weight.t()
            with pytest.raises(RuntimeError, match="Can't detach views in-place"):
                weight.detach_()
            return x @ weight

    model, x = Model(), torch.randn(3, 4)
    with perex.attach(model) as px:
        px.backward(model(x).sum(1))
        torch.testing.assert_close(px.norms(), x.norm(dim=1) * 2)
