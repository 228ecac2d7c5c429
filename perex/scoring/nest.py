"""Tensors inside tuples, lists, mappings and dataclasses: find them, replace them, move them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def map_leaves(change: Callable[[Any], Any], tree: Any) -> Any:
    """Rebuild `tree` with every leaf replaced by `change(leaf)`; the original is left as it is.

    Tuples (named ones too), lists, mappings and dataclasses are opened, Hugging Face's `ModelOutput` among
    them. Anything else is a leaf, and so is whatever has a `.to` of its own: tensors, packed sequences.

    Args:
        change: called with each leaf, in a fixed order.
        tree: the structure.

    Returns:
        A structure of the same types.

    Example:
        >>> map_leaves(lambda leaf: leaf + 1, {"a": 1, "b": (2, [3])})
        {'a': 2, 'b': (3, [4])}
    """
    if hasattr(tree, "to"):
        return change(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in dataclasses.fields(tree) if field.init]
        return dataclasses.replace(tree, **{name: map_leaves(change, getattr(tree, name)) for name in names})
    if isinstance(tree, Mapping):
        rebuilt: Any = copy.copy(tree)
        for key, value in tree.items():
            rebuilt[key] = map_leaves(change, value)
        return rebuilt
    if isinstance(tree, (tuple, list)):
        items = [map_leaves(change, item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return change(tree)


def leaves(tree: Any) -> list[Any]:
    """List every leaf of `tree`, in the order of `map_leaves`.

    Example:
        >>> leaves({"a": 1, "b": (2, [3])})
        [1, 2, 3]
    """
    found: list[Any] = []
    map_leaves(found.append, tree)
    return found


def tensors(tree: Any) -> list[Tensor]:
    """List every tensor in `tree`, in the order of `map_leaves`.

    Example:
        >>> [tuple(tensor.shape) for tensor in tensors(("label", {"x": torch.zeros(2, 3)}))]
        [(2, 3)]
    """
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def to_device(tree: Any, device: torch.device) -> Any:
    """Move every tensor in `tree`, and every object with a `.to` of its own, to `device`.

    Tensors are cut off from any graph, so that no backward reaches back into the data.

    Example:
        >>> to_device((torch.zeros(2), "label"), torch.device("cpu"))
        (tensor([0., 0.]), 'label')
    """

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().to(device, non_blocking=True)  # overlaps with computing, from pinned memory
        return leaf.to(device) if hasattr(leaf, "to") else leaf

    return map_leaves(move, tree)
