"""Gradient hooks that a model puts on tensors in its forward: whether they keep examples apart is looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from perex.capture.axis import Lost
from perex.capture.parameters import Shared
from perex.capture.probe import closed_over, watched
from perex.capture.suspects import of_hook

if TYPE_CHECKING:
    from perex.capture.mode import Capture


def hooked(capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `tensor.register_hook(hook)`, and remember the hook."""
    label = capture.labels.of(args[0])
    if isinstance(label, Shared) and not observes(args, kwargs):
        raise capture.refuse.unsupported(
            func,
            "is called on a tensor derived from parameters alone, whose gradient perex works out for each example "
            "by itself, past hooks. Put the hook on the parameter, or on what examples make of the tensor",
        )
    held, (hook,) = capture.labels.held(args[0]), (*args[1:], *kwargs.values())
    if held is None:
        return func(*args, **kwargs)
    capture.forward.hooks.append(of_hook(hook, args[0]))
    if any(isinstance(capture.labels.of(tensor), Lost) for tensor in closed_over(hook)):
        capture.forward.asks = (
            "a gradient hook holds something computed from several examples: whether it keeps them apart, "
            "`px.backward(losses)`, with one loss an example, can tell"
        )
    return func(args[0], watched(hook, capture.forward, held))


def observes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a gradient hook is of `register_multi_grad_hook`, as torch's module tracker's are: it changes nothing."""
    hook = next(iter((*args[1:], *kwargs.values())), None)
    name = getattr(hook, "__qualname__", "")
    return getattr(hook, "__module__", "") == "torch.autograd.graph" and name.startswith("register_multi_grad_hook.")
