"""One forward of the model, as far as per-example gradients are concerned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from perex.capture.parameters import Entry, Shared, Source
from perex.errors import PerexError

if TYPE_CHECKING:
    from perex.rules.call import Call

__all__ = ["Entry", "Forward", "Receiver", "Shared", "Source"]


class Receiver(Protocol):
    """Who gets what a backward brings: the tracker."""

    def receive(self, call: Call, saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """An output gradient of a call has arrived."""

    def refuse(self, error: PerexError) -> None:
        """The running backward shows that its numbers would be wrong."""


class Forward:
    """What all calls of one forward share.

    Attributes:
        number: forwards of a tracker count up; recomputations have the number of none, -1.
        batch: number of examples, B.
        path: the module whose call it is.
        tracked: the parameters that are wanted.
        uses: how many factors each parameter will get, if every call's gradient arrives.
        paths: for reports, `(module path, operator, rule, parameters)` of each call.
        sentinel: an input of all taps that requires grad. It is not a leaf, so that its node tells whether a
            backward is restricted to some inputs (`torch.autograd.grad`).
    """

    task: int | None = None
    """For a recomputation, the backward that it runs in."""

    def __init__(self, number: int, receiver: Receiver, batch: int, path: str, tracked: list[Entry]) -> None:
        self.number = number
        self.receiver = receiver
        self.batch = batch
        self.path = path
        self.tracked = tracked
        self.uses: Counter[Entry] = Counter()
        self.paths: list[tuple[str, str, str, tuple[str, ...]]] = []
        self.sentinel = torch.zeros((), requires_grad=True).clone()

    @property
    def recomputed(self) -> bool:
        """Whether it runs inside a backward, as checkpointing does."""
        return self.number < 0

    def entered(self, call: Call) -> None:
        """Count what a call will bring."""
        for source in call.slots.values():
            self.uses.update(source.entries if isinstance(source, Shared) else (source,))
        names = tuple(
            entry.name
            for source in call.slots.values()
            for entry in (source.entries if isinstance(source, Shared) else (source,))
        )
        self.paths.append((call.where, call.name, call.rule.name, names))

    def receive(self, call: Call, saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Hand on what a tap got."""
        self.receiver.receive(call, saved, grads)

    def refuse(self, error: PerexError) -> None:
        """Hand on why the running backward's numbers would be wrong."""
        self.receiver.refuse(error)
