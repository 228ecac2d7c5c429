"""Run perex, `torch.func.vmap` and Opacus over every architecture of transformers and others, against the loop.

python benchmarks/coverage/run.py                           all that the results of today do not hold yet
python benchmarks/coverage/run.py --only 'bert*' --ways perex
python benchmarks/coverage/run.py --only '*/*'              the networks of other packages alone
python benchmarks/coverage/run.py --redo refused,error      again those, too
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import importlib.metadata
import json
import multiprocessing
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import opacus.grad_sample  # noqa: E402, F401  imported here once for all forks, as some of transformers below
import torch  # noqa: E402
import transformers  # noqa: E402
import transformers.generation  # noqa: E402
import transformers.models.bert.modeling_bert  # noqa: E402
import transformers.models.llama.modeling_llama  # noqa: E402
from fixes import CONFIG  # noqa: E402
from inputs import Inputs, attempts, padded  # noqa: E402
from judge import WAYS, Loss, Norms, batch_gap, by_batch, by_loop, by_perex, compare  # noqa: E402
from others import installed  # noqa: E402
from private import by_private  # noqa: E402
from shrink import shrink  # noqa: E402
from torch import nn  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES  # noqa: E402
from zoo import CASES  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FAINT = 1e-8  # a squared norm below this is rounding: the model is saturated
GAP = 1e-6  # from here on, a batch computes something else than its examples alone
ALL = "perex,padded,training,private,vmap,opacus"
SECONDS, MEMORY, PARAMETERS = 60, 6 << 30, 30_000_000
# The heads to prefer, and after them the rest in torch's own order.
HEADS = [
    "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "CAUSAL_LM", "MULTIMODAL_LM",
    "CTC", "AUDIO_CLASSIFICATION", "IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION", "DEPTH_ESTIMATION", "VIDEO_CLASSIFICATION", "TIME_SERIES_PREDICTION", "PRETRAINING",
]  # fmt: skip


def classes(kind: str) -> list[str]:
    """The names of a model type's classes, the one that does most first."""
    mappings = {
        name.removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES"): getattr(modeling_auto, name)
        for name in vars(modeling_auto)
        if name.endswith("_MAPPING_NAMES") and name.startswith("MODEL_FOR_")
    }
    order = [*HEADS, *(name for name in mappings if name not in HEADS)]
    names: list[str] = []
    for mapping in [*(mappings[name] for name in order), modeling_auto.MODEL_MAPPING_NAMES]:
        found = mapping.get(kind, ())
        names += [found] if isinstance(found, str) else found
    return list(dict.fromkeys(names))


def promote() -> None:
    """Compute in float64 also where a model's code says float32."""
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64  # type: ignore[misc]
    torch.complex64 = torch.cfloat = torch.complex128  # type: ignore[misc]
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]


def build(kind: str, name: str, experts: str | None) -> nn.Module:
    """A small model of transformers."""
    config = shrink(CONFIG_MAPPING[kind](), CONFIG.get(kind))
    if experts:
        config._experts_implementation = experts
    cls = getattr(transformers, name)
    try:
        with torch.device("meta"):
            sizes = {n: p.numel() for n, p in cls(config).named_parameters()}
    except Exception:  # what cannot be built there may be built here
        sizes = {}
    if sum(sizes.values()) > PARAMETERS:
        largest = sorted(sizes, key=sizes.__getitem__)[-3:]
        raise ValueError(f"too large: {sum(sizes.values()):,} parameters, {[(n, sizes[n]) for n in largest]}")
    torch.manual_seed(0)
    return settled(cls(config))


def settled(model: nn.Module) -> nn.Module:
    """A model with random weights, none of them zero or degenerate."""
    model = model.double().eval()
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            fan = p.numel() // max(1, len(p)) if p.dim() > 1 else 100
            p.add_(torch.randn(p.shape, generator=random, dtype=torch.float64) * 0.7 / max(fan, 1) ** 0.5)
    return model


def prepare(kind: str, row: dict[str, Any]) -> tuple[Any, ...]:
    """The first class and inputs that the loop can run; notes what it took in the row."""
    if kind in CASES:
        found = looped(settled(CASES[kind].build()), CASES[kind].make_inputs())
        return noted(row, found, kind.split("/")[1], [])
    problems = []
    for name in classes(kind):
        for experts in (None, "eager"):
            try:
                model = build(kind, name, experts)
            except Exception as error:
                problems.append(f"{name}: build: {brief(error)}")
                break
            for inputs in attempts(model):
                try:
                    if isinstance(inputs, Exception):
                        raise inputs
                    found = looped(model, inputs)
                except Exception as error:
                    problems.append(f"{name}{' eager experts' if experts else ''}: {inputs}: {brief(error)}")
                    continue
                if experts:
                    row["experts"] = experts
                return noted(row, found, name, problems)
            if not any("expert" in n for n, _ in model.named_modules()):
                break
    raise RuntimeError("\n".join(problems) or "no class")


def looped(model: nn.Module, inputs: Inputs) -> tuple[Any, ...]:
    """The model, its inputs, a loss, and what the loop makes of them."""
    loss = Loss.of(model, inputs)
    oracle = by_loop(model, inputs, loss)
    total = sum(oracle[0].values())
    if not (total.isfinite().all() and (total > FAINT).all()):
        raise ValueError(f"the loop's norms are {total.tolist()}")
    return model, inputs, loss, oracle


def noted(row: dict[str, Any], found: tuple[Any, ...], name: str, problems: list[str]) -> tuple[Any, ...]:
    """The same, after what a row says of it is noted."""
    model, inputs, loss, oracle = found
    row.update({"class": name, "inputs": str(inputs), "outputs": list(loss.weights), "problems": problems})
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["reached"] = sum(bool(v.any()) for v in oracle[0].values()) / len(oracle[0])
    return found


def judge(kind: str, ways: Sequence[str], pipe: Connection) -> None:
    """In a process of its own: send the row's parts as they come."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY + 4096 * int(Path("/proc/self/statm").read_text().split()[0]),) * 2)
    promote()
    row: dict[str, Any] = {}
    try:
        model, inputs, loss, oracle = prepare(kind, row)
        row["gap"] = batch_gap(model, inputs, loss, oracle)
        pipe.send(row)
    except BaseException as error:
        pipe.send({"loop": str(error)[-3000:] if isinstance(error, RuntimeError) else brief(error)})
        return
    import perex

    for way in ways:
        start = time.perf_counter()
        notes: dict[str, float] = {}
        try:
            result = outcome(way, model, inputs, loss, oracle[0], row["gap"], notes)
        except perex.PerexError as error:
            result = {"status": "refused", "message": brief(error, 400)}
        except BaseException as error:
            result = {"status": "error", "message": brief(error)}
            if way in ("perex", "padded", "training", "private"):
                result["trace"] = traceback.format_exc()[-1500:]
        model.zero_grad()
        pipe.send({way: result | notes | {"seconds": round(time.perf_counter() - start, 2)}})


def outcome(
    way: str, model: nn.Module, inputs: Inputs, loss: Loss, expected: Norms, gap: float, notes: dict[str, float]
) -> dict[str, Any]:
    """One library's norms against the loop's; and against the batch's own, where that computes something else."""
    if way == "padded":
        shorter = padded(inputs)
        if shorter is None:
            return {"status": "none"}
        inputs = shorter
        loop = by_loop(model, inputs, loss)
        expected, gap = loop[0], batch_gap(model, inputs, loss, loop)
        notes["gap"] = gap
    if way == "private":
        return {"status": "none"} if gap > GAP else by_private(model, inputs, loss, expected)
    function = by_perex if way == "padded" else WAYS[way]
    torch.manual_seed(0)
    norms = function(model, inputs, loss)
    result = compare(norms, expected)
    if gap > GAP:
        torch.manual_seed(0)
        own = by_batch(model.eval(), inputs, loss)
        result = {"alone": result["error"]} | compare(norms, own)
    return result


def brief(error: BaseException, length: int = 300) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:length]


def row_of(kind: str, ways: Sequence[str]) -> dict[str, Any]:
    """Judge one model type in a fork, with a limit on time and memory."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=judge, args=(kind, ways, theirs))
    start = time.monotonic()
    process.start()
    theirs.close()
    row: dict[str, Any] = {"type": kind, "source": CASES[kind].package if kind in CASES else "transformers"}
    row["part"] = kind not in CASES and bool(CONFIG_MAPPING[kind].base_config_key)
    try:
        while ours.poll(max(0.0, start + SECONDS - time.monotonic())):
            row.update(ours.recv())
    except EOFError:
        pass
    if process.is_alive():
        process.join(0.2)
    if process.is_alive():
        process.kill()
        row["ended"] = f"after {SECONDS} s"
    process.join()
    if process.exitcode and "ended" not in row:
        row["ended"] = f"exit {process.exitcode}"
    row["seconds"] = round(time.monotonic() - start, 1)
    return row


def status(row: dict[str, Any], way: str) -> str:
    """A row's outcome for one library."""
    if "class" not in row:
        return "loop"
    return row.get(way, {}).get("status", "ended")


def kinds(only: str) -> Iterator[str]:
    """The model types to run: one for every class of transformers, and what is installed of the other packages."""
    taken = set()
    for kind in CONFIG_MAPPING_NAMES:
        names = classes(kind)
        if fnmatch.fnmatch(kind, only) and names and names[0] not in taken:
            taken.add(names[0])
            yield kind
    others = {kind: case.package for kind, case in CASES.items() if fnmatch.fnmatch(kind, only)}
    there = installed(others.values())
    if missing := sorted(set(others.values()) - set(there)):
        print("not installed, and left out:", ", ".join(missing), flush=True)
    yield from (kind for kind, package in others.items() if package in there)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Exactness over public architectures, against a loop.")
    parser.add_argument("--only", default="*", help="model types, as a glob")
    parser.add_argument("--limit", type=int, default=10**6, help="stop after as many")
    parser.add_argument("--ways", default=ALL, help="which of these, separated by commas")
    parser.add_argument("--redo", default="", help="again those whose status is one of these, e.g. refused,error")
    parser.add_argument("--out", type=Path, default=RESULTS / f"coverage-{datetime.date.today()}.jsonl")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    ways = options.ways.split(",")
    rows = {}
    if options.out.exists():
        rows = {row["type"]: row for row in map(json.loads, options.out.read_text().splitlines()) if "type" in row}
    redo = set(options.redo.split(",")) if options.redo else set()

    def missing(kind: str) -> bool:
        row = rows.get(kind, {})
        return not row or any(status(row, way) in redo or (way not in row and "class" in row) for way in ways)

    todo = [kind for kind in kinds(options.only) if missing(kind)][: options.limit]
    about = {"date": str(datetime.date.today()), "file": options.out.name}
    about |= {name: importlib.metadata.version(name) for name in ("torch", "transformers", "opacus", "perex")}
    about["others"] = installed(case.package for case in CASES.values())
    with options.out.open("a") as file:
        file.write(json.dumps(about) + "\n")
    start = time.monotonic()
    for number, kind in enumerate(todo, 1):
        row = row_of(kind, ways)
        if "class" in row or "class" not in rows.get(kind, {}):
            row = {**{k: v for k, v in rows.get(kind, {}).items() if k in ALL.split(",") and "class" in row}, **row}
        with options.out.open("a") as file:
            file.write(json.dumps(row).replace(f"{ROOT}/", "") + "\n")
        rows[kind] = row
        states = " ".join(f"{way} {status(row, way)}" for way in ways)
        print(f"{number}/{len(todo)} {kind} {states} {row['seconds']} s, {time.monotonic() - start:.0f} s", flush=True)

    latest = "".join(json.dumps(row) + "\n" for row in [about, *rows.values()])
    options.out.write_text(latest.replace(f"{ROOT}/", ""))


if __name__ == "__main__":
    sys.exit(main())
