"""What work takes on a GPU: an H100, by which the constants were measured (benchmarks/gpu/kernels.py)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from perex.kernels.triton.available import tensor_cores

RATES = {"half": 3.3e14, "TF32": 1.9e14, "float32": 2.4e13, "float64": 2.4e13}
"""Multiply-adds a second of large matrix products, by what is multiplied."""

BANDWIDTH = 2.4e12
"""Bytes a second that are read or written."""

LAUNCH = 8e-6
"""Seconds for an operator: to be launched by the host, and to begin and end on the device."""


def multiplied(dtype: torch.dtype) -> str:
    """What tensors of a dtype are multiplied as: a key of `RATES`."""
    if dtype == torch.float32:
        return "TF32" if tensor_cores(dtype) else "float32"
    return "half" if dtype in (torch.bfloat16, torch.float16) else "float64"


def seconds(
    dtype: torch.dtype, products: float, numbers: float, launches: int, efficiency: Mapping[str, float]
) -> float:
    """How long some work takes.

    Args:
        dtype: of what is multiplied.
        products: multiply-adds.
        numbers: of float32, how many are read or written beside.
        launches: of operators.
        efficiency: of the multiplication beside a large matrix product's, by what is multiplied.
    """
    kind = multiplied(dtype)
    return products / (efficiency[kind] * RATES[kind]) + 4 * numbers / BANDWIDTH + LAUNCH * launches
