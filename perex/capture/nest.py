"""Tensors in what a module takes and returns."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in what a module takes or returns: containers, mappings and dataclasses are looked into."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in dataclasses.fields(value):
            yield from tensors_of(getattr(value, item.name, None))


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same with its tensors changed: containers, named tuples and dataclasses are looked into."""
    if isinstance(value, Tensor):
        return function(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {item.name: getattr(value, item.name) for item in dataclasses.fields(value) if item.init}
        return dataclasses.replace(value, **{name: map_tensors(function, part) for name, part in parts.items()})
    if isinstance(value, MutableMapping):
        changed = copy.copy(value)
        changed.update((key, map_tensors(function, part)) for key, part in value.items())
        return changed
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, part) for part in value))
    if type(value) in (list, tuple):
        return type(value)(map_tensors(function, part) for part in value)
    return value
