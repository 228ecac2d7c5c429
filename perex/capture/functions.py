"""Autograd functions of the user's own, as operators: their backward says what they make of parameters.

`Fused.apply(x, weight)` goes past function modes, which see what it computes but not what it means. So while a forward
runs, a call that takes parameters is handed to the mode as one operator, and goes the general path.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily

from perex.capture.carry import tensors_in
from perex.capture.checks import run_eagerly
from perex.capture.forward import Forward
from perex.capture.refusals import Refusals
from perex.capture.taps import UNDER

NOT_THE_USERS = ("perex.", "torch.")
"""Where functions are written that no user wrote."""


class Applied:
    """`apply` of an autograd function, as an operator, for which `perex.operator_rule(Fused.apply)` may give a rule.

    Args:
        function: the class.
    """

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.bound = function.apply
        self.__name__ = f"{function.__name__}.apply"
        self.looks: Callable[[list[Tensor]], None] | None = None  # at what its forward reads

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the function."""
        with contextlib.nullcontext() if self.looks is None else Inside(self.looks):
            return self.bound(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return bool(self.bound == (other.bound if isinstance(other, Applied) else other))

    def __hash__(self) -> int:
        return hash(self.bound)


class Inside(TorchFunctionMode):
    """Shows what operators in a function's forward read.

    Args:
        looks: gets each one's tensors.
    """

    def __init__(self, looks: Callable[[list[Tensor]], None]) -> None:
        super().__init__()
        self.looks = looks

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        self.looks(tensors_in(*args, kwargs))
        return func(*args, **(kwargs or {}))


def apply(function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    """What `Function.apply` calls while a forward runs: a mode of perex's that wants to see the call gets it."""
    mode = _get_current_function_mode()
    wants = getattr(mode, "wants_function", None)
    if wants is None or function.__module__.startswith(NOT_THE_USERS) or not wants(tensors_in(*args, kwargs)):
        return super(UNDER, function).apply(*args, **kwargs)
    operator = Applied(function)
    with _pop_mode_temporarily() as mode:
        operator.looks = partial(mode.inside_function, operator)
        try:
            return mode.__torch_function__(operator, (), args, kwargs)
        finally:
            operator.looks = None  # what is recorded of the call is to hold on to nothing


class Watch:
    """Has calls of `Function.apply` go to perex's modes while a forward runs in some thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.forwards = 0

    def begin(self) -> Callable[[], object]:
        """A forward begins; what this returns is to be called at its end."""
        with self.lock:
            self.forwards += 1
            UNDER.apply = classmethod(apply)
        return self.end

    def end(self) -> None:
        """A forward is over."""
        with self.lock:
            self.forwards -= 1
            if not self.forwards:
                del UNDER.apply


FUNCTIONS = Watch()


def in_sight() -> Callable[[], object]:
    """Have code come to function modes that would go past them, compiled or the user's, until this result is called."""
    restore = run_eagerly()
    end = FUNCTIONS.begin()
    return lambda: (end(), restore())


def called(func: Any, args: Any, kwargs: Any, given: Sequence[Any], forward: Forward, refuse: Refusals) -> Any:
    """Call an operator; if it is a function of the user's, its backward is to be looked at.

    Args:
        func: the operator.
        args: its arguments.
        kwargs: those given by name.
        given: what among them it is not to change: tensors, and copies of lists.
        forward: the forward that is running.
        refuse: makes errors.

    Raises:
        UnsupportedError: a function has changed what it was given: it will run again, on examples alone.
    """
    if not isinstance(func, Applied):
        return func(*args, **kwargs)
    before = states(given)
    out = func(*args, **kwargs)
    if states(given) != before:
        raise refuse.unsupported(
            func,
            "takes parameters and changes what it was given, in place: activations, a statistic, a list. perex "
            "runs it again for each example, so it would do that again. Return the change instead",
        )
    forward.functions += node_of(out)
    return out


def states(values: Sequence[Any]) -> list[Any]:
    """What tells whether tensors, lists and dicts were changed in place; of tensors of inference mode, nothing does."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(0 if value.is_inference() else value._version)
        else:
            found.append([id(item) for item in (value.values() if isinstance(value, dict) else value)])
    return found


def holders(args: Sequence[Any]) -> list[Any]:
    """The lists and dicts of tensors among arguments: copies of the user's, which do not get what is written there."""
    return [arg for arg in args if isinstance(arg, (list, dict)) and tensors_in(arg)]


def with_own(args: Sequence[Any], own: Sequence[Any]) -> list[Any]:
    """Arguments with the user's own lists and dicts, for a function may write into those that hold no tensors."""
    return [
        given if isinstance(given, (list, dict)) and not tensors_in(given) else arg
        for arg, given in zip(args, own, strict=True)
    ]


def node_of(out: Any) -> list[Any]:
    """The node of a function in the graph of what it gave; none where nothing of that requires grad."""
    nodes = (tensor.grad_fn for tensor in tensors_in(out))
    return [node for node in nodes if node is not None][:1]
