"""Module hooks: when a forward begins and ends, and which module is running."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from perex.errors import AttachError


class Hook:
    """A hook of an attached model, known by its class."""

    def __init__(self, run: Callable[..., Any], path: str) -> None:
        self.run = run
        self.path = path

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        """Run the hook with the module's path."""
        return self.run(self.path, module, *arguments)


class Reduce:
    """An attached module's `__reduce_ex__`: copies and pickles of the model know nothing of perex."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, protocol: int) -> str | tuple[Any, ...]:
        """What the module's class answers, without the hooks."""
        answer = type(self.module).__reduce_ex__(self.module, protocol)
        if not isinstance(answer, tuple) or len(answer) < 3 or not isinstance(answer[2], dict):
            return answer
        state = {name: value for name, value in answer[2].items() if not isinstance(value, Reduce)}
        hooks = {**state.get("_forward_pre_hooks", {}), **state.get("_forward_hooks", {})}
        own = {key for key, hook in hooks.items() if isinstance(hook, Hook)}
        for name, value in state.items():
            if name.startswith(("_forward_pre_hooks", "_forward_hooks")):
                state[name] = type(value)((key, item) for key, item in value.items() if key not in own)
        return *answer[:2], state, *answer[3:]


def hooked(model: nn.Module) -> str | None:
    """The path of a module that has perex's hooks already, or None."""
    for path, module in model.named_modules():
        if any(isinstance(hook, Hook) for hook in module._forward_pre_hooks.values()):
            return path
    return None


def hook(
    model: nn.Module, enter: Callable[..., Any], leave: Callable[..., Any]
) -> list[Callable[[], object]]:
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
    return undo
