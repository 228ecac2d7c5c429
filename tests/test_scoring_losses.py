"""The loss of each example: that of a batch of one, in value and gradient, whatever the criterion."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perex.errors import LossError
from perex.scoring.errors import ScoringError
from perex.scoring.losses import PerExampleLosses
from perex.scoring.nest import map_leaves, tensors, to_device

B, C, T = 5, 4, 3
generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def labels(*shape: int) -> Tensor:
    found = torch.randint(0, C, shape, generator=generator)
    found[0], found[1] = 1, -100  # all of one example's tokens are ignored
    return found


def divergence(reduction: str) -> nn.Module:
    """With "batchmean" for "mean", which torch advises against."""
    return nn.KLDivLoss(reduction="batchmean" if reduction == "mean" else reduction)


WEIGHT = torch.tensor([0.5, 3.0, 1.0, 0.1], dtype=torch.float64)
CRITERIA: dict[str, tuple[Callable[..., nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "cross entropy": (nn.CrossEntropyLoss, lambda: (normal(B, C), labels(B))),
    "weighted": (lambda **r: nn.CrossEntropyLoss(WEIGHT, **r), lambda: (normal(B, C), labels(B))),
    "smoothed": (
        lambda **r: nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.3, **r),
        lambda: (normal(B, C), labels(B)),
    ),
    "of tokens": (lambda **r: nn.CrossEntropyLoss(WEIGHT, **r), lambda: (normal(B, C, T), labels(B, T))),
    "of tokens, T == B": (nn.CrossEntropyLoss, lambda: (normal(B, C, B), labels(B, B))),
    "probabilities": (nn.CrossEntropyLoss, lambda: (normal(B, C), normal(B, C).softmax(1))),
    "squares": (nn.MSELoss, lambda: (normal(B, C), normal(B, C))),
    "columns": (nn.MSELoss, lambda: (normal(B, 1), normal(B, 1))),
    "single numbers": (nn.L1Loss, lambda: (normal(B), normal(B))),
    "binary": (nn.BCEWithLogitsLoss, lambda: (normal(B, 1), normal(B, 1).sigmoid())),
    "margins": (nn.MultiMarginLoss, lambda: (normal(B, C), labels(B).clamp(min=0))),
    "divergence": (divergence, lambda: (normal(B, C).log_softmax(1), normal(B, C).softmax(1))),
}


def assert_alone(criterion: Any, output: Tensor, target: Any) -> PerExampleLosses:
    """Compare values and gradients with one call, and one backward, for each example."""
    output = output.clone().requires_grad_()
    losses_of = PerExampleLosses(criterion)
    losses = losses_of(output, target, B)
    assert losses.shape == (B,)
    (grads,) = torch.autograd.grad(losses.sum(), output)
    for b in range(B):
        one = output[b : b + 1].detach().requires_grad_()
        loss = criterion(one, target[b : b + 1]).sum()
        (grad,) = torch.autograd.grad(loss, one)
        torch.testing.assert_close(losses[b], loss, rtol=1e-12, atol=1e-14, equal_nan=True)
        torch.testing.assert_close(grads[b : b + 1], grad, rtol=1e-12, atol=1e-14, equal_nan=True)
    return losses_of


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", CRITERIA)
def test_criteria(name: str, reduction: str) -> None:
    make, data = CRITERIA[name]
    criterion = make(reduction=reduction)
    before = dict(vars(criterion))
    assert_alone(criterion, *data())
    assert vars(criterion) == before


def test_what_vmap_can_follow_is_called_at_once() -> None:
    calls = []

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        calls.append(output.shape)
        return nn.functional.cross_entropy(output, target)

    losses_of = PerExampleLosses(loss_fn)
    for _ in range(2):
        losses_of(normal(64, C), torch.zeros(64, dtype=torch.long), 64)
    assert losses_of.at_once
    assert calls == [(1, C)] * (1 + 3 + 1)  # mapped; three alone, to compare; mapped


def test_what_depends_on_values_is_called_for_each() -> None:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return output.sum() if float(output.detach().sum()) > 0 else output.square().sum()

    assert not assert_alone(loss_fn, normal(B, C), normal(B)).at_once


def test_what_vmap_gets_wrong_is_called_for_each() -> None:
    """A criterion that counts its calls stands for anything in which one mapped call differs from B calls."""

    class Counting(nn.Module):
        calls = 0

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            self.calls += 1
            return output.sum() * self.calls

    criterion = Counting()
    losses = PerExampleLosses(criterion)(torch.ones(B, 1), torch.ones(B), B)
    assert losses.diff().tolist() == [1.0] * (B - 1)


def test_a_warning_of_the_criterion_reaches_the_user() -> None:
    with pytest.warns(UserWarning, match="target size"):
        losses = PerExampleLosses(nn.MSELoss())(torch.zeros(B, 1), torch.arange(float(B)), B)
    assert losses.tolist() == [0.0, 1.0, 4.0, 9.0, 16.0]


def test_a_criterion_s_own_error_reaches_the_user() -> None:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        PerExampleLosses(loss_fn)(normal(B, C), normal(B), B)


# ---------------------------------------------------------------------- structures

Pair = namedtuple("Pair", ["logits", "extra"])


@dataclass(frozen=True)
class Output:
    logits: Tensor
    extra: Any = None


def hugging_face(logits: Tensor, extra: Any) -> Any:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    return outputs.SequenceClassifierOutput(loss=logits.mean(), logits=logits, hidden_states=(extra,))


WRAPS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda logits, extra: (logits, extra), lambda out: out[0]),
    "list": (lambda logits, extra: [[logits], extra], lambda out: out[0][0]),
    "namedtuple": (Pair, lambda out: out.logits),
    "dict": (lambda logits, extra: {"logits": logits, "extra": extra}, lambda out: out["logits"]),
    "dataclass": (Output, lambda out: out.logits),
    "Hugging Face": (hugging_face, lambda out: out.logits),
    "Hugging Face by key": (hugging_face, lambda out: out["logits"]),
    "Hugging Face by index": (hugging_face, lambda out: out[1]),
}


@pytest.mark.parametrize("name", WRAPS)
def test_every_tensor_in_a_structure_is_cut(name: str) -> None:
    wrap, logits_of = WRAPS[name]
    logits, target = normal(B, C), torch.arange(B) % C
    criterion = nn.CrossEntropyLoss()

    def loss_fn(output: Any, target: Any) -> Tensor:
        assert type(output) is type(wrapped)
        assert logits_of(output).shape == (1, C) and target["y"].shape == (1,)
        return criterion(logits_of(output), target["y"])

    wrapped = wrap(logits, normal(B, 2))
    losses = PerExampleLosses(loss_fn)(wrapped, {"y": target, "nothing": None}, B)
    torch.testing.assert_close(losses, nn.functional.cross_entropy(logits, target, reduction="none"))
    assert logits_of(wrapped) is logits


@pytest.mark.parametrize("use", [lambda t: t * 2, lambda t: t.sum(), lambda t: 1 + t, lambda t: t.shape, len, bool])
@pytest.mark.parametrize("stranger", [torch.tensor(1.0), torch.zeros(B + 1), 3, [1, 2, 3, 4, 5], object()])
def test_what_has_no_row_for_each_example_cannot_be_used(use: Callable, stranger: Any) -> None:
    def loss_fn(output: Any, target: Tensor) -> Tensor:
        part = output["stranger"]
        use(part[0] if isinstance(part, list) else part)
        return output["logits"].sum()

    with pytest.raises(ScoringError, match="which has no row for each example; pass step="):
        PerExampleLosses(loss_fn)({"logits": normal(B, C), "stranger": stranger}, normal(B), B)


@pytest.mark.parametrize(
    ("output", "target", "message"),
    [
        (
            normal(B + 1, C),
            normal(B),
            "the model output is a Tensor of shape .6, 4., but the batch has 5 examples",
        ),
        (normal(B, C), normal(B - 1), "the target is a Tensor of shape .4,., but the batch has 5 examples"),
        (object(), normal(B), "the model output is a object"),
        (normal(B, C), ["a"] * B, "the target is a list"),
    ],
)
def test_sizes_that_disagree(output: Any, target: Any, message: str) -> None:
    with pytest.raises(ScoringError, match=message):
        PerExampleLosses(nn.MSELoss())(output, target, B)


def test_several_numbers_are_refused_of_a_function() -> None:
    with pytest.raises(LossError, match=r"3 numbers, of shape \(3,\), for one example; let it return one"):
        PerExampleLosses(lambda o, t: (o - t).square()[0])(normal(B, 3), normal(B, 3), B)


def test_nest_keeps_types_and_the_original() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)])
    tree = {"a": [torch.ones(2), (1, "b")], "pair": Pair(None, torch.zeros(1)), "packed": packed}
    moved = to_device(tree, torch.device("cpu"))
    assert type(moved["pair"]) is Pair and type(moved["packed"]) is type(packed)
    assert moved["a"][1] == (1, "b") and moved["a"] is not tree["a"]
    assert len(tensors(tree)) == 2
    assert map_leaves(str, {"a": (1, None)}) == {"a": ("1", "None")}
