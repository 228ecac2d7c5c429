"""What perex raises: every error is a `PerexError`, and its message names the module or argument."""

from __future__ import annotations

import copy
from typing import TypeVar

Kind = TypeVar("Kind", bound="PerexError")


class PerexError(Exception):
    """The base of everything that perex refuses or rejects."""


class AttachError(PerexError):
    """The model, or an argument of `attach`, cannot be used as given."""


class ArgumentError(PerexError, ValueError):
    """An argument of another function has a value it cannot have."""


class ExamplesMixError(PerexError):
    """Examples of one batch influence each other, so no example has a gradient of its own."""


class UnsupportedError(PerexError):
    """perex cannot tell which example a value belongs to, or cannot see how a parameter is used."""


class NotReadyError(PerexError):
    """There is no result that belongs to the latest forward and backward."""


class LossError(PerexError):
    """The losses handed over are not one number for each example of the batch."""


def anew(error: Kind) -> Kind:
    """The same error without what it has come through, to be kept, or to be raised where one is kept.

    Frames hold a step's losses, these a graph, and that what keeps the error: nobody would ever free them.
    """
    return copy.copy(error)
