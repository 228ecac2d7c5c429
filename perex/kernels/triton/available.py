"""Whether fused kernels can run, and in which precision. Triton itself is imported on the first question that needs it.

With `TRITON_INTERPRET=1` in the environment before Triton is imported, kernels run on CPUs, in Python: for tests.
"""

from __future__ import annotations

import os
import warnings
from functools import cache

import torch

from perex.kernels.spot import Spot

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What kernels read. They multiply and add up in float32, so float64 would lose digits, and complex numbers parts."""

CAPABILITY = (8, 0)
"""The oldest NVIDIA GPUs that multiply all of `DTYPES` on tensor cores."""


def usable(spot: Spot | None) -> bool:
    """Whether kernels can run on tensors that are there."""
    if spot is None or spot.dtype not in DTYPES:
        return False
    if interpreted():
        return importable()
    return spot.device == "cuda" and importable() and compiles()


def fast(spot: Spot | None) -> bool:
    """Whether they are to be taken where they are the cheapest: interpreted ones run only when asked for by name."""
    return spot is not None and spot.device == "cuda" and not interpreted()


def interpreted() -> bool:
    """Whether kernels run in Python."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true", "y", "yes")


@cache
def importable() -> bool:
    """Whether Triton is installed, and of this machine."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def compiles() -> bool:
    """Whether a kernel can be compiled and run: Triton may lack a C compiler, or know the GPU no more or not yet."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < CAPABILITY:
        return False
    try:
        from perex.kernels.triton.outer import direct

        one = torch.ones(1, 1, 1, 1, device="cuda")
        return float(direct(one, one)) == 1.0
    except Exception as reason:  # of a compiler, a driver, a launcher: no list of them is complete
        text = f"perex runs without Triton kernels, as one failed: {type(reason).__name__}: {reason}"
        warnings.warn(text[:500], RuntimeWarning, stacklevel=2)
        return False


def tensor_cores(dtype: torch.dtype) -> bool:
    """Whether tensors of a dtype are multiplied on tensor cores: in half precision, or where the user allows TF32."""
    if dtype != torch.float32:
        return True
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9; the older settings raise once this one was set
        return matmul.fp32_precision == "tf32"
    return bool(matmul.allow_tf32) or torch.get_float32_matmul_precision() != "highest"


TF32 = 2.0**-10
"""What TF32 resolves."""


def resolution(dtype: torch.dtype) -> float:
    """What products of tensors of a dtype resolve of themselves; those of half precision are exact in float32."""
    return TF32 if dtype == torch.float32 and tensor_cores(dtype) else float(torch.finfo(torch.float32).eps)


def precision(dtype: torch.dtype) -> str:
    """What `tl.dot` is to do with float32."""
    return "tf32" if tensor_cores(dtype) else "ieee"


def widened(dtype: torch.dtype) -> bool:
    """Whether kernels must turn numbers into float32 themselves: the interpreter multiplies no bfloat16."""
    return dtype == torch.bfloat16 and interpreted()
