"""The demo and the question's benchmark, run small: what they report holds, what they promise is written."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PNG = b"\x89PNG\r\n\x1a\n"


def script(path: str) -> ModuleType:
    """The module in a file that is not in a package."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec and spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("demo") / "out"  # does not exist yet
    return script("examples/mnist.py").main(["--quick", "--out", str(out)]), out


def test_the_demo_agrees_with_the_loop(demo):
    results, _ = demo
    assert results["difference64"] < 1e-9
    assert results["difference32"] < 1e-3
    assert results["seconds"] > 0 and results["loop_seconds"] > 0


def test_the_demo_writes_its_picture_and_its_scores(demo):
    _, out = demo
    picture = (out / "mnist.png").read_bytes()
    assert picture.startswith(PNG) and len(picture) > 50_000
    lines = (out / "mnist.csv").read_text().splitlines()
    assert len(lines) == 1 + 800 and "norm" in lines[0]


def test_large_norms_gather_what_the_model_gets_wrong(demo):
    assert demo[0]["wrong_in_top_tenth"] > 0.25  # a tenth, were norms arbitrary


def test_norms_find_wrong_labels(demo):
    found = demo[0]["wrong_labels"]
    assert found["gradient norm"]["auc"] > 0.85
    assert found["gradient norm"]["recall"] > found["random"]["recall"] + 0.2
    assert 0.3 < found["random"]["auc"] < 0.7
    for figures in found.values():
        assert 0 <= figures["precision"] == figures["recall"] <= figures["recall10"] <= 1


def test_active_learning_reports_every_choice_and_seed(demo):
    results = demo[0]["active_learning"]
    assert set(results) == {"nothing", "random", "entropy", "pseudo", "oracle"}
    assert all(len(values) == 2 and all(0.5 < v <= 1 for v in values) for values in results.values())


def test_the_ways_to_answer_the_question_agree(capsys):
    results = script("benchmarks/question.py").main(["--pool", "130", "--rounds", "1"])
    assert results["differences"].keys() == results["seconds"].keys() and len(results["seconds"]) == 5
    assert max(results["differences"].values()) < 1e-9
    assert all(0 < s < math.inf for s in results["seconds"].values())
    printed = capsys.readouterr().out
    assert all(name in printed for name in results["seconds"])


def test_private_training_of_the_example():
    """Two epochs: better than chance by far, and the same by Opacus's hooks, random numbers included."""
    import warnings

    with warnings.catch_warnings(action="ignore"):
        train = script("examples/private_mnist.py").train
        (accuracy, epsilon, _), (expected, same, _) = train(True, 2, 0), train(False, 2, 0)
    assert accuracy > 0.5 and abs(accuracy - expected) < 0.02 and epsilon == same
