"""The handle a user holds: attach, run forward and backward as usual, read."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from perex.audit import check_losses
from perex.capture.derived import of_parameters
from perex.capture.forward import Forward
from perex.capture.parameters import Entry, Selection, Shared
from perex.capture.session import Session
from perex.errors import ArgumentError, AttachError, LossError, NotReadyError, PerexError, UnsupportedError
from perex.factors import Factor, Few
from perex.quantities import Quantity, SquaredNorms
from perex.report import Report, rows_of, shared_of
from perex.result import Result
from perex.rules.call import Call, Captured

By = Literal["parameter", "module"]

STRAY = (
    "In module '{}', rows that belong to no example go through a parameter in `{}` and have a part in the loss, so "
    "perex cannot say whose gradient theirs is. Leave such rows out of the loss, or make them rows of an example"
)


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
            examples that influence each other: a few of them are run again alone and compared, and each loss may
            depend on its own example's outputs only.
        grad_scaler: the scaler of the loss that is run backward, as in `scaler.scale(loss).backward()`: norms are then
            of the loss before scaling. `px.backward(losses)` scales by itself.

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
    return Tracker(model, quantities, params, loss_reduction, batch_dim, param_grads, forwards, audit, grad_scaler)


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
    ) -> None:
        self._quantities: list[Quantity] = [SquaredNorms(), *quantities]
        self._mean = loss_reduction == "mean"
        self._scale: float | None = None
        self._param_grads = param_grads
        self._relation = forwards
        self._audit = audit
        self._scaler = grad_scaler
        self._audited: set[tuple[object, ...]] = set()
        self._latest: Forward | None = None
        self._pending: list[weakref.ref[Forward]] = []
        self._result: Result | None = None
        self._losses: int | None = None
        self._session = Session(model, params, param_grads, batch_dim, self, self._began, self._untapped, audit)

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
        if self._latest is None:
            raise NotReadyError("batch_size: the model has not been called since perex was attached")
        return self._latest.batch

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
        forwards = [forward for ref in self._pending if (forward := ref()) is not None]
        if self._session.closed:
            raise NotReadyError("backward: this tracker is detached")
        if self._latest is None or self._session.unseen is not None:
            why = f"; {self._session.unseen}" if self._session.unseen else ""
            raise NotReadyError(f"backward: call the attached model first, with gradients enabled{why}")
        forwards = forwards or [self._latest]  # a second backward, of a graph that was retained
        count = len(losses)
        sizes = [forward.batch for forward in forwards]
        if count not in sizes and count != sum(sizes):
            raise LossError(
                f"losses: {count} losses for a forward of {' and '.join(map(str, sizes))} examples: there must be one "
                "loss an example. Average the losses of an example's own tokens or pixels; or is the batch axis "
                "another than `batch_dim`?"
            )
        self._result = None
        if not losses.requires_grad:
            if any(forward.uses for forward in forwards):
                raise LossError("losses: they do not depend on the model's outputs, or were computed under no_grad")
            return  # no tracked parameter was used: norms are zero
        self._audit_losses(losses, forwards)
        weight = 1 / count if self._mean and count else 1.0
        self._losses, self._scale = count, 1 / weight
        try:
            run = losses if self._scaler is None else self._scaler.scale(losses)
            run.backward(torch.full_like(run, weight))
        finally:
            self._losses, self._scale = None, None
        if self._result is None and any(forward.uses for forward in forwards):
            raise LossError("losses: no gradient reached the attached model; are they of another's outputs?")

    def _audit_losses(self, losses: Tensor, forwards: Sequence[Forward]) -> None:
        """Check that losses do not mix examples, when losses and outputs of these shapes are new."""
        edges, self._session.edges = dict(self._session.edges), []
        further = len(losses) == sum(forward.batch for forward in forwards)
        first = 0
        for forward in forwards:
            if self._audit:
                self._session.auditor.check(forward, self._session.parameters)
            outputs = edges.get(forward.number, [])
            kind = len(losses), first, *((edge.node.name(), axis) for edge, axis in outputs)
            if self._audit and kind not in self._audited:
                check_losses(losses, outputs, forward.batch, first)
                self._audited.add(kind)
            first += forward.batch if further else 0

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
        squared = {entry: value * scale**2 for entry, value in values.items()}
        scaled = self._result.scaled if self._result is not None else None
        if scaled is not None:
            squared = {entry: value / scaled.to(value) ** 2 for entry, value in squared.items()}
        if by == "parameter":
            return {entry.name: value for entry, value in squared.items()}
        if by == "module":
            modules: dict[str, Tensor] = {}
            for entry, value in squared.items():
                present = modules.get(entry.module)
                modules[entry.module] = value if present is None else present + value.to(present.device)
            return modules
        if by is not None:
            raise ArgumentError(f"by={by!r}: it is None, 'parameter' or 'module'")
        total, *others = squared.values()
        for value in others:
            total = total + value.to(total.device)
        return total

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
        latest = self._latest
        if latest is None:
            return Report((), tracked)
        names: dict[Entry, list[str]] = {entry: [] for entry in entries if entry.tracked}
        owners = {id(entry.parameter): entry for entry in names}
        for name, parameter in self._session.parameters.model.named_parameters(remove_duplicate=False):
            if id(parameter) in owners:
                names[owners[id(parameter)]].append(name)
        refused = None
        if self._result is not None and self._result.number >= latest.number:
            try:
                self._values(0)
            except PerexError as error:
                refused = f"{type(error).__name__}: {error}"
        forwards = 1 if self._result is None else len(self._result.shares)
        return Report(rows_of(latest), tracked, latest.batch, refused, shared_of(latest, names), forwards)

    # What capture hands over

    def _began(self, forward: Forward) -> None:
        self._latest = forward
        self._pending = [ref for ref in self._pending if ref() is not None] + [weakref.ref(forward)]

    def receive(self, call: Call, saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """An output gradient of a call has arrived: reduce or keep its factors."""
        forward = call.forward
        result = self._open(forward)
        if self._session.closed:
            why = "perex was detached between the forward and the backward: run the backward before detaching"
            result.refuse(NotReadyError(why))
        if self._session.running and not forward.recomputed:
            result.refuse(NotReadyError("the last backward ran inside the model's forward: nothing to read from it"))
        if result.losses is None:  # nobody will ask whether the examples do without each other
            self._session.auditor.wanted = forward.doubt is not None
            forward.record = None
            if forward.error is not None:
                result.refuse(forward.error)
        if forward.asks is not None and (result.losses is None or not self._audit):
            result.refuse(UnsupportedError(forward.asks))
        if forward.recomputed:
            result.refuse(
                UnsupportedError(
                    f"module '{call.where}' runs under reentrant checkpointing, which hides its parameters from the "
                    "forward: use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
                )
            )
            return
        if any(grad is not None and axis.stray(grad) for grad, axis in zip(grads, call.out_axes, strict=True)):
            result.refuse(UnsupportedError(STRAY.format(call.where, call.name)))
        device = saved[0].device.type if saved else "cpu"
        with torch.no_grad(), torch.autocast(device, enabled=False):
            captured = Captured(call, saved, grads)
            self._note_overflow(result, call, grads)
            factors = call.rule.function(captured)
            forward.arrived(call, grads)
            for slot, source in call.slots.items():
                factor = check_factor(call, slot, factors.get(slot), captured.batch)
                for entry, part in of_parameters(source, factor):
                    own = part if call.examples is None else Few(part, call.examples, forward.batch)
                    forward.made(call, entry, own)
                    result.add(forward, entry, own)

    def summed(self, error: PerexError) -> None:
        """A sum over the batch got a gradient, which no loss of one example gives it."""
        if self._losses is not None and self._losses > 1:
            self.refuse(error)

    def refuse(self, error: PerexError) -> None:
        """The running backward's numbers would be wrong: keep the reason for whoever reads them."""
        self._open(None).refuse(error)

    def _untapped(self, name: str) -> None:
        """A gradient reached a parameter from an unseen use."""
        self.refuse(
            UnsupportedError(
                f"parameter '{name}' got a gradient from a use that perex did not see: outside the model's forward "
                "(a penalty added to the loss, say), in a forward before perex was attached, or in compiled or "
                "scripted code in which its hooks do not run. Move that use into the model's forward, run it "
                "uncompiled, or leave the parameter out with `params=`"
            )
        )

    def _open(self, forward: Forward | None) -> Result:
        """The result of the backward that is running, begun if this is the first that is heard of it."""
        task = torch._C._current_graph_task_id()
        if forward is not None and forward.task is not None:
            task = forward.task  # reentrant checkpointing runs a backward of its own inside this one
        result = self._result
        if result is not None and result.task == task:
            return result
        waiting = [found for ref in self._pending if (found := ref()) is not None]
        alone = all(found is forward for found in waiting)
        number = self._latest.number if self._latest is not None else 0
        result = Result(task, self._quantities, alone, number, self._losses, self._scale)
        result.scaled = self._scaling()
        self._result = result
        torch.autograd.Variable._execution_engine.queue_callback(result.finish)
        self._pending = []
        self._session.consumed = True
        self._session.edges = []
        if forward is not None and not will_run(forward.sentinel):
            aliases = [entry.stand_in for entry in forward.uses if entry.stand_in is not None]
            if not self._param_grads or not all(map(will_run, aliases)):
                result.refuse(
                    UnsupportedError(
                        "the last backward went to some inputs only (torch.autograd.grad, or backward(inputs=...)), so "
                        "not every parameter's gradient was seen: run loss.backward() or px.backward(losses)"
                    )
                )
        return result

    def _scaling(self) -> Tensor | None:
        """What the loss of the running backward was multiplied by, as the scaler has it now; it waits for no device."""
        if self._scaler is None:
            return None
        device = next(iter(self._session.parameters)).parameter.device
        with torch.no_grad():
            scale: Tensor = self._scaler.scale(torch.ones((), device=device))
        return scale

    def _note_overflow(self, result: Result, call: Call, grads: Sequence[Tensor | None]) -> None:
        """Remember examples whose half-precision gradients became infinite."""
        for grad, axis in zip(grads, call.out_axes, strict=True):
            if grad is not None and grad.dtype in (torch.float16, torch.bfloat16):
                rows = axis.front(grad, call.batch).reshape(call.batch, -1)
                result.overflow(call.forward, rows.isinf().any(1) & ~rows.isnan().any(1), call.examples)

    def _values(self, index: int) -> tuple[dict[Entry, Tensor], float]:
        """One quantity of the last backward, and what gradients are to be multiplied by."""
        result = self._result
        latest = self._latest
        if latest is not None and not latest.uses and (result is None or latest.number > result.number):
            result = Result(-1, self._quantities, True, latest.number)  # no tracked parameter was used: all is zero
            result.share(latest)
            result.finish()
        if result is None:
            why = f"; {self._session.unseen}" if self._session.unseen else ""
            raise NotReadyError(f"nothing to read yet: run a forward and a backward of the attached model{why}")
        if self._latest is not None and self._latest.number > result.number:
            raise NotReadyError("nothing to read: the latest forward has not been followed by a backward yet")
        if result.error is not None:
            raise result.error
        if not result.finished:
            raise NotReadyError("nothing to read: the last backward did not finish")
        values, batch = result.values(index, self._relation)
        scale = result.scale if result.scale is not None else float(batch if self._mean else 1)
        return values, scale


def will_run(tensor: Tensor) -> bool:
    """Whether the running backward goes through the operator that made a tensor."""
    return tensor.grad_fn is not None and bool(torch._C._will_engine_execute_node(tensor.grad_fn))


def check_factor(call: Call, slot: object, factor: Factor | None, batch: int) -> Factor:
    """What a rule returned for one parameter, when it fits that parameter."""
    source = call.slots[slot]
    tensor = source.tensor if isinstance(source, Shared) else source.parameter
    if factor is None:
        raise PerexError(f"rule '{call.rule.name}' returned nothing for '{slot}' of module '{call.where}'")
    if factor.shape != tensor.shape or factor.batch != batch:
        raise PerexError(
            f"rule '{call.rule.name}' returned gradients of shape {(factor.batch, *factor.shape)} for '{slot}' of "
            f"module '{call.where}', which needs {(batch, *tensor.shape)}"
        )
    return factor
