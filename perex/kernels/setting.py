"""What holds while some code runs: a context variable with a value."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Generic, TypeVar

T = TypeVar("T")


class Setting(Generic[T]):
    """A context in which a variable has a value; entered in every tap, where a generator would take thrice as long.

    Example:
        >>> size = ContextVar("size", default=1)
        >>> with Setting(size, 2):
        ...     size.get()
        2
        >>> size.get()
        1
    """

    __slots__ = ("token", "value", "variable")

    def __init__(self, variable: ContextVar[T], value: T) -> None:
        self.variable = variable
        self.value = value

    def __enter__(self) -> None:
        self.token = self.variable.set(self.value)

    def __exit__(self, *error: object) -> None:
        self.variable.reset(self.token)
