"""One architecture, trained privately: is the clipped sum the loop's, and how far does one example move it?"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from inputs import BATCH, Inputs
from judge import TOTAL, Loss, Norms, spelled_out, tracked
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

STEPS = 2  # the first is checked, those after it are not


def output(out: Any, path: str) -> Tensor:
    """What a model returned at one of `judge.outputs`' paths, and nothing else of it."""
    for name, number in re.findall(r"\.([^.\[]+)|\[(\d+)\]", path):
        out = out[name] if name else out[int(number)]
    assert isinstance(out, Tensor)
    return out


class Criterion(nn.Module):
    """The projection of outputs that is each example's loss, with its row of the weights for a target."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss, self.reduction = loss, "sum"

    def forward(self, out: Any, index: Tensor) -> Tensor:
        weights = self.loss.weights.items()
        losses = sum((w.pieces(output(out, path), len(index)) * w.values[index]).sum(1) for path, w in weights)
        assert isinstance(losses, Tensor)
        return losses if self.reduction == "none" else losses.sum()


@spelled_out()
def by_loop(model: nn.Module, inputs: Inputs, loss: Loss, bound: float) -> list[list[Tensor]]:
    """Each example's gradient, by parameter, clipped."""
    parameters, clipped = list(tracked(model).values()), []
    for index in range(BATCH):
        value = loss.one(model(**inputs.one(index)), loss.rows(index))
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        norm = math.sqrt(sum(float(g.square().sum()) for g in found if g is not None))
        clipped.append(
            [
                torch.zeros_like(p) if g is None else g * min(1.0, bound / norm)
                for p, g in zip(parameters, found, strict=True)
            ]
        )
    return clipped


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    """Between two gradients of all parameters."""
    return math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(left, right, strict=True)))


def by_private(model: nn.Module, inputs: Inputs, loss: Loss, norms: Norms) -> dict[str, Any]:
    """Steps of the private engine without noise, clipped at the median norm: of the batch, then without each example.

    Returns:
        The clipped sums' largest distance from the loop's, and how far one example moves them, in clip bounds.
    """
    from perex.privacy import PrivacyEngine

    bound = float(sum(norms.values()).sqrt().median())
    clipped = by_loop(model, inputs, loss, bound)
    parameters = list(tracked(model).values())
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, criterion, _ = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(parameters, lr=0.0),
        criterion=Criterion(loss),
        data_loader=DataLoader(TensorDataset(torch.zeros(10 * BATCH)), batch_size=BATCH),
        noise_multiplier=0.0,
        max_grad_norm=bound,
        loss_reduction="sum",
        poisson_sampling=False,
    )

    def summed(examples: list[int]) -> list[Tensor]:
        optimizer.zero_grad()
        criterion(model(**inputs.some(examples)), torch.tensor(examples)).backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        optimizer.step()
        return found

    everyone = list(range(BATCH))
    try:
        sums = [(examples, summed(examples)) for examples in [everyone] * STEPS]
        sums += [(examples, summed(examples)) for i in everyone for examples in [everyone[:i] + everyone[i + 1 :]]]
    finally:
        engine.detach(model)
    error = max(
        distance(found, [sum(rows) for rows in zip(*(clipped[i] for i in examples), strict=True)])  # type: ignore[misc]
        for examples, found in sums
    )
    moved = max(distance(sums[0][1], found) for _, found in sums[STEPS:]) / bound
    good = error / bound <= TOTAL and moved <= 1 + TOTAL
    return {"status": "exact" if good else "wrong", "error": error / bound, "moved": moved}
