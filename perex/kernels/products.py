"""Matrix products that add up in float32, whatever is multiplied."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
"""Dtypes whose products are exact in float32, but whose sums are not their own."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of two stacks of matrices of one shape, in float32 where they are in half precision.

    Args:
        a: `(..., m, k)`.
        b: `(..., k, n)`.

    Returns:
        Tensor `(..., m, n)`.
    """
    if a.dtype not in HALVES:
        return a @ b
    if not (a.is_cuda and takes_dtype()):
        return a.float() @ b.float()
    found: Tensor = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return found.unflatten(0, a.shape[:-2])


def widen(tensor: Tensor) -> Tensor:
    """Half precision as float32; anything else as it is."""
    return tensor.float() if tensor.dtype in HALVES else tensor


def takes_dtype() -> bool:
    """Whether torch multiplies half-precision matrices into float32: since 2.8, on CUDA."""
    return torch.torch_version.TorchVersion(torch.__version__) >= (2, 8)  # type: ignore[operator]


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Switch autocast off, where it is on: the switch itself takes longer than a small rule."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
