"""Gradients that the user has autograd keep, by `retain_grad()`: what perex runs backward besides leaves them alone.

Autograd adds to such a tensor's `.grad` in each backward, one for `torch.autograd.grad` included.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import operator
from collections.abc import Iterator

import torch
from torch import Tensor


def retained(since: object = None) -> list[Tensor]:
    """All tensors that retain their gradients. Only the collector knows of those that were made behind the model.

    Args:
        since: something of Python's that is older than all that matter. Nothing is moved among old objects before what
            is older than it: where this is young still, the few young ones are enough.
    """
    objects = gc.get_objects(generation=0) + gc.get_objects(generation=1)  # no list of them is in itself
    if since is None or True not in map(operator.is_, objects, itertools.repeat(since)):
        objects = gc.get_objects()
    kinds, found = list(map(type, objects)), list[Tensor]()
    for kind in {kind for kind in set(kinds) if issubclass(kind, Tensor)}:
        place = -1
        with contextlib.suppress(ValueError):  # loops in C: there may be hundreds of thousands
            while True:
                place = kinds.index(kind, place + 1)
                found.append(objects[place])
    with torch._C.DisableTorchFunction():  # nobody's class is to hear of that
        return [tensor for tensor in found if tensor.requires_grad and tensor.retains_grad]


@contextlib.contextmanager
def spared(since: object = None) -> Iterator[list[Tensor]]:
    """Put back the gradients that tensors have retained, whatever runs backward meanwhile.

    Args:
        since: of `retained`.
    """
    tensors = retained(since)
    with torch._C.DisableTorchFunction():
        before = [tensor.grad for tensor in tensors]  # autograd replaces them
    try:
        yield tensors
    finally:
        with torch._C.DisableTorchFunction():
            for tensor, grad in zip(tensors, before, strict=True):
                tensor.grad = grad
