"""Rules and quantities that a user adds."""

import types

import pytest
import torch
from oracle import check
from torch import Tensor, nn

import perex
from perex.rules.registry import MODULES


class Scale(nn.Module):
    """A layer with one weight a feature, and a rule of its own in the tests below."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Unchanged(Scale):
    """Has its base's forward, so its base's rule."""


class Squared(Scale):
    """Overrides forward: the base's rule would be wrong."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight**2


@pytest.fixture
def calls():
    """Register a rule for `Scale`; gives the list of its calls."""
    seen: list[str] = []

    @perex.module_rule(Scale, saves="x")
    def scale(captured: perex.Captured) -> dict[str, perex.factors.Factor]:
        seen.append(captured.call.where)
        product = captured.grad * captured.examples("x")
        return {"weight": perex.factors.Dense(product.reshape(captured.batch, -1, product.shape[-1]).sum(1))}

    yield seen
    del MODULES[Scale]


def model(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), layer, nn.Linear(4, 2)).double()


@pytest.mark.parametrize(("cls", "by_rule"), [(Scale, True), (Unchanged, True), (Squared, False)])
def test_a_rule_holds_for_subclasses_that_keep_forward(calls, cls, by_rule):
    check(model(cls(4)), (torch.randn(5, 6, 3, dtype=torch.float64),))
    assert bool(calls) == by_rule
    assert set(calls) <= {"1.2", "2"}


def test_a_forward_replaced_on_the_instance_is_not_the_class_s(calls):
    layer = Scale(4)
    layer.forward = types.MethodType(lambda self, x: x * self.weight.sin(), layer)
    check(model(layer), (torch.randn(5, 6, 3, dtype=torch.float64),))
    assert not calls


def test_the_report_names_the_rule(calls):
    subject = model(Scale(4))
    with perex.attach(subject) as px:
        subject(torch.randn(5, 3, dtype=torch.float64)).sum(1).mean().backward()
        rows = {row.module: row.rule for row in px.report().rows}
    assert rows == {"0": "linear", "2": "scale", "3": "linear"}


def test_a_layer_has_one_rule(calls):
    with pytest.raises(ValueError, match="Scale has a rule already"):
        perex.module_rule(Scale)(lambda captured: {})
    with pytest.raises(ValueError, match="has a rule already"):
        perex.operator_rule(nn.functional.linear, arguments="input weight", parameters="weight")(lambda captured: {})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda captured: {}, "returned nothing for 'weight' of module '2'"),
        (lambda captured: {"weight": perex.factors.Dense(torch.zeros(5, 3))}, "returned gradients of shape"),
        (lambda captured: {"weight": perex.factors.Dense(torch.zeros(4, 4))}, "returned gradients of shape"),
    ],
)
def test_a_wrong_answer_of_a_rule_is_an_error(answer, message):
    perex.module_rule(Scale)(answer)
    try:
        subject = model(Scale(4))
        with perex.attach(subject), pytest.raises(perex.PerexError, match=message):
            subject(torch.randn(5, 3, dtype=torch.float64)).sum(1).mean().backward()
    finally:
        del MODULES[Scale]


class SumOfGradients(perex.Quantity):
    """A statistic of a user: the sum of all entries of each example's gradient."""

    degree = 1

    def reduce(self, name: str, gradient: perex.factors.Total) -> Tensor:
        return gradient.dense(0, gradient.batch).flatten(1).sum(1)


def test_a_quantity_of_a_user_sees_every_layer():
    subject = model(nn.LayerNorm(4))
    subject[0].bias.requires_grad_(False)
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    quantity = SumOfGradients()
    with perex.attach(subject, quantity, loss_reduction="sum") as px:
        subject(x).sin().sum().backward()
    found = px.read(quantity, by="parameter")
    names = [name for name, p in subject.named_parameters() if p.requires_grad]
    assert list(found) == names
    for b in range(5):
        loss = subject(x[b : b + 1]).sin().sum()
        tracked = [p for p in subject.parameters() if p.requires_grad]
        for name, grad in zip(names, torch.autograd.grad(loss, tracked), strict=True):
            torch.testing.assert_close(found[name][b], grad.sum())
    with pytest.raises(perex.PerexError, match="not given to attach"):
        px.read(SumOfGradients())
