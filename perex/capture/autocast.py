"""What autocast has an operator read: the tap keeps that, and not what it was made from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def half_for(device: str) -> torch.dtype | None:
    """The dtype that autocast multiplies in on a device now; None where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def as_read(value: Any) -> Any:
    """An argument as an operator that multiplies reads it: autocast would do the same, and keep it to itself.

    So nothing changes, neither numbers nor gradients. But in this form the rule is handed what the operator's own
    gradient is made of; it takes half the memory; and in the backward nothing is to be cast again.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
        return value
    if value.is_leaf and value.requires_grad and torch.is_autocast_cache_enabled():
        return value  # autocast makes one for all of its uses, so that their gradients add up in half precision
    half = half_for(value.device.type) if value.device.type in ("cpu", "cuda") else None
    return value if half is None or value.dtype == half else value.to(half)
