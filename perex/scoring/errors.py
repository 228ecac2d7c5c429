"""What scoring a pool raises beyond the errors of the core."""

from __future__ import annotations

from importlib.util import find_spec

from perex.errors import PerexError


class ScoringError(PerexError):
    """An argument of `score`, or what the pool or the model yields, cannot be used as given."""


def require(package: str, extra: str, what: str) -> None:
    """Refuse, without importing anything, what needs an optional package that is not installed.

    Raises:
        ScoringError: `package` is not installed; the message says which extra of perex brings it.

    Example:
        >>> require("numpy", "parquet", "to_parquet")
    """
    if find_spec(package) is None:
        raise ScoringError(f'{what} needs {package}, which is not installed: pip install "perex[{extra}]"')
