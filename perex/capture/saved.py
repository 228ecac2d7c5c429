"""How much memory a graph holds for its backward, and what would be kept of that backward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from perex.capture.forward import Tapped


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


def kept_bytes(graph: Iterable[Any]) -> float:
    """Bytes of the gradients that taps will bring: a layer's input and output gradient, or less if multiplied out."""
    total = 0.0
    for node in graph:
        tapped = getattr(node, "tapped", None)
        if not isinstance(tapped, Tapped) or tapped.use.site is None:
            continue
        outputs = getattr(node, "_input_metadata", None)
        if outputs is None:  # torch does not say
            return math.inf
        grads = sum(math.prod(output.shape) * output.dtype.itemsize for output in outputs)
        held = grads + sum(tensor.nbytes for tensor in saved_by(node))
        for entry, _ in tapped.use.site.parameters:
            total += min(held, tapped.call.batch * entry.parameter.nbytes)
    return total
