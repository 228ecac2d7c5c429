"""Several ways to one number, and the choice between them: by what they cost, by measuring, or by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from perex.kernels.plan import Plan

WORTH_TRYING = 8.0
"""Ways whose cost is estimated at more than so many times the cheapest are not measured."""


@dataclass
class Preferences:
    """What a user wants to be used.

    Attributes:
        names: strategies to take wherever they apply, the first one first.
        autotune: whether to measure the strategies that apply, once for inputs of some shapes.
        measured: which was the fastest, by kind and shapes.
    """

    names: tuple[str, ...] = ()
    autotune: bool = False
    measured: dict[Any, str] = field(default_factory=dict)


_current: ContextVar[Preferences] = ContextVar("preferences", default=Preferences())  # noqa: B039  (never written to)


@contextmanager
def preferring(preferences: Preferences) -> Iterator[None]:
    """Choose by a user's preferences."""
    token = _current.set(preferences)
    try:
        yield
    finally:
        _current.reset(token)


@dataclass(frozen=True)
class Strategy:
    """One way.

    Attributes:
        name: what reports call it, and what it is asked for by.
        plan: from the shapes of the arguments to what it costs; None where it does not apply.
        run: from the arguments to `(B,)`.
    """

    name: str
    plan: Callable[..., Plan | None]
    run: Callable[..., Tensor]


_all: list[Strategies] = []


def known_strategies() -> set[str]:
    """The names of all ways there are."""
    return {name for strategies in _all for name in strategies.ways}


class Strategies:
    """The ways to one number. Each is a function that reads like its formula, with a plan beside it.

    Args:
        kind: what they compute.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.ways: dict[str, Strategy] = {}
        _all.append(self)

    def way(self, name: str, plan: Callable[..., Plan | None]) -> Callable[[Callable[..., Tensor]], Any]:
        """Register a function under a name.

        Raises:
            ValueError: the name is taken.
        """

        def register(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
            if name in self.ways:
                raise ValueError(f"{self.kind} has a strategy {name!r} already")
            self.ways[name] = Strategy(name, plan, run)
            return run

        return register

    def plans(self, *shapes: Any) -> dict[str, Plan]:
        """What each way that applies costs."""
        found = ((name, way.plan(*shapes)) for name, way in self.ways.items())
        return {name: plan for name, plan in found if plan is not None}

    def choose(self, *shapes: Any) -> Plan:
        """The plan of the way that is taken for arguments of these shapes."""
        return self.pick(*shapes)[1]

    def pick(self, *shapes: Any) -> tuple[str, Plan]:
        """The name and the plan of that way."""
        plans, wanted = self.plans(*shapes), _current.get()
        name = next((name for name in wanted.names if name in plans), wanted.measured.get((self.kind, shapes)))
        if name not in plans:
            name = min(plans, key=lambda name: plans[name].cost)
        return name, plans[name]

    def run(self, shapes: tuple[Any, ...], *args: Any) -> Tensor:
        """The number, by the way that is chosen for `shapes`, which `plan`s take."""
        wanted = _current.get()
        if wanted.autotune and (self.kind, shapes) not in wanted.measured:
            wanted.measured[self.kind, shapes] = self.fastest(shapes, args)
        return self.ways[self.pick(*shapes)[0]].run(*args)

    def fastest(self, shapes: tuple[Any, ...], args: tuple[Any, ...]) -> str:
        """The name of the way that takes the least time."""
        plans = self.plans(*shapes)
        least = min(plan.cost for plan in plans.values())
        candidates = [name for name, plan in plans.items() if plan.cost <= WORTH_TRYING * least]
        return candidates[0] if len(candidates) == 1 else min(candidates, key=lambda name: self.seconds(name, args))

    def seconds(self, name: str, args: tuple[Any, ...]) -> float:
        """How long one way takes when it is warm."""
        run = self.ways[name].run
        run(*args)
        synchronize(args)
        start = time.perf_counter()
        run(*args)
        synchronize(args)
        return time.perf_counter() - start


def synchronize(args: tuple[Any, ...]) -> None:
    """Wait for what was started on a device."""
    if any(isinstance(arg, Tensor) and arg.is_cuda for arg in args):
        torch.cuda.synchronize()
