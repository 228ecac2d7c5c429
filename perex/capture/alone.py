"""What an example gets alone: a few examples of a batch are run again, each as a batch of one, and compared.

Labels say where examples are, but not what a number does that left torch, or a truth value that Python branched on;
nor can they see into code that runs elsewhere. So the first batch, and any batch whose inputs have new shapes, is
checked by what it computes: a `Record` keeps a few examples' rows wherever parameters meet them, and `replay` looks
whether they come out the same when the example is alone. Random draws are recorded too, and given out again. Where code
of the user's own runs in the backward, `replay_back` does the same with the gradients that arrive there.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from perex.capture.carry import tensors_in
from perex.capture.labels import plain_name
from perex.capture.nest import tensors_of
from perex.capture.operators import body, composite, in_place
from perex.capture.parameters import Parameters
from perex.capture.record import Record, Sample, Seen, draws, packing, sampled
from perex.capture.rewrites import rewritten
from perex.capture.state import starting_from
from perex.rules.registry import OPERATORS


class Replay(TorchFunctionMode):
    """Runs a model on one example, with the random numbers that it had in the batch.

    Args:
        record: of the batch.
        example: the example's number in it.
        parameters: the model's parameters.
        back: whether a backward is to come.
    """

    def __init__(self, record: Record, example: int, parameters: Parameters, back: bool = False) -> None:
        super().__init__()
        self.back = back
        self.got: dict[tuple[str, ...], list[GradientEdge | None]] = defaultdict(list)
        self.unlike = False  # whether the backward to come draws other random numbers than the batch's
        self.record = record
        self.example = example
        self.parameters = parameters
        self.met: dict[tuple[str, ...], list[Sample]] = defaultdict(list)
        self.drawn = deque(record.draws)
        self.short = False  # whether it drew something that it had not drawn in the batch
        self.differs: list[Seen] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        if func is Tensor.register_hook and not self.back:  # there are no gradients here
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
            self.met[key].append(sampled(results[0]))
            if self.back:
                self.got[key].append(get_gradient_edge(results[0]) if results[0].requires_grad else None)
        return out

    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give out the example's part of what was drawn in the batch."""
        recorded = self.drawn.popleft()
        for tensor, seen in zip(tensors_in(*args, kwargs), recorded.given, strict=False):
            sample = seen.rows.get(self.example)
            if in_place(func) or sample is None or not sample.values.is_floating_point():
                continue
            if not close(sample, sampled(tensor)):
                self.differs.append(seen)
        out = func(*args, **kwargs)
        for tensor, drawn in zip(tensors_in(out), recorded.rows, strict=False):
            rows = drawn if isinstance(drawn, Tensor) else drawn.get(self.example)
            if rows is None or (fitting := fitted(rows, tensor, self.example, self.record.batch)) is None:
                continue
            slope = None if recorded.slope is None else recorded.slope.get(self.example)
            if tensor.requires_grad and slope is not None and slope.shape == tensor.shape and not packing():
                linear = args[0] * slope
                return linear + (fitting - linear).detach()
            self.unlike = self.unlike or tensor.requires_grad
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


def close(batched: Sample, single: Sample) -> bool:
    """Whether two tensors agree as far as one precision can tell after many operators."""
    if batched.shape != single.shape:
        return True  # not comparable, as where one path flattens and the other does not
    rows, alone = batched.values, single.values
    size = max(float(rows.nan_to_num(0, 0, 0).abs().max()), float(alone.nan_to_num(0, 0, 0).abs().max()), 1e-30)
    slack = size * torch.finfo(rows.dtype).eps ** 0.5
    return torch.allclose(rows, alone.to(rows), rtol=0.0, atol=slack, equal_nan=True)


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

    Raises:
        RuntimeError and others: whatever the model raises on one example.
    """
    for b in record.examples:
        with run_alone(record, parameters, b, back=False) as (mode, out):
            for seen, number in comparable(record, b, mode.met):
                if not close(seen.rows[b], mode.met[seen.key][number]):
                    return seen
            if mode.differs:
                return mode.differs[0]
            alone = list(tensors_of(out))
            if len(alone) == len(record.outputs):
                for seen, tensor in zip(record.outputs, alone, strict=True):
                    if b in seen.rows and not close(seen.rows[b], sampled(tensor)):
                        return seen
    return None


def replay_back(record: Record, parameters: Parameters) -> Seen | None:
    """Run the recorded examples alone, and back; the last place where one of them gets another gradient, or None.

    The batch has run back already, from gradients of its outputs that `record.outputs` keep.

    Raises:
        RuntimeError and others: whatever the model raises on one example.
    """
    for b in record.examples:
        with run_alone(record, parameters, b, back=True) as (mode, out):
            alone = list(tensors_of(out))
            if mode.unlike or len(alone) != len(record.outputs):
                return None
            pairs = [(t, seen.full[b]) for t, seen in zip(alone, record.outputs, strict=True) if b in seen.full]
            if not pairs or any(tensor.shape != grad.shape or not tensor.requires_grad for tensor, grad in pairs):
                return None
            ends, grads = zip(*pairs, strict=True)
            met = [(seen, mode.got[seen.key][number]) for seen, number in comparable(record, b, mode.got)]
            wanted = [(seen, edge) for seen, edge in reversed(met) if b in seen.grads and edge is not None]
            if not wanted:
                return None
            found = torch.autograd.grad(ends, [edge for _, edge in wanted], grads, allow_unused=True)
            for (seen, _), grad in zip(wanted, found, strict=True):
                if grad is not None and not close(seen.grads[b], sampled(grad)):
                    return seen
    return None
