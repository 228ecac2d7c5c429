"""How much memory a graph holds for its backward, and what would be kept of that backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from perex.capture.forward import Tapped
from perex.rules.general import GENERAL


class UnseenError(Exception):
    """What a graph holds cannot be looked at without effects: hooks are on it, or tensors are of other kinds."""


def saved_bytes(graph: Iterable[Any], beside: Iterable[Tensor]) -> int:
    """Bytes of the tensors that a graph keeps for its backward.

    Args:
        graph: its nodes.
        beside: tensors that are there anyway.

    Raises:
        UnseenError: that cannot be told.
    """
    parts: dict[int, dict[int, int]] = {}  # by memory, and by where they begin in it
    whole: dict[int, int] = {}
    for node in graph:
        for tensor in saved_by(node):
            memory, start = tensor.untyped_storage(), tensor.data_ptr()
            found = parts.setdefault(memory.data_ptr(), {})
            found[start] = max(found.get(start, 0), tensor.nbytes)
            whole[memory.data_ptr()] = memory.nbytes()
    for tensor in beside:
        parts.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(min(whole[memory], sum(found.values())) for memory, found in parts.items())


def kept_bytes(graph: Iterable[Any]) -> int:
    """Bytes of the gradients that taps will bring: a layer's input and output gradient, or less if multiplied out.

    On the general path, and through derived weights, they are multiplied out.

    Raises:
        UnseenError: that cannot be told.
    """
    total = 0
    for node in graph:
        tapped = getattr(node, "tapped", None)
        if not isinstance(tapped, Tapped) or tapped.use.site is None:
            continue
        grads = sum(math.prod(output.shape) * output.dtype.itemsize for output in node._input_metadata)
        held = grads + sum(tensor.nbytes for tensor in saved_by(node))
        for entry, derived in tapped.use.site.parameters:
            out = tapped.call.batch * entry.parameter.nbytes
            total += out if derived or tapped.call.rule is GENERAL else min(held, out)
    return total


@functools.cache
def saving(kind: Any) -> list[str]:
    """Under which names a kind of node has what it saved, before any hook brings it back."""
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


def saved_by(node: Any) -> Iterator[Tensor]:
    """The tensors that an operator keeps."""
    for name in saving(type(node)):  # type: ignore[arg-type]
        try:
            value = getattr(node, name)
            values: list[Any] = [value] if type(value) is torch._C._autograd.SavedTensor else list(value or ())
            found = [one.data for one in values if one.unpack_hook is None]
        except (AttributeError, RuntimeError, TypeError):
            raise UnseenError from None
        if len(found) < len(values):
            raise UnseenError
        for tensor in found:
            if tensor is None:
                continue
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
                raise UnseenError
            yield tensor
