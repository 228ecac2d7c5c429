"""Module hooks: when a forward begins and ends, and which module is running."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from perex.errors import AttachError


class Hook(functools.partial[Any]):
    """A hook of an attached model, known by its class: calls a function with the module's path before all else."""

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy has no hook: see `Reduce` and `Copy`."""


class Reduce:
    """An attached module's `__reduce_ex__`: copies and pickles of the model know nothing of perex."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, protocol: int) -> str | tuple[Any, ...]:
        """What the module's class answers, without the hooks."""
        with unhooked(self.module):
            answer = type(self.module).__reduce_ex__(self.module, protocol)
        if not isinstance(answer, tuple) or len(answer) < 3 or not isinstance(answer[2], dict):
            return answer
        return *answer[:2], without_hooks(answer[2], hook_keys(self.module)), *answer[3:]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy needs none."""


class Copy:
    """An attached module's `__deepcopy__`: its class's, where it has one (parametrized modules do)."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, memo: dict[int, Any]) -> nn.Module:
        """A copy without the hooks."""
        if not hasattr(type(self.module), "__deepcopy__"):
            own = self.module.__dict__.pop("__deepcopy__")
            try:
                return copy.deepcopy(self.module, memo)  # by `Reduce`
            finally:
                self.module.__dict__["__deepcopy__"] = own
        with unhooked(self.module):
            copied: nn.Module = type(self.module).__deepcopy__(self.module, memo)  # type: ignore[attr-defined]
        copied.__dict__ = without_hooks(copied.__dict__, hook_keys(self.module))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy needs none."""


@contextlib.contextmanager
def unhooked(module: nn.Module) -> Iterator[None]:
    """Have a module without hooks for a while, for a class that copies itself in its own way."""
    attributes = dict(module.__dict__)
    module.__dict__.clear()
    module.__dict__.update(without_hooks(attributes, hook_keys_in(attributes)))
    try:
        yield
    finally:
        module.__dict__.clear()
        module.__dict__.update(attributes)


def hook_keys(module: nn.Module) -> set[int]:
    """Under which keys a module's dictionaries hold perex's hooks."""
    return hook_keys_in(module.__dict__)


def hook_keys_in(attributes: dict[str, Any]) -> set[int]:
    """Under which keys the dictionaries among a module's attributes hold perex's hooks."""
    hooks = {**attributes["_forward_pre_hooks"], **attributes["_forward_hooks"]}
    return {key for key, hook in hooks.items() if isinstance(hook, Hook)}


def without_hooks(state: dict[str, Any], keys: set[int]) -> dict[str, Any]:
    """A module's attributes with nothing of perex in them."""
    clean = {name: value for name, value in state.items() if name not in ("__reduce_ex__", "__deepcopy__")}
    for name, value in clean.items():
        if name.startswith(("_forward_pre_hooks", "_forward_hooks")):
            clean[name] = type(value)((key, item) for key, item in value.items() if key not in keys)
    return clean


def hooked(model: nn.Module) -> str | None:
    """The path of a module that has perex's hooks already, or None."""
    for path, module in model.named_modules():
        if any(isinstance(hook, Hook) for hook in module._forward_pre_hooks.values()):
            return path
    return None


def hook(model: nn.Module, enter: Callable[..., Any], leave: Callable[..., Any]) -> list[Callable[[], object]]:
    """Hook all modules of a model; what it returns, called, takes the hooks off again.

    Args:
        model: the model.
        enter: called with `(path, module, args, kwargs)` before each module's forward.
        leave: called with `(path, module, args, kwargs, output)` after it, also when it raised.
    """
    taken = hooked(model)
    if taken is not None:
        raise AttachError(
            f"perex is attached to {f'module {taken!r}' if taken else 'this model'} already: call `.detach()` on "
            "that tracker first, or use it as a context manager"
        )
    undo: list[Callable[[], object]] = []
    for path, module in model.named_modules():
        before, after = Hook(enter, path), Hook(leave, path)  # around the user's own hooks, which it must see
        undo.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
        undo.append(module.register_forward_hook(after, with_kwargs=True, always_call=True).remove)
        module.__dict__["__reduce_ex__"] = Reduce(module)
        undo.append(functools.partial(module.__dict__.pop, "__reduce_ex__", None))
        module.__dict__["__deepcopy__"] = Copy(module)  # which its class may get, when it is parametrized
        undo.append(functools.partial(module.__dict__.pop, "__deepcopy__", None))
    return undo
