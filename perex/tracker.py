"""The handle a user holds: attach, run forward and backward as usual, read."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from perex.backward import Backwards
from perex.capture.parameters import Entry, Selection
from perex.capture.session import Session
from perex.errors import ArgumentError, AttachError, LossError, NotReadyError, PerexError
from perex.kernels.strategies import Preferences, known_strategies, preferring
from perex.quantities import Quantity, SquaredNorms
from perex.report import Report, rows_of, shared_of
from perex.result import Result

By = Literal["parameter", "module"]


def attach(
    model: nn.Module,
    *quantities: Quantity,
    params: Selection = None,
    loss_reduction: Literal["mean", "sum"] = "mean",
    batch_dim: int = 0,
    param_grads: bool = True,
    forwards: Literal["same", "further"] | None = None,
    audit: bool = True,
    grad_scaler: torch.amp.GradScaler | None = None,
    strategies: str | Sequence[str] = (),
    autotune: bool = False,
) -> Tracker:
    r"""Attach perex to a model, to read per-example gradient norms after a backward.

    For a batch with losses $\ell_b$, it gives $\|\partial \ell_b / \partial \theta\|$ for every example $b$, of
    each parameter and of all together, exactly and without a backward for each example.

    Args:
        model: any module. Its code runs unchanged; its `state_dict` and outputs stay as they are.
        quantities: further statistics to reduce gradients to; see `Tracker.read`.
        params: which parameters to track: None for all that require grad, names or globs such as
            `["layer4.*", "fc.weight"]`, or a function of `(name, parameter)`.
        loss_reduction: how the loss that is run backward comes from the examples' losses: `"mean"` or `"sum"`.
        batch_dim: the dimension of the model's inputs that holds the examples.
        param_grads: whether `.grad` is computed too. With False it is left alone, and weight gradients are
            never computed: the fastest way when only statistics are wanted. (torch may then choose other kernels,
            as it does for frozen weights, so outputs agree to rounding; with True they are the same to the bit.)
        forwards: what several forwards before one backward hold: the `"same"` examples, as the two sides of
            a siamese network, or `"further"` ones. None refuses what it cannot know.
        audit: whether `px.backward(losses)` checks the first batch, and each whose inputs have new shapes, for
            examples that influence each other: a few of them are run again alone and compared; each loss may depend
            on its own example's outputs only; and a backward with other weights on the losses, which comes first and
            runs gradient hooks too, has to bring gradients in proportion.
        grad_scaler: the scaler of the loss that is run backward, as in `scaler.scale(loss).backward()`: norms are then
            of the loss before scaling. `px.backward(losses)` scales by itself.
        strategies: ways to the norms to take wherever they apply, the first one first, in place of the cheapest: of
            linear layers `"direct"`, `"Gram"`; of convolutions `"call per example"`, `"grouped calls"`, `"unfolded"`,
            `"pixel Gram"`; on GPUs, with Triton, also `"Triton direct"`, `"Triton Gram"` and, of embeddings,
            `"Triton segments"`. `px.report()` shows what was taken.
        autotune: whether to measure the ways that apply, once for each shape, and take the fastest, rather than the
            one that counting operations and bytes says is. The first steps are slower for that.

    Returns:
        A `Tracker`, which is also a context manager that detaches on exit.

    Raises:
        AttachError: the model is scripted, compiled, `DataParallel` or attached already; an argument is wrong.

    Example:
        >>> import torch, perex
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> x = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 5.0]])
        >>> with perex.attach(model) as px:
        ...     model(x).mean().backward()
        >>> px.norms()
        tensor([3., 5.])
    """
    if loss_reduction not in ("mean", "sum"):
        raise AttachError(f"loss_reduction={loss_reduction!r}: it is 'mean' or 'sum'")
    if forwards not in (None, "same", "further"):
        raise AttachError(f"forwards={forwards!r}: it is None, 'same' or 'further'")
    if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
        raise AttachError(f"batch_dim={batch_dim!r}: it is a dimension of the inputs, counted from 0")
    if grad_scaler is not None and not callable(getattr(grad_scaler, "scale", None)):
        raise AttachError(f"grad_scaler: expected a torch.amp.GradScaler, got {type(grad_scaler).__name__}")
    for quantity in quantities:
        if not isinstance(quantity, Quantity):
            raise AttachError(f"{quantity!r} is no perex.Quantity; parameters are chosen with `params=`")
    names = (strategies,) if isinstance(strategies, str) else tuple(strategies)
    for name in names:
        if name not in known_strategies():
            raise AttachError(f"strategies: {name!r} is none of {', '.join(sorted(known_strategies()))}")
    preferences = Preferences(names, autotune)
    return Tracker(
        model, quantities, params, loss_reduction, batch_dim, param_grads, forwards, audit, grad_scaler, preferences
    )


class Tracker:
    """What `attach` returns. See there for the arguments."""

    def __init__(
        self,
        model: nn.Module,
        quantities: Sequence[Quantity],
        params: Selection,
        loss_reduction: Literal["mean", "sum"],
        batch_dim: int,
        param_grads: bool,
        forwards: Literal["same", "further"] | None,
        audit: bool,
        grad_scaler: torch.amp.GradScaler | None,
        preferences: Preferences,
    ) -> None:
        self._quantities: list[Quantity] = [SquaredNorms(), *quantities]
        self._mean = loss_reduction == "mean"
        self._relation = forwards
        self._backwards = Backwards(self._quantities, param_grads, audit, grad_scaler, preferences)
        self._session = Session(model, params, param_grads, batch_dim, self._backwards, audit)
        self._backwards.session = self._session

    # The contract

    def __repr__(self) -> str:
        names = [entry.name for entry in self._session.parameters if entry.tracked]
        state = "detached" if self._session.closed else f"attached; {len(names)} parameters tracked"
        return f"Tracker({state})"

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Leave the model as it was found. Results stay readable; calling it again does nothing."""
        self._session.close()

    @property
    def batch_size(self) -> int:
        """Number of examples in the latest forward.

        Raises:
            NotReadyError: there was no forward yet.
        """
        if self._backwards.latest is None:
            raise NotReadyError("batch_size: the model has not been called since perex was attached")
        return self._backwards.latest.batch

    def backward(self, losses: Tensor) -> None:
        r"""Run the backward of per-example losses, so that no reduction has to be guessed.

        It is the backward of the losses' mean or sum, as `loss_reduction` says; norms are of each loss alone.

        Args:
            losses: `(B,)`, the loss of each example. With several forwards before it, their number tells
                whether these hold the same examples or further ones.

        Raises:
            LossError: `losses` is not one number an example.
            ExamplesMixError: a loss depends on other examples' outputs.
            NotReadyError: the model has not been called.
        """
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            what = f"of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise LossError(
                f"losses: expected a tensor (B,) with one loss an example, got {what}. "
                "Use a criterion with reduction='none', and average each example's own terms; `.squeeze(1)` a (B, 1)"
            )
        if self._session.closed:
            raise NotReadyError("backward: this tracker is detached")
        self._backwards.run(losses, self._mean)

    def norms(self, by: By | None = None) -> Tensor | dict[str, Tensor]:
        r"""Per-example gradient norms $\|\partial \ell_b / \partial \theta\|$ of the last backward.

        Args:
            by: None for all tracked parameters together, `"parameter"` or `"module"` for each.

        Returns:
            Tensor `(B,)`, or a dict of them by parameter name or module path (of its own parameters).

        Raises:
            NotReadyError: there was no backward since the last forward.
            PerexError: perex cannot vouch for the numbers; the message says which module, and why.
        """
        squared = self.squared_norms(by)
        if isinstance(squared, dict):
            return {name: value.sqrt() for name, value in squared.items()}
        return squared.sqrt()

    def squared_norms(self, by: By | None = None) -> Tensor | dict[str, Tensor]:
        """Squares of `norms`, which add up over parameters. See there."""
        values, scale = self._values(0)
        if by is None:
            return self._unscaled(added_up(list(values.values())), scale)
        squared = {entry: self._unscaled(value, scale) for entry, value in values.items()}
        if by == "parameter":
            return {entry.name: value for entry, value in squared.items()}
        if by == "module":
            modules: dict[str, Tensor] = {}
            for entry, value in squared.items():
                present = modules.get(entry.module)
                modules[entry.module] = value if present is None else present + value.to(present.device)
            return modules
        raise ArgumentError(f"by={by!r}: it is None, 'parameter' or 'module'")

    def _unscaled(self, squared: Tensor, scale: float) -> Tensor:
        """Squares of gradients of the examples' own losses, from those of the loss that was run backward."""
        result = self._backwards.result
        squared = squared * scale**2
        return squared if result is None or result.scaled is None else squared / result.scaled.to(squared) ** 2

    def read(self, quantity: Quantity) -> dict[str, Tensor]:
        """The values of a further quantity given to `attach`, by parameter.

        They are of the loss that was run backward: with a mean over the batch, 1/B of each example's own, and scaled
        where it was scaled.

        Args:
            quantity: the object that was given.

        Returns:
            What its `reduce` made of each parameter, by name.
        """
        if quantity not in self._quantities:
            raise ArgumentError(f"{quantity!r} was not given to attach")
        values, _ = self._values(self._quantities.index(quantity))
        return {entry.name: value for entry, value in values.items()}

    def report(self) -> Report:
        """How the norm of each use of a parameter in the latest forward was found, and what it cost; print it.

        Returns:
            A `Report` of one row for each operator in which tracked parameters met examples: rule, way to the norm,
            shapes, operations and memory. Below it, what parameters share, which were not used, and why reading would
            be refused, if it would.

        Example:
            >>> import torch, perex
            >>> model = torch.nn.Linear(3, 2)
            >>> with perex.attach(model) as px:
            ...     px.backward(model(torch.ones(4, 3)).sum(1))
            >>> row = px.report().rows[0]
            >>> row.operator, row.way, row.input, row.parameters
            ('linear', 'one position', '(B, 3)', ('weight', 'bias'))
        """
        entries = list(self._session.parameters)
        tracked = [entry.name for entry in entries if entry.tracked]
        latest, result = self._backwards.latest, self._backwards.result
        if latest is None:
            return Report((), tracked)
        names: dict[Entry, list[str]] = {entry: [] for entry in entries if entry.tracked}
        owners = {id(entry.parameter): entry for entry in names}
        for name, parameter in self._session.parameters.model.named_parameters(remove_duplicate=False):
            if id(parameter) in owners:
                names[owners[id(parameter)]].append(name)
        refused = None
        if result is not None and result.number >= latest.number:
            try:
                self._values(0)
            except PerexError as error:
                refused = f"{type(error).__name__}: {error}"
        forwards = 1 if result is None else len(result.shares)
        with preferring(self._backwards.preferences):
            rows = rows_of(latest)
        return Report(rows, tracked, latest.batch, refused, shared_of(latest, names), forwards)

    def _values(self, index: int) -> tuple[dict[Entry, Tensor], float]:
        """One quantity of the last backward, and what gradients are to be multiplied by."""
        result, latest = self._backwards.result, self._backwards.latest
        if latest is not None and not latest.uses and (result is None or latest.number > result.number):
            result = Result(-1, self._quantities, True, latest.number)  # no tracked parameter was used: all is zero
            result.share(latest)
            result.finish()
        if result is None:
            why = f"; {self._session.unseen}" if self._session.unseen else ""
            raise NotReadyError(f"nothing to read yet: run a forward and a backward of the attached model{why}")
        if latest is not None and latest.number > result.number:
            raise NotReadyError("nothing to read: the latest forward has not been followed by a backward yet")
        if result.error is not None:
            raise result.error
        if not result.finished:
            raise NotReadyError("nothing to read: the last backward did not finish")
        with preferring(self._backwards.preferences):
            values, batch = result.values(index, self._relation)
        scale = result.scale if result.scale is not None else float(batch if self._mean else 1)
        return values, scale


def added_up(values: list[Tensor]) -> Tensor:
    """The sum of `(B,)` tensors, on the first one's device."""
    if len({(value.dtype, value.device) for value in values}) == 1:
        return torch.stack(values).sum(0)
    total, *others = values
    for value in others:
        total = total + value.to(total.device)
    return total
