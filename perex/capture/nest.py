"""Tensors in what a module takes and returns."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor

LEAVES = frozenset({bool, int, float, str, type(None)})
"""Types of most of what is neither a tensor nor holds one: whether they are mappings takes long to ask."""


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in what a module takes or returns: containers, mappings and dataclasses are looked into."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, (list, tuple)):
        for item in value:
            found += tensors_of(item)
    elif type(value) in LEAVES:
        pass
    elif isinstance(value, Mapping):
        for item in value.values():
            found += tensors_of(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            found += tensors_of(getattr(value, field.name, None))
    return found


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
