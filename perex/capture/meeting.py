"""Where parameters meet examples: one operator or module call, recorded for its rule and tapped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from perex.capture.autocast import as_read
from perex.capture.axis import Axis, Held, Label, Lost, Single
from perex.capture.carry import tensors_in
from perex.capture.checkpoint import run_recomputation_in, sparing
from perex.capture.forward import Forward, Tapped
from perex.capture.functions import Applied, called, holders, with_own
from perex.capture.labels import Labels
from perex.capture.memo import Known, Place, results_in
from perex.capture.parameters import Source
from perex.capture.refusals import Refusals
from perex.capture.substitutes import ours, run
from perex.capture.taps import Poison, put
from perex.rules import recurring
from perex.rules.call import Call, Ref, pack, unpack
from perex.rules.general import GENERAL
from perex.rules.recurrence import CELLS
from perex.rules.recurrent import RECURRENT
from perex.rules.registry import OPERATORS, Rule


class Meeting:
    """Records and taps calls of one forward.

    Args:
        forward: the forward that is running.
        labels: what is known of its tensors.
        refusals: makes errors.
        recomputing: makes the context in which a checkpoint of this forward runs again.
    """

    def __init__(
        self,
        forward: Forward,
        labels: Labels,
        refusals: Refusals,
        recomputing: Callable[[tuple[Any, ...]], AbstractContextManager[None]],
    ) -> None:
        self.forward = forward
        self.labels = labels
        self.refuse = refusals
        self.recomputing = recomputing
        self.latest: Call | None = None  # what was recorded last

    def operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator on parameters and examples, by its rule or on the general path."""
        tensors: list[Tensor] = []
        packed_args, packed_kwargs = pack((args, kwargs), tensors)
        sources = [self.labels.source(tensor) for tensor in tensors]
        rule = OPERATORS.get(func, GENERAL)
        slots = None if rule is GENERAL else slots_for(rule, packed_args, packed_kwargs, tensors, sources)
        if slots is None:
            rule, slots = GENERAL, {i: source for i, source in enumerate(sources) if source is not None}
        values = [self.labels.stand_in(tensor) for tensor in tensors]
        if not self.labels.parameters.param_grads:
            values = [v if s is None else v.detach() for v, s in zip(values, sources, strict=True)]
        if rule.multiplies:
            values = [as_read(v) if s is None else v for v, s in zip(values, sources, strict=True)]
        left: object = None
        labels: list[Label] | None = None
        if func in CELLS and not kwargs:
            values = recurring.own_input(func, packed_args, values)
        if func in CELLS and not kwargs and self.forward.record is None and ours(self.forward):
            own, half = self.labels.parameters, torch.is_autocast_enabled(values[0].device.type)
            out, left = recurring.run(func, packed_args, values, own.param_grads or own.sharded or half)
        else:
            given = values
            if isinstance(func, Applied):  # whose forward and backward may look at what requires grad
                given = [v if s is None else as_leaf(v) for v, s in zip(values, sources, strict=True)]
            run_args, run_kwargs = unpack(packed_args, given), unpack(packed_kwargs, given)
            given = [*given, *holders(run_args)]
            if (
                isinstance(func, Applied) and rule is GENERAL
            ):  # tried on examples first: what it leaves anywhere is its last
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    first = called(func, run_args, run_kwargs, given, self.forward, self.refuse)
                labels = self.labels.of_results(func, args, kwargs, first, tensors_in(first))
            if isinstance(func, Applied):
                run_args = with_own(run_args, args)
            out = called(func, run_args, run_kwargs, given, self.forward, self.refuse)
        out_axes: list[Held] = []
        for label in labels or self.labels.of_results(func, args, kwargs, out, tensors_in(out)):
            self.refuse.mixed(label)
            if not isinstance(label, (Axis, Single)):
                lost = label or Lost("unknown", f"`{func.__name__}` of examples has a result without a batch axis")
                lost = self.refuse.placed(lost)
                call = self.record(func, rule, packed_args, packed_kwargs, tensors, slots, [])
                kept = range(len(tensors)) if rule is GENERAL else call.kept
                saved = [values[i] if sources[i] is None else values[i].detach() for i in kept]
                return self.poisoned(func, out, lost, saved)
            out_axes.append(label)
        self.refuse.random(func, args, kwargs)
        call = self.record(func, rule, packed_args, packed_kwargs, tensors, slots, out_axes)
        if rule is GENERAL:
            call.kept = list(range(len(tensors)))
            call.rule = RECURRENT if func in CELLS and not kwargs else GENERAL
        for index in call.kept:
            if call.axes[index] is None:
                axis = self.aligned_rows(tensors[index], func, args, kwargs, out, out_axes)
                if axis is not None:
                    call.rows[index] = axis
        saved = [values[i] if sources[i] is None else values[i].detach() for i in call.kept]
        return self.tap(call, out, saved, left=left)

    def again(
        self, known: Known, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], places: Sequence[Place]
    ) -> Any:
        """Run an operator of which all but its tensors is known."""
        given: dict[int | str, Any] = {}
        call: Call | None = None
        summed: tuple[str, ...] = ()
        aliases: list[Tensor] = []
        entries: dict[int, Place] = {}
        if places:
            for place in places:
                given[place.key] = self.labels.parameters.value(place.entry)
            if known.call is not None:
                entries = {place.number: place for place in places}
                own = [entries[number] for number in known.numbers.values()]
                call = known.call_at(self.refuse.where(), [place.entry for place in own])
                summed = self.shares_sums(call)
                for name, place in zip(known.numbers, own, strict=True):
                    if name in summed:
                        aliases.append(given[place.key])
                        given[place.key] = given[place.key].detach()
            if call is not None and call.rule.multiplies:
                items: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
                given |= {key: as_read(value) for key, value in items if key not in given}
            args = tuple([given.get(key, value) for key, value in enumerate(args)])
            kwargs = {key: given.get(key, value) for key, value in kwargs.items()}
        out = run(func, args, kwargs, self.forward, self.labels.parameters if places else None)
        if call is None:
            for result, label in zip(results_in(out), known.labels, strict=True):
                self.labels.mark(result, label)
            return out
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        saved = [tensors[i].detach() if i in entries else tensors[i] for i in call.kept]
        return self.tap(call, out, saved, summed, aliases)

    def shares_sums(self, call: Call) -> tuple[str, ...]:
        """Of which parameters a call is to leave the gradient to its tap, because the norm brings it along.

        Autograd computes it where another dtype is computed in, where what is saved is counted or moved (checkpoints),
        where parameters are shards, and where running the operator again would take more than is kept.
        """
        parameters = self.labels.parameters
        if not call.sharing.names or not parameters.param_grads or parameters.sharded:
            return ()
        if self.forward.recomputed or sparing() or torch.is_autocast_enabled("cpu"):
            return ()
        if len({*call.kept, *(call.template(name).number for name in call.slots)}) != len(call.axes):
            return ()
        return call.sharing.names

    def poisoned(self, func: Any, out: Any, label: Lost, saved: list[Tensor]) -> Any:
        """What an operator made of parameters and of rows that are no example's: an error if the loss depends on it."""
        produced: list[Tensor] = []
        template = pack(out, produced)
        if not produced:
            produced = list(out)
        run_recomputation_in(self.recomputing)
        results = Poison.apply(self.forward, self.refuse.lost(label, func), saved, self.forward.sentinel, *produced)
        for tensor in results:
            self.labels.mark(tensor, label)
        return type(out)(results) if template is out else unpack(template, results)

    def rows(self, tensor: Tensor, axis: Held, func: Callable[[Tensor], Tensor]) -> Tensor:
        """Tap a tensor that derives from parameters alone as one whose rows are the examples'; `func` says why."""
        source, rule = self.labels.source(tensor), OPERATORS[func]
        assert source is not None
        call = self.record(func, rule, (Ref(0),), {}, [tensor], {"value": source}, [axis])
        value = self.labels.stand_in(tensor)
        value = func(value if self.labels.parameters.param_grads else value.detach())
        tapped: Tensor = self.tap(call, value, [])
        return tapped

    def module(self, module: nn.Module, rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Tap the output of a module with a rule of its own, which keeps the batch axis of its input."""
        tensors: list[Tensor] = []
        packed_args, packed_kwargs = pack((args, kwargs), tensors)
        axis = next((axis for axis in map(self.labels.held, tensors) if axis is not None), None)
        fits = isinstance(out, Tensor) and (not isinstance(axis, Axis) or axis.dim < out.dim())
        if axis is None or not fits or isinstance(axis, Axis) and out.size(axis.dim) != axis.size(self.forward.batch):
            why = "has a rule of its own, but does not turn examples into one tensor with the same batch axis"
            raise self.refuse.unsupported(type(module), why)
        found = {name: self.labels.source(parameter) for name, parameter in module.named_parameters()}
        slots = {name: source for name, source in found.items() if source is not None}
        call = self.record(type(module), rule, packed_args, packed_kwargs, tensors, slots, [axis])
        return self.tap(call, out, [tensors[i] for i in call.kept])

    def record(
        self,
        func: Any,
        rule: Rule,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: Sequence[Tensor],
        slots: dict[Any, Source],
        out_axes: list[Held],
    ) -> Call:
        """What the rule will need to know of a call."""
        call = Call(
            where=self.refuse.where(),
            func=func,
            rule=rule,
            args=args,
            kwargs=kwargs,
            axes=[self.labels.held(tensor) for tensor in tensors],
            slots=slots,
            out_axes=out_axes,
            shapes=[tensor.shape for tensor in tensors],
            batch=self.forward.batch,
        )
        needed = {name for slot in slots for name in rule.saves.get(slot, ())} | set(rule.saves.get("", ()))
        saved = (call.template(name) for name in needed)
        call.kept = sorted({ref.number for ref in saved if isinstance(ref, Ref)})
        return call

    def tap(
        self,
        call: Call,
        out: Any,
        saved: list[Tensor],
        summed: tuple[str, ...] = (),
        aliases: Sequence[Tensor] = (),
        left: object = None,
    ) -> Any:
        """Put a tap behind the results of a call."""
        self.latest = call
        forward, out_axes = self.forward, call.out_axes
        if forward.record is not None:
            forward.record.met(call, tensors_in(out) or list(out), out_axes)
        if call.site is None:  # else it is numbered
            number(call, forward.batch)
        use = forward.entered(call)
        forward.readers.expect(saved)
        if sparing():
            self.spared()
        produced: list[Tensor] = []
        template = pack(out, produced)
        if not produced:  # a named result, as `torch.max` has
            produced = list(out)
        forward.half = forward.half or torch.float16 in [tensor.dtype for tensor in produced]
        without: tuple[int, ...] = ()
        if isinstance(call.func, Applied):  # whose parameters have required grad
            without = tuple(number for number, result in enumerate(produced) if not result.requires_grad)
        knows = Tapped(forward, call, use, summed, left, without)
        tapped = put(knows, saved, forward.sentinel, *aliases, *produced)
        for tensor, axis in zip(tapped, out_axes, strict=True):
            self.labels.mark(tensor, axis)
        return type(out)(tapped) if template is out else unpack(template, tapped)

    def spared(self) -> None:
        """Have the running checkpoint, if there is one, find all this again when it recomputes."""
        self.forward.sparing = True
        self.forward.once |= run_recomputation_in(self.recomputing)

    def aligned_rows(
        self,
        tensor: Tensor,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        out_axes: Sequence[Label],
    ) -> Axis | None:
        """The axis of a tensor whose rows are aligned with the examples, though it has no batch axis.

        `token.expand(B, -1, -1)` is derived from a parameter alone, and the first state of an LSTM is constant,
        yet row b is read by example b. Whether a dimension of the batch's size is such an axis shows when it is
        labelled as one: the axes of the results stay as they were exactly when the operator matches that
        dimension with the examples.
        """
        for axis in set(out_axes):
            if isinstance(axis, Axis):
                for dim, size in enumerate(tensor.shape):
                    if size == axis.size(self.forward.batch):
                        trial = axis.moved(dim)
                        if self.labels.with_trial(tensor, trial, func, args, kwargs, out) == list(out_axes):
                            return trial
        return None


def number(call: Call, batch: int) -> None:
    """Where rows are of a few examples, number these from 0 in all axes of a call."""
    if not any(isinstance(axis, Single) or axis.owners is not None for axis in call.out_axes):
        return
    found = [axis.example for axis in call.out_axes if isinstance(axis, Single)]
    for axis in call.out_axes:
        if isinstance(axis, Axis):
            found += range(batch) if axis.owners is None else axis.owners.examples
    call.examples = sorted(set(found))
    call.batch = len(call.examples)
    call.axes = [None if axis is None else axis.among(call.examples, batch) for axis in call.axes]
    call.rows = {index: axis.among(call.examples, batch) for index, axis in call.rows.items()}
    call.out_axes = [axis.among(call.examples, batch) for axis in call.out_axes]


def as_leaf(value: Tensor) -> Tensor:
    """A tensor that requires grad, whatever becomes of the gradient."""
    return value if value.requires_grad else value.detach().requires_grad_()


def slots_for(
    rule: Rule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tensors: Sequence[Tensor],
    sources: Sequence[Source | None],
) -> dict[Any, Source] | None:
    """The rule's parameters among the arguments, or None where the rule does not cover the call."""
    if len(args) > len(rule.arguments) or any(name not in rule.arguments for name in kwargs):
        return None
    named = {**dict(zip(rule.arguments, args, strict=False)), **kwargs}
    numbers = {name: ref.number for name, ref in named.items() if isinstance(ref, Ref)}
    if len(numbers) != len(tensors) or any(tensor.is_complex() for tensor in tensors):
        return None
    if not rule.applies({name: tensors[numbers[name]] if name in numbers else named[name] for name in named}):
        return None
    slots: dict[Any, Source] = {}
    for name, number in numbers.items():
        source = sources[number]
        if source is not None:
            if name not in rule.parameters:
                return None
            slots[name] = source
    return slots
