"""What an example gets alone: a few examples of a batch are run again, each as a batch of one, and compared.

Labels say where examples are, but not what a number does that left torch, or a truth value that Python branched on;
nor can they see into code that runs elsewhere. So the first batch, and any batch whose inputs have new shapes, is
checked by what it computes: a `Record` keeps a few examples' rows wherever parameters meet them, and `replay` looks
whether they come out the same when the example is alone. Random draws are recorded too, and given out again.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from perex.capture.axis import Axis, Held, Label, Single
from perex.capture.carry import tensors_in
from perex.capture.labels import Labels, plain_name
from perex.capture.nest import tensors_of
from perex.capture.operators import body, composite, in_place
from perex.capture.parameters import Entry, Parameters, Shared
from perex.capture.rewrites import rewritten
from perex.capture.state import State, starting_from
from perex.rules.call import Call
from perex.rules.registry import OPERATORS

Rows = dict[int, Tensor]
"""What an example has of a tensor, in the shape that it has alone, by the example's number."""

DRAWS = frozenset(
    """
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout bernoulli rand randn randint randperm
    rand_like randn_like randint_like normal uniform exponential geometric cauchy log_normal random multinomial poisson
    rrelu scaled_dot_product_attention native_dropout
    """.split()
)
"""Operators that may draw random numbers."""


def draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator call draws random numbers."""
    name = plain_name(func)
    if name not in DRAWS:
        return False
    if "dropout" in name or name == "rrelu":
        last = {"rrelu": (3, "training", False)}.get(name, (2, "training", name in ("dropout",)))
        training = args[last[0]] if len(args) > last[0] else kwargs.get("train", kwargs.get(last[1], last[2]))
        return bool(training)
    if name == "scaled_dot_product_attention":
        return bool((args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)) > 0)
    return True


@dataclass
class Seen:
    """What the examples had at one place: `key` are the parameters that met them there."""

    where: str
    key: tuple[str, ...]
    rows: Rows


@dataclass
class Draw:
    """What a random operator gave: rows of examples, or one tensor for all; and the rows it was given."""

    name: str
    given: list[Seen]
    rows: list[Rows | Tensor]


class Record:
    """Keeps what a few examples of a batch have, while the model runs.

    Args:
        examples: their numbers.
        batch: number of examples in the batch, B.
        module: the module whose call it is.
        inputs: its `(args, kwargs)` for an example alone.
    """

    def __init__(
        self,
        examples: Sequence[int],
        batch: int,
        module: nn.Module,
        inputs: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]],
    ) -> None:
        self.examples = examples
        self.batch = batch
        self.module = module
        self.inputs = {b: inputs(b) for b in examples}
        self.seen: list[Seen] = []
        self.draws: list[Draw] = []
        self.outputs: list[Seen] = []
        self.versions: list[int] = []  # of the parameters before
        kinds = {p.device.type for p in module.parameters()} | {"cpu"}
        self.autocast = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]
        self.state = random.getstate(), np.random.get_state()
        self.before = State(module, copies=True)

    def rows(self, tensor: Tensor, held: Held) -> Rows:
        """The rows of the recorded examples in a tensor."""
        tensor = tensor.detach()
        if isinstance(held, Single):
            return {held.example: tensor.clone()} if held.example in self.examples else {}
        found = {}
        for b in self.examples:
            own = (held.ids(self.batch) == b).nonzero().flatten()
            found[b] = tensor.index_select(held.dim, own.to(tensor.device))
        return {b: rows for b, rows in found.items() if rows.numel()}

    def met(self, call: Call, results: Sequence[Tensor], axes: Sequence[Held]) -> None:
        """Parameters have met examples."""
        if any(isinstance(source, Shared) for source in call.slots.values()):
            return
        key = tuple(sorted(source.name for source in call.slots.values() if isinstance(source, Entry)))
        self.seen += [Seen(call.where, key, self.rows(t, axis)) for t, axis in zip(results, axes, strict=True)][:1]

    def given(self, where: str, labels: Labels, tensors: list[Tensor]) -> list[Seen]:
        """What a random operator is given."""
        return [Seen(where, (), {} if (held := labels.held(t)) is None else self.rows(t, held)) for t in tensors]

    def drew(self, func: Any, given: list[Seen], out: list[tuple[Tensor, Label]]) -> None:
        """Random numbers have been drawn."""
        rows: list[Rows | Tensor] = [
            self.rows(t, held) if isinstance(held, (Axis, Single)) else t.detach().clone() for t, held in out
        ]
        self.draws.append(Draw(plain_name(func), given, rows))

    def returned(self, tensor: Tensor, label: Label) -> None:
        """An output of the model."""
        rows = self.rows(tensor, label) if isinstance(label, (Axis, Single)) and tensor.is_floating_point() else {}
        self.outputs.append(Seen("", (), rows))


class Replay(TorchFunctionMode):
    """Runs a model on one example, with the random numbers that it had in the batch.

    Args:
        record: of the batch.
        example: the example's number in it.
        parameters: the model's parameters.
    """

    def __init__(self, record: Record, example: int, parameters: Parameters) -> None:
        super().__init__()
        self.record = record
        self.example = example
        self.parameters = parameters
        self.met: dict[tuple[str, ...], deque[Tensor]] = defaultdict(deque)
        self.drawn = deque(record.draws)
        self.short = False  # whether it drew something that it had not drawn in the batch
        self.differs: list[Seen] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        if func is Tensor.register_hook:  # there are no gradients here
            return RemovableHandle({})
        replacement = rewritten(func, args)
        if replacement is None and composite(func) and func not in OPERATORS and not draws(func, args, kwargs):
            replacement = body(func)
        if replacement is not None:
            with self:
                return replacement(*args, **kwargs)
        if draws(func, args, kwargs):
            if self.drawn and self.drawn[0].name == plain_name(func):
                return self.draw(func, args, kwargs)
            self.short = True
        out = func(*args, **kwargs)
        found = [self.parameters.entries.get(id(tensor)) for tensor in tensors_in(*args, kwargs)]
        key = tuple(sorted(entry.name for entry in found if entry is not None and entry.tracked))
        results = tensors_in(out)
        if key and results and results[0].is_floating_point() and results[0].numel() and not in_place(func):
            self.met[key].append(results[0].detach().clone())  # it may be changed in place
        return out

    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give out the example's part of what was drawn in the batch."""
        recorded = self.drawn.popleft()
        for tensor, seen in zip(tensors_in(*args, kwargs), recorded.given, strict=False):
            rows = seen.rows.get(self.example)
            if in_place(func) or rows is None or not rows.is_floating_point():
                continue
            if not close(rows, tensor.detach()):
                self.differs.append(seen)
        out = func(*args, **kwargs)
        for tensor, drawn in zip(tensors_in(out), recorded.rows, strict=False):
            rows = drawn if isinstance(drawn, Tensor) else drawn.get(self.example)
            if rows is not None and (fitting := fitted(rows, tensor, self.example, self.record.batch)) is not None:
                tensor.detach().copy_(fitting)
        return out


def fitted(drawn: Tensor, wanted: Tensor, example: int, batch: int) -> Tensor | None:
    """What was drawn, in the shape that is wanted: an example's part of every dimension that holds the batch."""
    if drawn.dim() != wanted.dim():
        return None
    for dim, (size, want) in enumerate(zip(drawn.shape, wanted.shape, strict=True)):
        if size != want and size == want * batch:
            drawn = drawn.unflatten(dim, (batch, want)).select(dim, example)
    return drawn if drawn.shape == wanted.shape else None


def close(rows: Tensor, alone: Tensor) -> bool:
    """Whether two tensors agree as far as one precision can tell after many operators."""
    if rows.shape != alone.shape:
        return True  # not comparable, as where one path flattens and the other does not
    size = max(float(rows.nan_to_num(0, 0, 0).abs().max()), float(alone.nan_to_num(0, 0, 0).abs().max()), 1e-30)
    slack = size * torch.finfo(rows.dtype).eps ** 0.5
    return torch.allclose(rows, alone.to(rows), rtol=0.0, atol=slack, equal_nan=True)


def replay(record: Record, parameters: Parameters) -> Seen | None:
    """Run the recorded examples alone; the first place where one of them differs, or None.

    Raises:
        RuntimeError and others: whatever the model raises on one example.
    """
    for b in record.examples:
        args, kwargs = record.inputs[b]
        mode = Replay(record, b, parameters)
        with starting_from(record.before, record.module), torch.no_grad(), contextlib.ExitStack() as casts:
            for kind, dtype, enabled in record.autocast:
                casts.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            random.setstate(record.state[0])
            np.random.set_state(record.state[1])
            with mode:
                out = record.module(*args, **kwargs)
        if mode.drawn or mode.short:
            raise RuntimeError("it draws random numbers in another order when it is alone")
        here = [seen for seen in record.seen if b in seen.rows]
        times = Counter(seen.key for seen in here)
        matched = {key for key, count in times.items() if count == len(mode.met[key])}
        for seen in here:  # in order; where it met parameters more or less often alone, outputs have to tell
            found = mode.met[seen.key]
            if seen.key in matched and not close(seen.rows[b], found.popleft()):
                return seen
        if mode.differs:
            return mode.differs[0]
        alone = list(tensors_of(out))
        if len(alone) == len(record.outputs):
            for seen, tensor in zip(record.outputs, alone, strict=True):
                if b in seen.rows and not close(seen.rows[b], tensor.detach()):
                    return seen
    return None
