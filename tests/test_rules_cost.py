"""What is not made and not computed: no (batch x weight) tensor, and no weight gradient where none is wanted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import Bare
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import perex


class Watch(TorchDispatchMode):
    """Notes the size of the largest storage made, and every operator that ran, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func.overloadpacket.__name__, args))
        for t in tree_leaves(out):
            if torch.is_tensor(t) and t.layout is torch.strided:
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return out


def steps(model: nn.Module, x: Tensor, watch: Any, **options: Any) -> Any:
    """A forward, a backward and a reading under `watch`."""
    with perex.attach(model, **options) as px, watch:
        model(x).square().flatten(1).sum(1).mean().backward()
        px.norms()
    return watch


LAYERS = {
    "Linear": (nn.Linear(64, 48), (8, 64)),
    "Linear on a short sequence": (nn.Linear(64, 48), (8, 4, 64)),
    "Linear on a longer sequence": (nn.Linear(96, 96), (8, 40, 96)),
    "Linear on images": (nn.Linear(64, 64), (8, 2, 3, 64)),
    "Conv1D": (Conv1D(48, 64), (8, 4, 64)),
    "Conv1d": (nn.Conv1d(32, 32, 5), (8, 32, 8)),
    "Conv2d": (nn.Conv2d(32, 32, 3, padding=1), (8, 32, 4, 4)),
    "Conv2d, 1x1": (nn.Conv2d(64, 64, 1), (8, 64, 3, 3)),
    "Conv2d, grouped": (nn.Conv2d(64, 64, 3, groups=2), (8, 64, 4, 4)),
    "ConvTranspose2d": (nn.ConvTranspose2d(32, 32, 3), (8, 32, 3, 3)),
    "Bilinear": (nn.Bilinear(16, 16, 16), None),
    "Embedding": (nn.Embedding(1000, 16), "ids"),
    "EmbeddingBag": (nn.EmbeddingBag(1000, 16), "ids"),
}
B = 8


def built(case: str) -> tuple[nn.Module, Tensor]:
    """The layer behind something that has a parameter, where it takes floating-point input."""
    layer, shape = LAYERS[case]
    layer = copy.deepcopy(layer)
    if shape == "ids":
        return layer, torch.randint(1000, (B, 4))
    if shape is None:
        model = Bare(lambda m, x: m.layer(x, x.flip(1)))
        model.layer = layer
        return model, torch.randn(B, 2, 16)
    return nn.Sequential(nn.PReLU(), layer), torch.randn(shape)


@pytest.mark.parametrize("param_grads", [True, False])
@pytest.mark.parametrize("case", LAYERS)
def test_no_tensor_of_batch_times_weight(case, param_grads):
    model, x = built(case)
    size = max(p.numel() for p in model.parameters())
    watch = steps(model, x, Watch(), param_grads=param_grads)
    assert watch.largest < B * size, f"{watch.largest} elements, where {B} gradients have {B * size}"


@pytest.mark.parametrize("param_grads", [True, False])
def test_no_tensor_of_batch_times_weight_for_tied_weights(param_grads):
    model = Bare(lambda m, ids: F.linear(m.a(ids).tanh(), m.a.weight))
    model.a = nn.Embedding(500, 48)
    watch = steps(model, torch.randint(500, (B, 4)), Watch(), param_grads=param_grads)
    assert watch.largest < B * 500 * 48


def test_the_watch_sees_such_a_tensor():
    layer, x = nn.Linear(64, 48), torch.randn(B, 64)
    with Watch() as watch:
        torch.einsum("bo,bi->boi", layer(x), x)
    assert watch.largest >= B * 64 * 48


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def test_statistics_alone_cost_no_weight_gradients():
    """2-d input: forward and input gradients are all the products there are."""
    model, x = mlp(), torch.randn(16, 32)
    forward = FlopCounterMode(display=False)
    with forward:
        model(x)
    plain = FlopCounterMode(display=False)
    with plain:
        model(x).square().sum(1).mean().backward()
    first = 2 * 16 * 32 * 64
    weights = forward.get_total_flops()
    assert plain.get_total_flops() == 3 * weights - first  # no gradient of the input
    counted = steps(model, x, FlopCounterMode(display=False), param_grads=False)
    assert counted.get_total_flops() <= 1.05 * (plain.get_total_flops() - weights)


@pytest.mark.parametrize("case", ["Conv1d", "Conv2d", "Conv2d, 1x1", "Conv2d, grouped", "ConvTranspose2d"])
def test_no_weight_gradient_of_a_convolution(case):
    """Torch's own backward is asked for the input's gradient only; for one example at a time it may be asked."""
    model, x = built(case)
    for param_grads in (True, False):
        watch = steps(model, x, Watch(), param_grads=param_grads)
        asked = [args[-1][1] for name, args in watch.calls if name == "convolution_backward" and len(args[0]) == B]
        assert any(asked) == param_grads


@pytest.mark.parametrize("case", LAYERS)
def test_nothing_of_the_weights_size_is_written_to(case):
    """With statistics only, `.grad` stays None, or the tensor that it was."""
    model, x = built(case)
    steps(model, x, Watch(), param_grads=False)
    assert all(p.grad is None for p in model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    kept = [p.grad for p in model.parameters()]
    steps(model, x, Watch(), param_grads=False)
    assert all(p.grad is k and bool((k == 1).all()) for p, k in zip(model.parameters(), kept, strict=True))


@pytest.mark.parametrize("params, depth", [(["4.*"], 0), (["2.*", "4.*"], 1), (["0.bias"], 2), (None, 2)])
def test_the_backward_stops_at_the_first_layer_that_is_selected(params, depth):
    watch = steps(mlp(), torch.randn(16, 32), Watch(), params=params, param_grads=False)
    assert [name for name, _ in watch.calls].count("tanh_backward") == depth
