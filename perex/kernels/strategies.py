"""Several ways to one number, and the choice between them: by what they cost, by measuring, or by name."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from perex.kernels.plan import Plan
from perex.kernels.products import HALVES, widen
from perex.kernels.setting import Setting
from perex.kernels.spot import Spot, at, current
from perex.kernels.triton.available import fast

WORTH_TRYING = 8.0
"""Ways whose cost is estimated at more than so many times the cheapest are not measured."""


MOST = 4096
"""How many choices are remembered."""


@dataclass
class Preferences:
    """What a user wants to be used.

    Attributes:
        names: strategies to take wherever they apply, the first one first.
        autotune: whether to measure the strategies that apply, once for inputs of some shapes.
        measured: which was the fastest, by kind, shapes, and where tensors are if that is a GPU.
    """

    names: tuple[str, ...] = ()
    autotune: bool = False
    measured: dict[Any, str] = field(default_factory=dict)


_current: ContextVar[Preferences] = ContextVar("preferences", default=Preferences())  # noqa: B039  (never written to)


def preferring(preferences: Preferences) -> Setting[Preferences]:
    """Choose by a user's preferences."""
    return Setting(_current, preferences)


@dataclass(frozen=True)
class Strategy:
    """One way.

    Attributes:
        name: what reports call it, and what it is asked for by.
        plan: from the shapes of the arguments to what it costs; None where it does not apply.
        run: from the arguments to `(B,)`, or to terms of it, `(B, P)`, or to what else there are several ways to; the
            first of them is a floating-point tensor.
        narrow: whether it takes half precision as it is, and adds up in float32; others get it in float32.
    """

    name: str
    plan: Callable[..., Plan | None]
    run: Callable[..., Any]
    narrow: bool = False

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        if self.narrow or args[0].dtype not in HALVES:
            return self.run(*args)
        return self.run(*(widen(arg) if isinstance(arg, Tensor) else arg for arg in args))


_all: list[Strategies] = []


def known_strategies() -> set[str]:
    """The names of all ways there are."""
    return {name for strategies in _all for name in (*strategies.ways, *strategies.on_gpu)}


class Strategies:
    """The ways to one number. Each is a function that reads like its formula, with a plan beside it.

    Args:
        kind: what they compute.

    Attributes:
        ways: those that run everywhere, by name.
        picked: what was chosen for arguments of some shapes.
        on_gpu: those for GPUs; their plans ask `perex.kernels.spot.current` whether tensors are fit for them.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.ways: dict[str, Strategy] = {}
        self.on_gpu: dict[str, Strategy] = {}
        self.picked: dict[Any, tuple[str, Plan]] = {}
        _all.append(self)

    def way(
        self, name: str, plan: Callable[..., Plan | None], on_gpu: bool = False, narrow: bool = False
    ) -> Callable[[Callable[..., Any]], Any]:
        """Register a function under a name.

        Raises:
            ValueError: the name is taken.
        """

        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            if name in self.ways or name in self.on_gpu:
                raise ValueError(f"{self.kind} has a strategy {name!r} already")
            (self.on_gpu if on_gpu else self.ways)[name] = Strategy(name, plan, run, narrow or on_gpu)
            self.picked.clear()
            return run

        return register

    def plans(self, *shapes: Any) -> dict[str, Plan]:
        """What each way that applies costs."""
        ways = self.ways if self.spot() is None else self.ways | self.on_gpu
        found = ((name, way.plan(*shapes)) for name, way in ways.items())
        return {name: plan for name, plan in found if plan is not None}

    def spot(self) -> Spot | None:
        """Where tensors are, if that matters: not plainly in a CPU's memory, or one for GPUs is asked for by name."""
        spot = current()
        return spot if spot is not None and self.asked(spot) else None

    def asked(self, spot: Spot) -> bool:
        """Whether it matters to plans where tensors are."""
        return bool(self.on_gpu) and (not spot.plain or not self.on_gpu.keys().isdisjoint(_current.get().names))

    def choose(self, *shapes: Any) -> Plan:
        """The plan of the way that is taken for arguments of these shapes."""
        return self.pick(*shapes)[1]

    def pick(self, *shapes: Any) -> tuple[str, Plan]:
        """The name and the plan of that way."""
        wanted = _current.get()
        key = shapes, wanted.names, self.spot()
        if key not in self.picked or wanted.measured:
            plans = self.plans(*shapes)
            name = next((name for name in wanted.names if name in plans), wanted.measured.get(self.key(shapes)))
            if name not in plans:
                costs = self.costs(plans)
                name = min(costs, key=costs.__getitem__)
            if wanted.measured:
                return name, plans[name]
            if len(self.picked) >= MOST:
                self.picked.clear()
            self.picked[key] = name, plans[name]
        return self.picked[key]

    def key(self, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a measurement holds for."""
        return self.kind, shapes, self.spot()

    def costs(self, plans: dict[str, Plan]) -> dict[str, float]:
        """What the ways cost that may be taken unasked: those for GPUs, where any of these applies, or the others."""
        if fast(self.spot()):
            times = {name: plan.seconds for name, plan in plans.items() if name in self.on_gpu}
            if times:
                return times
        return {name: plan.cost for name, plan in plans.items() if name in self.ways}

    def run(self, shapes: tuple[Any, ...], *args: Any) -> Any:
        """The number, by the way that is chosen for `shapes`, which `plan`s take.

        Ways for GPUs are not even looked at for tensors on a CPU, unless one is asked for by name.
        """
        here = Spot(args[0].device.type, args[0].dtype)
        spot = here if self.asked(here) else None
        if spot == current():
            return self.chosen(shapes, args)(*args)
        with at(spot):  # while it runs, too: it may ask for plans of its own, and for the size of blocks
            return self.chosen(shapes, args)(*args)

    def chosen(self, shapes: tuple[Any, ...], args: tuple[Any, ...]) -> Strategy:
        """That way, which is measured if the user wants that."""
        wanted = _current.get()
        if wanted.autotune and self.key(shapes) not in wanted.measured:
            wanted.measured[self.key(shapes)] = self.fastest(shapes, args)
        name, _ = self.pick(*shapes)
        return self.ways.get(name) or self.on_gpu[name]

    def fastest(self, shapes: tuple[Any, ...], args: tuple[Any, ...]) -> str:
        """The name of the way that takes the least time."""
        costs = self.costs(self.plans(*shapes))
        least = min(costs.values())
        candidates = [name for name, cost in costs.items() if cost <= WORTH_TRYING * least]
        return candidates[0] if len(candidates) == 1 else min(candidates, key=lambda name: self.seconds(name, args))

    def seconds(self, name: str, args: tuple[Any, ...]) -> float:
        """How long one way takes when it is warm."""
        run = (self.ways | self.on_gpu)[name]
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
