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
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

SELECTIVE = "_CachingTorchDispatchMode"
"""The mode in which `create_selective_checkpoint_contexts` has a function run first."""


def run_recomputation_in(context: Callable[[tuple[Any, ...]], AbstractContextManager[None]]) -> bool:
    """Have the innermost running checkpoint run its recomputation in a context made from its arguments.

    Returns:
        Whether it is a selective one, which torch lets go backward once only.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or not inspect.isfunction(hooks[0]):
        return False
    frame: Any = inspect.getclosurevars(hooks[0]).nonlocals.get("frame")
    recompute = getattr(frame, "recompute_fn", None)
    if recompute is None or hasattr(recompute, "perex"):
        return False

    def again(*args: Any) -> None:
        with context((*args, enclosed(recompute, "kwargs"))):  # these are not among the arguments
            recompute(*args)

    again.perex = True  # type: ignore[attr-defined]
    frame.recompute_fn = again
    return any(type(mode).__name__ == SELECTIVE for mode in _get_current_dispatch_mode_stack())


def sparing() -> bool:
    """Whether what is saved for the backward is not simply held: recomputed, or moved elsewhere."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def enclosed(function: Any, name: str) -> Any:
    """A variable in a function's closure, or None; other variables there may have no value."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
    return cells[name].cell_contents if name in cells else None
