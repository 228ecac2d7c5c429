"""Checkpointing: what is recomputed in a backward has to be tapped as the forward was.

Non-reentrant checkpointing runs its function again when the backward first asks for a saved tensor, and counts
what is saved on the way. Taps save tensors, so the second run needs the same taps, although their gradients
never arrive. torch has no public way to be told; this reads the frame that `torch.utils.checkpoint` keeps in the
hook it installs, and does nothing where it finds none. The second run then saves fewer tensors than the first,
which torch reports as an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch


def run_recomputation_in(context: Callable[[tuple[Any, ...]], AbstractContextManager[None]]) -> None:
    """Have the innermost running checkpoint run its recomputation in a context made from its arguments."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or not inspect.isfunction(hooks[0]):
        return
    frame: Any = inspect.getclosurevars(hooks[0]).nonlocals.get("frame")
    recompute = getattr(frame, "recompute_fn", None)
    if recompute is None or hasattr(recompute, "perex"):
        return

    def again(*args: Any) -> None:
        with context((*args, enclosed(recompute, "kwargs"))):  # these are not among the arguments
            recompute(*args)

    again.perex = True  # type: ignore[attr-defined]
    frame.recompute_fn = again


def enclosed(function: Any, name: str) -> Any:
    """A variable in a function's closure, or None; other variables there may have no value."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
    return cells[name].cell_contents if name in cells else None
