"""What a forward leaves open: numbers over several examples, or of unknown origin, that may decide what one gets."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from perex.capture.axis import Axis, Lost, Single
from perex.capture.carry import COUNTS, tensors_in
from perex.capture.forward import Forward
from perex.capture.labels import Labels
from perex.capture.refusals import Refusals

FAINT, WEAK, STRONG = 1, 2, 3
"""How much a doubt weighs. A strong one is settled in every forward; a weak one, that ordinary code leaves (a look at a
mask or a length), once for inputs of some shapes; a faint one likewise, if the model can be run on one example."""

UNSEEN = Lost("counted", "a tensor is read that perex did not see being made")


def remember(forward: Forward, refuse: Refusals, name: str, lost: Lost, strength: int = STRONG) -> None:
    """Remember that numbers over the batch may have decided what an example of a forward gets."""
    if forward.batch > 1 and strength > forward.strength:
        forward.doubt, forward.strength = refuse.doubt(name, lost), strength


class Doubts:
    """Remembers the weightiest doubt of one forward.

    Args:
        forward: the forward that is running.
        refuse: makes errors.
        labels: what is known of its tensors.
    """

    def __init__(self, forward: Forward, refuse: Refusals, labels: Labels) -> None:
        self.forward = forward
        self.refuse = refuse
        self.labels = labels
        self.counted: Lost | None = None  # an integer over the batch that left torch: a length, or a denominator
        self.known: dict[int, weakref.ref[Tensor]] = {}  # constants of which perex saw how they were made
        self.buffers: set[int] | None = None

    def add(self, name: str, lost: Lost, strength: int = STRONG) -> None:
        """See `remember`."""
        remember(self.forward, self.refuse, name, lost, strength)

    # Numbers and truth values

    def take_out(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give out Python numbers, unless they were computed over the batch; what that leaves open is remembered."""
        label = self.labels.of(args[0])
        if isinstance(label, Lost) and label.kind not in COUNTS:
            raise self.refuse.taken_out(label, func)
        if isinstance(label, Lost):
            self.counted = label
        if isinstance(label, (Axis, Single, Lost)):
            lost = label if isinstance(label, Lost) else Lost("counted", "examples leave torch")
            ordinary = isinstance(label, Single) and not args[0].is_floating_point()
            self.add(func.__name__, lost, WEAK if ordinary else STRONG)
        return func(*args, **kwargs)

    def branch(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let Python decide on a truth value; one made of the real numbers of several examples is remembered."""
        for tensor in tensors_in(*args):
            label = self.labels.of(tensor)
            if isinstance(label, Lost):
                self.add(func.__name__, label, WEAK if label.kind == "counted" else STRONG)
            elif isinstance(label, (Axis, Single)):
                lost = Lost("counted", "Python branches on values of examples")
                self.add(func.__name__, lost, STRONG if self.labels.real(tensor) else WEAK)
        return func(*args, **kwargs)

    def unfollowed(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let a tensor's memory or its digits out of sight."""
        if any(isinstance(self.labels.of(tensor), (Axis, Single, Lost)) for tensor in tensors_in(*args)):
            self.add(func.__name__, Lost("counted", "examples leave perex's sight"), WEAK)
        return func(*args, **kwargs)

    def look_at_slices(self, ends: Iterable[Tensor]) -> None:
        """`x[:, :n]` with a tensor n takes a number out of torch, too."""
        for end in ends:
            self.take_out(Tensor.__index__, (end,), {})

    # Constants

    def foreign(self, tensor: Tensor) -> bool:
        """Whether perex does not know where a constant comes from: scripted code, say, that read the examples."""
        ref = self.known.get(id(tensor))
        if ref is not None and ref() is tensor or isinstance(tensor, nn.Parameter):
            return False
        if self.buffers is None:
            modules = self.labels.parameters.modules
            self.buffers = {id(buffer) for module in modules for buffer in module._buffers.values()}
        return id(tensor) not in self.buffers and id(tensor) not in self.labels.parameters.entries

    def made(self, tensors: Iterable[Tensor]) -> None:
        """Constants that perex saw being made."""
        for tensor in tensors:
            self.known[id(tensor)] = weakref.ref(tensor)

    def unmade(self, tensor: Any) -> None:
        """Something of unknown origin was written into a constant."""
        self.known.pop(id(tensor), None)


def slice_ends(index: Any) -> list[Tensor]:
    """The tensors that slices of an index begin, end, or count by."""
    parts = index if isinstance(index, tuple) else (index,)
    slices = [part for part in parts if isinstance(part, slice)]
    return [end for part in slices for end in (part.start, part.stop, part.step) if isinstance(end, Tensor)]
