"""From per-example norms to weights: clipping as a whole, by layer or group, and normalising."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from perex.errors import ArgumentError
from perex.quantities import added_up

Groups = Literal["parameter", "module"] | Mapping[str, str | Sequence[str]] | None


def groups_of(by: Groups, names: Sequence[str]) -> dict[str, list[str]]:
    """The parameters that are clipped together, by the name of their group.

    Args:
        by: None for all of them, `"parameter"` or `"module"` for each, or globs of parameters by group.
        names: of the tracked parameters.

    Raises:
        ArgumentError: a parameter is in no group, or in two.
    """
    if by is None:
        return {"": list(names)}
    if by == "parameter":
        return {name: [name] for name in names}
    groups: dict[str, list[str]] = {}
    if by == "module":
        for name in names:
            groups.setdefault(name.rpartition(".")[0], []).append(name)
        return groups
    if not isinstance(by, Mapping):
        raise ArgumentError(f"by={by!r}: it is None, 'parameter', 'module', or globs of parameters by group")
    if not all(isinstance(globs, (str, list, tuple)) for globs in by.values()):
        raise ArgumentError(
            "by: globs of parameters by group, such as {'first': ['0.*'], 'rest': ['2.*']}; the bounds of groups are "
            "`max_norm`, {'first': 1.0, 'rest': 0.5}"
        )
    for name in names:
        found = [
            group
            for group, globs in by.items()
            if any(fnmatch.fnmatchcase(name, glob) for glob in ([globs] if isinstance(globs, str) else globs))
        ]
        if len(found) != 1:
            raise ArgumentError(f"by: parameter '{name}' is in {' and '.join(map(repr, found)) or 'no group'}")
        groups.setdefault(found[0], []).append(name)
    return groups


def bounds_of(max_norm: float | Mapping[str, float], groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """The bound of each group.

    Raises:
        ArgumentError: a bound is missing, or not a positive number.
    """
    given = max_norm if isinstance(max_norm, Mapping) else dict.fromkeys(groups, max_norm)
    bounds: dict[str, float] = {}
    for group in groups:
        if group not in given:
            what = f"for '{group}'" if group else "of all together: for bounds of groups, say with `by` what these are"
            raise ArgumentError(f"max_norm: there is no bound {what}")
        bound = given[group]
        if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not bound > 0:
            raise ArgumentError(f"max_norm={bound!r}: it is a positive number")
        bounds[group] = float(bound)
    return bounds


def norms_of(squared: Mapping[str, Tensor], groups: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """Norms of each group's gradients together, `(B,)`, from squares by parameter."""
    return {group: added_up(squared[name] for name in names).sqrt() for group, names in groups.items()}


def clipped(norms: Tensor, bound: float) -> Tensor:
    r"""$\min(1, C / \|g_b\|)$, the weights that leave no gradient longer than C; which may be infinite."""
    return (bound / norms.double()).clamp(max=1).to(norms.dtype)


def normalized(norms: Tensor, bound: float, stability: float) -> Tensor:
    r"""$C / (\|g_b\| + \gamma)$: all gradients get a length just below C."""
    return bound / (norms + stability)
