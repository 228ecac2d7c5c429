"""Opacus's optimizers, and a look at what they are about to use: only what a private backward has made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from opacus.optimizers import (
    DistributedDPOptimizerFastGradientClipping,
    DPOptimizerFastGradientClipping,
    FSDPOptimizerFastGradientClipping,
)
from torch import Tensor, nn

from perex.capture.sharding import is_shard
from perex.privacy.errors import PrivacyError

NOT_PRIVATE = (
    "optimizer.step(): there was no private backward since the last step, so there is nothing to step along. Use the "
    "criterion that make_private returned, and call backward on its loss"
)


class Unsaved(Tensor):
    """A tensor that no pickle and no copy takes along."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """An empty tensor is kept, which any `torch.load` takes."""
        return torch.empty(0, device="cpu").__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Nothing is copied."""


class PrivateSteps:
    """What all private optimizers do beside adding noise, which Opacus does: refuse gradients that are not private.

    Clipped sums are written to `.grad` by a private backward, which tells `wrote`. Whatever else writes there (another
    loss, a use of a parameter outside the model, clipping of the whole batch's gradient) is noticed before the step: by
    the tensor's version and norm, or, where a scaler is to divide it, by a copy. Sums without noise are not left on
    parameters once they are taken up, but, unsaved, while a logical batch goes on.
    """

    original_optimizer: Any
    noise_multiplier: float
    max_grad_norm: float
    _held: dict[nn.Parameter, Tensor]  # what `.grad` is to be
    _stamps: dict[nn.Parameter, tuple[int, float]]  # of these, unless they are copies
    _sums: dict[nn.Parameter, Tensor]  # of a logical batch
    _scale: Tensor  # of `_held`
    _bounds: tuple[float, ...] = ()  # that the gradients of this step are clipped to
    _turn: nn.Parameter | None = None
    _ready = False
    _backwards = _most = 0  # since the last step; the most between two steps, skipped ones included
    _counted = 1
    overlapping = False
    """Whether batches are sampled anew each time, so that an example may be in several."""
    batches = 1
    """How many batches there are in an epoch."""
    bounded: Sequence[nn.Parameter] = ()
    """The parameters that the bounds in `max_grad_norms` are of, where each has its own; some may be frozen since."""
    scaled = False
    """Whether a `GradScaler` divides gradients in place, between the backward and the step."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._held, self._sums = {}, {}
        super().__init__(*args, **options)

    def foreign(self, expected: dict[nn.Parameter, Tensor]) -> Iterator[nn.Parameter]:
        """The parameters that have another gradient than expected, or than none."""
        found = {p: p.grad for p in self.params if p.grad is not None}
        stamps = {} if self.scaled else stamps_of(found)
        for parameter, grad in found.items():
            known = expected.get(parameter)
            if known is not None and (
                torch.equal(local(grad), local(known))
                if self.scaled
                else grad is known and stamps[parameter] == self._stamps[parameter]
            ):
                continue
            if bool((local(grad) != 0).any()):
                yield parameter

    def expect_none(self, what: str, expected: dict[nn.Parameter, Tensor] | None = None) -> None:
        """Raise if a gradient is there that was not clipped one by one."""
        found = next(self.foreign(self._held if expected is None else expected), None)
        if found is not None:
            scaler = ", other than by the scaler's `unscale_` or `step`" if self.scaled else ""
            raise PrivacyError(
                f"{what}: a parameter of shape {tuple(found.shape)} has a gradient that no private backward made, or "
                f"that was changed since{scaler}. Call optimizer.zero_grad() after each step, run only the private "
                "criterion's loss backward, and leave `.grad` alone"
            )

    def expect_whole(self) -> None:
        """Raise if a scaler would leave out the step of a part of a logical batch: later parts would be miscounted."""
        if self._step_skip_queue or self._sums:  # type: ignore[attr-defined]
            raise PrivacyError(
                "loss.backward(): a gradient is not finite with the scaler's scale, in a part of a logical batch, of "
                "which the scaler would leave out the step. Begin with a smaller GradScaler(init_scale=...), or "
                "compute in bfloat16 without a scaler"
            )

    def wrote(self, scale: Tensor) -> None:
        """Take up that a private backward has added to `.grad`, which is scaled so."""
        if not self._backwards and not self._sums:
            self._bounds = self.bounds()
        self.expect_bounds("loss.backward()")
        self._ready, self._scale = True, scale
        self._backwards += 1
        self._held = {p: p.grad.clone() if self.scaled else p.grad for p in self.params if p.grad is not None}
        self._stamps = {} if self.scaled else stamps_of(self._held)

    def bounds(self) -> tuple[float, ...]:
        """What gradients are clipped to: as a whole, and by parameter, if so."""
        return float(self.max_grad_norm), *map(float, getattr(self, "max_grad_norms", None) or ())

    def expect_bounds(self, what: str) -> None:
        """Raise if noise would be made for other bounds than gradients were clipped to."""
        whole, *each = self.bounds()
        if (whole, *each) != self._bounds:
            raise PrivacyError(
                f"{what}: `max_grad_norm` has changed since the first backward of this step, and noise would be made "
                "for another bound than gradients were clipped to. Change it, or call its scheduler's `step()`, after "
                "a step that was taken and `optimizer.zero_grad()`"
            )
        if sum(bound**2 for bound in each) ** 0.5 > whole * (1 + 1e-6):
            raise PrivacyError(
                f"{what}: the optimizer's `max_grad_norms` are more than its `max_grad_norm` together, which noise is "
                "made for: schedulers of clipping know nothing of bounds by layer. Change both"
            )

    def forget(self) -> None:
        """Let go of all that no noise was added to."""
        for parameter in self._held:
            parameter.grad = None
        self._ready, self._backwards = False, 0
        self._held, self._sums = {}, {}

    def pre_step(self, closure: Any = None) -> Any:
        """Check, then add noise and scale as Opacus does; whether a step is to be taken."""
        if not self._ready:
            raise PrivacyError(NOT_PRIVATE)
        held = self._held
        if self.scaled:
            held = {parameter: unscaled(sums, self._scale) for parameter, sums in held.items()}
        self.expect_none("optimizer.step()", held)
        self.expect_bounds("optimizer.step()")
        for parameter in self.params:
            if parameter.grad is None or parameter not in held:
                raise PrivacyError(
                    f"optimizer.step(): a parameter of shape {tuple(parameter.shape)} got no gradient from the private "
                    "backward: it was added or unfrozen after that, or cleared. Call make_private after the last "
                    "change of the model and its optimizer"
                )
        self._ready = False
        self._held = held
        del held  # so that each sum goes where it is used up
        self._most, self._backwards = max(self._most, self._backwards), 0
        kept = {id(parameter) for parameter in self.params}
        for group in self.original_optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in kept:  # frozen since the backward: it gets no noise, so it takes no step
                    parameter.grad = None
        stepped = super().pre_step()  # type: ignore[misc]
        if stepped:
            self._most = 0
        if not stepped:  # this physical batch is in the sum now, and must not be added again
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
        """Add what the backward has brought to the sum of the logical batch; the first is taken as it is."""
        for parameter in self.params:
            summed = self._sums.get(parameter)
            new = self._held[parameter]
            self._sums[parameter] = new if summed is None else summed.add_(new)
        self._held = {}
        self.show(self._sums)

    def show(self, sums: dict[nn.Parameter, Tensor]) -> None:
        """Have sums where Opacus has them, to be looked at until gradients are cleared."""
        for parameter, total in sums.items():
            if not is_shard(parameter):
                parameter.summed_grad = total.as_subclass(Unsaved)  # type: ignore[attr-defined]

    @property
    def params(self) -> list[nn.Parameter]:
        """Those that are trained; while noise is added, the one that has its turn."""
        found: list[nn.Parameter] = super().params if self._turn is None else [self._turn]  # type: ignore[misc]
        return found

    def add_noise(self) -> None:
        """Have Opacus add noise to the sums, one after the other; to long ones piece by piece, in their own memory."""
        sums, self._sums = self._sums, {}
        shards: Any = getattr(self, "grad_state", None)  # where Opacus looks for sums of sharded parameters
        for parameter in self.params:
            total = sums.pop(parameter)
            if shards is None:
                parts = pieces(total)
                for piece in parts:
                    piece.copy_(self.noisy(piece))
                parameter.grad = (total if parts else self.noisy(total.detach())).view_as(parameter)
            else:
                shards[parameter] = {"summed_grad": total}
                self.add_noise_to(parameter)
                shards.pop(parameter, None)
            parameter.summed_grad = None  # type: ignore[attr-defined]
            assert parameter.grad is not None
            self.show({parameter: parameter.grad.detach()})

    def noisy(self, total: Tensor) -> Tensor:
        """A sum with Opacus's noise."""
        turn = nn.Parameter(total, requires_grad=False)
        turn.summed_grad = total  # type: ignore[attr-defined]
        self.add_noise_to(turn)
        assert turn.grad is not None
        return turn.grad

    def add_noise_to(self, parameter: nn.Parameter) -> None:
        """Have Opacus make a parameter's gradient of its sum."""
        self._turn = parameter
        try:
            super().add_noise()  # type: ignore[misc]
        finally:
            self._turn = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and the sum of clipped ones unless the logical batch goes on."""
        if not self._is_last_step_skipped:  # type: ignore[attr-defined]
            self._sums = {}
            for parameter in self.params:
                parameter.summed_grad = None  # type: ignore[attr-defined]
        self.original_optimizer.zero_grad(set_to_none)
        self._ready, self._backwards, self._held = False, 0, {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: the model's new parameters would not be watched.

        Raises:
            PrivacyError: always.
        """
        raise PrivacyError(
            "add_param_group: only the parameters that the optimizer had when it was made private are clipped. Give it "
            "all of them before, frozen ones too, or call make_private again with the optimizer that has them"
        )


def stamps_of(grads: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, tuple[int, float]]:
    """The version and the norm of gradients; not all that changes one changes its version."""
    norms = torch._foreach_norm([local(grad.detach()) for grad in grads.values()]) if grads else ()
    kind = max((norm.dtype for norm in norms), key=lambda dtype: dtype.itemsize, default=torch.float32)
    numbers = torch.stack([norm.to(norms[0].device, kind) for norm in norms]).tolist() if norms else []
    return {p: (grad._version, number) for (p, grad), number in zip(grads.items(), numbers, strict=True)}


PIECE = 2**18
"""Numbers that get noise at once, a multiple of 16."""


def pieces(total: Tensor) -> Sequence[Tensor]:
    """Parts of a long sum, in its own memory: noise is as large again, and so is what becomes of both.

    On CPUs: torch draws normal numbers in groups of 16 there, so that they are those of the whole. There are none of
    other sums, nor of what does not lie in one piece.
    """
    if total.device.type != "cpu" or not total.is_contiguous() or total.numel() < 2 * PIECE:
        return []
    flat = total.detach().view(-1)
    ends = [*range(PIECE, len(flat) - PIECE + 1, PIECE), len(flat)]  # the last is no shorter than the others
    return [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def local(tensor: Any) -> Tensor:
    """What this process has of a tensor."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


def unscaled(tensor: Tensor, scale: Tensor) -> Tensor:
    """A copy of a gradient after what a `GradScaler` does to it, to the bit."""
    copied = tensor.clone()
    inverse = scale.double().reciprocal().float().to(copied.device)
    found = torch.zeros_like(inverse)
    torch._amp_foreach_non_finite_check_and_unscale_([local(copied)], found, inverse)
    return copied


class PrivateOptimizer(PrivateSteps, DPOptimizerFastGradientClipping):
    """In one process."""


class DistributedPrivateOptimizer(PrivateSteps, DistributedDPOptimizerFastGradientClipping):
    """In several, each with a copy of the parameters: one adds the noise, and gradients are summed."""


class ShardedPrivateOptimizer(PrivateSteps, FSDPOptimizerFastGradientClipping):
    """In several, each with a shard of the parameters."""
