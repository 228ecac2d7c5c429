"""Write docs/coverage.md from the raw results.

python benchmarks/coverage/table.py benchmarks/results/coverage-2026-11-23.jsonl
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
GAP = 1e-6
WAYS = "perex", "padded", "training", "private", "vmap", "opacus"
BESIDES = "padded", "training", "private"
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


def mixes(row: Row, way: str) -> bool:
    """Whether the batch of this way is not its examples, without any library."""
    return row.get(way, {}).get("gap", 0) > GAP


def cell(row: Row, way: str) -> str:
    """The same for the table, with the error where there is one."""
    result, state = row.get(way, {}), status(row, way)
    if way == "padded" and mixes(row, way):
        return "mixes" if state == "exact" else f"mixes, {MARKS[state]}"
    if state == "exact":
        return f"{max(result['error'], 1e-17):.0e}"
    return f"{MARKS[state]} {result['error']:.0e}" if state == "wrong" else MARKS[state]


def table(head: Sequence[str], body: Iterable[Sequence[object]], right: int = 1) -> str:
    """A table; columns from `right` on are numbers."""
    rule = ["---" if number < right else "---:" for number in range(len(head))]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, rule, *body))


def summary(rows: list[Row]) -> str:
    """Counts for each library."""
    body = []
    for way, name in NAMES.items():
        counts = Counter(status(row, way) for row in rows)
        worst = max((row[way]["error"] for row in rows if status(row, way) == "exact"), default=0)
        share = 100 * counts["exact"] / len(rows)
        others = [count or "" for count in (counts["refused"], counts["wrong"], counts["error"] + counts["ended"])]
        body.append([name, f"{counts['exact']} ({share:.0f} %)", *others, f"{worst:.0e}"])
    return table(["of " + str(len(rows)), "exact", "refused", "wrong", "error", "worst when exact"], body)


PLAIN = {
    r"In module '[^']*', |In the model's own forward, |[Mm]odule '[^']*'": "",
    r" So perex cannot tell the examples apart in what .*": "",
    r": whether an example gets something else in another batch cannot be seen from here.*": "",
    r"a tracked parameter is used by `\w+` together with a value whose examples perex cannot tell apart: ": "",
    r"a tensor derived from .*? got a gradient": "a tensor derived from parameters got a gradient",
    r" Leave the parameter out.*| Rewrite that step.*| Examples of a batch must not.*": "",
}


def kind_of(message: str) -> str:
    """A message without what is of one model alone."""
    message = message.split(": ", 1)[-1]  # without the name of the error
    for pattern, plain in PLAIN.items():
        message = re.sub(pattern, plain, message)
    return re.sub(r"\d+", "N", message)[:200].rstrip(". ")


def counted(rows: list[Row], way: str) -> str:
    """The counts of one way in words."""
    counts = Counter("none" if mixes(row, way) else status(row, way) for row in rows)
    return f"{sum(counts.values()) - counts['none']} models, " + ", ".join(
        f"{counts[state]} {state}" for state in ("exact", "refused", "wrong", "error", "ended") if counts[state]
    )


def moved(rows: list[Row]) -> float:
    """The most clip bounds by which one example has moved a private step."""
    return max((row["private"]["moved"] for row in rows if status(row, "private") == "exact"), default=0.0)


def failures(rows: list[Row], way: str) -> str:
    """What did not work, by reason, the most frequent first."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        state = status(row, way)
        if state in ("refused", "error", "wrong", "ended"):
            result = row.get(way, {})
            if way == "padded" and mixes(row, way):
                continue
            reason = kind_of(result.get("message") or result.get("where") or row.get("ended") or "")
            groups[state, reason].append(row["type"])
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return "\n".join(
        f"- {MARKS[state]}, {len(types)}: {reason}. {', '.join(types)}" for (state, reason), types in ordered
    )


def unrunnable(rows: list[Row]) -> str:
    """Model types that the loop itself did not run here, by why."""
    groups: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        text = row.get("loop") or row.get("ended") or ""
        reason = "inputs or configuration that no rule made"
        if "too large" in text:
            reason = "too large to shrink by rule"
        elif missing := re.search(r"requires the (\w+) library", text):
            reason = f"needs {missing[1]}"
        groups[reason].append(row["type"])
    return "\n".join(f"- {reason} ({len(types)}): {', '.join(types)}" for reason, types in sorted(groups.items()))


INTRO = """
Every architecture of transformers {transformers} that could be shrunk to run here: {ran} model types, each with one
class and one set of inputs, {date}, torch {torch}, Opacus {opacus}. They come from transformers' own auto-model
mappings, not from a list of favourites. {beside}`make coverage` runs them and writes this page;
[the raw results](../benchmarks/results/{file}) hold every message.

Each model is made small by one table of attribute names, with all parameters moved off their initial values, and run
in float64 on a batch of 3 in eval mode. Where a model's code says float32, float64 is put in its place. The loss of an
example is a random projection, another for each example, of every output with a row for each. The truth is a loop over
batches of one. *Exact*: every parameter's norms agree to 1e-6 of the example's norm, and the norms of all together to
1e-7. In the loop, batch norm by running statistics is spelled out, because torch's own backward of it on CPU is wrong
for some strides of a batch of one.
"""
BETWEEN = """
perex again, with the middle example two tokens shorter by its attention mask: {padded}. In an ordinary training step,
`loss.backward()`, with `.grad` compared to what it is without perex: {training}.

In a private step of `perex.privacy.PrivacyEngine` without noise, clipped at the median norm, with the sum of clipped
gradients compared to the loop's, of the batch and of the batch without each of its examples: {private}. One example
moves the sum by {moved:.6f} clip bounds at most.
"""
ODD = """
These models compute something else for a batch than for its examples one by one, without any library: random numbers
in the forward, or a result that depends on the batch. They are not counted above. Where perex gives numbers, they are
compared with each loss's gradient in the graph of the whole batch.
"""
BESIDE = "After them come {count} networks of [other packages](#other-packages). "
OTHERS = """
{count} networks of other public packages that nobody here wrote, judged by the same code: {packages}. Here the list is
ours ([zoo.py](../benchmarks/coverage/zoo.py)), of what runs on a CPU without torchvision and takes its examples as
tensors, and so are the small configurations and the inputs. Masks differ from example to example. Brackets name a
variant of the same class.
"""
LEGEND = """
*reached*: how many of the parameters got a gradient; few, where a model was given text alone. A number is the worst
relative error over parameters and examples. *pad*: with padding; *train*: in a training step; *priv*: in a private
step; *mixes*: with padding, the batch is not its examples.
"""


def filled(text: str) -> str:
    """Paragraphs, in lines of at most 120."""
    paragraphs = [" ".join(part.split()) for part in text.strip().split("\n\n")]
    return "\n\n".join(textwrap.fill(part, 120, break_on_hyphens=False) for part in paragraphs)


def page(about: Row, rows: list[Row]) -> str:
    """The whole page."""
    ours = [row for row in rows if row.get("source", "transformers") == "transformers"]
    others = [row for row in rows if row.get("source", "transformers") != "transformers"]
    ran, odd, told = sorted_out(ours)
    whole = [row for row in told if not row.get("part")]
    beside = BESIDE.format(count=len(others)) if others else ""
    parts = [
        "# Coverage",
        filled(INTRO.format(**about, ran=len(ran), beside=beside)),
        summary(told),
        f"Without those that are a part of another model (its text or vision tower), {len(whole)} are left:",
        summary(whole),
        filled(BETWEEN.format(**{way: counted(told, way) for way in BESIDES}, moved=moved(told))),
        "## Where a batch is not its examples",
        filled(ODD),
        mixed(odd),
        "## One by one",
        filled(LEGEND),
        one_by_one(told),
        "## What was not run",
        f"{len(ours) - len(ran)} model types that the loop could not run here:",
        unrunnable([row for row in ours if "class" not in row]),
        "## What does not work in perex",
        *problems(told),
    ]
    return "\n\n".join(parts + (other_packages(about, others) if others else [])) + "\n"


def other_packages(about: Row, rows: list[Row]) -> list[str]:
    """The second part of the page."""
    ran, odd, told = sorted_out(rows)
    counts = Counter(row["source"] for row in ran)
    versions = {"torch": about["torch"]} | about.get("others", {})
    packages = ", ".join(f"{name} {versions.get(name, '')} ({count})" for name, count in counts.most_common())
    parts = [
        "## Other packages",
        filled(OTHERS.format(count=len(ran), packages=packages)),
        summary(told),
        f"perex in an ordinary training step: {counted(told, 'training')}.",
        f"In a private step: {counted(told, 'private')}.",
    ]
    if odd:
        parts += ["A batch is not its examples in these, which are not counted above:", mixed(odd)]
    if failed := [row for row in rows if "class" not in row]:
        parts += ["The loop could not run these:", "\n".join(f"- {row['type']}: {why(row)}" for row in failed)]
    return [*parts, "What does not work in perex:", *problems(told), "One by one:", one_by_one(told)]


def sorted_out(rows: list[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """Those that ran; of them, those whose batch is not its examples; and the rest of them."""
    ran = [row for row in rows if "class" in row]
    return ran, [row for row in ran if row["gap"] > GAP], [row for row in ran if row["gap"] <= GAP]


def why(row: Row) -> str:
    """Why the loop did not run."""
    return (row.get("loop") or row.get("ended") or "").splitlines()[0][:200]


def mixed(rows: list[Row]) -> str:
    """The table of those whose batch is not its examples."""
    body = [[called(row), f"{row['gap']:.0e}", cell(row, "perex")] for row in rows]
    return table(["model type", "batch against loop", "perex"], body, 1)


def one_by_one(rows: list[Row]) -> str:
    """The table with a line for each."""
    head = ["model type", "class", "inputs", "reached", "perex", "pad", "train", "priv", "vmap", "Opacus"]
    body = [[called(r), r["class"], names(r), f"{r['reached']:.0%}", *(cell(r, way) for way in WAYS)] for r in rows]
    return table(head, body, 3)


def problems(rows: list[Row]) -> list[str]:
    """What does not work in perex, and what does not only with padding or in a training step."""
    parts = [failures(rows, "perex") or "Nothing on this page."]
    exact = [row for row in rows if status(row, "perex") == "exact"]
    titles = ("With padding only:", "In a training step only:", "In a private step only:")
    for title, way in zip(titles, BESIDES, strict=True):
        if found := failures(exact, way):
            parts += [title, found]
    return parts


def called(row: Row) -> str:
    """A model type's name; whether it is a part of others, and how its experts are computed if not as by default."""
    notes = ["part"] * bool(row.get("part")) + ["eager experts"] * ("experts" in row)
    return row["type"] + (f" ({', '.join(notes)})" if notes else "")


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
