"""What backwards of an attached model bring, collected as it comes."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from perex.arrivals import factors_of, note_overflow, whereabouts
from perex.capture.forward import Forward, Tapped
from perex.capture.parameters import Entry
from perex.capture.probe import Probe
from perex.capture.session import Session
from perex.errors import NotReadyError, PerexError, UnsupportedError
from perex.factors import Factor
from perex.factors.outline import outline
from perex.gradients import tensors_of
from perex.kernels.products import without_autocast
from perex.kernels.readers import reading
from perex.kernels.strategies import Preferences, preferring
from perex.quantities import Quantity
from perex.result import Result

STRAY = (
    "In module '{}', rows that belong to no example go through a parameter in `{}` and have a part in the loss, so "
    "perex cannot say whose gradient theirs is. Leave such rows out of the loss, or make them rows of an example"
)


ROOM = 2**25
"""How many bytes of gradients are kept where nobody has asked for them: 32 MiB."""


class Backwards:
    """Gets what taps, guards and hooks report, and makes a `Result` of each backward.

    Args:
        quantities: what each parameter's gradients are reduced to.
        param_grads: whether `.grad` is computed too.
        audit: whether backwards of losses are checked for examples that influence each other.
        scaler: of the loss that is run backward, if one is used.
        preferences: which ways to the norms to take.
        keep: whether gradients are kept when a backward is over: always, never, or, if None, those of the first one
            and, if these are asked for, of those after it.
        low: whether the graphs of losses are retained, so that `again` can run them a second time, where gradients take
            too much memory to be kept.

    Attributes:
        session: the session whose forwards these are backwards of; set by who makes both.
        latest: the latest forward.
        pending: forwards since the last backward.
        result: what the last backward brought.
        interrupted: what was brought by those in which that one runs, or that did not come to their end.
        errors: what was wrong with backwards since the last forward, with their numbers.
    """

    session: Session

    def __init__(
        self,
        quantities: Sequence[Quantity],
        param_grads: bool,
        audit: bool,
        scaler: torch.amp.GradScaler | None,
        preferences: Preferences,
        keep: bool | None,
        low: bool = False,
    ) -> None:
        self.quantities = quantities
        self.param_grads = param_grads
        self.audit = audit
        self.scaler = scaler
        self.preferences = preferences
        self.keep = keep
        self.low = low
        self.fits = False  # whether the running backward keeps gradients with `low`
        self.taking: Callable[[Forward, Entry, Factor], None] | None = None  # who gets factors of a second run
        self.sharing = param_grads  # whether taps may give gradients along with norms
        self.latest: Forward | None = None
        self.pending: list[weakref.ref[Forward]] = []
        self.result: Result | None = None
        self.interrupted: list[Result] = []
        self.errors: list[tuple[int, PerexError]] = []
        self.losses: int | None = None
        self.scale: float | None = None
        self.probe: Probe | None = None
        self.looking = False  # whether the running backward is for the probe alone, or none of perex's business
        self.after: list[Callable[[], None]] = []  # what to do when a backward is over

    def began(self, forward: Forward) -> None:
        """A forward begins."""
        if torch._C._current_graph_task_id() == -1:
            self.interrupted.clear()  # by errors, then
            self.errors.clear()
        self.latest = forward
        if self.result is not None:
            self.keep = False if self.keep is None and self.result.finished else self.keep  # nobody asked
            self.result.release()
        self.pending = [ref for ref in self.pending if ref() is not None] + [weakref.ref(forward)]

    def let_go(self) -> None:
        """Forget the last backward, which nobody can ask for: forwards lead here, so here must not lead back."""
        if self.result is not None:
            self.result.release()
        self.latest = self.result = None

    def asked(self) -> None:
        """Somebody wants gradients that were kept: go on keeping them."""
        self.keep = True if self.keep is None else self.keep

    # What capture hands over

    def receive(
        self, tapped: Tapped, saved: Sequence[Tensor], grads: Sequence[Tensor | None], sums: Sequence[str]
    ) -> Mapping[str, Tensor]:
        """An output gradient of a call has arrived: reduce or keep its factors.

        Returns:
            The gradients of the parameters that `sums` names.
        """
        if torch.is_grad_enabled():
            if self.sharing or tapped.summed:
                self.stop_sharing(tapped)
            with torch.no_grad():
                return self.receive(tapped, saved, grads, sums)
        device = saved[0].device.type if saved else "cpu"
        with (
            preferring(self.preferences),
            without_autocast(device),
            reading(tapped.forward.readers),
            whereabouts(saved),
        ):
            return self.take(tapped, saved, grads, sums)

    def take(
        self, tapped: Tapped, saved: Sequence[Tensor], grads: Sequence[Tensor | None], sums: Sequence[str]
    ) -> Mapping[str, Tensor]:
        """Reduce or keep the factors of a call, or hand them to who asks for something else of this backward."""
        forward, call = tapped.forward, tapped.call
        if self.probe is not None:
            self.probe.receive(tapped, grads)
        if self.looking:
            found = factors_of(tapped, saved, grads)
            return {slot: factor.summed() for slot, _, factor in found if slot in sums} if sums else {}
        if self.taking is not None:
            for _, entry, factor in factors_of(tapped, saved, grads):
                self.taking(forward, entry, factor)
            return {}
        result = self.open(forward)
        if forward not in result.shares:
            self.admit(result, tapped)
            if forward.recomputed:
                return {}
        for grad, axis in zip(grads, call.out_axes, strict=True):
            if grad is not None and axis.stray(grad):
                result.refuse(UnsupportedError(STRAY.format(call.where, call.name)))
        note_overflow(result, tapped, grads)
        keeping = result.keep and self.keep is not None
        form = keeping, *sums, *[None if grad is None else (grad.shape, grad.dtype) for grad in grads]
        outlines, known = call.outlines.get(form, []), form in call.outlines
        sums_of: dict[str, Tensor] = {}
        for slot, entry, factor in factors_of(tapped, saved, grads):
            kept = factor.condensed() if keeping else factor
            if slot in sums and kept is factor:
                kept.summing = slot in call.sharing.together
            result.add(forward, entry, kept)
            if not known:
                outlines.append((entry, outline(kept)))
            if slot in sums:
                sums_of[slot] = kept.summed()
            elif self.sharing and self.may_share(tapped, slot, factor):
                call.sharing.names = tuple(call.slots)  # a convolution's bias alone costs as much as both
                if factor.sums_with_norms():
                    call.sharing.together |= {slot}
        forward.readers.done(saved)
        call.sharing.decided = True
        call.outlines[form] = tapped.use.factors = outlines
        tapped.use.outputs = [None if grad is None else grad.shape for grad in grads]
        return sums_of

    def admit(self, result: Result, tapped: Tapped) -> None:
        """The first gradient of a forward has come in a backward: is there a reason not to trust its numbers?"""
        forward = tapped.forward
        if self.session.closed:
            why = "perex was detached between the forward and the backward: run the backward before detaching"
            result.refuse(NotReadyError(why))
        if self.session.running and not forward.recomputed:
            result.refuse(NotReadyError("the last backward ran inside the model's forward: nothing to read from it"))
        if result.losses is None:  # nobody will ask whether the examples do without each other
            self.session.auditor.wanted = forward.doubt is not None or self.session.auditor.functions
            forward.record = forward.compare = None
            if forward.error is not None:
                result.refuse(forward.error)
        if forward.asks is not None and (result.losses is None or not self.audit):
            result.refuse(UnsupportedError(forward.asks))
        if forward.recomputed:
            result.refuse(
                UnsupportedError(
                    f"module '{tapped.call.where}' runs under reentrant checkpointing, which hides its parameters from "
                    "the forward: use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
                )
            )

    def may_share(self, tapped: Tapped, slot: object, factor: Factor) -> bool:
        """Whether gradients of a call's parameters are to come with norms from the next forward on, being cheaper so.

        On CPUs: on GPUs norms come from kernels that keep nothing else.
        """
        call = tapped.call
        source = call.slots[slot]
        if call.sharing.decided or self.preferences.names or not isinstance(source, Entry):
            return False
        own = source.parameter.dtype, "cpu"
        alike = all((tensor.dtype, tensor.device.type) == own for tensor in tensors_of(factor))
        return alike and tapped.forward.uses[source.name] == 1 and factor.sums_cheaply()

    def stop_sharing(self, tapped: Tapped) -> None:
        """A gradient is to be differentiated again: from now on, operators read parameters with their graph."""
        self.sharing = False
        for known in self.session.memo.known.values():
            if known.call is not None:
                known.call.sharing.names = ()
        if tapped.summed:
            raise UnsupportedError(
                f"backward with create_graph=True: module '{tapped.call.where}' ran with parameters that have no graph "
                "(earlier backwards needed none, and perex gave their gradients along with the norms). From now on "
                "they have one: run the forward and this backward again, after zero_grad"
            )

    def changed(self) -> None:
        """A module's gradient hook has changed a gradient."""
        if self.losses is None and self.audit:
            self.refuse(
                UnsupportedError(
                    "a gradient hook, of a module or where numbers left torch, changes gradients: whether it treats "
                    "examples alone, `px.backward(losses)`, with one loss an example, can tell"
                )
            )

    def summed(self, error: PerexError) -> None:
        """A sum over the batch got a gradient, which no loss of one example gives it."""
        if self.losses is not None and self.losses > 1:
            self.refuse(error)

    def refuse(self, error: PerexError) -> None:
        """The running backward's numbers would be wrong: keep the reason for whoever reads them."""
        if not self.looking:
            self.open(None).refuse(error)

    def untapped(self, name: str) -> None:
        """A gradient reached a parameter from an unseen use."""
        self.refuse(
            UnsupportedError(
                f"parameter '{name}' got a gradient from a use that perex did not see: outside the model's forward "
                "(a penalty added to the loss, say), in a forward before perex was attached, in compiled or scripted "
                "code, in a reentrant checkpoint, or in a custom autograd function that finds the parameter by itself. "
                "Move that use into the model's forward, run it uncompiled, checkpoint with use_reentrant=False, write "
                "it in plain operators, or leave the parameter out with `params=`"
            )
        )

    def open(self, forward: Forward | None) -> Result:
        """The result of the backward that is running, begun if this is the first that is heard of it."""
        task = torch._C._current_graph_task_id()
        if forward is not None and forward.task is not None:
            task = forward.task  # reentrant checkpointing runs a backward of its own inside this one
        result = self.result
        if result is not None and result.task == task:
            return result
        if (outer := next((one for one in self.interrupted if one.task == task), None)) is not None:
            self.resume(outer)
            return outer
        if result is not None:
            self.note(result)
            if not result.finished:
                self.interrupted.append(result)
        waiting = [found for ref in self.pending if (found := ref()) is not None]
        alone = all(found is forward for found in waiting)
        number = self.latest.number if self.latest is not None else 0
        keep = not (forward is not None and forward.sparing) if self.keep is None else self.keep
        result = Result(task, self.quantities, alone, number, keep, self.losses, self.scale)
        result.room = ROOM if self.keep is None else math.inf
        if self.low:
            result.keep = self.fits
        result.scaled = self.scaling()
        if (result.keep or self.low) and self.param_grads:
            parameters = (
                self.session.parameters
            )  # some may have been frozen since the forward: they get one all the same
            entries = [*parameters.tracked(), *(forward.tracked if forward is not None else ())]
            result.accumulated.remember(parameters.holders(entries))
        self.take_over(result)
        self.result = result
        torch.autograd.Variable._execution_engine.queue_callback(partial(self.over, result))
        self.pending = []
        self.session.consumed = True
        self.session.outputs.kinds = {}
        if forward is not None and not will_run(forward.sentinel):
            aliases = [e.stand_in for e in forward.tracked if e.name in forward.uses and e.stand_in is not None]
            if not self.param_grads or not all(map(will_run, aliases)):
                result.refuse(
                    UnsupportedError(
                        "the last backward went to some inputs only (torch.autograd.grad, or backward(inputs=...)), so "
                        "not every parameter's gradient was seen: run loss.backward() or px.backward(losses)"
                    )
                )
        return result

    def resume(self, result: Result) -> None:
        """Go on with a backward in which another one ran, as in a checkpoint's or a function's own backward.

        What was wrong with that one is wrong with both: it is a part of the same gradients.
        """
        place = self.interrupted.index(result)
        for inner in [*self.interrupted[place + 1 :], self.result]:
            if inner is not None:
                self.note(inner)
        self.take_over(result)
        del self.interrupted[place:]
        self.result = result

    def note(self, result: Result) -> None:
        """Another backward's result takes the place of this one: remember what was wrong with it."""
        if result.error is not None:
            self.errors.append((result.task, result.error))

    def take_over(self, result: Result) -> None:
        """What was wrong with backwards that ran inside this one: autograd counts up, so their numbers are larger."""
        for task, error in self.errors:
            if task > result.task:
                result.refuse(error)

    def over(self, result: Result) -> None:
        """A backward has come to its end."""
        if result in self.interrupted:
            self.resume(result)
        result.finish()
        if result.accumulated.grads:
            result.accumulated.look(self.session.parameters.holders(result.tracked()))
        for forward in result.shares:
            forward.readers.clear()
        for action in self.after:
            action()

    def scaling(self) -> Tensor | None:
        """What the loss of the running backward was multiplied by, as the scaler has it now; it waits for no device."""
        if self.scaler is None:
            return None
        device = next(iter(self.session.parameters)).parameter.device
        with torch.no_grad():
            scale: Tensor = self.scaler.scale(torch.ones((), device=device))
        return scale


def will_run(tensor: Tensor) -> bool:
    """Whether the running backward goes through the operator that made a tensor."""
    return tensor.grad_fn is not None and bool(torch._C._will_engine_execute_node(tensor.grad_fn))
