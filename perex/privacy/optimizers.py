"""Opacus's optimizers, and a look at what they are about to use: only what a private backward has made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from opacus.optimizers import (
    DistributedDPOptimizerFastGradientClipping,
    DPOptimizerFastGradientClipping,
    FSDPOptimizerFastGradientClipping,
)
from torch import Tensor, nn

from perex.privacy.errors import PrivacyError

NOT_PRIVATE = (
    "optimizer.step(): there was no private backward since the last step, so there is nothing to step along. Use the "
    "criterion that make_private returned, and call backward on its loss"
)


class PrivateSteps:
    """What all private optimizers do beside adding noise, which Opacus does: refuse gradients that are not private.

    Clipped sums are written to `.grad` by a private backward, which tells `wrote`. Whatever else writes there (another
    loss, a use of a parameter outside the model, clipping of the whole batch's gradient) is noticed before the step.
    """

    params: list[nn.Parameter]
    original_optimizer: Any
    _written: dict[nn.Parameter, tuple[Tensor, int]]
    noise_multiplier: float
    _ready = False
    _backwards = _most = 0  # since the last step; the most between two steps, skipped ones included
    _counted = 1
    overlapping = False
    """Whether batches are sampled anew each time, so that an example may be in several."""
    batches = 1
    """How many batches there are in an epoch."""
    scaled = False
    """Whether a `GradScaler` divides gradients in place, between the backward and the step."""

    def foreign(self) -> Iterator[nn.Parameter]:
        """The parameters that have a gradient which no private backward made."""
        written = vars(self).setdefault("_written", {})
        for parameter in self.params:
            grad = parameter.grad
            if grad is None:
                continue
            known, version = written.get(parameter, (None, -1))
            if known is grad and (grad._version == version or self.scaled and self._ready):
                continue
            if bool((grad != 0).any()):
                yield parameter

    def expect_none(self, what: str) -> None:
        """Raise if a gradient is there that was not clipped one by one."""
        found = next(self.foreign(), None)
        if found is not None:
            raise PrivacyError(
                f"{what}: a parameter of shape {tuple(found.shape)} has a gradient that no private backward made, or "
                "that was changed since. Call optimizer.zero_grad() after each step, run only the private criterion's "
                "loss backward, and leave `.grad` alone"
            )

    def wrote(self) -> None:
        """Take up that a private backward has added to `.grad`."""
        self._ready = True
        self._backwards += 1
        self.remember()

    def remember(self) -> None:
        """What is in `.grad` now is private."""
        self._written = {p: (p.grad, p.grad._version) for p in self.params if p.grad is not None}

    def pre_step(self, closure: Any = None) -> Any:
        """Check, then add noise and scale as Opacus does; whether a step is to be taken."""
        if not self._ready:
            raise PrivacyError(NOT_PRIVATE)
        self.expect_none("optimizer.step()")
        self._ready = False
        self._most, self._backwards = max(self._most, self._backwards), 0
        kept = {id(parameter) for parameter in self.params}
        for group in self.original_optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in kept:  # frozen since the backward: it gets no noise, so it takes no step
                    parameter.grad = None
        for parameter in self.params:
            if not hasattr(parameter, "summed_grad"):  # unfrozen since the optimizer was made
                parameter.summed_grad = None  # type: ignore[attr-defined]
        stepped = super().pre_step()  # type: ignore[misc]
        if stepped:
            self._most = 0
        if not stepped:  # this physical batch is in `summed_grad` now, and must not be added again
            for parameter in self.params:
                parameter.grad = None
        return stepped

    @property
    def accumulated_iterations(self) -> int:
        """How many batches a step is of: what the accountant asks, and, with one as the answer, what divides sums."""
        return self._counted

    def attach_step_hook(self, fn: Callable[[Any], None]) -> None:
        """Have a function called in each step: Opacus's, which tells the accountant."""
        super().attach_step_hook(partial(PrivateSteps.tell, fn=fn))  # type: ignore[misc]

    def tell(self, fn: Callable[[Any], None]) -> None:
        r"""Tell the accountant what a step with $k$ backwards was: one of a batch $k$ times as large.

        If batches are sampled anew each time, one example may be in all of them, and move the sum by $k C$: then the
        noise is told as $\sigma / k$. That also covers a loss that is run backward twice.
        """
        k, sigma = max(self._most, 1), self.noise_multiplier
        self._counted = min(k, self.batches)
        self.noise_multiplier = sigma / k if self.overlapping else sigma
        try:
            fn(self)
        finally:
            self.noise_multiplier, self._counted = sigma, 1

    def accumulate(self) -> None:
        """Add `.grad` to the sum of the logical batch; the first one is taken as it is, for it is not used again."""
        if hasattr(self, "grad_state"):  # shards keep their sums elsewhere
            super().accumulate()  # type: ignore[misc]
            return
        for parameter in self.params:
            summed: Tensor | None = parameter.summed_grad  # type: ignore[attr-defined]
            parameter.summed_grad = (  # type: ignore[attr-defined]
                parameter.grad if summed is None else summed.add_(parameter.grad)  # type: ignore[arg-type]
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and the sum of clipped ones unless the logical batch goes on."""
        super().zero_grad(set_to_none)  # type: ignore[misc]
        self._ready, self._backwards = False, 0
        self.remember()


class PrivateOptimizer(PrivateSteps, DPOptimizerFastGradientClipping):
    """In one process."""


class DistributedPrivateOptimizer(PrivateSteps, DistributedDPOptimizerFastGradientClipping):
    """In several, each with a copy of the parameters: one adds the noise, and gradients are summed."""


class ShardedPrivateOptimizer(PrivateSteps, FSDPOptimizerFastGradientClipping):
    """In several, each with a shard of the parameters."""
