"""The models of the benchmarks, with a batch for each: images and classes, or token ids and the tokens after them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


class CNN(nn.Sequential):
    """Three convolutions, each followed by ReLU and pooling, for images of 32 by 32."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for into, out in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(into, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(2048, 128), nn.ReLU(), nn.Linear(128, 10))


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.around = nn.Sequential()
        if stride != 1 or into != out:
            self.around = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (h + self.around(x)).relu()


class ResNet18(nn.Sequential):
    """ResNet-18 with a stem for small images: 3x3, and no pooling."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        width = 64
        for out in (64, 128, 256, 512):
            layers += [Block(width, out, 1 if out == 64 else 2), Block(out, out, 1)]
            width = out
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class Attention(nn.Module):
    """Causal self-attention, queries, keys and values from one projection."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """A pre-norm transformer with learned positions, a 4d GELU MLP and an untied head."""

    def __init__(self, layers: int, d: int, vocabulary: int, length: int, heads: int = 8) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, d), nn.Embedding(length, d)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(d),
                    "attention": Attention(d, heads),
                    "norm2": nn.LayerNorm(d),
                    "mlp": nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)),
                }
            )
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            h = h + block["attention"](block["norm1"](h))
            h = h + block["mlp"](block["norm2"](h))
        return self.head(self.norm(h))


def classes(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each example, `(B,)`."""
    return F.cross_entropy(output, target, reduction="none")


def next_tokens(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each example's tokens, averaged, `(B,)`."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none").reshape(target.shape).mean(1)


@dataclass
class Case:
    """A model, and how to make its batch.

    Attributes:
        name: what tables call it.
        make: makes the model.
        batch: number of examples.
        inputs: makes `(B, ...)` inputs and targets.
        loss: of each example, `(B,)`.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: int
    inputs: Callable[[int], tuple[Tensor, Tensor]]
    loss: Loss

    def build(self) -> tuple[nn.Module, Tensor, Tensor]:
        """The model in eval mode with seeded weights, and a seeded batch."""
        torch.manual_seed(0)
        return (self.make().eval(), *self.inputs(self.batch))


def images(*shape: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Makes random inputs of one shape, of 10 classes."""
    return lambda batch: (torch.randn(batch, *shape), torch.randint(10, (batch,)))


def text(vocabulary: int, length: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Makes random token ids, and those to predict."""
    return lambda batch: tuple(torch.randint(vocabulary, (2, batch, length)))  # type: ignore[return-value]


def mlp(width: int = 1024, batch: int = 256) -> Case:
    """Three linear layers on 784 pixels."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))

    return Case(f"MLP 784-{width}-{width}-10 ({batch})", make, batch, images(784), classes)


def cnn(batch: int = 64) -> Case:
    """`CNN`."""
    return Case(f"3-conv CNN ({batch})", CNN, batch, images(3, 32, 32), classes)


def resnet(batch: int = 32) -> Case:
    """`ResNet18`."""
    return Case(f"ResNet-18 ({batch})", ResNet18, batch, images(3, 32, 32), classes)


def gpt(layers: int, d: int, vocabulary: int, length: int, batch: int) -> Case:
    """`GPT`."""
    name = f"GPT {layers}L d={d} V={vocabulary} T={length} ({batch})"
    return Case(name, lambda: GPT(layers, d, vocabulary, length), batch, text(vocabulary, length), next_tokens)


class Recurrent(nn.Module):
    """An LSTM on token embeddings, and a linear layer on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.lstm, self.head = (
            nn.Embedding(2000, 128),
            nn.LSTM(128, 256, batch_first=True),
            nn.Linear(256, 10),
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.tokens(ids))[0][:, -1])


def lstm(length: int = 40, batch: int = 32) -> Case:
    """`Recurrent`."""

    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        return torch.randint(2000, (batch, length)), torch.randint(10, (batch,))

    return Case(f"LSTM 128-256 T={length} ({batch})", Recurrent, batch, inputs, classes)


def tiny() -> list[Case]:
    """Two whose steps are shorter than Python is fast."""

    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))

    def cnn() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))

    return [
        Case("MLP 16-16-16-10 (16)", mlp, 16, images(16), classes),
        Case("1-conv CNN on 8x8 (256)", cnn, 256, images(1, 8, 8), classes),
    ]


TABLE = [mlp(), cnn(), resnet(), gpt(4, 512, 8192, 256, 4), gpt(2, 256, 2000, 64, 16), gpt(2, 256, 2000, 512, 2)]
"""The six that the goals are stated for."""
