"""The function mode that sees every operator of a forward, and says what happens to examples and parameters in it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from perex.capture.axis import Axis, Lost
from perex.capture.carry import CHOOSES, COUNTS, tensors_in
from perex.capture.deriving import Deriving
from perex.capture.doubts import FAINT, UNSEEN, Doubts, remember, slice_ends
from perex.capture.forward import Forward
from perex.capture.hooked import hooked
from perex.capture.labels import (
    BATCHED,
    CONSTANT,
    COUNTED,
    FOREIGN,
    LOST,
    SHARED,
    STRANGER,
    UNTRACKED,
    Labels,
    Mark,
    plain_name,
)
from perex.capture.meeting import Meeting
from perex.capture.memo import ALIKE, Memo
from perex.capture.operators import (
    BRANCHES,
    FILLS,
    NUMBERS,
    PARTS,
    PASSED_OVER,
    READS_FIRST,
    RESHAPES,
    UNFOLLOWED,
    body,
    by_holders,
    composite,
    in_place,
    out_of_place,
)
from perex.capture.parameters import Parameters, Shared
from perex.capture.record import Record, draws
from perex.capture.refusals import Refusals
from perex.capture.rewrites import rewritten
from perex.capture.spread import Made, Spread
from perex.capture.suspects import of_user
from perex.capture.watching import mark_watched, watch, watched
from perex.capture.writes import Writes
from perex.rules.broadcast import fill
from perex.rules.call import pack, unpack
from perex.rules.registry import OPERATORS

Operator = Callable[..., Any]


BLANKS = frozenset({torch.zeros_like, torch.empty_like, torch.ones_like, torch.full_like})

WRITES_ROWS = frozenset(
    getattr(Tensor, name) for name in "index_add_ index_copy_ index_put_ scatter_ scatter_add_ scatter_reduce_".split()
)
"""In-place operators that say which rows they write."""


INDEXES = (Tensor.__getitem__, Tensor.__setitem__)


class Capture(TorchFunctionMode):
    """Follows examples and parameters through the operators of one forward.

    A tensor is *batched* (its label says which axis holds the examples), *shared* (derived from tracked
    parameters alone), *lost* (examples can no longer be told apart), or unlabelled: a constant. Where shared
    meets batched, the operator's result is tapped; see `perex.capture.meeting`.

    Args:
        parameters: the model's parameters.
        forward: the forward that is running.
        key: the attribute under which tensors carry their label.
        where: gives the path of the module that is running.
        recomputing: makes the context in which a checkpoint of a forward runs again.
        memo: of calls in earlier forwards.
    """

    def __init__(
        self,
        parameters: Parameters,
        forward: Forward,
        key: str,
        where: Callable[[], str],
        recomputing: Callable[[Forward, tuple[Any, ...]], AbstractContextManager[None]],
        memo: Memo,
    ) -> None:
        super().__init__()
        self.memo = memo
        self.parameters = parameters
        self.forward = forward
        forward.half = memo.half
        self.refuse = Refusals(where)
        doubtful = partial(remember, forward, self.refuse)
        self.labels = Labels(parameters, key, forward.number, forward.batch, doubtful)
        self.doubts = Doubts(forward, self.refuse, self.labels)
        self.meeting = Meeting(forward, self.labels, self.refuse, partial(recomputing, forward))
        self.deriving = Deriving(forward, self.labels, self.doubts, self.refuse, self.meeting.spared)
        self.active = True
        self.record: Record | None = None  # of examples to run alone later
        self.opaque: object | None = None  # the running module that a rule of its own covers
        self.inputs: list[Tensor] = []
        self.kept: set[int] = set()  # tensors from an earlier call of this forward, by what part of the model called it
        self.ambiguous: str | None = None  # inputs of several sizes along the batch dimension
        self.made: Made = {}  # rows that were made again

    def __torch_function__(
        self, func: Operator, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator, and follow what it does."""
        kwargs = kwargs or {}
        if not self.active:
            return func(*args, **kwargs)
        if types and (out := by_holders(self, func, types, args, kwargs)) is not NotImplemented:
            return out
        if func in PASSED_OVER:
            self.forward.retains = self.forward.retains or func is Tensor.retain_grad
            return func(*args, **kwargs)
        if self.record is None:
            return self.handle(func, args, kwargs)
        self.forward.functions += [t.grad_fn for t in tensors_in(*args, kwargs) if of_user(t.grad_fn)]
        if not draws(func, args, kwargs):
            out = self.handle(func, args, kwargs)
            self.notice(tensors_in(out))
            return out
        given = self.record.given(self.refuse.where(), self.labels, tensors_in(*args, kwargs))
        record, self.record = self.record, None  # what it is made of is no draw of its own
        try:
            out = self.handle(func, args, kwargs)
        finally:
            self.record = record
        results = [(tensor, self.labels.batch_label(tensor)) for tensor in tensors_in(out)]
        record.drew(func, given, results)
        return out

    def notice(self, results: list[Tensor]) -> None:
        """Keep in mind how coarse numbers are, in a forward that is to be compared, whoever has parameters there."""
        for tensor in results:
            if self.record is not None:
                self.record.noticed(tensor)
            if tensor.dtype == torch.float16 and tensor.requires_grad:
                self.memo.half = self.forward.half = True

    def wants_function(self, tensors: list[Tensor]) -> bool:
        """Whether an autograd function takes parameters, and so is an operator to look at."""
        return self.active and torch.is_grad_enabled() and any(self.labels.source(t) is not None for t in tensors)

    def inside_function(self, func: Operator, tensors: list[Tensor]) -> None:
        """Refuse an autograd function that reads parameters in its forward which it was not given."""
        entries = (self.parameters.entries.get(id(tensor)) for tensor in tensors)
        for found in (entry for entry in entries if entry is not None and entry.tracked):
            raise self.refuse.unsupported(
                func,
                f"reads parameter '{found.name}', which is not the tensor that it was given, or not one of them: "
                "perex cannot follow functions that call modules. If it is a checkpoint, use torch.utils.checkpoint",
            )

    def handle(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Follow one operator."""
        if func in ALIKE and self.record is None and self.opaque is None and torch.is_grad_enabled():
            return self.alike(func, args, kwargs)
        return self.look_at(func, args, kwargs)

    def alike(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Follow one operator as the last one that was called alike, or find out about it and remember that."""
        if torch._C._are_functorch_transforms_active():
            return self.look_at(func, args, kwargs)
        form, places = self.memo.form(func, args, kwargs, self.labels, self.doubts)
        known = self.memo.known.get(form)
        if known is not None:
            return self.meeting.again(known, func, args, kwargs, places)
        before, self.meeting.latest = (self.forward.strength, self.labels.valued), None
        out = self.look_at(func, args, kwargs)
        if form is not None and (self.forward.strength, self.labels.valued) == before:
            self.memo.learn(form, out, args, self.labels, self.meeting.latest)
        return out

    def look_at(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Find out where examples are in what one operator gives."""
        labels, doubts, kinds = self.labels, self.doubts, 0
        marks: list[tuple[Tensor, Mark]] = []
        if func in INDEXES and len(args) > 1 and (ends := slice_ends(args[1])):
            self.doubts.look_at_slices(ends)
        for tensor in tensors_in(args[0]) if func in READS_FIRST else tensors_in(*args, kwargs):
            mark = labels.of(tensor)
            kind = labels.kind(tensor, mark)
            kinds |= FOREIGN if not kind and doubts.foreign(tensor) else kind
            marks.append((tensor, mark))
        if self.record is not None and self.kept and any(id(tensor) in self.kept for tensor, _ in marks):
            self.record = self.forward.record = None  # one example alone would read all of it
        if not kinds & ~FOREIGN:
            return self.constant(func, args, kwargs, bool(kinds))
        if kinds & STRANGER and not torch.is_grad_enabled():  # numbers from where perex cannot see, then
            kinds |= FOREIGN
        if kinds & FOREIGN and kinds & (BATCHED | LOST | COUNTED | SHARED):
            doubts.add(plain_name(func), UNSEEN, FAINT)
        if func in NUMBERS:
            return self.doubts.take_out(func, args, kwargs)
        if func in BRANCHES:
            return self.doubts.branch(func, args, kwargs)
        if func in UNFOLLOWED:
            return doubts.unfollowed(func, args, kwargs)
        if func is Tensor.register_hook:
            return hooked(self, func, args, kwargs)
        if func in PARTS:
            with self:
                PARTS[func](args[0]).copy_(args[1])
            return None
        if self.opaque is not None:
            return self.run_opaque(func, args, kwargs)
        if func is F.embedding_bag and kinds & SHARED:
            kinds |= self.settle_bags(args, kwargs)
        if composite(func) and func not in OPERATORS:
            with self:
                return body(func)(*args, **kwargs)
        replacement = None
        if kinds & SHARED or self.record is not None:
            replacement = rewritten(func, args, bool(kinds & SHARED))
        if replacement is not None:
            with self:
                return replacement(*args, **kwargs)
        if kinds & STRANGER and kinds & (SHARED | BATCHED) and torch.is_grad_enabled():
            raise self.refuse.stranger(func)
        if func is Tensor.__setitem__:
            return Writes(self).item(kinds, *args)
        if kinds & SHARED and func.__name__ in RESHAPES and isinstance(labels.of(args[0]), Shared):
            raise self.refuse.unsupported(
                func, "changes the shape of a tensor derived from parameters in place: assign the result instead"
            )
        if not torch.is_grad_enabled():
            if kinds & SHARED and labels.apart and in_place(func) and isinstance(labels.of(args[0]), Shared):
                why = "writes without gradients into a constant that parameters were written into: assign its result"
                raise self.refuse.unsupported(func, why)
            return self.follow(func, args, kwargs, marks, kinds)
        if kinds & SHARED and torch._C._are_functorch_transforms_active():
            raise self.refuse.unsupported(
                func,
                "uses a parameter inside torch.func (vmap, grad, jvp, ...): call the layer outside it, or detach first",
            )
        if kinds & SHARED and kinds & (BATCHED | LOST):
            return self.meet(func, args, kwargs)
        if kinds & SHARED and (not kinds & COUNTED or self.chosen(func, marks)):
            return self.deriving.operator(func, args, kwargs)
        if kinds & SHARED:
            return self.meet(func, args, kwargs)
        return self.follow(func, args, kwargs, marks, kinds, stand_ins=bool(kinds & UNTRACKED))

    # Neither

    def constant(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], foreign: bool) -> Any:
        """Run an operator on constants alone."""
        out = func(*args, **kwargs)
        if not foreign:
            self.doubts.made(tensors_in(out))
        elif in_place(func) or func is Tensor.__setitem__:
            self.doubts.unmade(args[0])
        return out

    # Examples without parameters

    def follow(
        self,
        func: Operator,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        marks: list[tuple[Tensor, Mark]],
        kinds: int,
        stand_ins: bool = False,
    ) -> Any:
        """Run an operator without wanted gradients, and label its results; what is made of a stranger is one."""
        strange = bool(kinds & STRANGER)
        targets = args[:1] if in_place(func) else tensors_in(kwargs["out"]) if kwargs.get("out") is not None else ()
        written = {id(tensor): self.labels.batch_label(tensor) for tensor in targets if isinstance(tensor, Tensor)}
        blank = [self.labels.blank(tensor) for tensor in targets if isinstance(tensor, Tensor)]
        if stand_ins:
            out = self.run(func, args, kwargs, detach=False)
        else:
            out = func(*args, **kwargs)
        produced = tensors_in(out)
        if func in WRITES_ROWS and any(blank) and written[id(args[0])] is not None:
            marks = [(tensor, None if tensor is args[0] else mark) for tensor, mark in marks]
        for tensor, label in zip(
            produced, self.labels.of_results(func, args, kwargs, out, produced, marks), strict=True
        ):
            if func in BLANKS and isinstance(label, Axis):
                self.labels.blanked(tensor)
            if torch.is_grad_enabled():
                if isinstance(label, Lost):
                    label = self.refuse.placed(label)
                self.refuse.mixed(label)
                if isinstance(label, Lost) and tensor.requires_grad:
                    seen = any(mark is label and watched(source) for source, mark in marks)
                    if not seen or self.labels.spoils(label):
                        self.watch(tensor, label)
                    else:
                        mark_watched(tensor)
            if id(tensor) not in written:
                made_of_own = tensor.grad_fn is not None or tensor._base is not None
                mark = CONSTANT if label is None and made_of_own and not strange else label
                if mark is None and not kinds & (FOREIGN | STRANGER):
                    self.doubts.made([tensor])
                whole = not tensor.is_floating_point()
                self.labels.mark(tensor, mark, whole and self.labels.from_real(plain_name(func), marks))
            elif label != written[id(tensor)]:
                self.labels.rewrite(tensor, label)
            if isinstance(label, Lost) and label.kind not in ("reduced", *COUNTS) and in_place(func):
                self.labels.spoil(tensor, label)
        return out

    def watch(self, tensor: Tensor, label: Lost, always: bool = False) -> None:
        """Make it an error if a loss depends on a tensor of which perex cannot say whose it is."""
        refuse = self.refuse.when_differentiated(self.forward, label)
        if label.kind == "reduced" and not always:  # as a loss of the batch is, but none of one example
            refuse = partial(self.forward.summed, self.refuse.error(label))
        watch(tensor, refuse)

    def run(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], detach: bool) -> Any:
        """Run an operator on stand-ins, perhaps detached where gradients are wanted."""
        tensors: list[Tensor] = []
        template = pack((args, kwargs), tensors)
        values = [self.labels.stand_in(tensor) for tensor in tensors]
        if detach:
            values = [v if self.labels.source(t) is None else v.detach() for v, t in zip(values, tensors, strict=True)]
        run_args, run_kwargs = unpack(template, values)
        return func(*run_args, **run_kwargs)

    def run_opaque(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator inside a module that is one operator to perex."""
        return self.run(func, args, kwargs, detach=not self.parameters.param_grads)

    def chosen(self, func: Operator, marks: list[tuple[Tensor, Mark]]) -> bool:
        """Whether counts only choose among parameters, as the experts that are called at all are chosen."""
        lost = next(mark for _, mark in marks if isinstance(mark, Lost))
        if plain_name(func) in CHOOSES:
            self.doubts.add(plain_name(func), lost)
            return True
        return False

    # Where parameters meet examples

    def meet(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator on parameters and examples, and tap its results; in place is out of place and a copy."""
        if kwargs.get("out") is not None:
            raise self.refuse.unsupported(func, "writes to `out=`: assign its result instead")
        if not in_place(func):
            spread = Spread(self.labels, self.meeting, self.call, self.made).arguments(func, args, kwargs)
            return self.meeting.operator(func, args, kwargs) if spread is None else self.call(func, *spread)
        target = args[0]
        if isinstance(self.labels.of(target), Shared):  # whose guard would take the gradient of what is written over
            why = "writes examples into a tensor derived from parameters: assign its result instead"
            raise self.refuse.unsupported(func, why)
        if func in FILLS:
            written = self.meeting.operator(fill, (target, args[1]), {})
        else:
            replacement = out_of_place(func)
            if replacement is None:
                raise self.refuse.unsupported(func, "works in place on examples and parameters")
            before = target.clone()  # the rule may read it again, and the target is about to change
            self.labels.mark(before, self.labels.of(target))
            written = self.meeting.operator(replacement, (before, *args[1:]), kwargs)
        self.labels.blank(target)
        target.copy_(written)
        self.labels.rewrite(target, self.labels.of(written))
        return target

    def call(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an operator as the model does."""
        with self:
            return func(*args, **kwargs)

    def settle_bags(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Bags given by offsets are the examples, whatever the first input's size had suggested.

        `model(ids, offsets)` begins with ids that have no batch axis. Until a parameter has met examples, the
        number of bags may still correct the batch size.
        """
        offsets = args[2] if len(args) > 2 else kwargs.get("offsets")
        if offsets is None:
            return 0
        last = args[9] if len(args) > 9 else kwargs.get("include_last_offset", False)
        bags = len(offsets) - bool(last)
        self.record = self.forward.record = None  # to run a bag alone, its ids would have to be cut out
        if bags != self.forward.batch and not self.forward.uses:
            self.forward.batch = self.labels.batch = bags
            for tensor in self.inputs:
                self.labels.mark(tensor, self.labels.plain(0) if tensor.dim() and len(tensor) == bags else None)
        return BATCHED
