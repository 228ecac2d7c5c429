"""Ways around the clip bound that were found by trying: each is refused, or right after all."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from test_privacy import B, C, Of, clipped_sum, detach, ids, private, real, simple, sum_by_perex
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

import perex
from perex.kernels import blocks
from perex.privacy import PrivacyError
from perex.privacy.optimizers import Unsaved


def grads(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# Two forwards


def test_sums_over_two_forwards_are_refused_in_every_order():
    model, x, criterion, y = simple()
    model, optimizer, loss_of, _ = private(model, criterion)
    first, second = model(x), model(x + 1)
    for one, other in ((first, second), (second, first)):
        with pytest.raises(PrivacyError, match="losses of two forwards do not add up"):
            loss_of(one, y) + loss_of(other, y)
    with pytest.raises(PrivacyError, match="forwards of 2 and 5 examples"):
        loss_of((first, model(x[:2])), y)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("between", [0, 3])
def test_two_forwards_run_backward_one_by_one(between):
    """Also with another forward, of another size, before the criterion is called."""
    model, x, criterion, y = simple()
    expected = clipped_sum(lambda: copy.deepcopy(model), criterion, x, y)
    model, optimizer, loss_of, _ = private(model, criterion)
    outs = [model(x[:3]), model(x[3:])]
    if between:
        model(x[:between])
    for out, targets in zip(outs, (y[:3], y[3:]), strict=True):
        loss_of(out, targets).backward()
    torch.testing.assert_close(grads(model), expected)


def test_a_siamese_network_and_a_sum_with_its_sides():
    def pair(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().sum()

    def both(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        a, b = m(x), m(x + 1)
        return pair(a, b) + pair(a, y)

    model, x, y = nn.Linear(4, 3).double(), real(B, 4), real(B, 3)
    expected: Any = 0
    for b in range(B):
        found = torch.autograd.grad(both(model, x[b : b + 1], y[b : b + 1]), list(model.parameters()))
        vector = torch.cat([g.flatten() for g in found])
        expected = expected + vector * min(1.0, C / float(vector.norm()))
    model, optimizer, loss_of, _ = private(model, pair)
    a, b = model(x), model(x + 1)
    (loss_of(a, b) + loss_of(a, y)).backward()
    torch.testing.assert_close(grads(model), expected)


@pytest.mark.parametrize("case", ["alone", "after another batch", "after another backward", "before another forward"])
def test_examples_that_mix_between_the_model_and_the_criterion(case):
    """It is looked at in every batch, unless what was done with the outputs tells."""
    model, x, criterion, y = simple()
    model, optimizer, loss_of, _ = private(model, criterion)
    first = model(x)
    if case == "after another batch":
        loss_of(first, y).backward()
    out = model(x + 1)
    if case == "before another forward":
        model(x)
    if case in ("after another backward", "before another forward"):
        loss_of(first, y).backward()
    with pytest.raises(perex.ExamplesMixError):
        loss_of(out - out.mean(0), y).backward()


@pytest.mark.parametrize(
    "function",
    [
        lambda out: out.unsqueeze(1)[:, 0].log_softmax(-1),
        lambda out: out.softmax(1) + out.tanh() * 2,
        lambda out: torch.stack([out, out * 2], 1).mean(1),
        lambda out: out[:, :2].sum(1, keepdim=True).expand(-1, 3),
    ],
)
def test_outputs_that_are_worked_on_row_by_row(function):
    model, x, criterion, y = simple()
    expected = clipped_sum(lambda: copy.deepcopy(model), lambda out, y: criterion(function(out), y), x, y)
    model, optimizer, loss_of, _ = private(model, criterion)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(function(model(x)), y).backward()
        torch.testing.assert_close(grads(model), expected)


# A scaler


def penalty(model: nn.Module) -> None:
    model[0].weight.square().sum().backward()


MEDDLERS: dict[str, Callable[[nn.Module], Any]] = {
    "backward": penalty,
    "add_": lambda model: model[0].weight.grad.add_(1.0),
    "data": lambda model: model[0].weight.grad.data.mul_(3.0),
    "clip": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
}


@pytest.mark.parametrize("how", MEDDLERS)
@pytest.mark.parametrize("when", ["scaled", "unscaled", "without a scaler"])
def test_gradients_that_are_changed_before_the_step(how, when):
    model, x, criterion, y = simple()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=when != "without a scaler")
    engine = {"grad_scaler": scaler} if when != "without a scaler" else {}
    model, optimizer, loss_of, _ = private(model, criterion, engine=engine)
    scaler.scale(loss_of(model(x), y)).backward()
    if when == "unscaled":
        scaler.unscale_(optimizer)
    MEDDLERS[how](model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PrivacyError, match="changed since"):
        scaler.step(optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_that_nobody_unscaled():
    model, x, criterion, y = simple()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model, optimizer, loss_of, _ = private(model, criterion, engine={"grad_scaler": scaler})
    scaler.scale(loss_of(model(x), y)).backward()
    with pytest.raises(PrivacyError, match="changed since, other than by the scaler"):
        optimizer.step()
    scaler.unscale_(optimizer)
    with pytest.raises(PrivacyError, match="changed since"):
        loss_of(model(x), y).backward()  # would add a scaled sum to one that is not


def test_a_scaler_s_own_steps():
    """By hand or not, for a loss that was scaled or not, with two backwards; the sum is the loop's."""
    for by_hand in (False, True):
        model, x, criterion, y = simple()
        expected = clipped_sum(lambda: copy.deepcopy(model), criterion, x, y)  # noqa: B023
        scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
        model, optimizer, loss_of, _ = private(model, criterion, engine={"grad_scaler": scaler})
        loss_of(model(x[:2]), y[:2]).backward()
        scaler.scale(loss_of(model(x[2:]), y[2:])).backward()
        if by_hand:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(sum_by_perex(model, optimizer), expected)


def test_a_scaler_leaves_out_a_step_and_scales_less():
    """Even if one example's loss is no number, whatever the scale is."""
    model = Of(lambda m, x: m.b(m.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    x, y = real(B, 4).float(), ids(B, high=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    model, optimizer, loss_of, _ = private(model, nn.CrossEntropyLoss(), engine={"grad_scaler": scaler})
    before, steps, spoilt = model.b.weight.detach().clone(), 0, x.clone()
    spoilt[0] = torch.nan

    def backward(x: Tensor) -> None:
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model(x), y)
        scaler.scale(loss).backward()

    while torch.equal(model.b.weight, before):
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            backward(spoilt)
        scaler.step(optimizer)
        scaler.update()
        steps += 1
    assert 5 < steps < 30 and model.b.weight.isfinite().all()
    optimizer.signal_skip_step(True)  # of a memory manager, which counts steps
    scaler.update(2.0**30)
    with pytest.raises(PrivacyError, match="part of a logical batch"):
        optimizer.zero_grad()
        backward(x)


# What is left behind


def test_nothing_without_noise_stays_on_the_model():
    model, x, criterion, y = simple()
    model, optimizer, loss_of, _ = private(model, criterion)

    def tensors_on_parameters() -> list[Tensor]:
        found = [v for p in model.parameters() for v in vars(p).values() if isinstance(v, Tensor) and v.numel()]
        return [v for v in found if not isinstance(v, Unsaved)]

    with BatchMemoryManager(
        data_loader=DataLoader(TensorDataset(x, y), batch_size=B), max_physical_batch_size=2, optimizer=optimizer
    ) as physical:
        for part, targets in physical:
            loss_of(model(part), targets).backward()
            optimizer.step()
            assert not tensors_on_parameters()
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    again = torch.load(saved, weights_only=False)
    assert not any(isinstance(v, Tensor) and v.numel() for p in again.parameters() for v in vars(p).values())
    assert copy.deepcopy(next(model.parameters()).summed_grad) is None
    optimizer.zero_grad()
    loss_of(model(x), y).backward()
    detach(model)  # between the backward and the step
    assert all(p.grad is None and not vars(p) for p in model.parameters())


def test_models_are_let_go():
    known = []
    for _ in range(3):
        model, x, criterion, y = simple()
        model, optimizer, loss_of, _ = private(model, criterion)
        loss_of(model(x), y).backward()
        known.append(weakref.ref(model))
        del optimizer, loss_of
        gc.collect()
        detach(model)  # which finds what watches it
        known.append(weakref.ref(private(model, criterion)[0]))
        del model
    gc.collect()
    assert not any(ref() is not None for ref in known)


def test_parameters_that_came_later():
    model, x, criterion, y = simple()
    model, optimizer, loss_of, _ = private(model, criterion)
    extra = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(PrivacyError, match="add_param_group"):
        optimizer.add_param_group({"params": [extra]})
    optimizer.original_optimizer.add_param_group({"params": [extra]})
    loss_of(model(x), y).backward()
    with pytest.raises(PrivacyError, match="got no gradient from the private backward"):
        optimizer.step()


# Examples whose gradient is not finite


@pytest.mark.parametrize("memory", ["auto", "low"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_an_example_without_a_finite_gradient_has_no_part_in_the_step(clipping, memory):
    """So whether it is there moves the sum by nothing, and decides nothing else."""
    model, x, _, _ = simple()
    y = torch.arange(B) % 3
    criterion = nn.CrossEntropyLoss(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    bound = C if clipping == "flat" else [C] * 4
    model, optimizer, loss_of, _ = private(model, criterion, bound=bound, clipping=clipping, memory=memory)
    with pytest.warns(UserWarning, match="gradients of 2 examples, or their squares, are not finite"):
        loss_of(model(x), y).backward()
    found = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    optimizer.zero_grad()
    model.load_state_dict(simple()[0].state_dict())
    finite = y != 0
    loss_of(model(x[finite]), y[finite]).backward()
    for one, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)


def test_nobody_with_a_finite_gradient():
    model, x, criterion, y = simple()
    model, optimizer, loss_of, _ = private(model, criterion)
    with pytest.warns(UserWarning, match=f"gradients of {B} examples"):
        loss_of(model(x * torch.inf), y).backward()
    assert not any(p.grad.any() for p in model.parameters())
    optimizer.step()


@pytest.mark.parametrize("memory", ["high", "low"])
def test_without_half_precision_no_scale_is_to_blame(memory):
    """A distance of zero has an infinite gradient at any scale: it is left out, and the scaler sees nothing."""
    model, x = nn.Linear(5, 3), torch.randn(8, 5)
    target = model(x).detach() + 1
    target[0] = model(x[:1]).detach()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def distance(out: Tensor, y: Tensor) -> Tensor:
        return (out - y).square().sum().sqrt()

    engine = {"grad_scaler": scaler, "memory": memory}
    model, optimizer, loss_of, _ = private(model, distance, engine=engine)
    with pytest.warns(UserWarning, match="gradients of 1 examples"):
        scaler.scale(loss_of(model(x), target)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0


class Twice(nn.Module):
    """An embedding, or layers, of which one example's terms may cancel."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = nn.Embedding(7, 64) if kind == "embedding" else nn.Linear(64, 64, bias=kind == "bias")
        self.layer = parametrizations.weight_norm(self.layer) if kind == "derived" else self.layer

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        if self.kind == "embedding":
            return self.layer(x[..., 0].long() % 7) * factor[..., None]
        if self.kind == "reused":
            return torch.stack([self.layer(x[:, 0]), self.layer(x[:, 1])], 1)
        return self.layer(x)


@pytest.mark.parametrize("memory", ["high", "low"])
@pytest.mark.parametrize("kind", ["plain", "bias", "embedding", "reused", "derived"])
@pytest.mark.parametrize("large", [1e6, 1e10])
def test_rounding_of_one_example_does_not_move_the_sum(kind, memory, large, monkeypatch):
    """Its two positions cancel: its own gradient is nearly nothing, and its terms are large."""
    count = 32
    if kind == "derived":
        monkeypatch.setattr(blocks, "BLOCK", 1)  # every parameter is a large one
    x, factor = torch.randn(count, 2, 64), torch.ones(count, 2)
    if kind == "embedding":
        x[-1], factor[-1] = 3.0, torch.tensor([large, -large])
    else:
        x[-1, 0] = large * torch.randn(64)
        x[-1, 1] = -x[-1, 0]
    model = Twice(kind)
    model, optimizer, loss_of, _ = private(model, lambda out, y: (out * y).sum(), bound=1.0, engine={"memory": memory})
    sums = []
    for rows in (slice(None), slice(0, -1)):
        optimizer.zero_grad()
        loss_of(model(x[rows], factor[rows]), torch.ones(count, 2, 64)[rows]).backward()
        sums.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))
    assert float((sums[0] - sums[1]).norm()) <= 1.001


@pytest.mark.parametrize("memory", ["high", "low"])
def test_whether_a_gradient_is_finite_is_a_matter_of_its_own(memory):
    """Sums of squares overflow in some ways to a norm and not in others, and batches of other sizes take others."""
    layers = nn.Conv2d(64, 64, 5, padding=2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3)
    model, x = nn.Sequential(*layers), torch.randn(4, 64, 8, 8)
    x[-1] = 1e20
    y = torch.arange(4) % 3
    model, optimizer, loss_of, _ = private(model, nn.CrossEntropyLoss(), bound=1.0, engine={"memory": memory})
    sums = []
    for rows in ([0, 1, 2, 3], [0, 1, 2], [3], [0, 3]):
        optimizer.zero_grad()
        loss_of(model(x[rows]), y[rows]).backward()
        sums.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))
    whole, without, alone, pair = sums
    torch.testing.assert_close(whole - without, alone, rtol=1e-3, atol=1e-4)
    assert float(alone.norm()) == pytest.approx(1.0, rel=1e-3) and float(pair.norm()) < 2


def test_a_target_too_large_to_be_weighted():
    """Its loss times a weight overflows in the check of losses, which says nothing of other examples."""
    model, x, y = nn.Linear(5, 64), torch.randn(32, 5), torch.randn(32, 64)
    y[-1] = 1e30 * torch.randn(64).sign()
    model, _, loss_of, _ = private(model, nn.MSELoss(), bound=1.0)
    loss_of(model(x), y).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_saved_parameters_load_by_default():
    model, x, criterion, y = simple()
    model, optimizer, loss_of, _ = private(model, criterion)
    loss_of(model(x), y).backward()
    optimizer.step()
    saved = io.BytesIO()
    torch.save(list(model.parameters()), saved)
    saved.seek(0)
    assert [p.shape for p in torch.load(saved)] == [p.shape for p in model.parameters()]


def test_bounds_and_types_that_bound_nothing():
    for bound in (float("inf"), float("nan"), 0.0):
        with pytest.raises(perex.PerexError, match="a clip bound is a positive number"):
            private(nn.Linear(4, 3), nn.CrossEntropyLoss(), bound=bound)
    with pytest.raises(PrivacyError, match=r"is in torch\.bfloat16"):
        private(nn.Linear(4, 3).bfloat16(), nn.CrossEntropyLoss())


# Batches of one and none

OUTPUTS: dict[str, tuple[Callable[[Any, Tensor], Any], Callable[..., Tensor], bool]] = {
    "numbers": (lambda m, x: m.a(x).sum(1), nn.MSELoss(), False),
    "targets first": (lambda m, x: m.a(x).sum(1), lambda y, out: F.mse_loss(out, y), True),
    "inputs handed on": (lambda m, x: (x, m.a(x)), lambda out, y: F.mse_loss(out[1], out[0][:, :3]), False),
    "two": (lambda m, x: (m.a(x), m.a(x).float()), lambda out, y: out[0].sum() + out[1].sum().double(), False),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_empty_batches_of_outputs_of_all_kinds(case):
    function, criterion, first = OUTPUTS[case]
    model, x, y = Of(function, a=nn.Linear(4, 3)).double(), real(B, 4), real(B)
    model, optimizer, loss_of, _ = private(model, criterion)
    for size in (0, B, 0):
        optimizer.zero_grad()
        out = model(x[:size])
        loss = loss_of(y[:size], out) if first else loss_of(out, y[:size])
        loss.backward()
        before = model.a.weight.detach().clone()
        optimizer.step()
        assert torch.equal(model.a.weight, before) == (size == 0)


def test_a_batch_of_one_beside_an_input_with_more_rows():
    model = Of(lambda m, x, others: m.a(x) @ m.a(others).T, a=nn.Linear(4, 3)).double()
    model, optimizer, loss_of, _ = private(model, nn.CrossEntropyLoss())
    out = model(real(1, 4), real(6, 4))
    with pytest.raises(perex.PerexError):
        loss_of(out, ids(1, high=6)).backward()
    assert model.a.weight.grad is None


# What is done with a loss


@pytest.mark.parametrize(
    "change",
    [
        lambda loss, out: loss * 7 / loss.detach(),
        lambda loss, out: loss / torch.tensor(3.0),
        lambda loss, out: torch.tensor(2.0) * loss,
        lambda loss, out: loss.mul_(torch.tensor(2.0)),
        lambda loss, out: torch.amp.GradScaler("cpu").scale(loss),  # of which the engine knows nothing
    ],
)
def test_tensors_as_factors(change):
    model, x, criterion, y = simple()
    model, optimizer, loss_of, _ = private(model, criterion)
    out = model(x)
    with pytest.raises(PrivacyError, match="multiplied or divided by a tensor"):
        change(loss_of(out, y), out)


def test_a_loss_is_scaled_once_and_all_of_it():
    model, x, criterion, y = simple()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model, optimizer, loss_of, _ = private(model, criterion, engine={"grad_scaler": scaler})
    out = model(x)
    scaled = scaler.scale(loss_of(out, y))
    assert scaled.item() == pytest.approx(8 * loss_of(out, y).item())
    with pytest.raises(PrivacyError, match="by a tensor"):
        scaler.scale(scaled)
    with pytest.raises(PrivacyError, match="scale their sum"):
        scaled + loss_of(out, y)


def test_losses_that_are_changed_in_place():
    model, x, criterion, y = simple()
    model, optimizer, loss_of, _ = private(model, criterion, bound=1e9)
    loss_of(model(x), y).backward()
    once = grads(model).clone()
    optimizer.zero_grad()
    loss = loss_of(model(x), y)
    value = loss.item()
    loss.mul_(0.5)
    loss *= 6
    loss /= 2
    loss += 1.0
    loss -= loss_of(model(x), y).detach()
    assert loss.item() == pytest.approx(0.5 * value + 1)
    loss.backward()
    torch.testing.assert_close(grads(model), 1.5 * once)
    optimizer.zero_grad()
    loss = loss_of(model(x), y)
    for change in (lambda: loss.add_(model[0].weight.square().sum()), lambda: loss.clamp_(0, 1), lambda: loss.zero_()):
        with pytest.raises(PrivacyError):
            change()
    running = torch.zeros((), dtype=torch.float64)
    running += loss
    assert running.item() == loss.item()


@pytest.mark.parametrize(
    "function",
    [
        lambda loss: loss.mean(),
        lambda loss: loss.clone(),
        lambda loss: loss.float(),
        lambda loss: 2 / loss,
        lambda loss: torch.add(loss, loss, alpha=2),
        lambda loss: torch.stack([loss, loss]).sum(),
        lambda loss: loss.exp() * 2,
    ],
)
def test_numbers_that_are_no_losses_any_more(function):
    model, x, criterion, y = simple()
    model, optimizer, loss_of, _ = private(model, criterion)
    loss = loss_of(model(x), y)
    number = function(loss)
    with pytest.raises(PrivacyError, match="examples' losses behind it are gone"):
        number.backward()
    with pytest.raises(PrivacyError, match="made of a private loss"):
        loss + number
    assert isinstance(copy.deepcopy(number), Tensor) and f"{number:.3f}" and "Number" not in repr(number)
    assert type(loss.detach()) is Tensor and type(loss.detach() * 2) is Tensor


# Statistics


def test_instance_norm_that_begins_to_keep_statistics():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.InstanceNorm1d(3, track_running_stats=True)).double().eval()
    model, optimizer, loss_of, _ = private(model, nn.MSELoss())
    before = model[1].running_mean.clone()
    model.train()
    with pytest.raises(perex.ExamplesMixError, match="Module '1' is a InstanceNorm1d that keeps running statistics"):
        model(real(B, 2, 6))
    assert torch.equal(model[1].running_mean, before)
    model[1].eval()
    loss_of(model(real(B, 2, 6)), real(B, 3, 4)).backward()
    detach(model)
    assert not model[1]._forward_pre_hooks and not model._forward_pre_hooks


# Rows


def test_selected_rows():
    """Five rows of one example and one of another would be split in half."""
    model, x, y = nn.Linear(4, 3).double(), real(4, 5, 4), ids(4, 5, high=3)
    model, optimizer, loss_of, _ = private(model, nn.CrossEntropyLoss())
    for counts in ([3, 3, 3, 3], [1, 5, 3, 3]):
        mask = torch.arange(5)[None] < torch.tensor(counts)[:, None]
        with pytest.raises(PrivacyError, match=r"shape \(12, 3\), made by IndexBackward0"):
            loss_of(model(x)[mask], y[mask])
    boxes = real(8, 3)  # of no graph, and as many as two for each
    with pytest.raises(PrivacyError, match=r"shape \(8, 3\) has not one row"):
        private(model, lambda out, y: (out.mean(1) - y).sum())[2](model(x), boxes)


@pytest.mark.parametrize(
    "flatten",
    [
        lambda out, y: (out.view(-1, 3), y.view(-1)),
        lambda out, y: (out.flatten(0, 1).float().double().log_softmax(1), y.flatten()),
        lambda out, y: (out[:, 1:].reshape(-1, 3), y[:, 1:].reshape(-1)),
        lambda out, y: (out[:, :-1].contiguous().view(-1, 3), y[:, 1:].contiguous().view(-1)),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_flattened_rows(flatten, inside):
    x, y = real(B, 6, 4), ids(B, 6, high=3)
    linear = nn.Linear(4, 3).double()
    expected: Any = 0
    for b in range(B):
        loss = F.cross_entropy(*flatten(linear(x[b : b + 1]), y[b : b + 1]))
        vector = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(linear.parameters()))])
        expected = expected + vector * min(1.0, C / float(vector.norm()))
    model = Of(lambda m, x: flatten(m.a(x), y)[0] if inside else m.a(x), a=linear)
    model, optimizer, loss_of, _ = private(model, nn.CrossEntropyLoss())
    out = model(x)
    loss_of(*((out, flatten(torch.zeros(B, 6, 3), y)[1]) if inside else flatten(out, y))).backward()
    torch.testing.assert_close(grads(model), expected)


def test_an_output_of_another_order_is_refused_when_it_is_used():
    """The states of two layers, of a batch of two."""
    model = Of(lambda m, x: (m.head(m.lstm(x)[0][:, -1]), m.lstm(x)[1]), head=nn.Linear(3, 2),
               lstm=nn.LSTM(4, 3, 2, batch_first=True)).double()  # fmt: skip
    x, y = real(2, 5, 4), ids(2, high=2)
    model, optimizer, loss_of, _ = private(model, lambda out, y: F.cross_entropy(out[0], y))
    loss_of(model(x), y).backward()
    optimizer.step()
    model, optimizer, loss_of, _ = private(model, lambda out, y: out[1][0].sum())
    with pytest.raises(PrivacyError, match=r"shape \(2, 2, 3\)"):
        loss_of(model(x), y)


def test_vectors_that_may_be_shared():
    """As many features as examples: a weight of each may be of either. Where a batch has told, it is known."""

    def weighted(out: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return ((out - y).square() * w).sum()

    model, x, y = nn.Linear(4, B).double(), real(B, 4), real(B, B)
    model, optimizer, loss_of, _ = private(model, weighted)
    with pytest.raises(PrivacyError, match="may be one number for each of the 5 examples"):
        loss_of(model(x), y, real(B))
    with pytest.raises(perex.PerexError, match=r"shape \(5,\), which has no row for each example; the criterion may"):
        loss_of(model(x[:3]), y[:3], real(B))
    loss_of(model(x[:3]), y[:3], real(3)).backward()
    loss_of(model(x), y, real(B)).backward()
    optimizer.step()


@pytest.mark.parametrize(
    "mixing",
    [lambda out: out / out.sum(1), lambda out: out * out.mean(1), lambda out: out.view(2, 8).softmax(1).view(4, 4)],
)
def test_rows_that_meet_others_columns(mixing):
    """As many columns as examples: a number for each row would be for each column. In any batch."""
    model, criterion = nn.Linear(3, 4).double(), nn.CrossEntropyLoss()
    x, y = real(4, 3), ids(4, high=4)
    model, optimizer, loss_of, _ = private(model, criterion)
    loss_of(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(perex.ExamplesMixError):
        loss_of(mixing(model(x)), y).backward()


def test_examples_that_mix_between_two_forwards():
    """In a later batch than the first."""
    model, criterion = nn.Linear(3, 3).double(), nn.MSELoss()
    x, y = real(4, 3), real(4, 3)
    model, optimizer, loss_of, _ = private(model, criterion)
    loss_of(model(model(x).cumsum(1)), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(perex.ExamplesMixError):
        loss_of(model(model(x).cumsum(0)), y).backward()


@pytest.mark.parametrize("memory", ["high", "low"])
@pytest.mark.parametrize("size", [1e7, 1e10])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv1d(8, 64, 1),
        lambda: nn.ConvTranspose1d(8, 8, 1),
    ],
)
def test_convolutions_whose_positions_cancel(layer, size, memory):
    """A short gradient of long terms: these must not leave their rounding in the sum."""
    torch.manual_seed(0)
    model = Of(lambda m, x: m.conv(x) - m.conv(x).mean(2, keepdim=True), conv=layer())
    x = torch.randn(6, 8, 32)
    x[-1] = size * (1 + 1e-3 * torch.randn(8, 1)).expand(8, 32)
    y = torch.randn(6, *model(x[:1]).shape[1:])
    sums = []
    for several in (x, x[:-1]):
        private_model, optimizer, loss_of, _ = private(copy.deepcopy(model), nn.MSELoss(), memory=memory)
        loss_of(private_model(torch.randn(6, 8, 32)), y).backward()  # an ordinary batch, which is checked
        optimizer.zero_grad()
        loss_of(private_model(several), y[: len(several)]).backward()
        sums.append(grads(private_model))
    assert float((sums[0] - sums[1]).norm()) <= C * (1 + 1e-3)


@pytest.mark.parametrize("make", [list, tuple, lambda t: torch.tensor(t).numpy()])
def test_lists_of_a_number_for_each_example(make):
    """Each example would be given all of them."""

    def longest(out: Tensor, y: Tensor, lengths: Any) -> Tensor:
        return (out - y).square().mean() * max(lengths)

    model, x, y = nn.Linear(4, 3).double(), real(B, 4), real(B, 3)
    model, optimizer, loss_of, _ = private(model, longest)
    with pytest.raises(PrivacyError, match=f"of {B} numbers, as many as there are examples"):
        loss_of(model(x), y, make([1.0] * B))
    loss_of(model(x[:3]), y[:3], make([1.0] * B)).backward()  # shared, then
    loss_of(model(x), y, make([1.0] * B)).backward()


def test_bounds_that_change_within_a_step():
    model, x, criterion, y = simple()
    model, optimizer, loss_of, _ = private(model, criterion)
    loss_of(model(x), y).backward()
    optimizer.max_grad_norm = C / 2
    with pytest.raises(PrivacyError, match="`max_grad_norm` has changed since the first backward of this step"):
        optimizer.step()
    optimizer.zero_grad()
    loss_of(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.max_grad_norms = [C] * len(optimizer.params)  # as schedulers leave bounds by layer
    with pytest.raises(PrivacyError, match="schedulers of clipping know nothing of bounds by layer"):
        loss_of(model(x), y).backward()


def test_complex_parameters_are_refused():
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(model.weight.detach().to(torch.cdouble))
    with pytest.raises(PrivacyError, match="complex"):
        private(model, nn.MSELoss())
