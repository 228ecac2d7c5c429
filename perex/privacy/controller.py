"""What stands between a private model, its criterion and its optimizer."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perex.attaching import attach
from perex.capture.forward import Forward
from perex.capture.hooks import Hook
from perex.errors import ArgumentError
from perex.privacy.errors import BatchStatisticsError, PrivacyError
from perex.privacy.optimizers import PrivateSteps, ShardedPrivateOptimizer
from perex.privacy.rows import Edges, forwards_in
from perex.tracker import Tracker


class Controller:
    """Per-example norms and clipping of one model, under the names by which Opacus's parts ask for them.

    With `PrivacyEngine` there is no need to see it. It is for code that is put together from Opacus's own parts, in
    place of a `GradSampleModule`; the model stays as it is:

    - `DPLossFastGradientClipping(controller, optimizer, criterion)`, which runs two backwards and asks for
      `get_clipping_coef` in between;
    - `DPOptimizer`, which reads the gradients themselves from `p.grad_sample`, with `grad_samples=True`.

    Args:
        module: the model.
        max_grad_norm: the clip bound, C.
        loss_reduction: `"mean"` or `"sum"`, how losses are reduced before `backward`.
        batch_first: whether inputs hold the examples in their first dimension, or else in the second.
        grad_samples: whether each backward leaves `p.grad_sample`, `(B, *shape)`.
        params: which parameters are private, as in `perex.attach`.

    Example:
        >>> import torch
        >>> from opacus.optimizers import DPOptimizerFastGradientClipping
        >>> from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
        >>> from perex.privacy import Controller
        >>> model = torch.nn.Linear(3, 2)
        >>> controller = Controller(model, max_grad_norm=1.0)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = DPOptimizerFastGradientClipping(
        ...     sgd, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4)
        >>> criterion = DPLossFastGradientClipping(controller, optimizer, torch.nn.CrossEntropyLoss())
        >>> criterion(model(torch.randn(4, 3)), torch.tensor([0, 1, 1, 0])).backward()
        >>> optimizer.step()
        >>> controller.get_norm_sample().shape
        torch.Size([4])
        >>> controller.cleanup()
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        max_grad_norm: float | Sequence[float] = 1.0,
        loss_reduction: str = "mean",
        batch_first: bool = True,
        grad_samples: bool = False,
        params: Any = None,
    ) -> None:
        if loss_reduction not in ("mean", "sum"):
            raise ArgumentError(f"loss_reduction={loss_reduction!r}: it is 'mean' or 'sum'")
        self.module = module
        self.max_grad_norm = max_grad_norm
        self.loss_reduction = loss_reduction
        self.px: Tracker = attach(
            module,
            params=params,
            loss_reduction=loss_reduction,  # type: ignore[arg-type]
            batch_dim=0 if batch_first else 1,
            memory="high" if grad_samples else "none",
        )
        if grad_samples:
            self.px.after_backward(self.fill)

    def get_norm_sample(self) -> Tensor:
        """The norm of each example's gradient, `(B,)`, of the last backward that was not disabled."""
        norms = self.px.norms()
        assert isinstance(norms, Tensor)
        return norms

    def get_clipping_coef(self) -> Tensor:
        r"""$\min(1, C / \|g_b\|)$, `(B,)`."""
        assert not isinstance(self.max_grad_norm, Sequence)
        return self.max_grad_norm / self.get_norm_sample().clamp(min=self.max_grad_norm)

    def disable_hooks(self) -> None:
        """Do not look at the next backward: it runs weighted losses."""
        self.px.pause()

    def enable_hooks(self) -> None:
        """Look at backwards again."""
        self.px.resume()

    overlapping = False
    """Whether batches are sampled anew each time, so that an example may be in several."""

    def forbid_grad_accumulation(self) -> None:
        """Batches are sampled anew each time. Clipped sums of several add up; the accountant has to be told so."""
        self.overlapping = True

    def allow_grad_accumulation(self) -> None:
        """Batches share no example."""
        self.overlapping = False

    def fill(self) -> None:
        """Write each example's gradient to `p.grad_sample`, as a list where there are some already."""
        parameters = dict(self.module.named_parameters())
        for name, gradient in self.px.gradients().materialized():
            present: Any = getattr(parameters[name], "grad_sample", None)
            all_of_them: Any = gradient
            if present is not None:
                all_of_them = [*(present if isinstance(present, list) else [present]), gradient]
            parameters[name].grad_sample = all_of_them  # type: ignore[attr-defined]

    def cleanup(self) -> None:
        """Leave the model as it was."""
        self.px.detach()
        for parameter in self.module.parameters():
            for name in ("grad_sample", "summed_grad"):  # Opacus's
                vars(parameter).pop(name, None)


class PrivateBackward(Controller):
    """The controller of `PrivacyEngine`: one backward, from which clipped sums are written to `.grad`.

    Args:
        module: the model.
        grad_scaler: of the loss, if one is used.
        memory: see `PrivacyEngine`.
        loss_reduction, batch_first, params: see `Controller`.

    Attributes:
        optimizer: that takes the steps; set when it is there.
    """

    optimizer: PrivateSteps

    def __init__(
        self,
        module: nn.Module,
        *,
        loss_reduction: str,
        batch_first: bool,
        params: Any,
        grad_scaler: torch.amp.GradScaler | None = None,
        memory: Literal["high", "low"] = "high",
    ) -> None:
        self.module, self.loss_reduction, self.grad_scaler = module, loss_reduction, grad_scaler
        self.px = attach(
            module,
            params=params,
            loss_reduction="sum",
            batch_dim=0 if batch_first else 1,
            param_grads=False,
            grad_scaler=grad_scaler,
            memory=memory,
        )
        self._handles = [
            child.register_forward_pre_hook(Hook(self.entered, path), prepend=True)
            for path, child in module.named_modules()
            if child is module or keeps_statistics(child)  # the model's own keeps this controller alive, too
        ]

    def entered(self, path: str, module: nn.Module, inputs: Any) -> None:
        """Before a module's forward: refuse to put statistics of the batch into buffers."""
        if torch.is_grad_enabled() and module.training and keeps_statistics(module):
            raise BatchStatisticsError(running_statistics(path, module))

    # What losses ask for

    def batch_of(self, values: Sequence[Tensor]) -> int:
        """The number of examples in the forward that made some outputs; without one, in the latest."""
        made = [next(forwards_in([value], self.receiver()), None) for value in values if value.grad_fn is not None]
        sizes = sorted({forward.batch for forward in made if forward is not None})
        if len(sizes) > 1:
            raise PrivacyError(
                f"criterion: its arguments are of forwards of {' and '.join(map(str, sizes))} examples. In one call, "
                "they have to be of the same examples, as the two sides of a siamese network are"
            )
        return sizes[0] if sizes else self.px.batch_size

    def edges(self) -> Edges:
        """Where the examples are in the model's latest outputs, by their place in the graph."""
        return self.px._session.outputs

    def receiver(self) -> object:
        """Who hears of the model's forwards."""
        return self.px._backwards

    def latest(self) -> Forward:
        """The latest forward."""
        found = self.px._backwards.latest
        assert found is not None
        return found

    def is_scale(self, factor: Tensor) -> bool:
        """Whether a factor is what the scaler multiplies losses by."""
        return self.grad_scaler is not None and bool(factor.detach() == self.scale_of(factor.device))

    def scale_of(self, device: torch.device) -> Tensor:
        """What the scaler multiplies losses by; one without a scaler."""
        one = torch.ones((), device=device)
        found: Tensor = one if self.grad_scaler is None else self.grad_scaler.scale(one)
        return found

    # The backward

    def backward(self, losses: Tensor, forwards: frozenset[Forward], doubtful: bool) -> None:
        """Run the backward of the examples' losses, and add their clipped gradients to `.grad`.

        Args:
            losses: `(B,)`.
            forwards: that they are of; others may have come before, between and after.
            doubtful: whether examples may be mixed between the model and the losses: then that is looked at again.
        """
        optimizer: Any = self.optimizer
        optimizer.expect_none("loss.backward()")
        backwards = self.px._backwards
        backwards.pending = [weakref.ref(forward) for forward in sorted(forwards, key=lambda one: one.number)]
        if doubtful:
            backwards.audited.clear()
        self.px.backward(losses)
        scale = self.scale_of(losses.device)
        bounds = getattr(optimizer, "max_grad_norms", None)
        bad = self.px.unbounded()
        if bad is not None and self.overflowed(losses[bad], forwards):
            optimizer.expect_whole()
            for parameter in optimizer.params:  # the scaler will see it, take no step, and scale less
                parameter.grad = torch.full_like(parameter, torch.inf)
            optimizer.wrote(scale)
            return
        scaling: float | Tensor = 1.0 if self.grad_scaler is None else scale
        share = scaling / optimizer.world_size if self.averages() else scaling
        if bounds is None:
            self.px.clip_(float(optimizer.max_grad_norm), scale=share, skip=bad, careful=True)
        else:
            names = {id(parameter): name for name, parameter in self.module.named_parameters()}
            bounded = optimizer.bounded or optimizer.params
            if len(bounded) != len(bounds):
                raise PrivacyError(
                    f"the optimizer's `max_grad_norms` are {len(bounds)} bounds, and {len(bounded)} parameters are "
                    "trained: there must be one for each"
                )
            limits = {names[id(p)]: float(bound) for p, bound in zip(bounded, bounds, strict=True) if p.requires_grad}
            self.px.clip_(limits, by="parameter", scale=share, skip=bad, careful=True)
        self.px.release()  # before noise is made
        optimizer.wrote(scale)

    def overflowed(self, losses: Tensor, forwards: frozenset[Forward]) -> bool:
        """Whether the gradients of examples are not finite because of the scale of their losses.

        If not, no clipping bounds what they would do to the step, so they are to have no part in it. To raise would let
        one example decide whether training goes on, which no noise would hide.
        """
        scaled = self.grad_scaler is not None and self.grad_scaler.is_enabled()
        if scaled and any(forward.half for forward in forwards) and bool(losses.detach().isfinite().any()):
            return True
        warnings.warn(
            f"loss.backward(): the gradients of {len(losses)} examples, or their squares, are not finite. No clipping "
            "bounds these, so they have no part in the step. It is often a 0/0 in the loss of an example alone, as the "
            "mean over targets that all have a class weight of zero, an input that is not finite, or a model that has "
            "diverged",
            stacklevel=4,
        )
        return False

    def averages(self) -> bool:
        """Whether the optimizer wants a mean over processes: Opacus's for shards does, where losses are means."""
        return isinstance(self.optimizer, ShardedPrivateOptimizer) and self.loss_reduction == "mean"

    def cleanup(self) -> None:
        """Leave the model as it was; sums that no noise was added to are gone."""
        for handle in self._handles:
            handle.remove()
        optimizer = getattr(self, "optimizer", None)
        if optimizer is not None:
            optimizer.forget()
        super().cleanup()


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a module is an instance norm that keeps running statistics, in training."""
    return isinstance(module, INSTANCE_NORMS) and module.track_running_stats


def running_statistics(path: str, module: nn.Module) -> str:
    """What to say of one in training mode."""
    return (
        f"Module '{path}' is a {type(module).__name__} that keeps running statistics, which no noise is added to: "
        "create it with track_running_stats=False, or call `.eval()` on it"
    )


INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
