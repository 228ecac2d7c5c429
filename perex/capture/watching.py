"""Noticing that a loss depends on a tensor of which perex cannot say whose it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

WATCHED = "perex_watched"
"""Under which a node of the graph says that its gradient is watched, or that of what it is made of."""


def watch(tensor: Tensor, refuse: Callable[[], None]) -> None:
    """Call a function when a gradient reaches a tensor."""
    if tensor.grad_fn is None:
        tensor.register_hook(lambda grad: refuse())
        return
    number = tensor.output_nr
    mark_watched(tensor)

    def arrived(grads: tuple[Tensor | None, ...]) -> None:
        if grads[number] is not None:
            refuse()

    tensor.grad_fn.register_prehook(arrived)  # a hook on a view that was changed in place can crash torch


def mark_watched(tensor: Tensor) -> None:
    """Note in a tensor's graph that its gradient is watched, by way of what it is made of."""
    node: Any = tensor.grad_fn
    if node is not None:
        node.metadata[WATCHED] = True


def watched(tensor: Tensor) -> bool:
    """Whether it is; a tensor's graph may be younger than its label."""
    node: Any = tensor.grad_fn
    return tensor.requires_grad and (node is None or WATCHED in node.metadata)
