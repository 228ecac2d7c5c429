"""The last backward run a second time, in place of gradients that were kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from perex.capture.forward import Forward
from perex.capture.parameters import Entry
from perex.errors import NotReadyError
from perex.factors import Factor
from perex.gradients import square_of
from perex.result import Result
from perex.running import Running
from perex.summing import Doubts, Sum, Treatment, sum_of, times, wide


class SecondRun:
    """What it brings: uses of parameters one by one, as they come.

    Args:
        backwards: who runs it.
        result: of the first time.
        relation: whether several forwards hold the `"same"` examples or `"further"` ones.
        scale: what gradients are to be multiplied by.
    """

    def __init__(self, backwards: Running, result: Result, relation: str | None, scale: float | Tensor) -> None:
        if result.total is None:
            raise NotReadyError(
                "memory='low' runs the backward of `px.backward(losses)` once more, and there is none to run: call "
                "that rather than loss.backward(), and clip_ or reweight_ once after each. A selective checkpoint can "
                "go backward once only: memory='high' does without"
            )
        self.run: Callable[..., None] = backwards.again
        self.result = result
        self.scale = scale
        self.parts: dict[Forward, slice] = {}  # which examples are each forward's
        first = 0
        for group in result.groups(relation):
            for share in group:
                self.parts[share.forward] = slice(first, first + share.forward.batch)
            first += group[0].forward.batch

    def weighted_sum(self, weights: Mapping[str, Tensor], treatment: Treatment) -> dict[str, Tensor]:
        r"""$\sum_b w_b g_b$ of each parameter that was used; after that, it cannot be run any more.

        Args:
            weights: `(B,)`, by parameter.
            treatment: of the examples.
        """
        sums: dict[str, Sum] = {}

        def take(forward: Forward, entry: Entry, factor: Factor) -> None:
            name, rows, doubts = entry.name, self.parts[forward], Doubts()
            own = times(wide(weights[name])[rows], self.scale)
            several = len(self.parts) > 1 or forward.uses[name] > 1
            doubts.add(factor, own, None if treatment.limits is None else treatment.limits[name], several)
            (doubt,) = doubts.settled()
            found = sum_of(factor, own, treatment.of(rows), doubt, several, rows.start)
            sums[name] = sums[name].plus(found) if name in sums else found

        self.run(self.result, take)
        return {name: found.whole() for name, found in sums.items()}

    def squares_of(self, examples: Sequence[int]) -> dict[str, Tensor]:
        """Squared norms of some examples' gradients by parameter, multiplied out and in float64, `(n,)` each."""
        found: dict[tuple[str, int], Tensor] = {}

        def take(forward: Forward, entry: Entry, factor: Factor) -> None:
            first = self.parts[forward].start
            for b in examples:
                if 0 <= b - first < forward.batch:
                    gradient = factor.dense(b - first, b - first + 1)
                    found[entry.name, b] = found[entry.name, b] + gradient if (entry.name, b) in found else gradient

        self.run(self.result, take, last=False)
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        return {
            entry.name: torch.stack(
                [square_of(found[entry.name, b], self.scale) if (entry.name, b) in found else zero for b in examples]
            )
            for entry in self.result.tracked()
        }
