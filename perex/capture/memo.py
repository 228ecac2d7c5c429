"""Operators that are called alike in forward after forward: what was found of one call holds for the next.

For the operators named here, where the examples are in the result follows from where they are in the arguments, and
from shapes and options, never from values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from perex.capture.axis import Axis
from perex.capture.carry import member
from perex.capture.doubts import Doubts
from perex.capture.labels import Labels
from perex.capture.parameters import Entry
from perex.rules.call import Call

ALIKE = frozenset(
    member(
        """
        linear conv1d conv2d conv3d layer_norm group_norm rms_norm batch_norm embedding matmul bmm mm addmm baddbmm
        scaled_dot_product_attention softmax log_softmax relu gelu silu elu selu leaky_relu hardswish hardsigmoid
        sigmoid tanh softplus mish add sub mul div neg exp log sqrt rsqrt square abs pow clamp max_pool1d max_pool2d
        avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d dropout flatten unflatten view reshape transpose
        permute unsqueeze squeeze contiguous mean sum
        """.split(),
        in_place=False,
    )
)

MOST = 4096
"""How many calls are remembered: inputs of ever new shapes would fill the memory."""

LITERALS = (int, float, bool, str, type(None))


NO_FORWARD: Any = None
"""What is remembered holds on to no forward."""


@dataclass(frozen=True)
class Known:
    """What is known of calls of one form.

    Attributes:
        label: where the examples are in the result.
        call: where parameters are among the arguments, what is recorded of the call, but for its forward.
        numbers: the parameters' places among the tensors, by the rule's names for them.
    """

    label: Axis
    call: Call | None = None
    numbers: dict[str, int] | None = None


class Memo:
    """What is known of calls, by their form; one for all forwards of a model."""

    def __init__(self) -> None:
        self.known: dict[Any, Known] = {}

    def form(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], labels: Labels, doubts: Doubts) -> Any:
        """All that labels and rules depend on; None where that is more than this says."""
        form: list[Any] = [func, labels.batch, *kwargs]
        entries = labels.parameters.entries
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                mark = labels.of(value)
                if type(mark) is Axis:
                    if mark.owners is not None:
                        return None
                    form.append(mark)
                elif mark is not None:
                    return None
                elif (entry := entries.get(id(value))) is not None:
                    form.append(entry.tracked)
                elif value.requires_grad or isinstance(value, nn.Parameter) or doubts.foreign(value):
                    return None
                form += value.shape, value.dtype, value.layout
            elif type(value) in LITERALS:
                form += type(value), value
            elif type(value) in (tuple, torch.Size) and all(type(item) is int for item in value):
                form.append(value)
            else:
                return None
        return tuple(form)

    def learn(self, form: Any, out: Any, args: Any, labels: Labels, call: Call | None) -> None:
        """Remember what was found of a call."""
        if not isinstance(out, Tensor) or not out.is_floating_point() or any(out is arg for arg in args):
            return
        label = labels.of(out)
        if type(label) is not Axis or label.owners is not None or len(self.known) >= MOST:
            return
        if call is None:
            self.known[form] = Known(label)
            return
        templates = {name: call.template(name) for name in call.slots if isinstance(name, str) and call.rule.arguments}
        if len(templates) != len(call.slots) or call.examples is not None:
            return
        if any(not isinstance(source, Entry) for source in call.slots.values()):
            return
        numbers = {name: template.number for name, template in templates.items()}
        self.known[form] = Known(label, replace(call, forward=NO_FORWARD, slots={}, shapes=[]), numbers)
