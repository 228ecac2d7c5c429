"""Module hooks: when a forward begins and ends, and which module is running."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from perex.errors import AttachError


def nothing(*args: Any) -> None:
    """What a copy of an attached model has in place of perex's hooks."""


def inert() -> Callable[..., None]:
    """What unpickling a hook gives."""
    return nothing


class Hook:
    """A hook of an attached model. Copies and pickles of the model get one that does nothing."""

    def __init__(self, run: Callable[..., Any], path: str) -> None:
        self.run = run
        self.path = path

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        """Run the hook with the module's path."""
        return self.run(self.path, module, *arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return inert, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return nothing


def hooked(model: nn.Module) -> str | None:
    """The path of a module that has perex's hooks already, or None."""
    for path, module in model.named_modules():
        if any(isinstance(hook, Hook) for hook in module._forward_pre_hooks.values()):
            return path
    return None


def hook(model: nn.Module, enter: Callable[..., Any], leave: Callable[..., Any]) -> list[RemovableHandle]:
    """Hook all modules of a model.

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
    handles = []
    for path, module in model.named_modules():
        before, after = Hook(enter, path), Hook(leave, path)  # around the user's own hooks, which it must see
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
    return handles
