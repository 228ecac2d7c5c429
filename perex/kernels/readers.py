"""What is computed of an input that several layers read, as queries, keys and values do: once for all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perex.kernels.setting import Setting


class Kept(NamedTuple):
    """What was computed of a tensor, which is held so that its memory becomes no other's, and its version then."""

    tensor: Tensor
    version: int
    kind: str
    value: list[Any]

    def fits(self, x: Tensor, kind: str) -> bool:
        """Whether it is of this kind, and was computed of what `x` is now."""
        mine = self.tensor
        same = self.kind == kind and mine.shape == x.shape and mine.stride() == x.stride() and mine.dtype == x.dtype
        return same and mine.device == x.device and self.version == x._version


class Readers:
    """How many layers are still to read each tensor in a backward, and what the first of them leave for the others.

    Attributes:
        ahead: by the tensors' addresses, as counted in the forward; one that is wrong costs time or memory, no more.
        kept: likewise.
        hits: how often something was there already.
    """

    def __init__(self) -> None:
        self.ahead: Counter[int] = Counter()
        self.kept: dict[int, Kept] = {}
        self.hits = 0

    def expect(self, tensors: Sequence[Tensor]) -> None:
        """A layer that reads these will ask in the backward."""
        for tensor in tensors:
            self.ahead[address_of(tensor)] += 1

    def done(self, tensors: Sequence[Tensor]) -> None:
        """One that reads these will not ask any more: let go of what nobody else is to read."""
        for tensor in tensors:
            address = address_of(tensor)
            self.ahead[address] -= 1
            if self.ahead[address] < 1:
                self.kept.pop(address, None)

    def clear(self) -> None:
        """The backward is over."""
        self.ahead.clear()
        self.kept.clear()

    def once(self, x: Tensor, kind: str, elements: int, compute: Callable[[], Iterable[Any]]) -> Iterable[Any]:
        """What `compute` makes of `x`, kept if others are to read that too and it has no more elements than `x`."""
        address = address_of(x)
        kept = self.kept.get(address)
        if kept is not None and kept.fits(x, kind):
            self.hits += 1
            return kept.value
        if not address or self.ahead[address] < 2 or elements > x.numel():
            return compute()
        value = list(compute())
        self.kept[address] = Kept(x, x._version, kind, value)
        return value

    def several(self, x: Tensor) -> bool:
        """Whether others are to read `x` too, or have left something for those that are."""
        address = address_of(x)
        return bool(address) and (self.ahead[address] > 1 or address in self.kept)


def address_of(tensor: Tensor) -> int:
    """Where a tensor's elements begin; 0 where they are not in one piece of memory."""
    return tensor.data_ptr() if tensor.layout == torch.strided else 0


_current: ContextVar[Readers] = ContextVar("readers")


def current() -> Readers:
    """The readers of the running backward; outside of one, none of anything."""
    return _current.get(None) or Readers()


def reading(readers: Readers) -> Setting[Readers]:
    """Compute among these readers."""
    return Setting(_current, readers)
