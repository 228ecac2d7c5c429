"""What modules hold beside parameters, before a forward and after it: buffers, attributes, containers.

And what their hooks hold, which often keep something of each forward in a list or a variable outside the model.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

OF_ALL_MODULES = frozenset(vars(nn.Module()))


class State:
    """The attributes of all modules of a model, as they are now; a forward may keep a state, a cache or a count there.

    Args:
        module: the model.
        copies: whether to copy tensors too, so that they can be put back after they were changed in place.
    """

    def __init__(self, module: nn.Module, copies: bool) -> None:
        self.attributes = [(owner, dict(owner.__dict__), dict(owner._buffers)) for owner in module.modules()]
        own = [(found, name) for _, found, _ in self.attributes for name in found if name not in OF_ALL_MODULES]
        hooks = [
            hook
            for owner, _, _ in self.attributes
            for hook in (*owner._forward_hooks.values(), *owner._forward_pre_hooks.values())
            if not (getattr(hook, "__module__", None) or "").startswith("perex.")  # these look on
        ]
        held = [found[name] for found, name in own]
        values = [*changeable(held), *changeable(variables(hooks), tensors=True)]
        self.contents = [(value, kept(value)) for value in values]
        buffers = [b for _, _, found in self.attributes for b in found.values() if b is not None]
        tensors = [value for value in (*held, *buffers) if type(value) is Tensor and not value.requires_grad]
        self.copies = {id(tensor): (tensor, tensor.detach().clone()) for tensor in tensors if copies}

    def put(self) -> None:
        """Put it back; where tensors were copied, modules get copies of these copies."""
        fresh = {key: kept.clone() for key, (_, kept) in self.copies.items()}
        for owner, found, buffers in self.attributes:
            owner.__dict__.clear()
            owner.__dict__.update({n: fresh.get(id(v), v) if type(v) is Tensor else v for n, v in found.items()})
            owner._buffers.clear()
            owner._buffers.update({name: fresh.get(id(buffer), buffer) for name, buffer in buffers.items()})
        for value, before in self.contents:
            restore(value, before)


class Variables:
    """The variables that a function shares with others: in its closure, and global."""

    def __init__(self, function: FunctionType) -> None:
        self.cells = [cell for cell in function.__closure__ or () if cell != CellType()]  # an empty one is like it
        self.globals = function.__globals__
        self.names = [
            name
            for name in function.__code__.co_names
            if not isinstance(self.globals.get(name, int), (type, ModuleType, FunctionType, BuiltinFunctionType))
        ]

    def values(self) -> tuple[list[Any], list[Any]]:
        """What they are now."""
        return [cell.cell_contents for cell in self.cells], [self.globals[name] for name in self.names]

    def put(self, before: tuple[list[Any], list[Any]]) -> None:
        """Make them that again."""
        for cell, value in zip(self.cells, before[0], strict=True):
            cell.cell_contents = value
        self.globals.update(zip(self.names, before[1], strict=True))


def variables(hooks: Iterable[Any]) -> Iterator[Any]:
    """Where hooks may keep something: variables, attributes of objects of the user's own, defaults of arguments."""
    waiting, seen = [(hook, getattr(hook, "__module__", None)) for hook in hooks], set[int]()
    while waiting:
        value, home = waiting.pop()
        if id(value) in seen or isinstance(value, (type, nn.Module)):
            continue
        seen.add(id(value))
        if isinstance(value, FunctionType) and value.__module__ == home:
            found = Variables(value)
            yield from (found, vars(value), value.__defaults__ or (), value.__kwdefaults__ or {})
            within = [*found.values()[0], *found.values()[1]]
        elif isinstance(value, partial):
            yield [*value.args, *value.keywords.values()]
            within, home = [value.func, *value.args, *value.keywords.values()], getattr(value.func, "__module__", None)
        elif isinstance(value, MethodType):
            within, home = [value.__func__, value.__self__], value.__func__.__module__
        elif type(value).__module__ == home and hasattr(value, "__dict__"):
            yield vars(value)
            within = list(vars(value).values())
        else:
            continue
        waiting += [(one, home) for one in within]


CONTAINERS = (list, dict, set, deque)


GENERATORS = (torch.Generator, np.random.Generator, random.Random)

SMALL = 2**16
"""How many elements a tensor may have that a hook changes in place, such as a counter."""


def changeable(values: Iterable[Any], tensors: bool = False) -> Iterator[Any]:
    """Containers, arrays and random generators among some values and in them, at any depth; tensors if asked for."""
    waiting, seen = list(values), set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (nn.Module, type, str, bytes, int, float)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if tensors and type(value) is Tensor and value.numel() <= SMALL and not value.requires_grad:
                yield value
            continue
        if isinstance(value, (Variables, *CONTAINERS, np.ndarray, bytearray, *GENERATORS)):
            yield value
        if isinstance(value, Variables):
            waiting += [*value.values()[0], *value.values()[1]]
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            waiting += value
        elif isinstance(value, SimpleNamespace) or dataclasses.is_dataclass(value) and hasattr(value, "__dict__"):
            waiting.append(value.__dict__)


def kept(value: Any) -> Any:
    """What is needed to put one of them back."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, Tensor):
        return value._version, value.clone()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, Variables):
        return value.values()
    return value.bit_generator.state if isinstance(value, np.random.Generator) else copy.copy(value)


def restore(value: Any, before: Any) -> None:
    """Put it back."""
    if isinstance(value, CONTAINERS):
        refill(value, before)
    elif isinstance(value, torch.Generator):
        value.set_state(before)
    elif isinstance(value, Tensor):
        if value._version != before[0]:
            value.copy_(before[1])
    elif isinstance(value, random.Random):
        value.setstate(before)
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = before
    elif isinstance(value, Variables):
        value.put(before)
    elif isinstance(value, bytearray):
        value[:] = before
    elif value.flags.writeable:
        value[...] = before


def refill(container: Any, before: Any) -> None:
    """Give a container the contents that it had, if it has others now; some would rather not be written to."""
    now, then = (list(c.items()) if isinstance(c, dict) else list(c) for c in (container, before))
    flat = [(a, b) for a, b in zip(now, then, strict=False)]
    if isinstance(container, dict):
        flat = [pair for (key, value), (other, held) in flat for pair in ((key, other), (value, held))]
    if len(now) == len(then) and (now == then if isinstance(container, set) else all(a is b for a, b in flat)):
        return
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(before)


@contextlib.contextmanager
def starting_from(state: State, module: nn.Module) -> Iterator[None]:
    """Run from an earlier state of a model, and leave no trace on it, nor on random states."""
    now = State(module, copies=False)
    python, numpy = random.getstate(), np.random.get_state()
    devices = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
    try:
        state.put()
        with torch.random.fork_rng(devices=[d for d in devices if d is not None]):
            yield
    finally:
        now.put()
        random.setstate(python)
        np.random.set_state(numpy)
