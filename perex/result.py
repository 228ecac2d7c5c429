"""What one backward brought: per-example gradients of each parameter, reduced to the wanted quantities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from perex.accumulated import Accumulated
from perex.capture.forward import Forward
from perex.capture.parameters import Entry
from perex.errors import NotReadyError, PerexError, anew
from perex.factors import Dense, Factor, Few, Total
from perex.gradients import Kept
from perex.quantities import Quantity
from perex.quantities.base import finished


class Share:
    """What one forward's calls brought in one backward."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.open: dict[str, list[Factor]] = {}  # by the parameter's name, here and below
        self.closed: dict[str, list[Any]] = {}
        self.kept: dict[str, Kept] = {}
        self.overflowed: Tensor | None = None


class Result:
    """Collects factors during one backward and reduces them, a parameter at a time.

    Args:
        task: the number of the backward, as autograd counts them.
        quantities: what each parameter's gradients are reduced to.
        alone: whether all factors come from one forward, so that a parameter can be closed, and its memory
            freed, as soon as its last factor is in.
        number: how many forwards had begun when this backward did.
        keep: whether gradients are kept as factors, to be used after the backward.
        room: how many bytes of them; with more, all are let go.
        losses: how many losses were handed over, if they were.
        scale: what gradients are to be multiplied by to be those of the examples' own losses, if known.
    """

    def __init__(
        self,
        task: int,
        quantities: Sequence[Quantity],
        alone: bool,
        number: int,
        keep: bool = False,
        losses: int | None = None,
        scale: float | None = None,
    ) -> None:
        self.task = task
        self.quantities = quantities
        self.alone = alone
        self.number = number
        self.keep = keep
        self.room = math.inf
        self.shares: dict[Forward, Share] = {}
        self.losses = losses
        self.scale = scale
        self.scaled: Tensor | None = None
        self.error: PerexError | None = None
        self.finished = False
        self.total: Tensor | None = None
        """What was run backward, where that may be done again."""
        self.accumulated = Accumulated()

    def share(self, forward: Forward) -> Share:
        """The part of one forward."""
        if forward not in self.shares:
            self.shares[forward] = Share(forward)
        return self.shares[forward]

    def add(self, forward: Forward, entry: Entry, factor: Factor) -> None:
        """Take up one use's gradients; close the parameter if it was the last."""
        share, name = self.share(forward), entry.name
        if name in share.closed:
            self.refuse(
                NotReadyError(
                    f"parameter '{name}' got gradients twice in one backward, from a forward that several "
                    "backwards share: run one backward for each forward"
                )
            )
            return
        factors = share.open.setdefault(name, [])
        uses = forward.uses[name] if self.alone else 0
        factors.append(factor if uses == 1 and not self.keep else factor.lasting())
        if len(factors) == uses:
            self.close([share], name)

    def overflow(self, forward: Forward, where: Tensor, examples: list[int] | None = None) -> None:
        """Note examples whose half-precision gradients became infinite: booleans `(B,)`, or of some `examples`."""
        share = self.share(forward)
        if examples is not None:
            where = where.new_zeros(forward.batch).index_copy(0, torch.tensor(examples, device=where.device), where)
        share.overflowed = where if share.overflowed is None else share.overflowed | where

    def close(self, shares: list[Share], name: str) -> None:
        """Reduce a parameter's gradients, summed over the uses in all of `shares`."""
        factors = [factor for share in shares for factor in share.open.pop(name, [])]
        if factors:
            total = Total(factors)
            shares[0].closed[name] = [quantity.reduce(name, total) for quantity in self.quantities]
            if self.keep:
                kept = shares[0].kept[name] = Kept(total)
                self.room -= sum(tensor.nbytes for tensor, _ in kept.stamps)
                if self.room < 0:
                    self.release()

    def drop(self) -> None:
        """Keep no gradients."""
        self.keep = False
        for share in self.shares.values():
            share.kept.clear()

    def release(self) -> None:
        """Let go of all that somebody might want after the backward."""
        self.accumulated, self.total = Accumulated(), None
        self.drop()

    def finish(self) -> None:
        """The backward has come to its end."""
        self.finished = True

    def refuse(self, error: PerexError) -> None:
        """Remember why this result must not be read; the first reason stays."""
        self.error = self.error or anew(error)

    def groups(self, relation: str | None) -> list[list[Share]]:
        """Shares by whose examples they hold, every parameter closed.

        Args:
            relation: for several forwards, whether they hold the `"same"` examples or `"further"` ones.
        """
        shares = sorted(self.shares.values(), key=lambda share: share.forward.number)
        same = self.relation(shares, relation) == "same"
        groups = [shares] if same else [[share] for share in shares]
        for group in groups:
            for name in {name for share in group for name in share.open}:
                self.close(group, name)
        return groups

    def tracked(self) -> list[Entry]:
        """The tracked parameters of all forwards."""
        return list({entry.name: entry for share in self.shares.values() for entry in share.forward.tracked}.values())

    def values(self, index: int, relation: str | None) -> tuple[dict[str, Any], int]:
        """One quantity of every tracked parameter that has a part in it.

        Args:
            index: the quantity's place among `quantities`.
            relation: see `groups`.

        Returns:
            Values by parameter's name, of norms perhaps `Terms`, and the number of examples B.
        """
        groups = self.groups(relation)
        quantity, values = self.quantities[index], dict[str, Any]()
        overflown = index == 0 and any(share.overflowed is not None for share in self.shares.values())
        for entry in self.tracked():
            found = [self.part(group[0], entry, index) for group in groups]
            parts = [part for part in found if part is not None]
            if not parts:
                continue
            value = quantity.joined([finished(part) for part in parts]) if len(parts) > 1 else parts[0]
            if overflown:
                value = finished(value)
                overflowed = torch.cat([self.overflowed(group, value.device) for group in groups])
                value = value.masked_fill(overflowed & value.isnan(), float("inf"))
            values[entry.name] = value
        return values, sum(group[0].forward.batch for group in groups)

    def kept(self, relation: str | None) -> dict[str, list[Kept]]:
        """The gradients that were kept, by parameter's name; for each forward of further examples, one."""
        groups = self.groups(relation)
        return {
            entry.name: [
                group[0].kept.get(entry.name) or Kept(Total([nothing(entry, group[0].forward.batch)]))
                for group in groups
            ]
            for entry in self.tracked()
        }

    def part(self, share: Share, entry: Entry, index: int) -> Any:
        """A parameter's values from one forward; of gradients that are zero where it was not used."""
        found = share.closed.get(entry.name)
        if found is not None:
            return found[index]
        return self.quantities[index].reduce(entry.name, Total([nothing(entry, share.forward.batch)]))

    def overflowed(self, group: Iterable[Share], device: torch.device) -> Tensor:
        """Which examples' gradients became infinite in half precision, `(B,)`."""
        group = list(group)
        out = torch.zeros(group[0].forward.batch, dtype=torch.bool, device=device)
        for share in group:
            if share.overflowed is not None:
                out |= share.overflowed.to(device)
        return out

    def relation(self, shares: list[Share], relation: str | None) -> str:
        """Whether several forwards hold the same examples or further ones."""
        if len(shares) == 1:
            return "same"
        sizes = [share.forward.batch for share in shares]
        if self.losses is not None and relation is None:
            fits = {"same": set(sizes) == {self.losses}, "further": sum(sizes) == self.losses}
            relation = next((name for name, fit in fits.items() if fit), None)
        if relation is None:
            paths = [f"module {share.forward.path!r}" if share.forward.path else "the model" for share in shares]
            called = ", ".join(f"of {path} on {size} examples" for path, size in zip(paths, sizes, strict=True))
            raise NotReadyError(
                f"{len(shares)} forwards came before one backward: {called}. Do they "
                "hold the same examples, as the two sides of a siamese network do, or further ones? Say "
                'attach(..., forwards="same") or forwards="further", or call `px.backward(losses)` with one loss an '
                "example"
            )
        if relation == "same" and len(set(sizes)) > 1:
            raise NotReadyError(f'forwards="same", but the forwards have {sizes} examples')
        if relation == "same" and any(share.closed for share in shares[1:]):
            raise NotReadyError("forwards of different backwards came together in one: run one backward for them all")
        return relation


def nothing(entry: Entry, batch: int) -> Factor:
    """The gradients of a parameter that was not used: no example has one."""
    dtype = torch.promote_types(entry.parameter.dtype, torch.float32)
    return Few(Dense(torch.empty(0, *entry.parameter.shape, dtype=dtype, device=entry.parameter.device)), [], batch)
