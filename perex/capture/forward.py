"""One forward of the model, as far as per-example gradients are concerned."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from perex.capture.axis import Held
from perex.capture.parameters import Entry, Shared, Source
from perex.errors import PerexError
from perex.factors.outline import Outline
from perex.kernels.readers import Readers

if TYPE_CHECKING:
    from perex.capture.record import Record
    from perex.capture.suspects import Suspect
    from perex.rules.call import Call

__all__ = ["Entry", "Forward", "Receiver", "Shared", "Site", "Source", "Tapped", "Use"]


class Receiver(Protocol):
    """Who hears of forwards, and gets what backwards bring."""

    def began(self, forward: Forward) -> None:
        """A forward begins."""

    def untapped(self, name: str) -> None:
        """A gradient reached a parameter from a use that nobody saw."""

    def receive(
        self, tapped: Tapped, saved: Sequence[Tensor], grads: Sequence[Tensor | None], sums: Sequence[str]
    ) -> Mapping[str, Tensor]:
        """An output gradient of a call has arrived; what is wanted back are some parameters' gradients."""

    def changed(self) -> None:
        """A module's gradient hook has changed a gradient."""

    def summed(self, error: PerexError) -> None:
        """The running backward goes through a sum over the batch."""

    def refuse(self, error: PerexError) -> None:
        """The running backward shows that its numbers would be wrong."""


@dataclass(slots=True, eq=False)
class Site:
    """What reports need to know of a call: names and shapes, and no tensor.

    Attributes:
        module: the path of the module that ran it.
        operator: the operator's name.
        rule: the rule's name.
        parameters: those whose gradients it brings, in order, and whether it read what was derived from them.
        shapes: of the call's tensors.
        axes: where the examples are in them.
        out_axes: where the examples are in the outputs.
    """

    module: str
    operator: str
    rule: str
    parameters: list[tuple[Entry, bool]]
    shapes: list[torch.Size]
    axes: Sequence[Held | None]
    out_axes: Sequence[Held]


@dataclass(slots=True, eq=False)
class Use:
    """A call of one forward, for reports.

    Attributes:
        site: what is known of the call.
        outputs: shapes of the output gradients, when they have arrived; None for one that did not.
        factors: outlines of the gradients that were made of them, in the order of the site's parameters.
    """

    site: Site
    outputs: list[torch.Size | None] | None = None
    factors: list[tuple[Entry, Outline]] | None = None


class Tapped(NamedTuple):
    """What a tap knows.

    Attributes:
        forward: the forward that it was put into.
        call: the operator call that it is behind.
        use: that call, for reports.
        summed: the parameters whose `.grad` the tap gives, since the norm brings it along.
        left: what running the operator has left for its rule, where perex ran it.
        without: the numbers of outputs that no gradient goes through, as the operator says.
    """

    forward: Forward
    call: Call
    use: Use
    summed: tuple[str, ...] = ()
    left: object = None
    without: tuple[int, ...] = ()


class Forward:
    """What all calls of one forward share.

    Attributes:
        number: forwards of a tracker count up; recomputations have the number of none, -1.
        batch: number of examples, B.
        path: the module whose call it is.
        tracked: the parameters that are wanted.
        uses: how many factors each parameter, by name, will get, if every call's gradient arrives.
        paths: for reports, each call, in order.
        readers: how many calls will read each tensor again in the backward.
        strength: how much that doubt weighs; see `perex.capture.doubts`.
        settled: whether that run has shown it already.
        record: what is needed to run some examples alone, where that is to be done.
        error: what that run has shown, if anything.
        asks: what only a backward of each example's loss can tell, if there is such a thing.
        shapes: tells inputs of one kind from others.
        half: whether a tap is behind an operator in half precision of five bits of exponent, `torch.float16`.
        sparing: whether something spares memory by not holding what is saved for the backward.
        derived: then, what derives from parameters alone, which may be an argument of a checkpoint.
        batched: then, what is of examples, which a checkpoint may read without having it for an argument.
        once: whether its graph can be run backward once only.
        retains: whether the model has had a tensor retain its gradient.
        fed: whether gradients go on from its inputs, to another forward perhaps.
        changed: whether such a hook has changed a gradient.
        functions: nodes of the user's autograd functions that operators have met, while examples are recorded.
        hooks: gradient hooks that were put on tensors of examples in it.
        module_hooks: backward hooks of modules that ran in it.
        compare: compares them with what they are when examples are alone, if they have changed gradients.
        doubt: why a run of some examples alone has to show that they do not depend on the others, if it has to.
    """

    task: int | None = None
    """For a recomputation, the backward that it runs in."""

    def __init__(self, number: int, receiver: Receiver, batch: int, path: str, tracked: list[Entry]) -> None:
        self.number = number
        self.receiver = receiver
        self.batch = batch
        self.path = path
        self.tracked = tracked
        self.uses: Counter[str] = Counter()
        self.doubt: str | None = None
        self.strength = 0
        self.half = False
        self.sparing = False
        self.derived: list[tuple[weakref.ref[Tensor], Shared]] = []
        self.batched: list[weakref.ref[Tensor]] = []
        self.once = False
        self.retains = False
        self.fed = False
        self.changed = False
        self.functions: list[Any] = []
        self.hooks: list[Suspect] = []
        self.module_hooks: list[Suspect] = []
        self.compare: Callable[[], PerexError | None] | None = None
        self.settled = False
        self.record: Record | None = None
        self.error: PerexError | None = None
        self.asks: str | None = None
        self.shapes: object = None
        self.paths: list[Use] = []
        self.readers = Readers()

    @functools.cached_property
    def sentinel(self) -> Tensor:
        """An input of all taps that requires grad; made for the first one, unseen, as checkpoints count operators.

        It is no leaf, so that its node tells whether a backward is restricted to some inputs (`torch.autograd.grad`).
        """
        with torch.enable_grad(), _disable_current_modes():
            return torch.zeros((), requires_grad=True, device="cpu").clone()

    @property
    def recomputed(self) -> bool:
        """Whether it runs inside a backward, as checkpointing does."""
        return self.number < 0

    def entered(self, call: Call) -> Use:
        """Count what a call will bring."""
        site = call.site = call.site or site_of(call)
        for entry, _ in site.parameters:
            self.uses[entry.name] += 1
        use = Use(site)
        self.paths.append(use)
        return use

    def receive(
        self, tapped: Tapped, saved: Sequence[Tensor], grads: Sequence[Tensor | None], sums: Sequence[str]
    ) -> Mapping[str, Tensor]:
        """Hand on what a tap got."""
        return self.receiver.receive(tapped, saved, grads, sums)

    def hook_changed(self) -> None:
        """A module's gradient hook has changed a gradient."""
        self.changed = True
        self.receiver.changed()

    def summed(self, error: PerexError) -> None:
        """A sum over the batch got a gradient: right for the loss of a batch, and wrong for losses of examples."""
        self.receiver.summed(error)

    def refuse(self, error: PerexError) -> None:
        """Hand on why the running backward's numbers would be wrong."""
        self.receiver.refuse(error)


def site_of(call: Call) -> Site:
    """What reports need to know of a call."""
    parameters: list[tuple[Entry, bool]] = []
    for source in call.slots.values():
        if isinstance(source, Shared):
            parameters.extend((entry, True) for entry in source.entries)
        else:
            parameters.append((source, False))
    return Site(call.where, call.name, call.rule.name, parameters, call.shapes, call.axes, call.out_axes)
