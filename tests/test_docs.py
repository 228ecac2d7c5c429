"""The documentation runs: every Python block of the README and of docs/, and every example in a docstring.

The Python blocks of a page run in order, in one namespace and an empty directory. Where a ```text block follows
a Python block directly, it is what that block prints; `...` stands for anything. Links to files must lead
somewhere.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import importlib.util
import io
import pkgutil
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import perex
from perex.rules import registry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = ["perex", *(found.name for found in pkgutil.walk_packages(perex.__path__, "perex."))]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


class Block(NamedTuple):
    """A fenced Python block: its code, the line it begins on, and what it prints, if the page says."""

    code: str
    line: int
    printed: str | None


def blocks(text: str) -> list[Block]:
    fences = list(FENCE.finditer(text))
    found = []
    for place, fence in enumerate(fences):
        if fence[1] == "python":
            after = fences[place + 1] if place + 1 < len(fences) else None
            follows = after is not None and after[1] == "text" and not text[fence.end() : after.start()].strip()
            printed = after[2] if after is not None and follows else None
            found.append(Block(fence[2], text.count("\n", 0, fence.start(2)), printed))
    return found


def run_page(text: str, name: str) -> None:
    """Run a page's Python blocks; an error's traceback and a wrong output name the page and line."""
    namespace: dict[str, object] = {"__name__": "page"}
    checker, options = doctest.OutputChecker(), doctest.ELLIPSIS
    for block in blocks(text):
        tree = ast.increment_lineno(ast.parse(block.code, name), block.line)
        stdout = io.StringIO()
        with contextlib.redirect_stdout(stdout):
            exec(compile(tree, name, "exec"), namespace)
        if block.printed is not None and not checker.check_output(block.printed, stdout.getvalue(), options):
            shown = checker.output_difference(doctest.Example("", block.printed), stdout.getvalue(), options)
            pytest.fail(f"{name}, the block before line {block.line + block.code.count(chr(10)) + 2}:\n{shown}")


@pytest.fixture(autouse=True)
def as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty directory; take back the rules that examples register, and what they set in torch."""
    monkeypatch.chdir(tmp_path)
    tables = [(table, dict(table)) for table in (registry.OPERATORS, registry.MODULES)]
    dtype, state, threads = torch.get_default_dtype(), torch.get_rng_state(), torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(2)  # of which reports count each one's memory
    try:
        yield
    finally:
        for table, rules in tables:
            table.clear()
            table.update(rules)
        torch.set_default_dtype(dtype)
        torch.set_rng_state(state)
        torch.set_num_threads(threads)
        torch.set_printoptions(profile="default")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs_and_prints_what_the_page_says(page: Path) -> None:
    run_page(page.read_text(encoding="utf-8"), str(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    targets = LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_rows_of_a_table_have_as_many_cells_as_its_head(page: Path) -> None:
    head = 0
    for number, line in enumerate(FENCE.sub(lambda code: "\n" * code[0].count("\n"), page.read_text()).splitlines(), 1):
        cells = len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`|\$[^$]*\$", "", line))) if line.startswith("|") else 0
        head = head or cells if cells else 0
        assert cells == head, f"line {number}: {line[:60]}"


def test_there_is_code_to_run() -> None:
    counts = {page.name: len(blocks(page.read_text(encoding="utf-8"))) for page in PAGES}
    assert counts["README.md"] >= 1 and counts["guide.md"] >= 8 and counts["rules.md"] >= 4


def doctests(module: types.ModuleType) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder().find(module) if test.examples]


def run_doctests(module: types.ModuleType) -> str:
    """What went wrong, as doctest tells it; empty if nothing did."""
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    for test in doctests(module):
        runner.run(test, out=report.append)
    return "".join(report)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_hold(name: str) -> None:
    assert run_doctests(importlib.import_module(name)) == ""


def test_what_users_call_has_an_example() -> None:
    named = {test.name for name in MODULES for test in doctests(importlib.import_module(name))}
    assert {"perex.attaching.attach", "perex.scoring.score.score", "perex.rules.registry.module_rule"} <= named


# That these tests can fail

PAGE = """
```python
x = 1
```
```python
print(x + 1)
```

```text
{printed}
```
"""


@pytest.mark.parametrize("printed", ["2", "..."])
def test_a_right_page_passes(printed: str) -> None:
    run_page(PAGE.format(printed=printed), "page.md")


def test_a_wrong_output_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match="page.md"):
        run_page(PAGE.format(printed="3"), "page.md")


def test_an_error_in_a_block_fails_on_its_line() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run_page("\n\n```python\nx = 0\n1 / x\n```\n", "page.md")
    assert caught.traceback[-1].lineno + 1 == 5


def test_text_that_does_not_follow_directly_is_not_compared() -> None:
    run_page("```python\nprint(1)\n```\nand then\n```text\n2\n```\n", "page.md")


def test_a_wrong_docstring_fails() -> None:
    module = types.ModuleType("module")
    module.__doc__ = ">>> 1 + 1\n3\n"
    assert "Expected:\n    3" in run_doctests(module)


def test_a_page_without_its_picture_fails() -> None:
    assert LINK.findall("![a](docs/images/gone.png) [b](https://c.d) [e](#f)") == ["docs/images/gone.png"]
