"""`perex.verify`: right about what agrees, what does not and where, and no trace on the model."""

from __future__ import annotations

import copy
import dataclasses
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from printed import assert_printed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import perex
from perex.factors.terms import Terms
from perex.rules.registry import MODULES, OPERATORS

torch.set_num_threads(1)
CE = nn.CrossEntropyLoss()


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    load = pytest.importorskip("sklearn.datasets").load_digits
    images, labels = load(return_X_y=True)
    return torch.tensor(images[:16] / 16, dtype=torch.float32), torch.tensor(labels[:16])


@pytest.fixture(autouse=True)
def rules_as_before() -> Iterator[None]:
    tables = [(table, dict(table)) for table in (OPERATORS, MODULES)]
    torch.manual_seed(0)
    yield
    for table, rules in tables:
        table.clear()
        table.update(rules)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5), nn.LayerNorm(32), nn.Linear(32, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.Flatten(),
        nn.Linear(72, 10),
    )


def pairs(n: int = 6, d: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d), torch.randint(2, (n,))


class Wrong(nn.Module):
    """A layer for which a test registers a rule of twice the gradient."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(d) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.hypot(x, self.scale)


class Through(nn.Module):
    """A layer made of a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def minus_mean_by_numpy(x: Tensor) -> Tensor:
    return x - torch.from_numpy(x.detach().numpy().mean(0))


def settled(found: perex.Verification) -> str:
    """What is printed, with one size for all rounding, which is a matter of the machine."""
    rows = [dataclasses.replace(row, worst=0, difference=2e-16) if row.agrees else row for row in found.rows]
    summary = re.sub(r"\d\.\de-1[4-9]", "2.0e-16", found.summary)
    return str(dataclasses.replace(found, rows=rows, summary=summary))


# Models that perex is right about


@pytest.mark.parametrize("make", [mlp, cnn])
def test_real_models_agree(make: Callable[[], nn.Module], digits: tuple[Tensor, Tensor]) -> None:
    found = perex.verify(make(), digits, CE)
    assert found and found.agrees and found.verdict == "agrees" and found.losses_agree
    assert found.dtype == torch.float64 and not found.notes and found.error is None
    assert [row.parameter for row in found.rows] == [name for name, _ in make().named_parameters()]
    assert all(row.difference < 1e-12 and row.perex.shape == row.loop.shape == (4,) for row in found.rows)


def test_agreement_is_printed(digits: tuple[Tensor, Tensor]) -> None:
    found = perex.verify(mlp(), digits, nn.CrossEntropyLoss(weight=torch.rand(10)))
    assert_printed("verify_agrees", settled(found))


def test_a_gpt_agrees_and_reads_batches_of_dicts() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    batch = {"input_ids": torch.randint(50, (5, 9)), "attention_mask": torch.ones(5, 9, dtype=torch.long)}
    batch["attention_mask"][1, 6:] = 0

    def step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(**batch).logits[:, :-1]
        return cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none").mean(1)

    found = perex.verify(model, batch, step=step, examples=3)
    assert found.agrees, str(found)
    assert len(found.rows) == len(list(model.parameters())) and found.rows[0].module == "transformer.wte"
    assert "... and" in str(found)
    encoded = transformers.BatchEncoding({name: tensor.numpy() for name, tensor in batch.items()})
    assert perex.verify(model, encoded, step=step, examples=2, params=["*.wpe.weight"]).agrees


def test_nests_shared_inputs_and_batch_dim() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.lstm(x)[0] * mask

    batch = {"x": [torch.randn(5, 6, 3)], "mask": (torch.rand(4),), "y": np.arange(6.0), "name": "sequences first"}

    def step(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return (model(batch["x"][0], batch["mask"][0]).sum((0, 2)) - batch["y"]).square()

    assert perex.verify(Net(), batch, step=step, batch_dim=1).agrees


def test_gradients_that_are_zero_but_for_rounding_agree() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)  # the key's bias shifts all scores alike

    def step(model: nn.Module, x: Tensor) -> Tensor:
        return model(x, x, x)[0].square().sum((1, 2))

    assert perex.verify(attention, torch.randn(4, 5, 8), step=step).agrees


# Errors of a rule


def test_a_wrong_rule_is_found_and_named() -> None:
    perex.operator_rule(torch.hypot, arguments="input other", parameters="other", saves={"other": "input other"})(
        lambda captured: {"other": perex.factors.Dense(2 * captured.grad)}
    )
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Tanh(), Wrong(3)), nn.Linear(3, 2))
    found = perex.verify(model, pairs(), CE)
    assert found.verdict == "disagrees" and not found and found.losses_agree
    assert [row.parameter for row in found.rows if not row.agrees] == ["1.1.scale"]
    assert "module '1.1'" in found.summary and "`hypot`" in found.summary and "one of your own" in found.summary
    wrong = next(row for row in found.rows if not row.agrees)
    assert wrong.difference > 0.1 and wrong.module == "1.1"


def test_disagreement_is_printed() -> None:
    def twice(captured: perex.Captured) -> dict[str, perex.factors.Factor]:
        x, w = captured.examples("x"), 1.0
        return {"scale": perex.factors.Dense(2 * captured.grad * w / torch.hypot(x, torch.ones_like(x)))}

    perex.module_rule(Wrong, saves="x")(twice)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), Wrong(3), nn.Linear(3, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape))
        model[2].scale.fill_(1.0)
    batch = torch.linspace(-1, 2, 12).reshape(3, 4), torch.tensor([0, 1, 1])
    found = perex.verify(model, batch, CE)
    wrong = next(row for row in found.rows if not row.agrees)
    torch.testing.assert_close(wrong.perex, 2 * wrong.loop)
    assert wrong.difference == pytest.approx(0.5)
    assert_printed("verify_disagrees", settled(found))


def test_a_wrong_rule_of_perex_is_to_be_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    terms = perex.factors.Outer.terms
    monkeypatch.setattr(perex.factors.Outer, "terms", lambda self: Terms.of(1.5 * terms(self).values))
    found = perex.verify(mlp(), (torch.randn(4, 64), torch.randint(10, (4,))), CE)
    assert [row.parameter for row in found.rows if not row.agrees] == ["0.weight", "4.weight"]
    assert "module '0'" in found.summary and "file an issue" in found.summary


def test_a_slightly_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    terms = perex.factors.Dense.terms
    monkeypatch.setattr(perex.factors.Dense, "terms", lambda self: Terms.of((1 + 1e-4) * terms(self).total()))
    assert perex.verify(mlp(), (torch.randn(4, 64), torch.randint(10, (4,))), CE).verdict == "disagrees"


def test_an_error_inside_perex_is_reported_as_one() -> None:
    perex.module_rule(Wrong, saves="x")(lambda captured: 1 / 0)
    found = perex.verify(nn.Sequential(nn.Linear(4, 3), Wrong(3)), pairs(), CE)
    assert found.verdict == "fails" and isinstance(found.error, ZeroDivisionError) and "bug" in found.summary


# Models that perex cannot be right about


def test_a_refusal_is_printed_with_its_reason() -> None:
    model = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape))
    batch = torch.linspace(-1, 2, 12).reshape(3, 4).square(), torch.tensor([0, 1, 1])
    found = perex.verify(model, batch, CE, mode="train")
    assert found.verdict == "refused" and isinstance(found.error, perex.ExamplesMixError) and not found.losses_agree
    assert_printed("verify_refused", str(found))


def test_a_refusal_of_what_does_not_run_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    assert perex.verify(model, pairs(), CE).agrees
    found = perex.verify(model, pairs(), CE, mode="train")
    assert found.verdict == "refused" and "one example alone" in found.summary and "BatchNorm1d" in found.summary
    assert perex.verify(model.train(), pairs(), CE, mode=None).verdict == "refused"


def test_a_refusal_that_nothing_calls_for() -> None:
    class Mapped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.func.vmap(lambda row: row * self.bias.sum())(x))

    found = perex.verify(nn.Sequential(nn.Linear(4, 3), Mapped(3, 2)), pairs(), CE)
    assert found.verdict == "refused" and found.losses_agree and "torch.func" in found.summary


def test_mixing_that_perex_cannot_see_is_told_from_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Tanh(), Through(minus_mean_by_numpy)), nn.Linear(3, 2))
    found = perex.verify(model, pairs(), CE)
    assert found.verdict == "mixes" and not found and not found.losses_agree
    assert "examples influence each other" in found.summary and "module '1.1' (Through)" in found.summary


def test_mixing_in_a_forward_or_a_step_is_placed_there() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(minus_mean_by_numpy(self.a(x)))

    found = perex.verify(nn.Sequential(Mixer()), pairs(), CE)
    assert found.verdict == "mixes" and "module '0', in its own forward before '0.b'" in found.summary

    def step(model: nn.Module, batch: Any) -> Tensor:
        return minus_mean_by_numpy(model(batch[0]).square()).square().sum(1)

    found = perex.verify(nn.Linear(4, 2), pairs(), step=step)
    assert found.verdict == "mixes" and "the loss, or in the step" in found.summary


def test_mixing_that_leaves_gradients_alone_is_a_note() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        losses = model(batch[0]).square().sum(1)
        return losses - float(losses.detach().numpy().mean())

    found = perex.verify(nn.Linear(4, 2), pairs(), step=step)
    assert found.agrees and not found.losses_agree and "influence each other" in found.notes[0]


def test_randomness_is_told() -> None:
    batch = torch.randn(4, 64), torch.randint(10, (4,))
    found = perex.verify(mlp(), batch, CE, mode="train")
    assert found.verdict == "random" and 'mode="eval"' in found.summary and not found.rows


# Precision and copies


def test_a_model_bound_to_float32_is_compared_in_float32() -> None:
    model = nn.Sequential(Through(lambda x: x.float()), nn.Linear(4, 2))
    found = perex.verify(model, pairs(), CE)
    assert found.agrees and found.dtype == torch.float32 and "does not run in float64" in found.notes[0]


def test_a_cast_inside_the_model_bounds_the_precision() -> None:
    model = nn.Sequential(nn.Linear(4, 3), Through(lambda x: x.float().sin().to(x.dtype)), nn.Linear(3, 2))
    found = perex.verify(model, pairs(), CE)
    assert found.agrees and found.dtype == torch.float32 and "float32" in found.notes[0]


def test_half_precision_weights_are_compared_in_float64() -> None:
    found = perex.verify(nn.Linear(4, 2).bfloat16(), (pairs()[0].bfloat16(), pairs()[1]), CE)
    assert found.agrees and found.dtype == torch.float64


def test_a_model_that_makes_its_own_tensors_runs_in_float64() -> None:
    model = nn.Sequential(nn.Linear(4, 3), Through(lambda x: x @ torch.eye(3)), nn.Linear(3, 2))
    found = perex.verify(model, pairs(), CE)
    assert found.agrees and found.dtype == torch.float64 and torch.get_default_dtype() == torch.float32


def test_a_model_that_cannot_be_copied_is_run_and_left_as_it_is() -> None:
    class Uncopied(nn.Linear):
        def __deepcopy__(self, memo: Any) -> None:
            raise RuntimeError("there is only one of me")

    model = nn.Sequential(Uncopied(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = perex.verify(model, pairs(), CE)
    assert found.agrees and found.dtype == torch.float32 and "there is only one of me" in found.notes[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules()) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", ["eval", "train", None])
def test_the_model_is_left_as_it_was_found(mode: Any, digits: tuple[Tensor, Tensor]) -> None:
    model, criterion = cnn(), nn.CrossEntropyLoss(weight=torch.rand(10))
    model[1].eval(), model[4].weight.requires_grad_(False)
    model[6].weight.grad = torch.ones_like(model[6].weight)
    model.calls = 0  # type: ignore[assignment]
    reference, weight = copy.deepcopy(model), criterion.weight.clone()
    versions = {name: tensor._version for name, tensor in model.state_dict(keep_vars=True).items()}
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    x = digits[0].clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    perex.verify(model, (x, digits[1]), criterion, mode=mode)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tolist()
    for (name, tensor), (_, other) in zip(
        model.state_dict(keep_vars=True).items(), reference.state_dict(keep_vars=True).items(), strict=True
    ):
        assert torch.equal(tensor, other) and tensor.dtype == other.dtype, name
        assert tensor.requires_grad == other.requires_grad and tensor._version == versions[name], name
    assert [p.grad is not None for p in model.parameters()] == [False] * 6 + [True, False]
    assert bool((model[6].weight.grad == 1).all())
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    assert [m.training for m in model.modules()] == [m.training for m in reference.modules()]
    assert torch.equal(weight, criterion.weight) and torch.equal(x, digits[0]) and torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


def test_it_runs_while_perex_is_attached_and_under_no_grad() -> None:
    model = nn.Linear(4, 2)
    with perex.attach(model) as px, torch.no_grad():
        assert perex.verify(model, pairs(), CE).agrees
        with pytest.raises(perex.NotReadyError):
            _ = px.batch_size


# Arguments


def test_params_and_examples() -> None:
    found = perex.verify(mlp(), (torch.randn(9, 64), torch.randint(10, (9,))), CE, params=["4.*"], examples=7)
    assert [row.parameter for row in found.rows] == ["4.weight", "4.bias"] and found.rows[0].loop.shape == (7,)
    one = perex.verify(mlp(), (torch.randn(1, 64), torch.tensor([3])), CE)
    assert one.agrees and "one example" in one.notes[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_fn": None}, "either loss_fn"),
        ({"examples": 0}, "positive whole number"),
        ({"batch": ("x", "y")}, "next\\(iter"),
        ({"model": lambda x: x}, "nn.Module"),
        ({"batch": (torch.zeros(0, 4), torch.zeros(0))}, "no tensor with examples"),
    ],
)
def test_arguments_that_cannot_be_used(arguments: dict[str, Any], message: str) -> None:
    given = {"model": nn.Linear(4, 2), "batch": pairs(), "loss_fn": CE, **arguments}
    with pytest.raises(perex.PerexError, match=message):
        perex.verify(given.pop("model"), given.pop("batch"), given.pop("loss_fn"), **given)


def test_errors_of_the_user_s_own_are_raised_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        perex.verify(nn.Linear(5, 2), pairs(), CE)
    with pytest.raises(perex.LossError, match="one for each example"):
        perex.verify(nn.Linear(4, 2), pairs(), step=lambda model, batch: model(batch[0]).sum())
    with pytest.raises(perex.ScoringError, match="pairs"):
        perex.verify(nn.Linear(4, 2), {"x": pairs()[0]}, CE)


def test_a_step_that_calls_another_model_is_told() -> None:
    model = nn.Linear(4, 2)
    found = perex.verify(model, pairs(), step=lambda other, batch: model(batch[0].float()).square().sum(1))
    assert found.verdict == "refused" and "attached model" in found.summary
