"""`memory="low"`: gradients are kept where they fit in where the graph was, or else the backward runs a second time."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import no_trace
from test_clipping import assert_grads, each, losses_of, norms_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import perex
from perex.capture.saved import kept_bytes
from perex.capture.suspects import nodes
from perex.running import Running


@pytest.mark.parametrize("param_grads", [True, False])
def test_a_second_run_where_they_take_more(param_grads, monkeypatch):
    """Also after a step that took less, and before one; what `.grad` held before is added to."""
    model = nn.Sequential(nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 96)).double()
    parts, runs, again = [torch.randn(count, 96).double() for count in (3, 216, 2)], [], Running.again
    gradients = {name: torch.cat([each(model, x)[name] for x in parts]) for name, _ in model.named_parameters()}
    monkeypatch.setattr(Running, "again", lambda *args, **kwargs: (runs.append(1), again(*args, **kwargs)))
    with no_trace(model), perex.attach(model, param_grads=param_grads, memory="low") as px:
        for x in parts:
            px.backward(losses_of(model, x))
            px.clip_(0.7)
    assert len(runs) == (3 if param_grads else 1)
    assert_grads(model, gradients, dict.fromkeys(gradients, (0.7 / norms_of(gradients)).clamp(max=1)))


@pytest.mark.parametrize("forwards", [1, 2])
def test_no_second_run_where_they_take_what_the_graph_took(forwards, monkeypatch):
    """The graph is gone when the backward is over, and gradients are kept."""
    monkeypatch.setattr(Running, "again", None)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(512, 3))
    model, parts = model.double(), [torch.randn(4, 3, 12, 12).double() for _ in range(forwards)]
    gradients = {name: torch.cat([each(model, x)[name] for x in parts]) for name, _ in model.named_parameters()}
    with no_trace(model), perex.attach(model, param_grads=False, memory="low") as px:
        for _ in range(3):
            losses = torch.cat([losses_of(model, x) for x in parts])
            px.backward(losses)
            model.zero_grad()
            px.clip_(0.7)
            assert_grads(model, gradients, dict.fromkeys(gradients, (0.7 / norms_of(gradients)).clamp(max=1)))
            with pytest.raises(RuntimeError, match="second time"):
                losses.sum().backward()


@pytest.mark.parametrize("layers", ["linear", "conv", "norm", "table", "twice", "general"])
def test_what_will_be_kept_is_known_before(layers):
    """As many bytes at least, and not many more."""
    made = {
        "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(4, 7, 6)),
        "conv": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)), torch.randn(4, 3, 9, 9)),
        "norm": (lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), torch.randn(4, 7, 6)),
        "table": (lambda: nn.Sequential(nn.Embedding(50, 6), nn.Linear(6, 2)), torch.randint(50, (4, 7))),
        "twice": (lambda: nn.Sequential(*[nn.Linear(6, 6)] * 2), torch.randn(4, 7, 6)),
        "general": (lambda: nn.Sequential(nn.LSTM(6, 5, batch_first=True)), torch.randn(4, 7, 6)),
    }
    make, x = made[layers]
    model = make()
    with perex.attach(model, param_grads=False, memory="high", audit=False) as px:
        out = model(x)
        losses = (out[0] if isinstance(out, tuple) else out).sin().flatten(1).sum(1)
        expected = kept_bytes(nodes([losses.grad_fn]))
        px.backward(losses)
        px.gradients()
        shares = px._backwards.result.shares.values()
        found = sum(t.nbytes for share in shares for kept in share.kept.values() for t, _ in kept.stamps)
    assert 0 < found <= 1.01 * expected <= 3 * found


def low(model: nn.Module, losses: Callable[[], Tensor], **options: Any) -> tuple[dict[str, Tensor], bool]:
    """Clipped sums with little memory, and whether gradients were kept for them."""
    with perex.attach(model, param_grads=False, memory="low", **options) as px:
        px.backward(losses())
        kept = px._backwards.result.keep
        model.zero_grad()
        px.clip_(0.7)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept


def convolutions() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(512, 3))
    return model.double(), torch.randn(4, 3, 12, 12).double()


def once(tensors: dict[int, Tensor]) -> Any:
    """Hooks on saved tensors that bring each back once."""

    def pack(tensor: Tensor) -> int:
        tensors[len(tensors)] = tensor
        return len(tensors) - 1

    return torch.autograd.graph.saved_tensors_hooks(pack, tensors.pop)


def test_hooks_on_what_the_graph_holds_are_not_called_to_look_at_it():
    """Of the loss alone, where no tap is."""
    model, x = convolutions()
    calls: list[int] = []
    with perex.attach(model, param_grads=False, memory="low", audit=False) as px:
        for hooked in (False, True):
            out = model(x)
            hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: (calls.append(1), t)[1])
            with hooks if hooked else contextlib.nullcontext():
                losses = out.sin().exp().log().flatten(1).sum(1)
            assert px._backwards.fitting(losses, [px._backwards.latest]) == (not hooked) and not calls
            px.backward(losses)
            px.clip_(0.7)
    assert calls


def test_what_can_be_run_once_is_refused_by_name():
    model, x = convolutions()
    with perex.attach(model, param_grads=False, memory="low", audit=False) as px:
        out = model(x)
        with once({}):
            losses = out.sin().exp().log().flatten(1).sum(1)
        px.backward(losses)
        with pytest.raises(perex.UnsupportedError, match="a second time.*KeyError.*memory='high'"):
            px.clip_(0.7)


def test_a_part_of_a_large_tensor_is_no_large_graph():
    """A batch is a view of all data; and what the model has anyway, frozen or not, is not of the graph."""
    data, layers = torch.randn(20_000, 64), [layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.Tanh())]
    frozen = [nn.Linear(64, 64).requires_grad_(False) for _ in range(20)]
    for model in (nn.Sequential(*layers), nn.Sequential(*layers[:2], *frozen, *layers[2:])):
        for x in (data[:32], data[:32].clone()):
            assert not low(model, lambda model=model, x=x: losses_of(model, x))[1]


def test_kinds_are_not_remembered():
    """A batch of one of another length, or parameters that were unfrozen: each backward is looked at by itself."""
    model = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.Tanh())])
    found = []
    with perex.attach(model, param_grads=False, memory="low", audit=False) as px:
        for length in (4096, 8, 4096):
            px.backward(losses_of(model, torch.randn(1, length, 64)).sum(1))
            found.append(px._backwards.result.keep)
            px.clip_(0.7)
    assert found == [True, False, True]


def test_a_selective_checkpoint_of_frozen_layers():
    """Running it again makes nothing of perex's: such checkpoints count operators."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 2)
            self.frozen = nn.Sequential(nn.Linear(5, 5), nn.Tanh()).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h = checkpoint(self.frozen, h, use_reentrant=False, context_fn=contexts)
            return self.last(h)

    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(4, 5).double()
    plain = copy.deepcopy(model)
    for memory in ("none", "high"):
        with perex.attach(model, audit=False, memory=memory) as px:
            model.zero_grad()
            losses_of(model, x).mean().backward()
            norms = px.norms()
    plain.zero_grad()
    losses_of(plain, x).mean().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert norms.shape == (4,)


@pytest.mark.parametrize("memory", ["high", "low"])
def test_a_selective_checkpoint_in_the_loss(memory):
    """It can be run once: neither checked nor, with little memory, clipped."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE)

    def losses(out: Tensor) -> Tensor:
        found: Tensor = checkpoint(lambda h: (h.sin() * h).sum(1), out, use_reentrant=False, context_fn=contexts)
        return found

    model, x = nn.Linear(5, 3).double(), torch.randn(4, 5).double()
    with perex.attach(model, param_grads=False, memory=memory) as px:
        with pytest.raises(perex.UnsupportedError, match="selective checkpoint.*audit=False"):
            px.backward(losses(model(x)))
    with perex.attach(model, param_grads=False, memory=memory, audit=False) as px:
        px.backward(losses(model(x)))
        norms = px.norms()
        if memory == "high":
            px.clip_(0.7)
        else:
            with pytest.raises(perex.UnsupportedError, match="a second time.*memory='high'"):
                px.clip_(0.7)
    for b in range(len(x)):
        h = model(x[b : b + 1])
        alone = torch.autograd.grad((h.sin() * h).sum(), list(model.parameters()))
        torch.testing.assert_close(norms[b], torch.cat([g.flatten() for g in alone]).norm())
