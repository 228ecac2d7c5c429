"""The result: ranking, files that read back the same, a plot that touches nothing global."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_imports import optional_packages_imported_by

from perex.scoring import Scores, ScoringError

NAN, INF = float("nan"), float("inf")


def scores(dtype: torch.dtype = torch.float64) -> Scores:
    return Scores(
        np.array(["a", "b", "c, d", 'e"', "f"]),
        torch.tensor([0.1, 0.3, NAN, 1 / 3, -2.0], dtype=dtype),
        torch.tensor([2.0, NAN, INF, 2.0, 0.0], dtype=dtype),
        {"norm": torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=dtype)},
    )


def test_top_and_bottom() -> None:
    assert scores().top(9).ids.tolist() == ["c, d", "a", 'e"', "f", "b"]  # equals in order, NaN last
    assert scores().bottom(9).ids.tolist() == ["f", "a", 'e"', "c, d", "b"]
    assert scores().top(2, by="loss").ids.tolist() == ['e"', "b"]
    assert scores().bottom(1, by="norm/norm").ids.tolist() == ["f"]
    best = scores().top(2)
    assert best.norms.tolist() == [INF, 2.0] and best.parts["norm"].tolist() == [3.0, 5.0]
    assert best.losses[1] == 0.1 and len(best) == 2 and len(scores().top(0)) == 0


@pytest.mark.parametrize("by", ["id", "fc", "norm/fc"])
def test_ranking_by_no_column(by: str) -> None:
    with pytest.raises(ScoringError, match="there are loss, norm, norm/norm"):
        scores().top(1, by=by)
    with pytest.raises(ScoringError, match="k must not be negative"):
        scores().bottom(-1)


def test_a_few_are_printed_row_by_row() -> None:
    three = Scores(np.array(["a", "bcd", "e"]), torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([4.0, 61.25, 5.0]))
    assert str(three).splitlines() == [" id   norm  loss", "  a      4     1", "bcd  61.25     2", "  e      5   nan"]
    many = Scores(np.arange(21), torch.ones(21), torch.ones(21))
    assert str(many) == repr(many) and str(three.top(0)) == repr(three.top(0))


def test_repr_is_short_and_counts_what_is_not_finite() -> None:
    assert repr(scores()) == (
        "Scores(5 examples; norm 0 to 2, median 2, 2 not finite; "
        "loss -2 to 0.333, median 0.2, 1 not finite; norms of 1 parts)"
    )
    empty = Scores(np.arange(1), torch.tensor([NAN]), torch.tensor([INF]))
    assert repr(empty) == "Scores(1 example; norm never finite; loss never finite)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_csv_reads_back_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    scores(dtype).save(tmp_path / "scores.csv")
    with open(tmp_path / "scores.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["id", "loss", "norm", "norm/norm"]
    for k, (_, expected) in enumerate(scores(dtype).columns().items()):
        found = np.array([row[k] for row in rows]).astype(expected.dtype)
        np.testing.assert_array_equal(found, expected)
    assert dtype is torch.float64 or rows[0][1] == "0.1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_npz_reads_back_the_same_without_pickle(tmp_path: Path, dtype: torch.dtype) -> None:
    scores(dtype).to_npz(tmp_path / "scores")
    with np.load(tmp_path / "scores", allow_pickle=False) as file:
        for name, expected in scores(dtype).columns().items():
            np.testing.assert_array_equal(file[name], expected)
            assert file[name].dtype == expected.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parquet_reads_back_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    scores(dtype).save(str(tmp_path / "scores.PARQUET"))
    table = parquet.read_table(tmp_path / "scores.PARQUET")
    for name, expected in scores(dtype).columns().items():
        np.testing.assert_array_equal(table[name].to_numpy().astype(expected.dtype), expected)
    assert str(table.schema.field("norm").type) == ("float" if dtype is torch.float32 else "double")


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_plot_writes_a_picture(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    many = Scores(np.arange(300), torch.rand(300), torch.rand(300).exp())
    figure = many.plot(tmp_path / f"scores{suffix}")
    assert (tmp_path / f"scores{suffix}").stat().st_size > 5000
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert sum(heights) == 300
    assert len(figure.axes[1].collections[0].get_offsets()) == 300


@pytest.mark.parametrize(
    ("losses", "norms", "drawn"),
    [
        ([0.1, 0.3, NAN, 0.2, -2.0], [2.0, NAN, INF, 3.0, 0.0], 2),
        ([1.0, 1.0], [3.0, 3.0], 2),
        ([1.0], [0.0], 0),
        ([], [], 0),
    ],
)
def test_plot_draws_what_can_be_drawn(tmp_path: Path, losses: list, norms: list, drawn: int) -> None:
    pytest.importorskip("matplotlib")
    odd = Scores(np.arange(len(losses)), torch.tensor(losses), torch.tensor(norms))
    figure = odd.plot(tmp_path / "scores.png")
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == drawn
    assert ("not finite" in figure.get_suptitle()) == (drawn < len(losses))


def test_plot_leaves_pyplot_and_settings_alone() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    scores().plot()
    assert dict(matplotlib.rcParams) == before
    code = """
    import sys
    from perex.scoring import Scores
    Scores(["a"], torch.ones(1), torch.ones(1)).plot()
    assert "matplotlib.pyplot" not in sys.modules
    """
    assert "matplotlib" in optional_packages_imported_by(code)


@pytest.mark.parametrize(("path", "package"), [("x.parquet", "pyarrow"), ("x.png", "matplotlib")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    extra = "parquet" if package == "pyarrow" else "plot"
    with pytest.raises(ScoringError, match=rf'needs {package}.*pip install "perex\[{extra}\]"'):
        scores().save(tmp_path / path)
    call: Any = scores().to_parquet if package == "pyarrow" else scores().plot
    with pytest.raises(ScoringError, match=package):
        call(tmp_path / path)


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(ScoringError, match="suffix of 'scores' is none of .csv, .npz"):
        scores().save("scores")
    with pytest.raises(ScoringError, match="there is no directory"):
        scores().save(tmp_path / "nowhere" / "scores.csv")
