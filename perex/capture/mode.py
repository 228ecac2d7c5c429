"""The function mode that sees every operator of a forward and taps those where parameters meet examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from perex.capture import families, views  # noqa: F401  (they fill the table of families)
from perex.capture.axis import Axis, Label, Lost
from perex.capture.carry import FAMILIES, Operation, carry, tensors_in
from perex.capture.forward import Forward
from perex.capture.operators import PASSED_OVER, READS_FIRST, body, composite, in_place, out_of_place
from perex.capture.parameters import Entry, Parameters, Shared, Source
from perex.capture.taps import Guard, Tap
from perex.errors import ExamplesMixError, PerexError, UnsupportedError
from perex.rules.broadcast import fill
from perex.rules.call import Call, Ref, pack, unpack
from perex.rules.general import GENERAL
from perex.rules.registry import OPERATORS, Rule

Operator = Callable[..., Any]

FAMILIES[fill] = families.aligned  # an operator of perex's own

BATCHED, SHARED, LOST, STRANGER, UNTRACKED = 1, 2, 4, 8, 16


class Capture(TorchFunctionMode):
    """Follows examples and parameters through the operators of one forward.

    A tensor is *batched* (its label says which axis holds the examples), *shared* (derived from tracked
    parameters alone), *lost* (examples can no longer be told apart), or unlabelled: a constant. Where shared
    meets batched, the operator's result is tapped; see `meet`.

    Args:
        parameters: the model's parameters.
        forward: the forward that is running.
        key: the attribute under which tensors carry their label.
        where: gives the path of the module that is running.
    """

    def __init__(self, parameters: Parameters, forward: Forward, key: str, where: Callable[[], str]) -> None:
        super().__init__()
        self.parameters = parameters
        self.forward = forward
        self.key = key
        self.where = where
        self.active = True
        self.opaque: object | None = None  # the running module that a rule of its own covers
        self.inputs: list[Tensor] = []
        self.labelled: list[Tensor] = []  # tensors that are not this forward's own: cleaned when it ends

    # Labels

    def label(self, tensor: Tensor) -> Axis | Lost | Shared | None:
        """What is known of a tensor in this forward."""
        number, label = getattr(tensor, self.key, (None, None))
        return label if number == self.forward.number else None

    def batch_label(self, tensor: Tensor) -> Label:
        """The label, as far as examples are concerned."""
        label = self.label(tensor)
        return None if isinstance(label, Shared) else label

    def mark(self, tensor: Tensor, label: Axis | Lost | Shared | None) -> None:
        """Give a tensor its label."""
        if label is not None:
            setattr(tensor, self.key, (self.forward.number, label))
        elif hasattr(tensor, self.key):
            delattr(tensor, self.key)

    def mark_foreign(self, tensor: Tensor, label: Axis | Lost | Shared | None) -> None:
        """Label a tensor that outlives the forward: an input, or a buffer written in place."""
        self.labelled.append(tensor)
        self.mark(tensor, label)

    def clean(self) -> None:
        """Take the labels off tensors that are not this forward's own."""
        for tensor in self.labelled:
            self.mark(tensor, None)
        self.labelled.clear()

    def kind(self, tensor: Tensor) -> int:
        """One of the kinds above, or 0 for a constant."""
        label = self.label(tensor)
        if label is not None:
            return BATCHED if isinstance(label, Axis) else LOST if isinstance(label, Lost) else SHARED
        entry = self.parameters.entries.get(id(tensor))
        if entry is not None:
            return SHARED if entry.tracked else 0 if self.parameters.param_grads else UNTRACKED
        return STRANGER if tensor.grad_fn is not None else 0

    def source(self, tensor: Tensor) -> Source | None:
        """The parameter, or derived tensor, that an argument is."""
        entry = self.parameters.entries.get(id(tensor))
        if entry is not None:
            return entry if entry.tracked else None
        label = self.label(tensor)
        return label if isinstance(label, Shared) else None

    def stand_in(self, tensor: Tensor) -> Tensor:
        """What the operator gets for an argument."""
        entry = self.parameters.entries.get(id(tensor))
        if entry is not None:
            return self.parameters.read(entry)
        label = self.label(tensor)
        return label.tensor if isinstance(label, Shared) else tensor

    # Operators

    def __torch_function__(
        self, func: Operator, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator, and follow what it does."""
        kwargs = kwargs or {}
        if not self.active or func in PASSED_OVER:
            return func(*args, **kwargs)
        kinds = 0
        for tensor in tensors_in(args[:1] if func in READS_FIRST else (args, kwargs)):
            kinds |= self.kind(tensor)
        if not kinds:
            return func(*args, **kwargs)
        if self.opaque is not None:
            return self.run_plain(func, args, kwargs)
        if func is F.embedding_bag and kinds & SHARED:
            kinds |= self.settle_bags(args, kwargs)
        if composite(func) and func not in OPERATORS:
            with self:
                return body(func)(*args, **kwargs)
        if func is Tensor.__setitem__:
            return self.set_item(kinds, *args)
        if not torch.is_grad_enabled():
            return self.follow(func, args, kwargs, args, kwargs)
        if kinds & SHARED and kinds & (BATCHED | LOST | STRANGER):
            return self.meet(func, args, kwargs, kinds)
        if kinds & SHARED:
            return self.derive(func, args, kwargs)
        if kinds & STRANGER and kinds & BATCHED:
            self.estranged(func)
        if kinds & UNTRACKED:
            tensors: list[Tensor] = []
            template = pack((args, kwargs), tensors)
            run_args, run_kwargs = unpack(template, [self.stand_in(tensor) for tensor in tensors])
            return self.follow(func, args, kwargs, run_args, run_kwargs)
        return self.follow(func, args, kwargs, args, kwargs)

    def run_plain(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator inside a module that is one operator to perex."""
        tensors: list[Tensor] = []
        template = pack((args, kwargs), tensors)
        values = [self.stand_in(tensor) for tensor in tensors]
        if not self.parameters.param_grads:
            shared = [self.source(tensor) is not None for tensor in tensors]
            values = [v.detach() if s else v for v, s in zip(values, shared, strict=True)]
        run_args, run_kwargs = unpack(template, values)
        return func(*run_args, **run_kwargs)

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
        if bags != self.forward.batch and not self.forward.uses:
            self.forward.batch = bags
            for tensor in self.inputs:
                self.mark_foreign(tensor, Axis(0) if tensor.dim() and len(tensor) == bags else None)
        return BATCHED

    def follow(
        self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], run_args: Any, run_kwargs: Any
    ) -> Any:
        """Run an operator without wanted gradients, and label its results."""
        before = self.batch_label(args[0]) if in_place(func) and isinstance(args[0], Tensor) else None
        out = func(*run_args, **run_kwargs)
        labels = self.labels_of(func, args, kwargs, out)
        for tensor, label in zip(tensors_in(out), labels, strict=True):
            if torch.is_grad_enabled():
                self.refuse_mixed(label)
            if in_place(func) and tensor is args[0]:
                if label != before:
                    self.rewrite(tensor, label)
            else:
                self.mark(tensor, label)
        return out

    def labels_of(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Label]:
        """One label for each tensor in the result of an operator."""
        produced = list(tensors_in(out))
        if not produced:
            return []
        name = getattr(func, "__name__", str(func))
        name = name.strip("_") if name.startswith("__") else name.rstrip("_")
        found = carry(Operation(name, args, kwargs, out, self.batch_label, self.forward.batch), func)
        labels = found if isinstance(found, list) else [found] * len(produced)
        return [self.checked(tensor, label, name) for tensor, label in zip(produced, labels, strict=True)]

    def checked(self, tensor: Tensor, label: Label, name: str) -> Label:
        """A label, if the tensor has a dimension of the size it says."""
        if isinstance(label, Axis):
            size = label.size(self.forward.batch)
            if not 0 <= label.dim < tensor.dim() or tensor.size(label.dim) != size:
                return Lost("unknown", f"`{name}` has a result of an unexpected shape, {tuple(tensor.shape)}")
        return label

    def rewrite(self, tensor: Tensor, label: Label) -> None:
        """Label a tensor that was changed in place, and the tensor that it is a view of."""
        self.mark_foreign(tensor, label)
        base = tensor._base
        if base is not None and label is not None and self.label(base) is None:
            self.mark_foreign(base, Lost("unknown", "a view of a constant was overwritten with examples"))

    def derive(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator on parameters and constants alone: its results are shared too."""
        tensors: list[Tensor] = []
        template = pack((args, kwargs), tensors)
        stand_ins = [self.stand_in(tensor) for tensor in tensors]
        run_args, run_kwargs = unpack(template, stand_ins)
        out = func(*run_args, **run_kwargs)
        entries: dict[Entry, Tensor] = {}
        for tensor in tensors:
            source = self.source(tensor)
            if isinstance(source, Shared):
                entries.update(zip(source.entries, source.stand_ins, strict=True))
            elif source is not None:
                entries[source] = self.parameters.read(source)
        same = {id(stand_in): tensor for stand_in, tensor in zip(stand_ins, tensors, strict=True)}
        names = ", ".join(entry.name for entry in entries)

        def guarded(tensor: Tensor) -> Tensor:
            if id(tensor) in same:  # an in-place operator, or one that had nothing to do
                return same[id(tensor)]
            if not tensor.requires_grad:
                return tensor
            held = Guard.apply(self.forward, names, self.parameters.param_grads, tensor)
            self.mark(held, Shared(tensor, tuple(entries), tuple(entries.values())))
            return held

        produced: list[Tensor] = []
        template = pack(out, produced)
        if not produced and isinstance(out, tuple):  # a named result, as `torch.max` has
            return type(out)(map(guarded, out))
        return unpack(template, [guarded(tensor) for tensor in produced])

    # Where parameters meet examples

    def meet(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], kinds: int) -> Any:
        """Run an operator on parameters and examples, and tap its results."""
        if kinds & STRANGER:
            self.estranged(func)
        if in_place(func):
            replacement = None if func is Tensor.copy_ else out_of_place(func)
            target = args[0]
            if func is Tensor.copy_:
                written = self.meet(fill, (target, args[1]), {}, kinds)
            elif replacement is not None:
                written = self.meet(replacement, args, kwargs, kinds)
            else:
                raise self.unsupported(func, "works in place on examples and parameters")
            target.copy_(written)
            self.rewrite(target, self.label(written))  # type: ignore[arg-type]
            return target
        if kwargs.get("out") is not None:
            raise self.unsupported(func, "writes to `out=`: assign its result instead")
        return self.tap(func, args, kwargs, OPERATORS.get(func))

    def tap(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], rule: Rule | None) -> Any:
        """Run an operator, record what its rule needs, and put a tap behind its results."""
        tensors: list[Tensor] = []
        packed_args, packed_kwargs = pack((args, kwargs), tensors)
        sources = [self.source(tensor) for tensor in tensors]
        axes = [label if isinstance(label := self.label(t), Axis) else None for t in tensors]
        slots: dict[Any, Source] | None = None
        if rule is not None:
            slots = self.slots_for(rule, packed_args, packed_kwargs, tensors, sources, axes)
        if slots is None:
            rule, slots = GENERAL, {i: source for i, source in enumerate(sources) if source is not None}
        assert rule is not None
        values = [self.stand_in(tensor) for tensor in tensors]
        if not self.parameters.param_grads:
            values = [v if s is None else v.detach() for v, s in zip(values, sources, strict=True)]
        out = func(*unpack(packed_args, values), **unpack(packed_kwargs, values))
        labels = self.labels_of(func, args, kwargs, out)
        for label in labels:
            self.refuse_mixed(label)
            if not isinstance(label, Axis):
                raise self.lost(label, func)
        self.refuse_random(func, args, kwargs)
        produced: list[Tensor] = []
        out_template = pack(out, produced)
        call = Call(
            forward=self.forward,
            where=self.where(),
            func=func,
            rule=rule,
            args=packed_args,
            kwargs=packed_kwargs,
            axes=axes,
            slots=slots,
            rows={},
            shapes=[tensor.shape for tensor in tensors],
            kept=[],
            out_axes=labels,  # type: ignore[arg-type]
            out_shapes=[tensor.shape for tensor in produced],
        )
        if rule is GENERAL:
            others = [i for i, axis in enumerate(axes) if axis is None]
            call.rows = self.aligned_rows(func, args, kwargs, out, labels, tensors, others)
            call.kept = list(range(len(tensors)))
        else:
            saves = (call.template(name) for name in rule.saves)
            call.kept = sorted({ref.index for ref in saves if isinstance(ref, Ref)})
        self.forward.entered(call)
        saved = [values[i].detach() if sources[i] is not None else values[i] for i in call.kept]
        tapped = Tap.apply(call, saved, self.forward.sentinel, *produced)
        for tensor, label in zip(tapped, labels, strict=True):
            self.mark(tensor, label)
        if isinstance(out, tuple) and not isinstance(out_template, tuple):
            return type(out)(tapped)
        return unpack(out_template, tapped)

    def tap_module(
        self, module: nn.Module, rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Any:
        """Put a tap behind the output of a module with a rule of its own."""
        tensors: list[Tensor] = []
        packed_args, packed_kwargs = pack((args, kwargs), tensors)
        axes = [label if isinstance(label := self.label(t), Axis) else None for t in tensors]
        axis = next((axis for axis in axes if axis is not None), None)
        slots: dict[Any, Source] = {}
        for name, parameter in module.named_parameters():
            source = self.source(parameter)
            if source is not None:
                slots[name] = source
        if not isinstance(out, Tensor) or axis is None or out.dim() <= axis.dim:
            raise self.unsupported(type(module), "has a rule, but does not turn examples into one tensor of them")
        if out.size(axis.dim) != axis.size(self.forward.batch):
            raise self.unsupported(type(module), "has a rule, but moves the batch axis")
        call = Call(
            forward=self.forward,
            where=self.where(),
            func=type(module),
            rule=rule,
            args=packed_args,
            kwargs=packed_kwargs,
            axes=axes,
            slots=slots,
            rows={},
            shapes=[tensor.shape for tensor in tensors],
            kept=[],
            out_axes=[axis],
            out_shapes=[out.shape],
        )
        saves = (call.template(name) for name in rule.saves)
        call.kept = sorted({ref.index for ref in saves if isinstance(ref, Ref)})
        self.forward.entered(call)
        (tapped,) = Tap.apply(call, [tensors[i] for i in call.kept], self.forward.sentinel, out)
        self.mark(tapped, axis)
        return tapped

    def slots_for(
        self,
        rule: Rule,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: Sequence[Tensor],
        sources: Sequence[Source | None],
        axes: Sequence[Axis | None],
    ) -> dict[Any, Source] | None:
        """The rule's parameters among the arguments, or None where the rule does not cover the call."""
        if len(args) > len(rule.arguments) or any(name not in rule.arguments for name in kwargs):
            return None
        named = {**dict(zip(rule.arguments, args, strict=False)), **kwargs}
        by_name = {name: ref.index for name, ref in named.items() if isinstance(ref, Ref)}
        if len(by_name) != len(tensors) or any(tensor.is_complex() for tensor in tensors):
            return None
        if not rule.applies({name: tensors[index] for name, index in by_name.items()}):
            return None
        slots: dict[Any, Source] = {}
        for name, index in by_name.items():
            source = sources[index]
            if source is not None:
                if name not in rule.parameters:
                    return None
                slots[name] = source
        return slots

    def aligned_rows(
        self,
        func: Operator,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        labels: list[Label],
        tensors: Sequence[Tensor],
        candidates: Sequence[int],
    ) -> dict[int, Axis]:
        """Tensors without a batch axis whose rows are aligned with the examples all the same.

        `token.expand(B, -1, -1)` is derived from a parameter alone, and the first state of an LSTM is constant,
        yet row b is read by example b. Whether a
        dimension of the batch's size is such an axis shows when it is labelled as one: the result's axis
        stays as it was exactly when the operator matches that dimension with the examples.
        """
        rows: dict[int, Axis] = {}
        name = getattr(func, "__name__", str(func)).strip("_")
        for index in candidates:
            tensor = tensors[index]
            for axis in {label for label in labels if isinstance(label, Axis)}:
                for dim, size in enumerate(tensor.shape):
                    if size != axis.size(self.forward.batch):
                        continue
                    trial = axis.moved(dim)

                    def labels_with(t: Tensor, tensor: Tensor = tensor, trial: Axis = trial) -> Label:
                        return trial if t is tensor else self.batch_label(t)

                    operation = Operation(name, args, kwargs, out, labels_with, self.forward.batch)
                    found = carry(operation, func)
                    if (found if isinstance(found, list) else [found] * len(labels)) == labels:
                        rows[index] = trial
        return rows

    def set_item(self, kinds: int, target: Tensor, index: Any, value: Any) -> None:
        """`target[index] = value`: label what is written, and tap it where a parameter is written to examples."""
        shared = isinstance(value, Tensor) and self.source(value) is not None
        if torch.is_grad_enabled() and shared and self.kind(target) == BATCHED:
            piece = target[index]
            label = self.labels_of(Tensor.__getitem__, (target, index), {}, piece)[0]
            self.mark(piece, label)
            target[index] = self.meet(fill, (piece, value), {}, kinds)
            return
        if torch.is_grad_enabled() and self.kind(target) == SHARED and not (kinds & BATCHED):
            self.derive(Tensor.__setitem__, (target, index, value), {})
            return
        if torch.is_grad_enabled() and shared:
            raise self.unsupported(Tensor.__setitem__, "writes a parameter into a tensor that holds no examples")
        before = self.label(target)
        target[index] = value
        if kinds & LOST or isinstance(before, Shared):
            self.rewrite(target, Lost("unknown", "`__setitem__` writes what perex cannot follow"))
            return
        if not isinstance(value, Tensor) or self.batch_label(value) is None:
            return
        held = self.written_axis(target, index, value)
        if before is None or before != held:
            self.rewrite(target, held)

    def written_axis(self, target: Tensor, index: Any, value: Tensor) -> Label:
        """The axis of a tensor after rows of examples were written into it."""
        piece = target[index]
        own = self.batch_label(value)
        before = self.batch_label(target)
        assert isinstance(own, Axis)
        want = own.moved(own.dim - value.dim() + piece.dim())
        for dim, size in enumerate(target.shape):
            trial = own.moved(dim)
            if size != own.size(self.forward.batch) or (before is not None and before != trial):
                continue

            def labels_with(t: Tensor, trial: Axis = trial) -> Label:
                return trial if t is target else self.batch_label(t)

            operation = Operation("getitem", (target, index), {}, piece, labels_with, self.forward.batch)
            if carry(operation, Tensor.__getitem__) == want:
                return trial
        if self.forward.batch == 1 and target.dim():
            return Axis(0, 1, target.size(0))
        kind = "unknown" if before is None else "mixed"
        return Lost(kind, "`__setitem__` writes rows of examples where perex cannot follow them")

    # Refusals

    def place(self) -> str:
        """The running module, for messages."""
        return f"module '{self.where()}'" if self.where() else "the model's own forward"

    def refuse_mixed(self, label: Label) -> None:
        """Raise where an operator mixes examples."""
        if isinstance(label, Lost) and label.kind in ("mixed", "refused"):
            raise ExamplesMixError(
                f"In {self.place()}, {label.why}. Examples of a batch must not influence each other, or none has "
                "a gradient of its own."
            )

    def lost(self, label: Label, func: Operator) -> PerexError:
        """The error for a parameter that meets rows of which perex lost track."""
        why = label.why if isinstance(label, Lost) else "its result has no batch axis"
        kind = ExamplesMixError if isinstance(label, Lost) and label.kind == "reduced" else UnsupportedError
        name = getattr(func, "__name__", str(func))
        return kind(
            f"In {self.place()}, a tracked parameter is used by `{name}` together with a value whose examples "
            f"perex cannot tell apart: {why}. Leave the parameter out with `params=`, or rewrite that step."
        )

    def unsupported(self, func: Operator, why: str) -> PerexError:
        """The error for an operator that perex does not follow."""
        return UnsupportedError(f"In {self.place()}, `{getattr(func, '__name__', func)}` {why}.")

    def estranged(self, func: Operator) -> None:
        """Raise where a tensor of unknown origin is used."""
        raise self.unsupported(
            func,
            "reads a tensor that requires grad but comes from code perex cannot see into: a scripted or compiled "
            "function, a function transform, or something computed outside the model's forward. Compute it in "
            "plain operators, or detach it",
        )

    def refuse_random(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise where the general path would draw other random numbers than the forward did."""
        name = getattr(func, "__name__", "")
        recurrent = name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
        if recurrent and len(args) == 9 and args[5] > 0 and args[6]:
            raise self.unsupported(
                func,
                "has dropout inside, whose random choice cannot be repeated. Set its dropout to 0, or call "
                "`.eval()` on the module",
            )
        dropout = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
        if name == "rrelu" or name == "scaled_dot_product_attention" and dropout > 0:
            raise self.unsupported(func, "draws random numbers together with a parameter")
