"""What an example gets alone: a few examples of a batch are run again, each as a batch of one, and compared.

Labels say where examples are, but not what a number does that left torch, or a truth value that Python branched on;
nor can they see into code that runs elsewhere. So the first batch, and any batch whose inputs have new shapes, is
checked by what it computes: a `Record` keeps a few examples' rows wherever parameters meet them, and `replay` looks
whether they come out the same when the example is alone. Random draws are recorded too, and given out again."""

from __future__ import annotations

import contextlib
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from perex.capture.carry import tensors_in
from perex.capture.functions import Applied, node_of
from perex.capture.labels import plain_name
from perex.capture.nest import tensors_of
from perex.capture.operators import body, by_holders, composite, in_place
from perex.capture.parameters import Parameters
from perex.capture.record import Record, Sample, Seen, close, draws, sampled
from perex.capture.rewrites import rewritten
from perex.capture.state import starting_from
from perex.capture.suspects import Suspect, of_function, of_hook, of_user, user_code
from perex.rules.registry import OPERATORS


class Replay(TorchFunctionMode):
    """Runs a model on one example, with the random numbers that it had in the batch.

    Args:
        record: of the batch.
        example: the example's number in it.
        parameters: the model's parameters.
        back: whether to look for code of the user's own in the backward.

    Attributes:
        functions: nodes of the user's autograd functions that operators have met.
        hooks: gradient hooks.
    """

    def __init__(self, record: Record, example: int, parameters: Parameters, back: bool = False) -> None:
        super().__init__()
        self.back = back
        self.functions: list[Any] = []
        self.hooks: list[Suspect] = []
        self.record = record
        self.example = example
        self.parameters = parameters
        self.met: dict[tuple[str, ...], list[Sample]] = defaultdict(list)
        self.drawn = deque(record.draws)
        self.short = False  # whether it drew something that it had not drawn in the batch
        self.differs: list[Seen] = []

    def wants_function(self, tensors: list[Tensor]) -> bool:
        """Whether an autograd function takes parameters, and so is an operator to look at."""
        found = (self.parameters.entries.get(id(tensor)) for tensor in tensors)
        return any(entry is not None and entry.tracked for entry in found)

    def inside_function(self, func: Any, tensors: list[Tensor]) -> None:
        """What its forward reads was looked at in the batch."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        if (out := by_holders(self, func, types, args, kwargs)) is not NotImplemented:
            return out
        if func is Tensor.register_hook:  # no gradients come here
            if self.back:
                self.hooks.append(of_hook((*args[1:], *kwargs.values())[0], args[0]))
            return RemovableHandle(OrderedDict())  # of no hooks: it keeps a weak reference, as a dict has none
        if self.back:
            self.functions += [t.grad_fn for t in tensors_in(*args, kwargs) if of_user(t.grad_fn)]
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
        if self.back and isinstance(func, Applied):
            self.functions += node_of(out)
        found = [self.parameters.entries.get(id(tensor)) for tensor in tensors_in(*args, kwargs)]
        key = tuple(sorted(entry.name for entry in found if entry is not None and entry.tracked))
        results = tensors_in(out)
        if key and results and results[0].is_floating_point() and results[0].numel() and not in_place(func):
            self.met[key].append(sampled(results[0]))
        return out

    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give out the example's part of what was drawn in the batch."""
        recorded = self.drawn.popleft()
        for tensor, seen in zip(tensors_in(*args, kwargs), recorded.given, strict=False):
            sample = seen.rows.get(self.example)
            if in_place(func) or sample is None or not sample.values.is_floating_point():
                continue
            if not close(sample, sampled(tensor), self.record.precision):
                self.differs.append(seen)
        out = func(*args, **kwargs)
        for tensor, drawn in zip(tensors_in(out), recorded.rows, strict=False):
            rows = drawn if isinstance(drawn, Tensor) else drawn.get(self.example)
            if rows is None or (fitting := fitted(rows, tensor, self.example, self.record.batch)) is None:
                continue
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


@contextlib.contextmanager
def run_alone(record: Record, parameters: Parameters, example: int, back: bool) -> Iterator[tuple[Replay, Any]]:
    """Run one of the recorded examples alone; what was seen, and what the model returned."""
    args, kwargs = record.inputs[example]
    mode = Replay(record, example, parameters, back)
    with starting_from(record.before, record.module), torch.set_grad_enabled(back), contextlib.ExitStack() as casts:
        for kind, dtype, enabled in record.autocast:
            casts.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
        random.setstate(record.state[0])
        np.random.set_state(record.state[1])
        with mode:
            out = record.module(*args, **kwargs)
        if mode.drawn or mode.short:
            raise RuntimeError("it draws random numbers in another order when it is alone")
        yield mode, out


def comparable(record: Record, example: int, met: dict[tuple[str, ...], Any]) -> Iterator[tuple[Seen, int]]:
    """Where an example has met parameters, in order, each with its number among those where it met the same.

    Where it met them more or less often alone, outputs have to tell.
    """
    here = [seen for seen in record.seen if example in seen.rows]
    times = Counter(seen.key for seen in here)
    matched = {key for key, count in times.items() if count == len(met[key])}
    number: Counter[tuple[str, ...]] = Counter()
    for seen in here:
        if seen.key in matched:
            yield seen, number[seen.key]
        number[seen.key] += 1


def replay(record: Record, parameters: Parameters) -> Seen | None:
    """Run the recorded examples alone; the first place where one of them differs, or None.

    Without gradients, if the model runs like that: it may go backward in its forward.

    Raises:
        RuntimeError and others: whatever the model raises on one example.
    """
    try:
        return compared(record, parameters, graph=False)
    except Exception:
        with without_gradients(record.module):
            return compared(record, parameters, graph=True)


@contextlib.contextmanager
def without_gradients(module: nn.Module) -> Iterator[None]:
    """Leave the gradients that parameters have alone, whatever runs backward meanwhile."""
    before = [(parameter, parameter.grad) for parameter in module.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in before:
            parameter.grad = grad


def compared(record: Record, parameters: Parameters, graph: bool) -> Seen | None:
    """The same, with gradients or without."""
    for b in record.examples:
        with run_alone(record, parameters, b, graph) as (mode, out):
            for seen, number in comparable(record, b, mode.met):
                if not close(seen.rows[b], mode.met[seen.key][number], record.precision):
                    return seen
            if mode.differs:
                return mode.differs[0]
            alone = tensors_of(out)
            if len(alone) == len(record.outputs):
                for seen, tensor in zip(record.outputs, alone, strict=True):
                    if b in seen.rows and not close(seen.rows[b], sampled(tensor), record.precision):
                        return seen
    return None


@contextlib.contextmanager
def suspects_alone(
    record: Record, parameters: Parameters, example: int
) -> Iterator[tuple[list[Suspect], list[Suspect]]]:
    """Run an example alone, with gradients: the user's autograd functions in its graph, and gradient hooks."""
    with run_alone(record, parameters, example, back=True) as (mode, out):
        roots = [tensor.grad_fn for tensor in tensors_of(out)]
        functions, _ = user_code([*roots, *mode.functions])
        yield [of_function(node) for node in functions], mode.hooks
