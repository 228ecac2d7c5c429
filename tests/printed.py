"""Printed text against files in tests/golden. `PEREX_OVERWRITE_GOLDEN=1` writes the files anew: read the diff then."""

from __future__ import annotations

import os
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"


def assert_printed(name: str, text: str) -> None:
    """The text is that of the file."""
    path = GOLDEN / f"{name}.txt"
    text += "\n"
    if os.environ.get("PEREX_OVERWRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"PEREX_OVERWRITE_GOLDEN=1 writes {path.name} anew"
    assert all(len(line) <= 120 for line in text.splitlines()), "it fits into a terminal"
