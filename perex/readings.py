"""What can be read of an attached model's last backward: norms, further quantities, a report."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from perex.capture.parameters import Entry
from perex.capture.session import Session
from perex.errors import ArgumentError, NotReadyError, PerexError, anew
from perex.kernels.strategies import preferring
from perex.quantities import By, Quantity, grouped
from perex.quantities.base import finished
from perex.report import Report, rows_of, shared_of
from perex.result import Result
from perex.running import Running
from perex.summing import times


class Readings:
    """The part of `Tracker` that reads; it changes nothing."""

    _quantities: list[Quantity]
    _mean: bool
    _relation: Literal["same", "further"] | None
    _backwards: Running
    _session: Session

    @property
    def batch_size(self) -> int:
        """Number of examples in the latest forward.

        Raises:
            NotReadyError: there was no forward yet.
        """
        if self._backwards.latest is None:
            raise NotReadyError("batch_size: the model has not been called since perex was attached")
        return self._backwards.latest.batch

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
        found: Tensor | dict[str, Tensor] = self.read(self._quantities[0], by)
        return found

    def read(self, quantity: Quantity, by: By | None = None) -> Any:
        """The values of a further quantity given to `attach`, of the examples' own losses.

        Args:
            quantity: the object that was given.
            by: None for all tracked parameters together, `"parameter"` or `"module"` for each.

        Returns:
            What its `reduce` made of the parameters, added up, or a dict by parameter name or module path.

        Raises:
            NotReadyError, PerexError: as in `norms`.
        """
        index = next((i for i, given in enumerate(self._quantities) if given is quantity), None)
        if index is None:
            raise ArgumentError(
                f"{quantity!r} was not given to attach: perex.attach(model, {type(quantity).__name__}(...))"
            )
        values, scale = self._values(index)
        if not values and by is None and index == 0:  # all parameters are frozen
            return torch.zeros(self.batch_size, device=next(iter(self._session.parameters)).parameter.device)
        power = scale**quantity.degree if quantity.degree else 1.0
        if by is None and type(quantity).combined is Quantity.combined:  # a sum, so that it may be scaled as a whole
            whole = quantity.combined(values)
            return times(whole, power) if values and quantity.degree else copied(whole)
        found = {name: finished(value) for name, value in values.items()}
        found = {name: times(value, power) if quantity.degree else copied(value) for name, value in found.items()}
        return found if by == "parameter" else grouped(found, by, quantity.combined)

    @property
    def scale(self) -> float | Tensor:
        """What gradients of the loss that was run backward are multiplied by, to be of the examples' own losses.

        It is B for a mean over the batch and 1 for a sum, divided by what a `grad_scaler` multiplied the loss by.

        Raises:
            NotReadyError, PerexError: as in `norms`.
        """
        return self._values(0)[1]

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

    def _values(self, index: int) -> tuple[dict[str, Any], float | Tensor]:
        """One quantity of the last backward, and what gradients are to be multiplied by."""
        result = self._result()
        with preferring(self._backwards.preferences):
            values, batch = result.values(index, self._relation)
        scale = result.scale if result.scale is not None else float(batch if self._mean else 1)
        return values, scale if result.scaled is None else scale / result.scaled.double()

    def _result(self) -> Result:
        """What the last backward brought, if it may be read."""
        result, latest = self._backwards.result, self._backwards.latest
        if latest is not None and not latest.uses and (result is None or latest.number > result.number):
            result = Result(-1, self._quantities, True, latest.number, True)  # no parameter was used: all is zero
            result.share(latest)
            result.finish()
            self._backwards.result = result
        if result is None:
            why = f"; {self._session.unseen}" if self._session.unseen else ""
            raise NotReadyError(f"nothing to read yet: run a forward and a backward of the attached model{why}")
        if latest is not None and latest.number > result.number:
            raise NotReadyError("nothing to read: the latest forward has not been followed by a backward yet")
        if result.error is not None:
            raise anew(result.error)
        if not result.finished:
            raise NotReadyError("nothing to read: the last backward did not finish")
        return result


def copied(value: Any) -> Any:
    """A tensor that the reader may change."""
    return value.clone() if isinstance(value, Tensor) else value
