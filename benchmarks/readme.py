"""The speed table of the README: five ways to the gradients or their norms, timed in turn, in float32.

    OMP_WAIT_POLICY=passive python benchmarks/readme.py    the table, about a minute
    python benchmarks/readme.py --quick                    a few seconds: small batches, times that mean nothing

Every round runs all five ways once, so that a busy moment of the machine hits all alike; the table has the medians
of the times and of their ratios within a round. Threads that sleep while they wait (OMP_WAIT_POLICY) make a busy
machine's times far steadier. The norms of all ways are compared with the loop's first. Below the table: what
watching a forward costs for each operator, in time on one core.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

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
        scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, float("-inf")).softmax(3) @ v
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


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 128), nn.ReLU(), nn.Linear(128, 10))


def small_cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


Job = tuple[str, nn.Module, Tensor, Tensor, int | None]  # name, model, inputs, targets, vmap's chunk size
Way = tuple[Callable[[], AbstractContextManager[Any]], Callable[[Any], Tensor | None]]  # set-up, and a step in it
PLAIN = "plain forward, backward"


def jobs(quick: bool) -> list[Job]:
    """The models. Each chunk size was the fastest for vmap of 1, 2, 4, ..., 32 and the whole batch."""
    torch.manual_seed(0)

    def data(batch: int, *shape: int) -> tuple[Tensor, Tensor]:
        batch = min(batch, 4) if quick else batch
        return torch.randn(batch, *shape), torch.randint(10, (batch,))

    ids = torch.randint(2000, (4 if quick else 16, 65))
    return [
        ("MLP 784-1024-1024-10, batch 256", mlp(784, 1024, 1024, 10), *data(256, 784), 4),
        ("CNN, 3 convolutions, batch 64 of 3x32x32", cnn(), *data(64, 3, 32, 32), 16),
        ("GPT, 2 layers, d=256, batch 16 of 64 tokens", GPT(2, 256, 2000, 64), ids[:, :-1], ids[:, 1:], None),
        ("MLP 16-16-10, batch 16", mlp(16, 16, 10), *data(16, 16), None),
        ("CNN, 1 convolution, batch 256 of 1x8x8", small_cnn(), *data(256, 1, 8, 8), None),
    ]


def losses_of(output: Tensor, y: Tensor) -> Tensor:
    """The loss of each example: (B,)."""
    losses = F.cross_entropy(output, y, reduction="none")
    return losses if losses.dim() == 1 else losses.mean(1)


def ways(model: nn.Module, x: Tensor, y: Tensor, chunk: int | None) -> dict[str, Way]:
    values = {name: p.detach() for name, p in model.named_parameters()}
    parameters = list(model.parameters())

    def plain() -> None:
        losses_of(model(x), y).mean().backward()
        model.zero_grad()

    def loop() -> Tensor:
        norms = []
        for image, label in zip(x.split(1), y.split(1), strict=True):
            gradients = torch.autograd.grad(losses_of(model(image), label).sum(), parameters)
            norms.append(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
        return torch.stack(norms)

    def loss_of_one(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return losses_of(functional_call(model, values, (x[None],)), y[None]).sum()

    def norm_of_one(x: Tensor, y: Tensor) -> Tensor:
        gradients = grad(loss_of_one)(values, x, y).values()
        return torch.stack([g.square().sum() for g in gradients]).sum().sqrt()

    def tracked(px: perex.Tracker) -> Tensor:
        px.backward(losses_of(model(x), y))
        model.zero_grad()
        return px.norms()  # type: ignore[return-value]

    return {
        PLAIN: (nullcontext, lambda _: plain()),
        "loop": (nullcontext, lambda _: loop()),
        "torch.func.vmap": (nullcontext, lambda _: vmap(norm_of_one, chunk_size=chunk)(x, y)),
        "perex, param_grads=False": (lambda: perex.attach(model, param_grads=False), tracked),
        "perex, with .grad": (lambda: perex.attach(model), tracked),
    }


def seconds(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    run()
    return clock() - start


def table(job: Job, rounds: int) -> None:
    name, model, x, y, chunk = job
    found: dict[str, Tensor | None] = {}
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for way, (setup, run) in ways(model, x, y, chunk).items():
            with setup() as context:
                found[way] = run(context)  # and everything is warm
                times.setdefault(way, []).append(seconds(lambda run=run, context=context: run(context)))
    print(f"\n{name}")
    for way, taken in times.items():
        if found[way] is not None:
            torch.testing.assert_close(found[way], found["loop"], rtol=1e-3, atol=0)
        ratio = median(t / plain for t, plain in zip(taken, times[PLAIN], strict=True))
        print(f"  {way:<26}{1000 * median(taken):9,.1f} ms{ratio:8.2f}x")


class Counter(TorchFunctionMode):
    """Counts operators."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def overhead(rounds: int) -> None:
    """What being watched adds to a forward of twelve layers, for one operator."""
    model, threads = GPT(12, 256, 2000, 64), torch.get_num_threads()
    torch.set_num_threads(1)
    print("\nA watched forward, GPT, 12 layers, d=256")
    for batch, tokens in ((1, 8), (8, 64)):
        ids = torch.randint(2000, (batch, tokens))
        with Counter() as counter:
            model(ids)

        times: dict[str, list[float]] = {"plain": [], "one": [], "all": []}
        for _ in range(rounds):
            times["plain"].append(seconds(lambda ids=ids: model(ids), time.process_time))
            for name, params in (("one", ["norm.weight"]), ("all", None)):
                with perex.attach(model, params=params, param_grads=False) as px:
                    times[name].append(seconds(lambda ids=ids: model(ids), time.process_time))
        plain, one, everything = map(median, times.values())
        each, light = (1e6 * (watched - plain) / counter.count for watched in (everything, one))
        print(
            f"  {batch} x {tokens} tokens: {1000 * plain:.1f} ms, watched {1000 * everything:.1f} ms; {counter.count} "
            f"operators, {len(px.report().rows)} with parameters\n"
            f"    {each:.0f} microseconds an operator; {light:.0f} if one parameter is tracked"
        )
    torch.set_num_threads(threads)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The speed table of the README.")
    parser.add_argument("--rounds", type=int, default=7, help="each way is timed this often")
    parser.add_argument("--quick", action="store_true", help="a few seconds, times that mean nothing")
    options = parser.parse_args(arguments)
    rounds = 1 if options.quick else options.rounds
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU cores, medians of {rounds} rounds")
    for job in jobs(options.quick):
        table(job, rounds)
    overhead(1 if options.quick else 30)


if __name__ == "__main__":
    main()
