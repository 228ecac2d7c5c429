"""The private steps that are timed, from `zero_grad` to the optimizer's step; and the clipped loop they follow."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from models import Case
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from ways import Step, Unsupported, kept_in_eval

BOUND = 0.1


class Loss(nn.Module):
    """The losses of a case as Opacus wants a criterion: it has a `reduction`, which may be changed."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.reduction = case, "mean"

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean of the examples' losses, or `(B,)`."""
        losses = self.case.loss(output, target)
        return losses.mean() if self.reduction == "mean" else losses


def sgd(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """A plain step with SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        case.loss(model(x), y).mean().backward()
        optimizer.step()

    return step


def made(engine: Any, case: Case, model: nn.Module, x: Tensor, **options: Any) -> Any:
    """What an engine makes of a case; the noise is switched on after the first step, which is compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
            criterion=Loss(case),
            data_loader=DataLoader(TensorDataset(torch.zeros(10 * len(x), 1)), len(x)),
            noise_multiplier=0.0,
            max_grad_norm=BOUND,
            poisson_sampling=False,
            **options,
        )


def stepping(model: Any, optimizer: Any, criterion: Any, x: Tensor, y: Tensor) -> Step:
    """One step after the other; the first, without noise, returns what makes of the clipped sum one vector.

    Only where that is called: two more copies of all parameters would count as memory of the step.
    """

    def step() -> Callable[[], Tensor] | None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        if optimizer.noise_multiplier:
            return None
        optimizer.noise_multiplier = 1.0
        grads = [p.grad for p in optimizer.params]
        return lambda: torch.cat([grad.flatten() for grad in grads]) * len(x)

    return step


def perex(case: Case, model: nn.Module, x: Tensor, y: Tensor, memory: Literal["high", "low"] = "high") -> Step:
    """perex's engine."""
    from perex.privacy import PrivacyEngine

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, optimizer, criterion, _ = made(PrivacyEngine(accountant="rdp", memory=memory), case, model, x)
    return stepping(model, optimizer, criterion, x, y)


def perex_low(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """perex's engine, with a second backward in place of kept gradients."""
    return perex(case, model, x, y, memory="low")


def opacus(mode: str) -> Callable[..., Step]:
    """Opacus's engine in one of its modes."""

    def way(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Step:
        from opacus import PrivacyEngine

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine = PrivacyEngine(accountant="rdp")
        if any(isinstance(module, nn.modules.batchnorm._NormBase) for module in model.modules()):
            raise Unsupported("Opacus has no batch norm, in eval mode neither")
        model, optimizer, *rest = made(engine, case, model.train(), x, grad_sample_mode=mode)
        kept_in_eval(model)
        return stepping(model, optimizer, rest[0] if mode == "ghost" else Loss(case), x, y)

    return way


PRIVATE: dict[str, Callable[..., Step]] = {
    "plain": sgd,
    "perex": perex,
    "perex, low": perex_low,
    "Opacus, hooks": opacus("hooks"),
    "Opacus, ghost": opacus("ghost"),
}
"""By the names of columns; `plain` is a step with SGD."""


def clipped(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loop's sum of clipped gradients in float64, in one vector."""
    model = copy.deepcopy(model).double()
    x = x.double() if x.is_floating_point() else x
    total: Any = 0
    for b in range(len(x)):
        loss = case.loss(model(x[b : b + 1]), y[b : b + 1]).sum()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        total = total + gradient * (BOUND / gradient.norm()).clamp(max=1)
    return total
