"""What scoring a pool returns: ids, losses and gradient norms, to rank, keep and look at."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perex.scoring.errors import ScoringError, require
from perex.scoring.plot import draw
from perex.table import table

SHOWN = 20
"""How many examples are printed row by row, at most."""


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """The loss and gradient norm of every example in a pool, on the CPU, in the data's order.

    Attributes:
        ids: `(N,)`, whole numbers or strings; the position in the data unless the user named the examples.
        losses: `(N,)`.
        norms: `(N,)`, the norm of the gradient of each example's own loss, over all tracked parameters.
        parts: the norms `(N,)` over each module's or parameter's gradient alone, by name; empty without `by`.
        extra: further statistics, `(N, ...)`, by the names that `quantities` gave them.

    Example:
        >>> scores = Scores(np.array(["a", "b", "c"]), torch.tensor([1., 2., 3.]), torch.tensor([4., 6., 5.]))
        >>> scores
        Scores(3 examples; norm 4 to 6, median 5; loss 1 to 3, median 2)
        >>> scores.top(2).ids.tolist()
        ['b', 'c']
    """

    ids: np.ndarray
    losses: Tensor
    norms: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        columns = f"norm {_spread(self.norms)}; loss {_spread(self.losses)}"
        parts = f"; norms of {len(self.parts)} parts" if self.parts else ""
        return f"Scores({len(self):,} example{'s' * (len(self) != 1)}; {columns}{parts})"

    def __str__(self) -> str:
        """A few examples row by row, more in one line."""
        if not 0 < len(self) <= SHOWN:
            return repr(self)
        columns = [[str(name) for name in self.ids]]
        columns += [[f"{value:.4g}" for value in values.tolist()] for values in (self.norms, self.losses)]
        return "\n".join(table(("id", "norm", "loss"), list(zip(*columns, strict=True)), right={0, 1, 2}))

    def columns(self) -> dict[str, np.ndarray]:
        """Name the columns, as the files do: `id`, `loss`, `norm`, and `norm/<name>` for each part.

        Further statistics follow by their names; one of several numbers an example has a column for each, `<name>/0`
        and so on.

        Returns:
            Arrays `(N,)` that share memory with the tensors.

        Example:
            >>> list(Scores(np.arange(1), torch.ones(1), torch.ones(1), {"fc": torch.ones(1)}).columns())
            ['id', 'loss', 'norm', 'norm/fc']
        """
        parts = {f"norm/{name}": norms.numpy() for name, norms in self.parts.items()}
        columns = {"id": self.ids, "loss": self.losses.numpy(), "norm": self.norms.numpy(), **parts}
        for name, values in self.extra.items():
            if values.dim() == 1:
                columns[name] = values.numpy()
            else:
                rows = values.reshape(len(values), values[:1].numel() if len(values) else 0)
                columns |= {f"{name}/{k}": column.numpy() for k, column in enumerate(rows.unbind(1))}
        return columns

    def arrays(self) -> dict[str, np.ndarray]:
        """The columns, those of one statistic together, as arrays `(N, ...)`."""
        columns, extra = self.columns(), {name: values.numpy() for name, values in self.extra.items()}
        own = {f"norm/{name}" for name in self.parts} | {"id", "loss", "norm"}
        return {name: column for name, column in columns.items() if name in own} | extra

    def top(self, k: int, by: str = "norm") -> Scores:
        """Pick the `k` examples with the largest values, the largest first.

        Equals keep the data's order, and NaN comes last.

        Args:
            k: how many; all of them if there are fewer.
            by: a column: `"norm"`, `"loss"` or `"norm/<name>"`.

        Returns:
            Scores of those examples.

        Raises:
            ScoringError: there is no such column, or `k` is negative.

        Example:
            >>> scores = Scores(np.arange(3), torch.tensor([3., 1., 2.]), torch.zeros(3))
            >>> scores.top(2, by="loss").ids.tolist()
            [0, 2]
        """
        return self._ranked(k, by, descending=True)

    def bottom(self, k: int, by: str = "norm") -> Scores:
        """Pick the `k` examples with the smallest values, the smallest first.

        Equals keep the data's order, and NaN comes last.

        Args:
            k: how many; all of them if there are fewer.
            by: a column: `"norm"`, `"loss"` or `"norm/<name>"`.

        Returns:
            Scores of those examples.

        Raises:
            ScoringError: there is no such column, or `k` is negative.

        Example:
            >>> Scores(np.arange(3), torch.zeros(3), torch.tensor([3., 1., 2.])).bottom(2).ids.tolist()
            [1, 2]
        """
        return self._ranked(k, by, descending=False)

    def _ranked(self, k: int, by: str, descending: bool) -> Scores:
        columns = self.columns()
        if by == "id" or by not in columns:
            raise ScoringError(f"by={by!r} is no column to rank by; there are {', '.join(list(columns)[1:])}")
        if not isinstance(k, int):
            raise ScoringError(f"k is {k!r}; pass how many, such as k=len(scores) // 10 for a tenth")
        if k < 0:
            raise ScoringError(f"k must not be negative, but is {k}")
        values = columns[by]
        if values.dtype.kind in "bu":  # which have no negatives
            values = values.astype(np.float64)
        order = np.argsort(-values if descending else values, kind="stable")[:k]  # NumPy puts NaN last
        rows = torch.from_numpy(order)
        parts = {name: norms[rows] for name, norms in self.parts.items()}
        extra = {name: values[rows] for name, values in self.extra.items()}
        return Scores(self.ids[order], self.losses[rows], self.norms[rows], parts, extra)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a `.csv`, `.npz` or `.parquet` file, or plot to `.png`, `.pdf` or `.svg`, as the suffix says.

        Args:
            path: a file in a directory that exists.

        Raises:
            ScoringError: the suffix is unknown, there is no such directory, or a package is missing.

        Example:
            >>> import tempfile
            >>> path = Path(tempfile.mkdtemp(), "scores.csv")
            >>> Scores(np.arange(2), torch.ones(2), torch.tensor([0.5, 2.0])).save(path)
            >>> path.read_text().split()
            ['id,loss,norm', '0,1.0,0.5', '1,1.0,2.0']
        """
        writer(path)(self, path)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write a CSV file with a header; numbers in the fewest digits that read back the same.

        Args:
            path: where to.

        Example:
            >>> Scores(np.arange(2), torch.ones(2), torch.ones(2)).to_csv("/dev/null")
        """
        columns = self.columns()
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(columns)
            table.writerows(zip(*(map(str, column) for column in columns.values()), strict=True))

    def to_npz(self, path: str | PathLike[str]) -> None:
        """Write a NumPy archive with an array for each column, or statistic of several; `numpy.load` reads it.

        Args:
            path: where to; as given, with no suffix added.

        Example:
            >>> import tempfile
            >>> path = Path(tempfile.mkdtemp(), "scores.npz")
            >>> Scores(np.arange(2), torch.ones(2), torch.ones(2)).to_npz(path)
            >>> np.load(path)["id"]
            array([0, 1])
        """
        with open(path, "wb") as file:
            np.savez(file, **self.arrays())  # type: ignore[arg-type]

    def to_parquet(self, path: str | PathLike[str]) -> None:
        """Write a Parquet file (needs pyarrow: `pip install "perex[parquet]"`).

        Args:
            path: where to.

        Raises:
            ScoringError: pyarrow is not installed.

        Example:
            >>> Scores(np.arange(2), torch.ones(2), torch.ones(2)).to_parquet("/dev/null")
        """
        require("pyarrow", "parquet", "to_parquet")
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({name: pyarrow.array(column) for name, column in self.columns().items()})
        pyarrow.parquet.write_table(table, path)

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """Draw the distribution of the norms, and norm against loss (needs matplotlib).

        The scales are logarithmic; examples whose norm is zero or not finite are counted in the title.
        Nothing global in matplotlib is touched: no window opens, and no figure stays open.

        Args:
            path: where to, in the form its suffix names; None to get the figure only.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            ScoringError: matplotlib is not installed (`pip install "perex[plot]"`).

        Example:
            >>> figure = Scores(np.arange(9), torch.rand(9), torch.rand(9)).plot()
            >>> len(figure.axes)
            2
        """
        figure = draw(self.losses.numpy(), self.norms.numpy())
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


WRITERS: dict[str, Callable[[Scores, Any], Any]] = {
    ".csv": Scores.to_csv,
    ".npz": Scores.to_npz,
    ".parquet": Scores.to_parquet,
    ".png": Scores.plot,
    ".pdf": Scores.plot,
    ".svg": Scores.plot,
}
NEEDS = {Scores.to_parquet: ("pyarrow", "parquet"), Scores.plot: ("matplotlib", "plot")}


def writer(path: str | PathLike[str]) -> Callable[[Scores, Any], Any]:
    """Find what writes `path`, so that a bad path is known before a pool is scored and not after.

    Raises:
        ScoringError: the suffix is unknown, the directory does not exist, or an optional package is missing.

    Example:
        >>> writer("scores.npz").__name__
        'to_npz'
    """
    path = Path(path)
    write = WRITERS.get(path.suffix.lower())
    if write is None:
        raise ScoringError(f"out: the suffix of {str(path)!r} is none of {', '.join(WRITERS)}")
    if not path.parent.is_dir():
        raise ScoringError(f"out: there is no directory {str(path.parent)!r}; make it first")
    if write in NEEDS:
        require(*NEEDS[write], what=f"out={str(path)!r}")
    return write


def _spread(values: Tensor) -> str:
    """Say in short how values `(N,)` are distributed."""
    finite = values[values.isfinite()].numpy()
    if not len(finite):
        return "never finite"
    lost = f", {len(values) - len(finite):,} not finite" if len(finite) < len(values) else ""
    return f"{finite.min():.3g} to {finite.max():.3g}, median {np.median(finite):.3g}{lost}"
