"""Recurrent operators as perex runs them: what their backward needs is what the rule has found already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perex.capture.taps import identity, stands_for_several
from perex.kernels.large import in_memory
from perex.rules.call import unpack
from perex.rules.product import ordinary
from perex.rules.recurrence import STEPS, Recurrence, inputs_of, is_packed


class Run:
    """What an operator that perex ran has left for the rule, and what the rule leaves for the operator's backward."""

    def __init__(self) -> None:
        self.asked = False  # whether a gradient of the input or of first states is wanted
        self.outs: list[Tensor] = []
        self.back: tuple[Any, dict[int, Tensor]] | None = None

    def keep(self, outs: Sequence[Tensor]) -> None:
        """Keep the outputs of all layers, or of the last one, which anybody may change, for one backward."""
        self.outs = [*outs[:-1], outs[-1].detach().clone()]

    def outputs(self) -> list[Tensor]:
        """These, the first time; none after that."""
        outs, self.outs = self.outs, []
        return outs

    def found(self, grads: Sequence[Tensor | None], back: dict[int, Tensor]) -> None:
        """Leave the gradients of the input and of first states, by their numbers, that outputs' gradients give."""
        self.back = identities(grads), back

    def given(self, grads: Sequence[Tensor | None]) -> dict[int, Tensor] | None:
        """These, the first time, if they are of the same gradients."""
        back, self.back = self.back, None
        return back[1] if back is not None and back[0] == identities(grads) else None


def identities(grads: Sequence[Tensor | None]) -> list[Any]:
    """What tells these gradients from others of one backward, while they live."""
    return [None if g is None or stands_for_several(g) else (*identity(g), g.shape, g.stride()) for g in grads]


class Recurrent(torch.autograd.Function):
    """One of torch's operators, whose backward is what the rule does, for the gradients of input and first states."""

    @staticmethod
    def forward(ctx: Any, run: Run, func: Any, template: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run it, a layer at a time if there are several."""
        values = [tensor.detach() for tensor in tensors]
        own = Recurrence.of(func, template, values)
        if len(own.weights) == own.directions:
            found = func(*unpack(template, values))
            results = (found,) if isinstance(found, Tensor) else tuple(found)
            outs = [own.rows(results[0])]
        else:
            outs, last = own.layers(len(own.weights) // own.directions)
            results = (own.in_layout(outs[-1]), *last)
        run.asked = any(ctx.needs_input_grad)
        run.keep(outs)
        ctx.save_for_backward(*tensors)
        ctx.call = run, func, template
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Of input and first states: as the rule found them, or by the operator where it did not look."""
        run, func, template = ctx.call
        asked = ctx.needs_input_grad[3:]
        back = None if torch.is_grad_enabled() else run.given(grads)
        if back is None:
            back = by_operator(func, template, ctx.saved_tensors, asked, grads)
        return None, None, None, *[back.get(number) if wanted else None for number, wanted in enumerate(asked)]


def by_operator(
    func: Any, template: Any, tensors: Sequence[Tensor], asked: Sequence[bool], grads: Sequence[Tensor | None]
) -> dict[int, Tensor]:
    """The gradients of some tensors by the operator's own backward."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        values = list(tensors) if again else [tensor.detach() for tensor in tensors]
        sources: dict[int, Tensor] = {}
        for number, wanted in enumerate(asked):
            if wanted:  # each by itself: one may lead to another, or be the same tensor
                values[number] = values[number].view_as(values[number]) if again else values[number].requires_grad_()
                sources[number] = values[number]
        found = func(*unpack(template, values))
        outs = [found] if isinstance(found, Tensor) else found
        pairs = [(out, grad) for out, grad in zip(outs, grads, strict=True) if grad is not None]
        if not pairs:
            return {}
        results, given = zip(*pairs, strict=True)
        back = torch.autograd.grad(results, list(sources.values()), given, create_graph=again, allow_unused=True)
    return {number: grad for number, grad in zip(sources, back, strict=True) if grad is not None}


def own_input(func: Any, template: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    """An operator's tensors, with a copy of the input where torch makes one, so that it may be changed in place.

    So it does where rows are not in the order of steps.
    """
    values, args = list(tensors), unpack(template, tensors)
    if func not in STEPS and not is_packed(args):
        by_step = args[0].transpose(0, 1) if args[8] else args[0]
        if not by_step.is_contiguous():
            values[template[0].number] = args[0].clone()
    return values


def run(func: Any, template: Any, tensors: Sequence[Tensor], bits: bool) -> tuple[Any, Run]:
    """Run one of torch's operators, and keep what its rule will need.

    Args:
        func: the operator.
        template: its arguments, with `Ref`s in place of tensors.
        tensors: these.
        bits: whether results and gradients are to be the operator's own, to the bit.
    """
    left = Run()
    args = unpack(template, tensors)
    own = {ref.number for ref in inputs_of(template, func not in STEPS and is_packed(args))}
    weighed = any(tensor.requires_grad for number, tensor in enumerate(tensors) if number not in own)
    if not bits and not weighed and all(ordinary(tensor) and in_memory(tensor) for tensor in tensors):
        results = Recurrent.apply(left, func, template, *tensors)
        return (results if len(results) > 1 else results[0]), left
    found = func(*args)
    first: Tensor = found if isinstance(found, Tensor) else found[0]
    left.keep([Recurrence.of(func, template, tensors).rows(first.detach())])
    return found, left
