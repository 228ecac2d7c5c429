"""Where parameters meet no examples: what derives from them alone is theirs, too."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perex.capture.checkpoint import sparing
from perex.capture.doubts import Doubts
from perex.capture.forward import Forward
from perex.capture.functions import called, holders
from perex.capture.labels import Labels
from perex.capture.operators import FILLS, in_place, out_of_place
from perex.capture.parameters import Entry, Shared
from perex.capture.refusals import Refusals
from perex.capture.spread import SPREADS, origin_of
from perex.capture.taps import Guard
from perex.rules.broadcast import fill
from perex.rules.call import pack, unpack


class Deriving:
    """Runs operators on parameters and constants, and puts guards behind what they give.

    Args:
        forward: the forward that is running.
        labels: of its tensors.
        doubts: about constants.
        refuse: makes errors.
        spared: has the running checkpoint, if there is one, find all this again when it recomputes.
    """

    def __init__(
        self, forward: Forward, labels: Labels, doubts: Doubts, refuse: Refusals, spared: Callable[[], None]
    ) -> None:
        self.forward = forward
        self.labels = labels
        self.doubts = doubts
        self.refuse = refuse
        self.spared = spared

    def operator(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator on parameters and constants alone: its results are shared too."""
        if func is Tensor.detach_ and isinstance(held := self.labels.of(args[0]), Shared):
            if held.tensor._is_view():  # torch refuses that, but what stands for it is none
                return func(held.tensor)
            out = func(*args)  # from here on it is a constant
            self.labels.mark(args[0], None)
            self.doubts.made(args)
            return out
        if in_place(func) and args and isinstance(args[0], Tensor) and self.labels.source(args[0]) is None:
            return self.written(func, args, kwargs)
        tensors: list[Tensor] = []
        template = pack((args, kwargs), tensors)
        stand_ins = [self.labels.stand_in(tensor) for tensor in tensors]
        run_args, run_kwargs = unpack(template, stand_ins)
        out = called(func, run_args, run_kwargs, [*stand_ins, *holders(run_args)], self.forward, self.refuse)
        spared = sparing()
        if spared:
            self.spared()
        entries: dict[Entry, Tensor] = {}
        for tensor in tensors:
            source = self.labels.source(tensor)
            if isinstance(source, Shared):
                spared = spared or source.spared
                entries.update(zip(source.entries, source.stand_ins, strict=True))
            elif source is not None:
                entries[source] = self.labels.parameters.read(source)
        self.labels.derived.update(entries)
        if args and (in_place(func) or func is Tensor.__setitem__):
            self.labels.rewritten = True
            if isinstance(args[0], Tensor) and isinstance(held := self.labels.of(args[0]), Shared):
                made_of = tuple(entries), tuple(entries.values())
                self.labels.mark(args[0], Shared(held.tensor, *made_of, spared=spared))
                if self.labels.apart:
                    self.labels.bring_up(args[0])
        same = {id(stand_in): tensor for stand_in, tensor in zip(stand_ins, tensors, strict=True)}
        origin = None if in_place(func) or func is Tensor.__setitem__ else origin_of(self.labels, func, args, kwargs)
        shown = self.labels.source(args[0]) if func in SPREADS and args else None
        count = itertools.count()
        names = ", ".join(entry.name for entry in entries)

        def guarded(tensor: Tensor) -> Tensor:
            index = next(count)
            if id(tensor) in same:  # an in-place operator, or one that had nothing to do
                return same[id(tensor)]
            if not tensor.requires_grad:
                self.doubts.made([tensor])
                return tensor
            held: Tensor = Guard.apply(self.forward, names, self.labels.parameters.param_grads, tensor)
            made = None if origin is None else origin._replace(place=index, version=held._version)
            again = shown if isinstance(shown, Shared) else None
            made_of = tuple(entries), tuple(entries.values())
            self.labels.mark(held, Shared(tensor, *made_of, origin=made, shown=again, spared=spared))
            return held

        produced: list[Tensor] = []
        template = pack(out, produced)
        if not produced and isinstance(out, tuple):  # a named result, as `torch.max` has
            return type(out)(map(guarded, out))
        return unpack(template, [guarded(tensor) for tensor in produced])

    def written(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run an operator that writes parameters into a constant: one out of place, and a copy of what it gives.

        From there on the constant derives from parameters; so does what it is a view of.
        """
        target = args[0]
        replacement = fill if func in FILLS else out_of_place(func)
        base = target._base
        if replacement is None or base is not None and base.requires_grad:
            what = "a constant" if base is None else "a view of one"
            raise self.refuse.unsupported(func, f"works in place on {what} and parameters: assign its result instead")
        before = target.clone()  # the operator may have saved it
        self.labels.mark(before, self.labels.of(target))
        result = self.operator(replacement, (before, *(args[1:2] if replacement is fill else args[1:])), kwargs)
        if replacement is fill:  # which shows the value, and that may change
            result = self.operator(Tensor.clone, (result,), {})
        if result.dtype != target.dtype:
            result = self.operator(Tensor.to, (result, target.dtype), {})
        if base is None:
            self.labels.written(target, result)
            return target
        place = target.size(), target.stride(), target.storage_offset()
        self.labels.written(base, self.operator(torch.as_strided_scatter, (base, result, *place), {}))
        shown = self.operator(torch.as_strided, (base, *place), {})  # later writes to either are to both
        self.labels.mark(target, self.labels.of(shown))
        return target
