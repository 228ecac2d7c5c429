"""The rules, and how one is found: by operator, or by module class along its hierarchy.

Layers of `torch.nn` need no entry of their own: `nn.Linear` calls `F.linear`, and so does every subclass and
every function that multiplies by a weight. A rule for a module class is for layers whose gradient has a
shorter form than that of the operators inside.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from perex.factors.base import Factor
from perex.rules.call import Captured


class Substitute(Protocol):
    """What runs in an operator's place, where it is faster: the same to rounding, with gradients of examples alone."""

    def run(self, given: Mapping[str, Any]) -> Tensor | None:
        """What the operator gives for these arguments, or None where it is to be run itself."""


RuleFunction = Callable[[Captured], dict[Any, Factor]]


@dataclass(frozen=True, eq=False)
class Rule:
    """How to turn the output gradient of one operator or module into factors.

    Attributes:
        name: what reports call it.
        arguments: the arguments of the operator, or of the module's `forward`, in order.
        parameters: those whose per-example gradients the function returns.
        saves: for each parameter, those whose values its gradient needs in the backward; under `""`, those that are
            needed in any case.
        function: from `Captured` to a factor for each wanted parameter.
        applies: whether it covers a call with these arguments, by their names.
        narrow: whether it takes half precision as it is on GPUs, makes factors of that, and adds up in float32.
        multiplies: whether autocast has the operator read its arguments in half precision.
        substitute: what may run in its place where no gradient of its parameters is wanted.
    """

    name: str
    arguments: tuple[str, ...]
    parameters: frozenset[str]
    saves: Mapping[str, tuple[str, ...]]
    function: RuleFunction
    applies: Callable[[dict[str, Any]], bool] = field(default=lambda given: True)
    narrow: bool = False
    multiplies: bool = False
    substitute: Substitute | None = None


OPERATORS: dict[Any, Rule] = {}
MODULES: dict[type[nn.Module], Rule] = {}


def operator_rule(
    *operators: Callable[..., Any],
    arguments: str,
    parameters: str,
    saves: Mapping[str, str] | None = None,
    applies: Callable[[dict[str, Any]], bool] = lambda given: True,
    narrow: bool = False,
    multiplies: bool = False,
    substitute: Substitute | None = None,
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a rule for torch operators.

    Args:
        operators: functions such as `torch.nn.functional.linear`.
        arguments: their arguments in order, separated by spaces.
        parameters: arguments whose per-example gradients the rule returns.
        saves: for a parameter, the arguments whose values its gradient needs, separated by spaces: memory is held
            for them only while that parameter is tracked.
        applies: a test on the call's arguments, by their names; where it fails, the general path is taken.
        narrow: whether the rule takes half precision as it is; see `Rule`.
        multiplies: whether autocast has the operators read half precision; see `Rule`.
        substitute: what may run in their place; see `Rule`.

    Raises:
        ValueError: an operator has a rule already.
    """

    def register(function: RuleFunction) -> RuleFunction:
        rule = Rule(
            function.__name__,
            tuple(arguments.split()),
            frozenset(parameters.split()),
            {name: tuple(needed.split()) for name, needed in (saves or {}).items()},
            function,
            applies,
            narrow,
            multiplies,
            substitute,
        )
        for operator in dict.fromkeys(operators):
            if operator in OPERATORS:
                raise ValueError(f"{operator} has a rule already: {OPERATORS[operator].name}")
            OPERATORS[operator] = rule
        return function

    return register


def module_rule(*classes: type[nn.Module], saves: str = "") -> Callable[[RuleFunction], RuleFunction]:
    r"""Register a rule for module classes, and for subclasses that keep their `forward`.

    The function gets a `Captured` call whose arguments are those of `forward`, and returns one factor for
    each own parameter of the module, by its attribute name.

    Args:
        classes: the module classes.
        saves: arguments of `forward` whose values the rule reads, separated by spaces.

    Raises:
        ValueError: a class has a rule already.

    Example:
        >>> import torch, perex
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self, d):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.ones(d))
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> @perex.module_rule(Scale, saves="x")
        ... def scale(captured):  # d loss_b / d weight = sum over positions of grad * x
        ...     product = captured.grad * captured.examples("x")  # (B, ..., d)
        ...     return {"weight": perex.factors.Dense(product.reshape(captured.batch, -1, product.shape[-1]).sum(1))}
    """

    def register(function: RuleFunction) -> RuleFunction:
        for cls in classes:
            if cls in MODULES:
                raise ValueError(f"{cls.__name__} has a rule already: {MODULES[cls].name}")
            names = tuple(inspect.signature(cls.forward).parameters)[1:]
            MODULES[cls] = Rule(function.__name__, names, frozenset(), {"": tuple(saves.split())}, function)
        return function

    return register


def module_rule_for(module: nn.Module) -> Rule | None:
    """The rule of the nearest class in the hierarchy, if that class's `forward` is the one that runs."""
    for cls in type(module).__mro__:
        if cls in MODULES:
            runs = getattr(cls, "forward", None) is type(module).forward and "forward" not in vars(module)
            return MODULES[cls] if runs else None
    return None
