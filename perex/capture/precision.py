"""How exactly numbers were computed that two runs are compared by."""

from __future__ import annotations

import torch
from torch import Tensor

from perex.kernels.triton.available import TF32, tensor_cores


def precision(tensor: Tensor, operator: str | None = None) -> float:
    """What the numbers of a tensor resolve, relative to their size.

    Args:
        tensor: of floating-point or complex numbers.
        operator: the name of what computed it, if known: convolutions have a setting of their own.
    """
    own = float(torch.finfo(tensor.dtype).eps)
    if not tensor.is_cuda or tensor.dtype not in (torch.float32, torch.complex64):
        return own
    convolution = operator is None or operator.startswith("conv")
    product = operator is None or not convolution
    return max(own, TF32) if product and tensor_cores(torch.float32) or convolution and convolved_in_tf32() else own


def convolved_in_tf32() -> bool:
    """Whether cuDNN may convolve float32 in TF32, as it may by default."""
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # torch 2.9; the older setting raises once this one was set
        return str(cudnn.conv.fp32_precision) == "tf32"
    return bool(cudnn.allow_tf32)
