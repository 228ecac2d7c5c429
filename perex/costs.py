"""What the norms of one backward cost: factors are made again without numbers, and asked for their plans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from perex.capture.forward import Use
from perex.capture.parameters import Entry
from perex.factors import Dense, Factor, Few, Piecewise, Total
from perex.kernels.spot import Spot, at
from perex.rules.general import GENERAL


@dataclass
class Cost:
    """What one use costs, as it is added up.

    Attributes:
        ways: how the norm of each of its parameters was computed.
        flops: operations.
        bytes: memory.
        counted: whether `flops` is all of it.
    """

    ways: list[str]
    flops: int = 0
    bytes: int = 0
    counted: bool = True


class Share(NamedTuple):
    """One use of one parameter: the cost of its row, its place, its factor without numbers, and where that was."""

    cost: Cost
    place: int
    factor: Factor | None
    pulled_back: bool
    spot: Spot | None


def costs_of(uses: Sequence[Use]) -> list[Cost]:
    """What the norms of each use cost, in the order of the uses."""
    costs = []
    shares: dict[Entry, list[Share]] = {}
    for use in uses:
        cost = Cost([""] * len(use.site.parameters), counted=use.site.rule != GENERAL.name)
        costs.append(cost)
        arrived = sum(shape.numel() for shape in use.outputs or () if shape is not None)
        places: dict[Entry, list[int]] = {}
        for place, (entry, _) in enumerate(use.site.parameters):
            places.setdefault(entry, []).append(place)
        for entry, outline in use.factors or ():
            place, factor = places[entry].pop(0), outline.factor()
            inner = factor.factor if isinstance(factor, Few) else factor
            dense = isinstance(inner, Dense)
            pulled_back = use.site.parameters[place][1] and isinstance(inner, (Dense, Piecewise))
            cost.counted &= not pulled_back
            if dense and cost.counted:
                cost.flops += arrived  # added up
            shares.setdefault(entry, []).append(Share(cost, place, factor, pulled_back, outline.spot()))
    for found in shares.values():
        add_costs(found)
    return costs


def add_costs(uses: Sequence[Share]) -> None:
    """Give the uses of one parameter their ways and costs."""
    known = [use.factor for use in uses if use.factor is not None]
    if len(known) < len(uses):  # a kind of factor that is somebody else's
        for use in uses:
            use.cost.ways[use.place], use.cost.counted = "its own", False
        return
    total = Total(known)
    with at(uses[0].spot):
        plans = [factor.plan() for factor in total.factors]
    seen: set[int] = set()
    for (cost, place, _, pulled_back, _), factor, where in zip(uses, known, total.places, strict=True):
        plan = plans[where]
        assert plan is not None
        cost.ways[place] = "pulled back" if pulled_back else plan.way
        if len(uses) > 1:  # kept until the last use is in
            cost.bytes += held(factor)
        if where not in seen:
            seen.add(where)
            cost.flops += plan.flops
            cost.bytes += plan.elements * width(total.factors[where])
    last = uses[-1].cost
    for i, factor in enumerate(total.factors):
        for earlier in total.factors[:i]:
            cross = factor.dot_plan(earlier)
            last.flops += cross.flops
            last.bytes += cross.elements * width(factor)


def tensors_of(factor: Factor) -> Iterator[torch.Tensor]:
    """The floating-point tensors that a factor holds."""
    for value in vars(factor).values():
        if isinstance(value, Factor):
            yield from tensors_of(value)
        elif isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
            yield value


def held(factor: Factor) -> int:
    """Bytes of a factor's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(factor))


def width(factor: Factor) -> int:
    """Bytes of one element."""
    return max((tensor.element_size() for tensor in tensors_of(factor)), default=0)
