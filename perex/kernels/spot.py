"""Where the tensors are whose shapes a plan is asked about, and of which dtype: what fused kernels must be fit for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch


class Spot(NamedTuple):
    """A device and a dtype.

    Attributes:
        device: its type, such as `"cuda"`.
        dtype: of the floating-point tensors.
    """

    device: str
    dtype: torch.dtype

    @property
    def plain(self) -> bool:
        """Whether tensors are real and in a CPU's memory, as plans suppose where they are told nothing."""
        return self.device == "cpu" and not self.dtype.is_complex


_current: ContextVar[Spot | None] = ContextVar("spot", default=None)


def current() -> Spot | None:
    """The spot that plans are for; None where only ways that run everywhere are wanted."""
    return _current.get()


def plain() -> bool:
    """Whether plans are for tensors plainly in a CPU's memory, or for nobody knows which."""
    spot = current()
    return spot is None or spot.plain


@contextmanager
def at(spot: Spot | None) -> Iterator[None]:
    """Ask for plans as of tensors that are there, also where tensors without numbers stand for them."""
    token = _current.set(spot)
    try:
        yield
    finally:
        _current.reset(token)
