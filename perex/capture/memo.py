"""Operators that are called alike in forward after forward: what was found of one call holds for the next.

For the operators named here, where the examples are in the results follows from where they are in the arguments, and
from shapes and options. Where values have a say, as those of an attention mask may, nothing is remembered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from perex.capture.axis import Axis
from perex.capture.carry import member
from perex.capture.doubts import Doubts
from perex.capture.labels import Labels
from perex.capture.operators import in_place
from perex.capture.parameters import Entry, Source
from perex.rules.call import Call

ALIKE = frozenset(
    member(
        """
        linear conv1d conv2d conv3d layer_norm group_norm rms_norm batch_norm embedding matmul bmm mm addmm baddbmm
        scaled_dot_product_attention softmax log_softmax relu gelu silu elu selu leaky_relu hardswish hardsigmoid
        sigmoid tanh softplus mish add sub mul div neg exp log sqrt rsqrt square abs pow clamp max_pool1d max_pool2d
        avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d dropout flatten unflatten view reshape transpose
        permute unsqueeze squeeze contiguous mean sum unbind chunk split split_with_sizes
        """.split(),
        in_place=False,
    )
) | frozenset(member("add sub mul div relu".split(), in_place=True))

MOST = 4096
"""How many calls are remembered: inputs of ever new shapes would fill the memory."""

LITERALS = frozenset({int, float, bool, str, type(None)})

SIZES = frozenset({tuple, list, torch.Size})

MOST_PLACES = 1024
"""How many places of one form are remembered."""


class Place(NamedTuple):
    """A parameter among the arguments of a call.

    Attributes:
        key: the argument's position, or its name.
        number: its number among the tensors.
        entry: the parameter.
    """

    key: int | str
    number: int
    entry: Entry


@dataclass(frozen=True)
class Known:
    """What is known of calls of one form.

    Attributes:
        labels: where the examples are in each result.
        call: what is recorded of a call in which parameters meet examples.
        numbers: these parameters' places among its tensors, by the rule's names for them.
        calls: the same for each module and parameters that came by.
    """

    labels: tuple[Axis, ...]
    call: Call | None = None
    numbers: dict[str, int] = field(default_factory=dict)
    calls: dict[tuple[Any, ...], Call] = field(default_factory=dict)

    def call_at(self, where: str, entries: list[Entry]) -> Call:
        """The call of this form in module `where`, with `entries` in the places of `numbers`."""
        key = where, *map(id, entries)
        call = self.calls.get(key)
        if call is None:
            assert self.call is not None
            if len(self.calls) >= MOST_PLACES:
                self.calls.clear()
            slots: dict[Any, Source] = dict(zip(self.numbers, entries, strict=True))
            call = self.calls[key] = replace(self.call, where=where, slots=slots, outlines={}, site=None)
        return call


class Memo:
    """What is known of calls, by their form; one for all forwards of a model.

    Attributes:
        known: what is known.
        half: whether any operator has given numbers in half precision of five bits of exponent.
    """

    def __init__(self) -> None:
        self.known: dict[Any, Known] = {}
        self.half = False

    def forget(self) -> None:
        """Let go of parameters: some are the model's no more, and calls hold on to them."""
        for known in self.known.values():
            known.calls.clear()

    def form(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], labels: Labels, doubts: Doubts
    ) -> tuple[Any, list[Place]]:
        """All that labels and rules depend on, None where that is more than this says; and where parameters are."""
        form: list[Any] = [func, labels.batch]
        places: list[Place] = []
        if "out" in kwargs or labels.blanks and in_place(func):
            return None, places
        entries, number = labels.parameters.entries, 0
        given: Iterable[tuple[int | str, Any]] = (*enumerate(args), *kwargs.items()) if kwargs else enumerate(args)
        for key, value in given:
            if isinstance(value, Tensor):
                mark = labels.of(value)
                if type(mark) is Axis:
                    if mark.owners is not None:
                        return None, places
                    form.append(mark)
                elif mark is not None:
                    return None, places
                elif (entry := entries.get(id(value))) is not None:
                    form.append(entry.tracked)
                    places.append(Place(key, number, entry))
                elif value.requires_grad or isinstance(value, nn.Parameter) or doubts.foreign(value):
                    return None, places
                form += value.shape, value.dtype, value.layout
                number += 1
            elif (kind := type(value)) in LITERALS:
                form += kind, value
            elif kind in SIZES and {int}.issuperset(map(type, value)):
                form.append(tuple(value))
            else:
                return None, places
            if type(key) is str:
                form.append(key)
        return tuple(form), places

    def learn(self, form: Any, out: Any, args: Any, labels: Labels, call: Call | None) -> None:
        """Remember what was found of a call."""
        results = results_in(out)
        if len(self.known) >= MOST or not all(
            isinstance(each, Tensor) and each.is_floating_point() for each in results
        ):
            return
        found = tuple([label for label in map(labels.of, results) if whole(label)])
        if len(found) < len(results) or in_place(form[0]) and form[2] != found[0]:  # a constant has become examples'
            return
        if call is None:
            self.known[form] = Known(found)
            return
        if out is not results[0] or any(out is arg for arg in args):
            return
        templates = {name: call.template(name) for name in call.slots if isinstance(name, str) and call.rule.arguments}
        if len(templates) != len(call.slots) or call.examples is not None:
            return
        if any(not isinstance(source, Entry) for source in call.slots.values()):
            return
        numbers = {name: template.number for name, template in templates.items()}
        self.known[form] = Known(found, replace(call, slots={}, outlines={}, site=None), numbers)


def results_in(out: Any) -> Sequence[Any]:
    """What an operator returned, one by one."""
    return out if type(out) in (tuple, list) else (out,)


def whole(label: Any) -> TypeGuard[Axis]:
    """Whether a label says that examples lie in order, whatever the numbers are."""
    return type(label) is Axis and label.owners is None
