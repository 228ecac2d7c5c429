"""One parameter in several places: its gradient is a sum, and the cross terms count."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import Bare, check, scramble
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def net(function, ties: dict[str, str] | None = None, **layers: nn.Module) -> nn.Module:
    """Children `layers`, forward `function(net, *inputs)`; `ties` maps "layer.name" to another parameter."""
    model = Bare(function)
    for name, layer in layers.items():
        model.add_module(name, layer)
    scramble(model)
    for target, source in (ties or {}).items():
        path, _, name = target.rpartition(".")
        setattr(model.get_submodule(path), name, model.get_parameter(source))
    return model


def both(name_a: str = "weight", name_b: str = "weight") -> dict[str, str]:
    return {f"b.{name_b}": f"a.{name_a}"}


def sequence(m, x: Tensor) -> Tensor:
    return m.b(m.a(x).tanh())


def twice(m, x: Tensor) -> Tensor:
    return m.a(m.a(x).tanh())


def siamese(m, x: Tensor) -> Tensor:
    return m.a(x) * m.a(x.sin())


TWO_PLACES = {  # name: (model, shape of x)
    "linear, twice": (lambda: net(twice, a=nn.Linear(4, 4)), (3, 3, 4)),
    "linear, twice on 2-d input": (lambda: net(twice, a=nn.Linear(4, 4)), (3, 4)),
    "linear, five times": (lambda: net(lambda m, x: twice(m, twice(m, m.a(x))), a=nn.Linear(3, 3)), (3, 3)),
    "linear, siamese": (lambda: net(siamese, a=nn.Linear(4, 5)), (2, 3, 4)),
    "linear, two modules": (lambda: net(sequence, both(), a=nn.Linear(4, 4), b=nn.Linear(4, 4)), (3, 3, 4)),
    "linear, same input": (lambda: net(lambda m, x: m.a(x) * m.a(x).tanh(), a=nn.Linear(4, 5)), (3, 3, 4)),
    "linear, lengths differ": (
        lambda: net(lambda m, x: m.a(x).sum(1) * m.a(x[:, 0]), a=nn.Linear(4, 5)),
        (3, 3, 4),
    ),
    "linear, tied bias": (
        lambda: net(sequence, both("bias", "bias"), a=nn.Linear(4, 5), b=nn.Linear(5, 5)),
        (3, 3, 4),
    ),
    "bias used as weight": (lambda: net(lambda m, x: m.a(x) @ m.a.bias, a=nn.Linear(4, 5)), (3, 3, 4)),
    "linear and its transpose": (
        lambda: net(lambda m, x: F.linear(m.a(x).tanh(), m.a.weight.t()), a=nn.Linear(4, 5)),
        (3, 3, 4),
    ),
    "linear and F.linear": (
        lambda: net(lambda m, x: F.linear(m.a(x).tanh(), m.a.weight, m.a.bias), a=nn.Linear(4, 4)),
        (3, 3, 4),
    ),
    "linear and matmul": (lambda: net(lambda m, x: m.a(x) @ m.a.weight, a=nn.Linear(4, 5)), (3, 3, 4)),
    "linear and its norm": (
        lambda: net(lambda m, x: m.a(x) * m.a.weight.norm(), a=nn.Linear(4, 5)),
        (3, 3, 4),
    ),
    "linear and 1x1 convolution": (
        lambda: net(lambda m, x: F.conv1d(m.a(x).mT, m.a.weight[:, :, None]), a=nn.Linear(4, 4)),
        (3, 3, 4),
    ),
    "linear and Conv1D": (lambda: net(sequence, both(), a=nn.Linear(4, 4), b=Conv1D(4, 4)), (3, 3, 4)),
    "Conv1D, two modules": (lambda: net(sequence, both(), a=Conv1D(4, 4), b=Conv1D(4, 4)), (3, 3, 4)),
    "bilinear, twice": (
        lambda: net(lambda m, x: m.a(m.a(x, x).tanh(), x), a=nn.Bilinear(4, 4, 4)),
        (3, 3, 4),
    ),
    "conv2d, twice": (lambda: net(twice, a=nn.Conv2d(2, 2, 3, padding=1)), (3, 2, 4, 4)),
    "conv2d, siamese": (lambda: net(siamese, a=nn.Conv2d(2, 3, 3)), (3, 2, 4, 4)),
    "conv2d, two modules": (
        lambda: net(sequence, both(), a=nn.Conv2d(2, 2, 3), b=nn.Conv2d(2, 2, 3, padding=1)),
        (3, 2, 5, 5),
    ),
    "conv2d, other options": (
        lambda: net(
            sequence,
            both(),
            a=nn.Conv2d(2, 2, 2, stride=2),
            b=nn.Conv2d(2, 2, 2, padding="same", dilation=2, padding_mode="circular"),
        ),
        (3, 2, 8, 8),
    ),
    "conv2d, other groups": (
        lambda: net(lambda m, x: m.a(x[:, :2]) * m.b(x), both(), a=nn.Conv2d(2, 4, 3), b=nn.Conv2d(4, 4, 3, groups=2)),
        (3, 4, 5, 5),
    ),
    "conv2d and its transpose": (
        lambda: net(sequence, both(), a=nn.Conv2d(2, 3, 3), b=nn.ConvTranspose2d(3, 2, 3)),
        (3, 2, 5, 5),
    ),
    "transposed conv, twice": (lambda: net(twice, a=nn.ConvTranspose1d(2, 2, 3)), (3, 2, 4)),
    "sizes of a pyramid": (
        lambda: net(lambda m, x: m.a(x).mean((2, 3)) * m.a(x[..., ::2, ::2]).mean((2, 3)), a=nn.Conv2d(2, 3, 2)),
        (3, 2, 6, 6),
    ),
    "layer norm, twice": (lambda: net(twice, a=nn.LayerNorm(4)), (3, 3, 4)),
    "layer norm, two modules": (
        lambda: net(sequence, {"b.weight": "a.weight", "b.bias": "a.bias"}, a=nn.LayerNorm(4), b=nn.LayerNorm(4)),
        (3, 3, 4),
    ),
    "weight as the bias": (
        lambda: net(sequence, {"a.bias": "a.weight"}, a=nn.LayerNorm(4), b=nn.Tanh()),
        (3, 3, 4),
    ),
    "norms of two kinds": (
        lambda: net(sequence, both(), a=nn.GroupNorm(1, 4), b=nn.InstanceNorm1d(4, affine=True)),
        (3, 4, 4),
    ),
    "batch norm in eval mode": (lambda: net(twice, a=nn.BatchNorm1d(3)).eval(), (3, 3, 4)),
    "prelu everywhere": (
        lambda: net(lambda m, x: m.a(m.b(m.a(x))), a=nn.PReLU(), b=nn.Linear(4, 4)),
        (3, 3, 4),
    ),
    "one module under two names": (lambda: net(sequence, a=(one := nn.Linear(4, 4)), b=one), (3, 3, 4)),
    "bare parameter and layer": (
        lambda: net(lambda m, x: m.a(x) * m.a.bias + m.a.bias, a=nn.Linear(4, 5)),
        (3, 3, 4),
    ),
}


@pytest.mark.parametrize("case", TWO_PLACES)
def test_two_places(case):
    build, shape = TWO_PLACES[case]
    torch.manual_seed(1)
    check(build(), (torch.randn(shape),))


@pytest.mark.parametrize("case", ["linear, twice", "linear, two modules", "conv2d, two modules", "prelu everywhere"])
def test_two_places_on_input_that_requires_grad(case):
    build, shape = TWO_PLACES[case]
    check(build(), (torch.randn(shape).requires_grad_(),))


V, D = 5, 4


def language(m, ids: Tensor) -> Tensor:
    return m.b(m.a(ids).tanh())


TABLES = {
    "head is a module": lambda: net(language, both(), a=nn.Embedding(V, D), b=nn.Linear(D, V, bias=False)),
    "head has a bias": lambda: net(language, both(), a=nn.Embedding(V, D), b=nn.Linear(D, V)),
    "head is F.linear": lambda: net(lambda m, ids: F.linear(m.a(ids).tanh(), m.a.weight), a=nn.Embedding(V, D)),
    "head is matmul": lambda: net(lambda m, ids: m.a(ids).tanh() @ m.a.weight.t(), a=nn.Embedding(V, D)),
    "head is a part": lambda: net(lambda m, ids: F.linear(m.a(ids).tanh(), m.a.weight[:3]), a=nn.Embedding(V, D)),
    "padding": lambda: net(language, both(), a=nn.Embedding(V, D, padding_idx=1), b=nn.Linear(D, V)),
    "two embeddings": lambda: net(
        lambda m, ids: m.a(ids) * m.b(ids.flip(1)), both(), a=nn.Embedding(V, D), b=nn.Embedding(V, D)
    ),
    "two embeddings, one padded": lambda: net(
        lambda m, ids: m.a(ids) * m.b(ids.flip(1)),
        both(),
        a=nn.Embedding(V, D),
        b=nn.Embedding(V, D, padding_idx=2),
    ),
    "encoder, decoder and head": lambda: net(
        lambda m, ids: m.b(m.c(m.a(ids) + m.a(ids.roll(1, 1))).tanh() * m.a(ids[:, :1])),
        both(),
        a=nn.Embedding(V, D),
        b=nn.Linear(D, V),
        c=nn.Linear(D, D),
    ),
    "embedding and bag": lambda: net(
        lambda m, ids: m.a(ids).sum(1) * m.b(ids), both(), a=nn.Embedding(V, D), b=nn.EmbeddingBag(V, D)
    ),
    "embedding used as a mixture": lambda: net(
        lambda m, ids: (m.a(ids) @ m.a.weight.t()).softmax(-1) @ m.a.weight, a=nn.Embedding(V, D)
    ),
    "adaptive softmax": lambda: net(
        lambda m, ids: m.b.log_prob(m.a(ids).flatten(0, 1)).view(*ids.shape, V),
        a=nn.Embedding(V, D),
        b=nn.AdaptiveLogSoftmaxWithLoss(D, V, [2]),
    ),
}


@pytest.mark.parametrize("shape", [(2, 3), (3, 3), (4, 9)], ids=str)
@pytest.mark.parametrize("case", TABLES)
def test_embedding_tied_to_another_use(case, shape):
    torch.manual_seed(1)
    check(TABLES[case](), (torch.randint(V, shape),))


def test_towers_with_inputs_of_their_own():
    model = net(lambda m, x, y: F.cosine_similarity(m.a(x), m.a(y), dim=-1), a=nn.Linear(4, 5))
    check(model, (torch.randn(3, 3, 4), torch.randn(3, 3, 4)))


def test_weights_that_cancel():
    """Two uses whose gradients are opposite: the norm of the sum is zero, but for rounding."""
    model = net(lambda m, x: m.a(x) - m.a(x) + m.b(x), a=nn.Linear(4, 5), b=nn.Linear(4, 5))
    check(model, (torch.randn(3, 3, 4),), atol=1e-7)


def test_universal_transformer():
    layer = nn.TransformerEncoderLayer(4, 2, 5, 0.0, batch_first=True)
    check(net(lambda m, x: m.a(m.a(m.a(x))), a=layer), (torch.randn(3, 3, 4),))


def test_recursive_module():
    """A module that calls itself."""

    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.join = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] == 1:
                return x[:, 0]
            half = x.shape[1] // 2
            return self.join(torch.cat([self(x[:, :half]), self(x[:, half:])], -1)).tanh()

    check(scramble(Tree()), (torch.randn(3, 5, 4),))


def test_only_one_of_the_tied_names_is_selected():
    """A tied parameter has one gradient, of all its uses, whatever it is called; its first name counts."""
    model = net(language, both(), a=nn.Embedding(V, D), b=nn.Linear(D, V))
    check(model, (torch.randint(V, (3, 3)),), params=["a.weight"])
