"""Batch norm with running statistics, with the one multiplication for a backward that its input's gradient takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perex.kernels.large import in_memory
from perex.rules.product import ordinary

WORTH_A_FUNCTION = 2**16
"""Numbers that there have to be: below, torch's operator is over sooner than a function in Python."""


class Rescaling:
    r"""$y = w (x - \mu) / \sqrt{v + \epsilon} + b$, with $\mu$ and $v$ given.

    On a CPU, torch's backward of it reads the input too and adds up gradients of weights that nobody wants.
    """

    def run(self, given: Mapping[str, Any]) -> Tensor | None:
        """What `F.batch_norm` gives, to the bit, or None where it is to be run itself.

        Args:
            given: its arguments, by name. Neither weight nor bias requires gradients; the input may.

        Returns:
            Tensor `(N, C, *spatial)`.
        """
        x, others = given["input"], [given.get(name) for name in ("running_mean", "running_var", "weight", "bias")]
        if given.get("training") or others[0] is None or others[1] is None or not ordinary(x) or x.dim() < 2:
            return None
        if x.numel() < WORTH_A_FUNCTION or not in_memory(x) or not x.is_floating_point():
            return None
        for other in others:
            if other is not None and (not ordinary(other) or other.requires_grad or other.dtype != x.dtype):
                return None
        found: Tensor = Rescaled.apply(x, *others, given.get("eps", 1e-5))
        return found


class Rescaled(torch.autograd.Function):
    """Batch norm with running statistics, with a gradient for the input alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        """`(N, C, *spatial)` to the same."""
        scale = (variance + eps).rsqrt_()
        ctx.save_for_backward(scale if weight is None else scale.mul_(weight))
        return F.batch_norm(x.detach(), mean, variance, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Each channel by its scale."""
        (scale,) = ctx.saved_tensors
        return grad * scale.view(-1, *(1,) * (grad.dim() - 2)), None, None, None, None, None
