"""Write docs/coverage.md from the raw results.

    python benchmarks/coverage/table.py benchmarks/results/coverage-2026-11-23.jsonl
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
GAP = 1e-6
NAMES = {"perex": "perex", "vmap": "`torch.func.vmap`", "opacus": "Opacus, norm mode"}
MARKS = {"exact": "exact", "refused": "refused", "wrong": "**wrong**", "error": "error", "none": "", "ended": "ended"}
Row = dict[str, Any]


def read(path: Path) -> tuple[Row, list[Row]]:
    """What the results say of the run itself, and the latest row of each model type."""
    about: Row = {}
    rows: dict[str, Row] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if "type" in row:
            rows[row["type"]] = row
        else:
            about = row
    return about, [rows[name] for name in sorted(rows)]


def status(row: Row, way: str) -> str:
    """How one library did: exact, refused, wrong, error, ended (crash, time or memory), or none (not applicable)."""
    return row.get(way, {}).get("status", "ended")


def cell(row: Row, way: str) -> str:
    """The same for the table, with the error where there is one."""
    result, state = row.get(way, {}), status(row, way)
    if state == "exact":
        return f"{max(result['error'], 1e-17):.0e}"
    return f"{MARKS[state]} {result['error']:.0e}" if state == "wrong" else MARKS[state]


def lines(head: Sequence[str], body: Iterable[Sequence[object]], right: int = 1) -> list[str]:
    """A table; columns from `right` on are numbers."""
    rule = ["---" if number < right else "---:" for number in range(len(head))]
    return [f"| {' | '.join(map(str, line))} |" for line in (head, rule, *body)]


def summary(rows: list[Row]) -> list[str]:
    body = []
    for way, name in NAMES.items():
        counts = Counter(status(row, way) for row in rows)
        worst = max((row[way]["error"] for row in rows if status(row, way) == "exact"), default=0)
        share = 100 * counts["exact"] / len(rows)
        others = [counts[state] or "" for state in ("refused", "wrong")]
        body.append([name, f"{counts['exact']} ({share:.0f} %)", *others, counts["error"] + counts["ended"] or "", f"{worst:.0e}"])
    return lines(["of " + str(len(rows)), "exact", "refused", "wrong", "error", "worst when exact"], body)


def kind_of(message: str) -> str:
    """A message without what is of one model alone."""
    message = re.sub(r"In module '[^']*', |[Mm]odule '[^']*'", "", message)
    message = re.sub(r"a tracked parameter is used by `\w+` together with a value whose examples perex cannot tell apart: ", "", message)
    message = re.sub(r"a tensor derived from .*? got a gradient", "a tensor derived from parameters got a gradient", message)
    message = re.sub(r" Leave the parameter out.*| Rewrite that step.*| Examples of a batch must not.*", "", message)
    return re.sub(r"\d+", "N", message.split(": ", 1)[-1])[:200].rstrip(". ")


def failures(rows: list[Row], way: str) -> list[str]:
    """What did not work, by reason, the most frequent first."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        state = status(row, way)
        if state in ("refused", "error", "wrong", "ended"):
            result = row.get(way, {})
            reason = kind_of(result.get("message") or result.get("where") or row.get("ended") or "")
            groups[state, reason].append(row["type"])
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return [f"- {MARKS[state]}, {len(types)}: {reason}. {', '.join(types)}" for (state, reason), types in ordered]


def unrunnable(rows: list[Row]) -> list[str]:
    """Model types that the loop itself did not run here, by why."""
    groups: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        text = row.get("loop") or row.get("ended") or ""
        missing = re.search(r"requires the (\w+) library", text)
        reason = f"needs {missing[1]}" if missing else "too large to shrink by rule" if "too large" in text else "inputs or configuration that no rule made"
        groups[reason].append(row["type"])
    return [f"- {reason} ({len(types)}): {', '.join(types)}" for reason, types in sorted(groups.items())]


def page(about: Row, rows: list[Row]) -> str:
    ran = [row for row in rows if "class" in row]
    odd = [row for row in ran if row.get("gap", 0) > GAP]
    told = [row for row in ran if row.get("gap", 0) <= GAP]
    whole = [row for row in told if not row.get("part")]
    padded = Counter(status(row, "padded") for row in told)
    training = Counter(status(row, "training") for row in told)
    out = [
        "# Coverage",
        "",
        f"Every architecture of transformers {about.get('transformers')} that could be shrunk to run here: "
        f"{len(ran)} model types, each with one class and one set of inputs, {about.get('date')}, torch "
        f"{about.get('torch')}, Opacus {about.get('opacus')}. They come from transformers' own auto-model mappings, not "
        "from a list of favourites. `make coverage` runs them and writes this page; "
        f"[the raw results](../benchmarks/results/{about.get('file')}) hold every message.",
        "",
        "Each model is made small by one table of attribute names, with all parameters moved off their initial values, "
        "and run in float64 on a batch of 3 in eval mode. Where a model's code says float32, float64 is put in its place. "
        "The loss of an example is a random projection, another for each example, of every output with a row for each. "
        "The truth is a loop over batches of one. *Exact*: every parameter's norms agree to 1e-6 of the example's norm, "
        "and the norms of all together to 1e-7.",
        "",
        *summary(told),
        "",
        f"Without those that are a part of another model (its text or vision tower), {len(whole)} are left:",
        "",
        *summary(whole),
        "",
        f"perex again, with the middle example two tokens shorter by its attention mask ({sum(padded.values()) - padded['none']} "
        f"models with text): {padded['exact']} exact, {padded['refused']} refused, {padded['wrong']} wrong, "
        f"{padded['error'] + padded['ended']} errors. In an ordinary training step, `loss.backward()` with `.grad` compared to "
        f"that without perex: {training['exact']} exact, {training['refused']} refused, {training['wrong']} wrong, "
        f"{training['error'] + training['ended']} errors.",
        "",
        "`vmap` was also tried without masks that hide nothing, and with eager attention, and the best counts. Opacus looks "
        "at modules in training mode only: it had that, without dropout and with batch norm in eval mode.",
        "",
        "## Where a batch is not its examples",
        "",
        "These models compute something else for a batch than for its examples one by one, without any library: random "
        "numbers in the forward, or a result that does depend on the batch. They are not counted above.",
        "",
        *lines(
            ["model type", "batch against loop", "perex", "against the batch's own graph"],
            [[row["type"], f"{row['gap']:.0e}", MARKS[status(row, "perex")], f"{row.get('perex', {}).get('error', float('nan')):.0e}"] for row in odd],
            4,
        ),
        "",
        "## One by one",
        "",
        "A number is the worst relative error over parameters and examples. *pad*: with padding; *train*: in a training step.",
        "",
        *lines(
            ["model type", "class", "inputs", "perex", "pad", "train", "vmap", "Opacus"],
            [
                [row["type"] + (" (part)" if row.get("part") else ""), row["class"], names(row), *(cell(row, way) for way in ("perex", "padded", "training", "vmap", "opacus"))]
                for row in told
            ],
            3,
        ),
        "",
        "## What was not run",
        "",
        f"{len(rows) - len(ran)} model types that the loop could not run here:",
        "",
        *unrunnable([row for row in rows if "class" not in row]),
        "",
        "## What does not work in perex",
        "",
        *(failures(told, "perex") or ["Nothing on this page."]),
        "",
    ]
    with_padding = [line for line in failures([row for row in told if status(row, "perex") == "exact"], "padded")]
    if with_padding:
        out += ["With padding only:", "", *with_padding, ""]
    in_training = [line for line in failures([row for row in told if status(row, "perex") == "exact"], "training")]
    if in_training:
        out += ["In a training step only:", "", *in_training, ""]
    return "\n".join(out)


def names(row: Row) -> str:
    """The names of the inputs, without masks."""
    return ", ".join(part.split(" ")[0] for part in row["inputs"].split(", ") if "mask" not in part)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="docs/coverage.md from the raw results.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    about, rows = read(options.results)
    options.out.write_text(page(about | {"file": options.results.name}, rows))


if __name__ == "__main__":
    main()
