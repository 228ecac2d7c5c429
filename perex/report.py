"""The table that says which path each use of a parameter took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """Rows of `(module path, operator, rule, parameters)`, printed as a table.

    Attributes:
        rows: one for each operator in which tracked parameters met examples, in the order they ran.
        tracked: names of all tracked parameters.
    """

    rows: Sequence[tuple[str, str, str, tuple[str, ...]]]
    tracked: Sequence[str]

    @property
    def unused(self) -> list[str]:
        """Tracked parameters that the latest forward did not use: their norms are zero."""
        used = {name for row in self.rows for name in row[3]}
        return [name for name in self.tracked if name not in used]

    def __str__(self) -> str:
        table = [("module", "operator", "rule", "parameters")]
        table += [(path or "(model)", operator, rule, ", ".join(names)) for path, operator, rule, names in self.rows]
        widths = [max(len(row[column]) for row in table) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        if self.unused:
            lines.append(f"not used in the latest forward: {', '.join(self.unused)}")
        return "\n".join(line.rstrip() for line in lines)
