"""The speed table of the README: five ways to the gradients or their norms, timed in turn, in float32.

    python benchmarks/readme.py                   the table, a few minutes
    python benchmarks/readme.py --rounds 1        one round of each

Every round runs all five ways once, so that a busy moment of the machine hits all alike; the table has medians.
The norms of all ways are compared with the loop's first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import perex


class Block(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, 2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """GPT-2 in small: learned positions, an embedding tied to the output layer, logits (B, V, T)."""

    def __init__(self, layers: int, d: int, vocabulary: int, length: int, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, d), nn.Embedding(length, d)
        self.blocks = nn.Sequential(*(Block(d, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 128), nn.ReLU(), nn.Linear(128, 10))


Job = tuple[str, nn.Module, Tensor, Tensor]  # name, model, inputs and targets


def jobs() -> list[Job]:
    torch.manual_seed(0)
    ids = torch.randint(2000, (16, 65))
    return [
        ("MLP 784-1024-1024-10, batch 256", mlp(), torch.randn(256, 784), torch.randint(10, (256,))),
        ("3-conv CNN, 32x32, batch 64", cnn(), torch.randn(64, 3, 32, 32), torch.randint(10, (64,))),
        ("2-layer GPT, d=256, 16 x 64 tokens", GPT(2, 256, 2000, 64), ids[:, :-1], ids[:, 1:]),
    ]


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss of each example: (B,)."""
    losses = F.cross_entropy(model(x), y, reduction="none")
    return losses if losses.dim() == 1 else losses.mean(1)


def ways(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor | None]]:
    values = {name: p.detach() for name, p in model.named_parameters()}
    parameters = list(model.parameters())
    scoring, training = perex.attach, perex.attach

    def plain() -> None:
        losses_of(model, x, y).mean().backward()
        model.zero_grad()

    def loop() -> Tensor:
        norms = []
        for i in range(len(x)):
            gradients = torch.autograd.grad(losses_of(model, x[i : i + 1], y[i : i + 1]).sum(), parameters)
            norms.append(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
        return torch.stack(norms)

    def loss_of_one(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(functional_call(model, values, (x[None],)), y[None])
        return losses

    of_each = vmap(grad(loss_of_one), in_dims=(None, 0, 0))

    def mapped() -> Tensor:
        gradients = of_each(values, x, y).values()
        return torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()

    def attached(param_grads: bool) -> Tensor:
        with perex.attach(model, param_grads=param_grads) as px:
            px.backward(losses_of(model, x, y))
            norms = px.norms()
        model.zero_grad()
        return norms

    return {
        "plain backward, no norms": plain,
        "loop": loop,
        "torch.func.vmap": mapped,
        "perex, param_grads=False": lambda: attached(False),
        "perex, with .grad too": lambda: attached(True),
    }


def medians(runs: dict[str, Callable[[], Tensor | None]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The speed table of the README.")
    parser.add_argument("--rounds", type=int, default=9, help="each way is timed this often")
    rounds = parser.parse_args(arguments).rounds
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU cores; median of {rounds} rounds, in milliseconds")
    for name, model, x, y in jobs():
        runs = ways(model, x, y)
        found = {way: run() for way, run in runs.items()}  # warms up, too
        for way, norms in found.items():
            if norms is not None:
                torch.testing.assert_close(norms, found["loop"], rtol=1e-3, atol=0, msg=lambda m, way=way: f"{way}: {m}")
        times = medians(runs, rounds)
        print(f"\n{name}")
        for way, taken in times.items():
            print(f"  {way:<26}{1000 * taken:9.1f}{taken / times['plain backward, no norms']:8.2f}x")


if __name__ == "__main__":
    main()
