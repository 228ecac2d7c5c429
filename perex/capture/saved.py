"""How much memory a graph holds for its backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(graph: Iterable[Any], beside: Iterable[Tensor]) -> int:
    """Bytes of the tensors that a graph keeps for its backward.

    Args:
        graph: its nodes.
        beside: tensors that are there anyway.
    """
    found: dict[int, int] = {}
    for node in graph:
        for tensor in saved_by(node):
            if tensor.layout == torch.strided and type(tensor) in (Tensor, nn.Parameter):
                memory = tensor.untyped_storage()
                found[memory.data_ptr()] = memory.nbytes()
    for tensor in beside:
        found.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(found.values())


def saved_by(node: Any) -> Iterator[Tensor]:
    """The tensors that an operator keeps; none where it let go of them, or they were changed in place."""
    names = [name for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]
    for name in names:
        try:
            value = getattr(node, name)
        except RuntimeError:
            continue
        values = value if isinstance(value, (list, tuple)) else (value,)
        yield from (tensor for tensor in values if isinstance(tensor, Tensor))
