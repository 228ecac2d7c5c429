"""Tables for a terminal: columns aligned, long names shortened, numbers with units."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

WIDTH = 120
UNITS = ("", "k", "M", "G", "T", "P")


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Collection[int] = (),
    shrink: Mapping[int, Literal["start", "end"]] | None = None,
    least: int = 12,
) -> list[str]:
    """The lines of a table, no longer than `WIDTH` where shortening allows.

    Args:
        header: titles of the columns.
        rows: cells.
        right: columns that are aligned to the right.
        shrink: columns that may be shortened, the widest first, and at which side.
        least: what shortening leaves of a column at least.

    Example:
        >>> print(*table(("name", "n"), [("weight", "12"), ("b", "3")], right={1}), sep="\\n")
        name     n
        weight  12
        b        3
    """
    shrink = shrink or {}
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        column = max(shrink, key=lambda column: widths[column], default=-1)
        if column < 0 or widths[column] <= least:
            break
        widths[column] -= 1
    lines = []
    for row in cells:
        parts = []
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            short = shortened(cell, width, shrink.get(column, "end"))
            parts.append(short.rjust(width) if column in right else short.ljust(width))
        lines.append("  ".join(parts).rstrip())
    return lines


def shortened(text: str, width: int, side: Literal["start", "end"]) -> str:
    """A text without its start or end where it is too long.

    Example:
        >>> shortened("transformer.h.0.attn.c_attn", 16, "start"), shortened("weight, bias", 8, "end")
        ('…h.0.attn.c_attn', 'weight,…')
    """
    if len(text) <= width:
        return text
    return f"…{text[len(text) - width + 1 :]}" if side == "start" else f"{text[: width - 1]}…"


def human(number: float, unit: str = "") -> str:
    """A number with three digits at most, and a prefix.

    Example:
        >>> human(950), human(1234567, "FLOP"), human(1023.9e3, "B")
        ('950', '1.2 MFLOP', '1 MB')
    """
    value, prefix = float(number), 0
    while value >= 999.5 and prefix < len(UNITS) - 1:
        value, prefix = value / 1000, prefix + 1
    digits = f"{value:.1f}" if value < 9.95 and prefix else f"{value:.0f}"
    return f"{digits.removesuffix('.0')} {UNITS[prefix]}{unit}".rstrip()


def wrapped(text: str) -> list[str]:
    """A paragraph as lines, further ones indented."""
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
