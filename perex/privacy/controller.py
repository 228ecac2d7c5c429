"""What stands between a private model, its criterion and its optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perex.attaching import attach
from perex.errors import ArgumentError
from perex.privacy.optimizers import PrivateSteps, ShardedPrivateOptimizer
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
            if hasattr(parameter, "grad_sample"):
                del parameter.grad_sample


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

    def batch_size(self) -> int:
        """Number of examples in the latest forward."""
        return self.px.batch_size

    def number(self) -> int:
        """The number of the latest forward."""
        return self.px.forwards

    def backward(self, losses: Tensor) -> None:
        """Run the backward of the examples' losses, and add their clipped gradients to `.grad`."""
        optimizer: Any = self.optimizer
        optimizer.expect_none("loss.backward()")
        scaling: float | Tensor = 1.0
        if self.grad_scaler is not None:  # the losses are scaled, which the tracker does by itself
            scaling = self.grad_scaler.scale(torch.ones((), device=losses.device))
            losses = losses / scaling
        self.px.backward(losses)
        share = scaling / optimizer.world_size if self.averages() else scaling
        bounds = getattr(optimizer, "max_grad_norms", None)
        if bounds is None:
            self.px.clip_(float(optimizer.max_grad_norm), scale=share)
        else:
            names = {id(parameter): name for name, parameter in self.module.named_parameters()}
            pairs = zip(optimizer.params, bounds, strict=True)
            self.px.clip_({names[id(p)]: float(bound) for p, bound in pairs}, by="parameter", scale=share)
        optimizer.wrote()

    def averages(self) -> bool:
        """Whether the optimizer wants a mean over processes: Opacus's for shards does, where losses are means."""
        return isinstance(self.optimizer, ShardedPrivateOptimizer) and self.loss_reduction == "mean"
