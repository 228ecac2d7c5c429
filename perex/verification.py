"""What `perex.verify` returns: a verdict, a sentence, and a row for each parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from perex.report import Report
from perex.table import table, wrapped

Verdict = Literal["agrees", "disagrees", "mixes", "refused", "fails", "random"]
SHOWN = 20


@dataclass(frozen=True, eq=False)
class Comparison:
    """One parameter's gradient norms, from perex and from the loop.

    Attributes:
        parameter: its name.
        module: the path of the module that used it first; that of its owner, if none did.
        perex: norms from one batched backward, `(n,)`.
        loop: norms from one backward for each example, `(n,)`.
        difference: the largest difference between the two, in relation to the larger one.
        worst: for which example that is.
        agrees: whether it is rounding.
    """

    parameter: str
    module: str
    perex: Tensor
    loop: Tensor
    difference: float
    worst: int
    agrees: bool


@dataclass(frozen=True, eq=False)
class Verification:
    """What `verify` found; print it. It is true where perex agrees with the loop.

    Attributes:
        verdict: `"agrees"`; `"disagrees"`, where perex is wrong; `"mixes"`, where examples influence each other, so
            that there is nothing to agree on; `"refused"`, where perex says that it cannot; `"fails"`, where it
            raised another error; `"random"`, where two runs of the same examples differ.
        summary: the finding in words, and what to do.
        rows: a comparison for each tracked parameter; none where perex gave no norms.
        losses_agree: whether every example has the same loss in the batch and alone.
        dtype: the precision of the comparison.
        notes: what else there is to know: why it was not float64, for instance.
        error: what perex raised, if it did.
        report: perex's own report of the run, if it gave norms.
    """

    verdict: Verdict
    summary: str
    rows: Sequence[Comparison] = ()
    losses_agree: bool = True
    dtype: torch.dtype = torch.float64
    notes: Sequence[str] = ()
    error: Exception | None = None
    report: Report | None = None

    @property
    def agrees(self) -> bool:
        """Whether perex agrees with the loop on every parameter."""
        return self.verdict == "agrees"

    def __bool__(self) -> bool:
        return self.agrees

    def __str__(self) -> str:
        lines = wrapped(self.summary)
        for note in self.notes:
            lines += wrapped(f"note: {note}")
        if self.rows:
            ordered = sorted(self.rows, key=lambda row: row.agrees)  # those that disagree first, else in order
            header = ("module", "parameter", "example", "perex", "loop", "difference", "")
            cells = [
                (
                    row.module or "(model)",
                    row.parameter,
                    str(row.worst),
                    f"{float(row.perex[row.worst]):.6g}",
                    f"{float(row.loop[row.worst]):.6g}",
                    f"{row.difference:.1e}",
                    "" if row.agrees else "<-",
                )
                for row in ordered[:SHOWN]
            ]
            lines += ["", *table(header, cells, right={2, 3, 4, 5}, shrink={0: "start", 1: "start"})]
            if len(ordered) > SHOWN:
                rest = ordered[SHOWN:]
                wrong = sum(not row.agrees for row in rest)
                lines.append(f"... and {len(rest)} more, {f'{wrong} of which disagree' if wrong else 'which agree'}")
        return "\n".join(lines)
