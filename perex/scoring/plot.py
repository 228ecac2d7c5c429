"""The picture of a pool's scores."""

from __future__ import annotations

from typing import Any

import numpy as np

from perex.scoring.errors import require

BLUE = "#2a6f97"
MOST_POINTS = 20_000


def draw(losses: np.ndarray, norms: np.ndarray) -> Any:
    """Draw a histogram of the norms, and the norms against the losses, both on logarithmic scales.

    Args:
        losses: `(N,)`.
        norms: `(N,)`.

    Returns:
        A `matplotlib.figure.Figure` that pyplot knows nothing of.

    Raises:
        ScoringError: matplotlib is not installed.

    Example:
        >>> figure = draw(np.array([0.1, 1.0]), np.array([1.0, 10.0]))
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['gradient norm', 'loss']
    """
    require("matplotlib", "plot", "plot")
    from matplotlib.figure import Figure

    drawn = np.isfinite(norms) & (norms > 0)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    title = f"{len(norms):,} examples"
    if not drawn.all():
        title += f", {np.count_nonzero(~drawn):,} of norm zero or not finite"
    figure.suptitle(title)

    left.set(xlabel="gradient norm", ylabel="examples")
    right.set(xlabel="loss", ylabel="gradient norm")
    if not drawn.any():
        return figure
    shown = norms[drawn].astype(np.float64)
    low, high = shown.min(), shown.max()
    if low == high:
        low, high = low / 2, high * 2
    left.hist(shown, bins=np.geomspace(low, high, 51), color=BLUE)
    left.set_xscale("log")
    for q, style in ((0.5, "-"), (0.95, ":")):
        left.axvline(np.quantile(shown, q), color="black", linestyle=style, label=f"{q:.0%} are below")
    left.legend(frameon=False)

    both = np.flatnonzero(drawn & np.isfinite(losses))
    both = both[:: -(-len(both) // MOST_POINTS) or 1]  # evenly thinned: a picture, not a table
    right.scatter(losses[both], norms[both], s=6, alpha=0.4, linewidths=0, color=BLUE, rasterized=True)
    right.set_yscale("log")
    if len(both) and losses[both].min() > 0:
        right.set_xscale("log")
    return figure
