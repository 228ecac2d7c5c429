"""The gradient noise scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perex.errors import ArgumentError, NotReadyError
from perex.factors import Total
from perex.quantities.base import By, Quantity, added_up, grouped

if TYPE_CHECKING:
    from perex.tracker import Tracker


class NoiseScale(Quantity):
    r"""$\mathcal{B} = \mathrm{tr}\,\Sigma / \|\bar g\|^2$: the batch size at which noise and signal are equal.

    $\Sigma$ is the covariance of the examples' gradients and $\bar g$ their true mean. A batch of $B$ with mean
    $\hat g$ gives unbiased estimates of both:

    $S = \frac{B}{B - 1} \left( \frac1B \sum_b \|g_b\|^2 - \|\hat g\|^2 \right)$ of $\mathrm{tr}\,\Sigma$, and
    $N = \frac{1}{B - 1} \left( B \|\hat g\|^2 - \frac1B \sum_b \|g_b\|^2 \right)$ of $\|\bar g\|^2$.

    Their ratio is biased and noisy, so each has a moving average of its own, and the ratio is of these. Call `update`
    once after each backward. Weight gradients are computed for $\hat g$, also with `param_grads=False`.

    Args:
        decay: of the moving averages, in `[0, 1)`: about the latest 1 / (1 - decay) steps count. They are corrected
            for their start at zero, as Adam's are.

    Example:
        >>> import torch, perex
        >>> model, noise = torch.nn.Linear(5, 1), perex.NoiseScale(decay=0.9)
        >>> with perex.attach(model, noise, param_grads=False) as px:
        ...     for _ in range(20):
        ...         x = torch.randn(64, 5)
        ...         px.backward((model(x).squeeze(1) - x.sum(1)).square())
        ...         noise.update(px)
        >>> 0 < noise.value() < 64, sorted(noise.value(by="parameter"))
        (True, ['bias', 'weight'])

    References:
        McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, appendix A.1, with a small batch of one.
    """

    degree = 0

    def __init__(self, decay: float = 0.95) -> None:
        if not 0 <= decay < 1:
            raise ArgumentError(f"decay={decay!r}: it is at least 0 and less than 1")
        self.decay = decay
        self.averages: dict[str, Tensor] = {}
        """By parameter, moving averages of S and N, `(2,)`, not yet corrected; of those in the last backward."""
        self.weights: dict[str, float] = {}
        """What the weights in each of them add up to by now."""

    def reduce(self, name: str, gradient: Total) -> Tensor:
        r"""See `Quantity.reduce`: `(1, 3)`, of $\sum_b \|G_b\|^2$, $\|\sum_b G_b\|^2$ and B."""
        squares = gradient.squared_norm().double()
        total = gradient.weighted_sum(squares.new_ones(gradient.batch))
        length = torch.linalg.vector_norm(total).square().to(squares)
        return torch.stack((squares.sum(), length, squares.new_tensor(gradient.batch))).unsqueeze(0)

    def update(self, px: Tracker, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Take up the last backward; where several processes run, that of each.

        Args:
            px: the tracker that this quantity was given to.
            group: the processes whose estimates are averaged; None for all, where `torch.distributed` runs.

        Raises:
            ArgumentError: the batch is of one example, which tells nothing of noise.
            NotReadyError: there was no backward since the last forward.
        """
        found = px.read(self, by="parameter")
        names = list(found)
        squares, length, batch = torch.stack([found[name].to(found[names[0]]) for name in names]).unbind(2)  # (P, F)
        if bool((batch < 2).any()):
            raise ArgumentError("NoiseScale: a batch of one example tells nothing of noise; it takes two at least")
        scale = px.scale if not isinstance(px.scale, Tensor) else px.scale.to(squares)
        mean, signal = scale**2 * squares / batch, scale**2 * length / batch**2
        estimates = torch.stack(((mean - signal) * batch / (batch - 1), (batch * signal - mean) / (batch - 1)), 1).mean(
            2
        )  # (P, 2)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(estimates, group=group)
            estimates /= torch.distributed.get_world_size(group)
        new, before = 1 - self.decay, (self.averages, self.weights)
        self.averages, self.weights = {}, {}
        for name, estimate in zip(names, estimates, strict=True):
            average, weight = before[0].get(name, torch.zeros_like(estimate)), before[1].get(name, 0.0)
            self.averages[name] = self.decay * average + new * estimate
            self.weights[name] = self.decay * weight + new

    def columns(self, px: Tracker) -> dict[str, Tensor]:
        """See `Quantity.columns`: it has none, but takes up each batch of two or more: its value is the pool's."""
        if px.batch_size > 1:
            self.update(px)
        return {}

    def __repr__(self) -> str:
        return f"NoiseScale({self.value():.3g})" if self.averages else "NoiseScale(before its first update)"

    def parts(self, by: By | None = None) -> Any:
        r"""The moving averages of numerator and denominator, $(\mathrm{tr}\,\Sigma, \|\bar g\|^2)$.

        Args:
            by: None for all tracked parameters together, `"parameter"` or `"module"` for each.

        Returns:
            A pair of numbers, or a dict of them. The second may be negative, where there is more noise than signal.

        Raises:
            NotReadyError: `update` was never called.
        """
        if not self.averages:
            raise NotReadyError("NoiseScale: there is nothing to read before update(px) has been called")

        def pair(values: Mapping[str, Tensor]) -> tuple[float, float]:
            noise, signal = added_up(values.values()).tolist()
            return noise, signal

        corrected = {name: average / self.weights[name] for name, average in self.averages.items()}
        return grouped(corrected, by, pair)

    def value(self, by: By | None = None) -> Any:
        r"""$\mathrm{tr}\,\Sigma / \|\bar g\|^2$, of the moving averages.

        Args:
            by: None for all tracked parameters together, `"parameter"` or `"module"` for each.

        Returns:
            A number of examples, or a dict of them; infinite where no signal is seen, that is where the estimate of
            $\|\bar g\|^2$ is not positive.
        """
        found = self.parts(by)
        if isinstance(found, dict):
            return {name: ratio(*pair) for name, pair in found.items()}
        return ratio(*found)


def ratio(noise: float, signal: float) -> float:
    """Noise over signal."""
    return noise / signal if signal > 0 else math.inf
