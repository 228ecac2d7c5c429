"""Private training in one backward a step: Opacus's engine, with perex for the examples' gradients."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import opacus
import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader

from perex.capture.checks import refuse_batch_statistics
from perex.errors import ArgumentError, ExamplesMixError
from perex.privacy.controller import PrivateBackward, keeps_statistics, running_statistics
from perex.privacy.errors import BatchStatisticsError, PrivacyError
from perex.privacy.loss import PrivateCriterion
from perex.privacy.optimizers import DistributedPrivateOptimizer, PrivateOptimizer, ShardedPrivateOptimizer

_private: weakref.WeakKeyDictionary[nn.Module, weakref.ref[PrivateBackward]] = weakref.WeakKeyDictionary()
"""What watches each model that was made private; the model's hooks keep it alive."""


class PrivacyEngine(opacus.PrivacyEngine):
    r"""Train with differential privacy: `opacus.PrivacyEngine`, for any model and in one backward a step.

    Each example's gradient is clipped to the bound C, the clipped ones are added up, Gaussian noise of standard
    deviation C times `noise_multiplier` is added, and the accountant says what has been spent. Clipping is perex's;
    sampling, noise, optimizers, accountants, `BatchMemoryManager` and checkpoints are Opacus's. `make_private` and
    `make_private_with_epsilon` take Opacus's arguments and always return `(model, optimizer, criterion, data_loader)`.
    The model is the one that was given, neither wrapped nor copied. The loss of an example is what the criterion
    returns on that example alone.

    What would break the guarantee is refused: batch statistics, steps without a private backward, gradients from
    anywhere else.

    Args:
        accountant: `"prv"`, `"rdp"` or `"gdp"`; see Opacus.
        secure_mode: noise from a cryptographic generator, which needs torchcsprng; see Opacus.
        grad_scaler: the scaler of the loss, if one is used: `scaler.scale(loss).backward()`. Clipping is of the
            gradients before scaling, and noise is added after `scaler.step` has undone it.
        memory: `"high"` keeps layers' inputs and output gradients from the backward to the clipping; `"low"` runs the
            backward twice instead, where they would not fit in where the graph was.

    Example:
        >>> import torch, warnings
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from perex.privacy import PrivacyEngine
        >>> data = TensorDataset(torch.randn(64, 5), torch.randint(3, (64,)))
        >>> model = torch.nn.Linear(5, 3)
        >>> with warnings.catch_warnings(action="ignore"):  # Opacus warns that its generator is not for production
        ...     engine = PrivacyEngine(accountant="rdp")
        >>> model, optimizer, criterion, loader = engine.make_private(
        ...     module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=DataLoader(data, 8),
        ...     criterion=torch.nn.CrossEntropyLoss(), noise_multiplier=1.0, max_grad_norm=1.0)
        >>> for x, y in loader:
        ...     optimizer.zero_grad()
        ...     criterion(model(x), y).backward()
        ...     optimizer.step()
        >>> round(engine.get_epsilon(delta=1e-3), 1)
        2.4

    References:
        Abadi et al., "Deep Learning with Differential Privacy", 2016; Yousefpour et al., "Opacus", 2021.
    """

    def __init__(
        self,
        *,
        accountant: str = "prv",
        secure_mode: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        memory: Literal["high", "low"] = "high",
    ) -> None:
        if memory not in ("high", "low"):
            raise ArgumentError(f"memory={memory!r}: it is 'high' or 'low'")
        super().__init__(accountant=accountant, secure_mode=secure_mode)
        self.grad_scaler = grad_scaler
        self.memory = memory

    def make_private(self, *, module: nn.Module, optimizer: optim.Optimizer, **options: Any) -> Any:
        """Make a model, its optimizer, criterion and loader private.

        Args:
            module: the model, also in `DistributedDataParallel`, Opacus's own, or `fully_shard`.
            optimizer: any, over the model's parameters; those that it has are private.
            options: as in `opacus.PrivacyEngine.make_private`: `criterion`, `data_loader`, `noise_multiplier`,
                `max_grad_norm`, `batch_first`, `loss_reduction`, `poisson_sampling`, `clipping` (`"flat"`, or
                `"per_layer"` with a bound for each parameter), `noise_generator`, `rand_on_empty`. `grad_sample_mode`
                and `wrap_model` are taken and mean nothing here.

        Returns:
            `(model, optimizer, criterion, data_loader)`.

        Raises:
            BatchStatisticsError: a module normalises by statistics of the batch, or keeps some.
            PrivacyError: an argument asks for what is not private.
        """
        options.pop("wrap_model", None)
        options["grad_sample_mode"] = "ghost"  # the mode in which Opacus prepares a criterion, and adds noise to .grad
        self._owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        controller, private, criterion, loader = super().make_private(module=module, optimizer=optimizer, **options)
        controller.optimizer = private
        private.overlapping, private.batches = controller.overlapping, max(len(loader), 1)
        private.zero_grad()
        return module, private, criterion, loader

    def make_private_with_epsilon(self, **options: Any) -> Any:
        """`make_private`, with the noise that a privacy budget asks for.

        Args:
            options: as in `opacus.PrivacyEngine.make_private_with_epsilon`: `target_epsilon`, `target_delta`, `epochs`
                in place of `noise_multiplier`.

        Returns:
            `(model, optimizer, criterion, data_loader)`.
        """
        return super().make_private_with_epsilon(**options)

    def detach(self, module: nn.Module) -> None:
        """Leave a model as it was; its optimizer and criterion are of no use then."""
        known = _private.pop(module, None)
        controller = None if known is None else known()
        if controller is not None:
            controller.cleanup()

    def validate(
        self, *, module: nn.Module, optimizer: optim.Optimizer | None = None, data_loader: DataLoader[Any] | None = None
    ) -> None:
        """Refuse modules in which a batch's statistics reach its outputs, or the model's buffers."""
        for path, child in module.named_modules():
            try:
                refuse_batch_statistics(path, child)
            except ExamplesMixError as error:
                raise BatchStatisticsError(str(error)) from None
            if keeps_statistics(child) and child.training:
                raise BatchStatisticsError(running_statistics(path, child))

    def is_compatible(
        self, *, module: nn.Module, optimizer: optim.Optimizer | None = None, data_loader: DataLoader[Any] | None = None
    ) -> bool:
        """Whether `validate` has nothing against a model."""
        try:
            self.validate(module=module)
        except BatchStatisticsError:
            return False
        return True

    # What Opacus asks for on the way

    def _prepare_model(
        self, module: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean", **options: Any
    ) -> PrivateBackward:
        self.validate(module=module)
        self.detach(module)
        # by name: what a sharded module holds is another tensor while it runs
        names = {name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in self._owned}
        controller = PrivateBackward(
            module,
            loss_reduction=loss_reduction,
            batch_first=batch_first,
            params=lambda name, parameter: name in names,
            grad_scaler=self.grad_scaler,
            memory=self.memory,
        )
        _private[module] = weakref.ref(controller)
        return controller

    def _prepare_optimizer(
        self,
        *,
        optimizer: optim.Optimizer,
        max_grad_norm: float | Sequence[float],
        clipping: str = "flat",
        distributed: bool = False,
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "ghost",
        **options: Any,
    ) -> DPOptimizer:
        if isinstance(optimizer, DPOptimizer):
            optimizer = optimizer.original_optimizer
        if clipping not in ("flat", "per_layer"):
            raise PrivacyError(f"clipping={clipping!r}: it is 'flat' or 'per_layer' here")
        bounds = list(max_grad_norm) if isinstance(max_grad_norm, Sequence) else None
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if (bounds is None) != (clipping == "flat") or bounds is not None and len(bounds) != len(trained):
            raise ArgumentError(
                "max_grad_norm: a number where clipping is 'flat', and where it is 'per_layer' a list of one for each "
                f"of the {len(trained)} parameters that are trained"
            )
        given: list[Any] = [max_grad_norm] if bounds is None else list(bounds)
        if not all(0 < float(bound) < math.inf for bound in given):
            raise ArgumentError(f"max_grad_norm={max_grad_norm!r}: a clip bound is a positive number")
        half = next((p for p in trained if p.dtype.itemsize < 4), None)
        if half is not None:
            raise PrivacyError(
                f"a parameter of shape {tuple(half.shape)} is in {half.dtype}: rounding a sum of clipped gradients to "
                "that moves it by more than one example's bound. Keep trained parameters in float32, and use "
                "torch.autocast to compute in half precision"
            )
        if any(p.is_complex() for p in trained):
            raise PrivacyError(
                "a trained parameter is complex, and Opacus's noise for it has half the variance in each real number. "
                "Train its real and imaginary parts as two parameters (torch.complex)"
            )
        total = max_grad_norm if bounds is None else float(torch.tensor(bounds, device="cpu").norm())
        sharded = any(type(p.data).__name__ == "DTensor" for p in trained)
        kind = ShardedPrivateOptimizer if sharded else DistributedPrivateOptimizer if distributed else PrivateOptimizer
        private = kind(
            optimizer=optimizer,
            max_grad_norm=total,
            generator=self.secure_rng if self.secure_mode else noise_generator,
            secure_mode=self.secure_mode,
            **options,
        )
        private.scaled = self.grad_scaler is not None and self.grad_scaler.is_enabled()
        if bounds is not None:
            private.max_grad_norms, private.bounded = bounds, trained
        return private

    def _prepare_criterion(
        self,
        *,
        module: PrivateBackward,
        criterion: Callable[..., Tensor],
        loss_reduction: str = "mean",
        **options: Any,
    ) -> PrivateCriterion:
        return PrivateCriterion(criterion, loss_reduction, module)
