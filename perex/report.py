"""The table that says how the norm of each use of a parameter was found, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from perex.capture.axis import Axis, Held
from perex.capture.forward import Forward, Use
from perex.capture.parameters import Entry
from perex.costs import Cost, costs_of
from perex.table import human, table, wrapped

HEADER = ("module", "operator", "rule", "norm by", "parameters", "input", "output", "FLOP", "memory")
SHRINK: dict[int, Literal["start", "end"]] = {0: "start", 1: "end", 2: "end", 4: "end", 5: "end", 6: "end"}


@dataclass(frozen=True)
class Row:
    """One operator in which tracked parameters met examples.

    Attributes:
        module: the path of the module that ran it; `""` is the model's own forward.
        operator: its name; the class's, for a module with a rule of its own.
        rule: the name of its rule, or `"general"`.
        parameters: names of the parameters that were used.
        shapes: their shapes.
        ways: how the norm of each one's gradient was computed; empty until a backward came.
        input: shape of the first argument that holds examples, such as `(B, 64, 256)`.
        output: shape of the output gradient, written alike; `""` until a backward came.
        flops: floating-point operations of the norms, a multiply-add being two; None until a backward came. A parameter
            used several times counts at its first use, cross terms at its last.
        counted: whether `flops` is all of it. The general path runs the operator again, and a derived parameter's
            gradients are pulled back: what that takes is not counted.
        bytes: memory the norms took beyond the backward's own: temporaries, and what a parameter used several times
            keeps until its last use. None until a backward came.
    """

    module: str
    operator: str
    rule: str
    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    ways: tuple[str, ...] = ()
    input: str = ""
    output: str = ""
    flops: int | None = None
    counted: bool = True
    bytes: int | None = None

    @property
    def way(self) -> str:
        """How the norm of the largest parameter's gradient was computed."""
        if not self.ways:
            return ""
        return self.ways[max(range(len(self.ways)), key=lambda place: math.prod(self.shapes[place]))]


@dataclass(frozen=True)
class Report:
    """What `Tracker.report` returns; print it.

    Attributes:
        rows: one for each operator in which tracked parameters met examples, in the order they ran.
        tracked: names of all tracked parameters.
        batch: number of examples in the latest forward; None before any.
        refused: why reading norms would raise now, and nothing if it would not.
        shared: of parameters used several times or tied, how often and where.
        forwards: how many forwards the latest backward went through.
    """

    rows: Sequence[Row]
    tracked: Sequence[str]
    batch: int | None = None
    refused: str | None = None
    shared: Mapping[str, str] = field(default_factory=dict)
    forwards: int = 1

    @property
    def unused(self) -> list[str]:
        """Tracked parameters that the latest forward did not use: their norms are zero."""
        used = {name for row in self.rows for name in row.parameters}
        return [name for name in self.tracked if name not in used]

    @property
    def flops(self) -> int:
        """Operations of all rows."""
        return sum(row.flops or 0 for row in self.rows)

    @property
    def bytes(self) -> int:
        """The most memory that any row took."""
        return max((row.bytes or 0 for row in self.rows), default=0)

    def __str__(self) -> str:
        if self.batch is None:
            return (
                f"nothing to report yet: the model was not called ({counted(len(self.tracked), 'parameter')} tracked)"
            )
        lines = []
        if self.rows:
            lines += table(HEADER, [cells(row) for row in self.rows], right={7, 8}, shrink=SHRINK)
            lines.append("")
        lines += wrapped(self.totals())
        if not all(row.counted for row in self.rows):
            lines.append(
                "+ and what the general path, or pulling gradients of a derived weight back, runs: not counted"
            )
        for name, where in self.shared.items():
            lines += wrapped(f"shared: {name}: {where}")
        if self.unused:
            lines += wrapped(f"not used in the latest forward, so norms are zero: {', '.join(self.unused)}")
        if self.refused:
            lines += wrapped(f"refused: {self.refused}")
        return "\n".join(lines)

    def totals(self) -> str:
        """The sentence below the table."""
        what = f"{counted(self.batch or 0, 'example')}, {counted(len(self.tracked), 'parameter')} tracked"
        if self.forwards > 1:
            what += f"; the latest of {self.forwards} forwards"
        if all(row.flops is None for row in self.rows):
            return f"{what}; how norms are computed is known after a backward" if self.rows else what
        return f"{what}; norms take {human(self.flops, 'FLOP')}, and up to {human(self.bytes, 'B')} at a time"


def counted(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def cells(row: Row) -> tuple[str, ...]:
    """A row as text."""
    largest = max(range(len(row.shapes)), key=lambda place: math.prod(row.shapes[place]))
    parameters = []
    for place, name in enumerate(row.parameters):
        own = name.removeprefix(f"{row.module}.") if row.module else name
        if own == name and name.count(".") > 1:
            own = "…" + ".".join(name.split(".")[-2:])
        size = "x".join(map(str, row.shapes[place])) if place == largest else ""
        parameters.append(f"{own} {size}".rstrip())
    return (
        row.module or "(model)",
        row.operator,
        row.rule,
        row.way or "-",
        ", ".join(parameters),
        row.input or "-",
        row.output or "-",
        "-" if row.flops is None else human(row.flops) + ("" if row.counted else " +"),
        "-" if row.bytes is None else human(row.bytes, "B"),
    )


def labelled(shape: Iterable[int], axis: Held) -> str:
    """A shape with B where the examples are; `B:9` are nine rows that belong to examples by no formula.

    Example:
        >>> labelled((4, 7), Axis(1)), labelled((12, 3), Axis(0, inner=4))
        ('(4, B)', '(B*4, 3)')
    """
    parts = [str(size) for size in shape]
    if isinstance(axis, Axis) and axis.owners is not None:
        parts[axis.dim] = f"B:{parts[axis.dim]}"
    elif isinstance(axis, Axis):
        before, after = f"{axis.outer}*" if axis.outer != 1 else "", f"*{axis.inner}" if axis.inner != 1 else ""
        parts[axis.dim] = f"{before}B{after}"
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def rows_of(forward: Forward) -> list[Row]:
    """The rows of a forward, with the costs of the backward that went through it, if one did."""
    costs = costs_of(forward.paths)
    return [row_of(use, cost) for use, cost in zip(forward.paths, costs, strict=True)]


def row_of(use: Use, cost: Cost) -> Row:
    """One row."""
    entries = [entry for entry, _ in use.site.parameters]
    first = next(((s, a) for s, a in zip(use.site.shapes, use.site.axes, strict=True) if a is not None), None)
    outputs = zip(use.outputs or (), use.site.out_axes, strict=False)
    output = next(((shape, axis) for shape, axis in outputs if shape is not None), None)
    return Row(
        use.site.module,
        use.site.operator,
        use.site.rule,
        tuple(entry.name for entry in entries),
        tuple(tuple(entry.parameter.shape) for entry in entries),
        tuple(cost.ways) if use.factors is not None else (),
        labelled(*first) if first is not None else "",
        labelled(*output) if output is not None else "",
        cost.flops if use.factors is not None else None,
        cost.counted,
        cost.bytes if use.factors is not None else None,
    )


def shared_of(forward: Forward, names: Mapping[Entry, Sequence[str]]) -> dict[str, str]:
    """Which parameters were used several times or have several names, in words.

    Args:
        forward: the forward.
        names: all names of each parameter.
    """
    places: dict[Entry, list[str]] = {}
    for use in forward.paths:
        for entry, _ in use.site.parameters:
            places.setdefault(entry, []).append(f"{use.site.module or '(model)'} ({use.site.operator})")
    found = {}
    for entry, own in names.items():
        where = places.get(entry, [])
        parts = [f"{len(where)} uses: {', '.join(dict.fromkeys(where))}"] if len(where) > 1 else []
        others = [name for name in own if name != entry.name]
        parts += [f"tied with {', '.join(others)}"] if others else []
        if parts:
            found[entry.name] = "; ".join(parts)
    return found
