"""Operators that multiply rows by a matrix, done by perex where it multiplies faster than they do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perex.kernels.large import faster, in_memory, multiplied
from perex.kernels.products import without_autocast


class Product(NamedTuple):
    r"""$Y = X M + c$, or $X M^\top + c$: the names of the arguments.

    Attributes:
        rows: X, `(..., n)`.
        matrix: M, `(n, m)`.
        bias: c, `(m,)`, where there is one.
        transposed: whether M is `(m, n)`.
    """

    rows: str
    matrix: str
    bias: str = ""
    transposed: bool = False

    def run(self, given: Mapping[str, Any]) -> Tensor | None:
        """What the operator gives for these arguments, or None where it is to be run itself.

        Args:
            given: all arguments. Neither matrix nor bias requires gradients; the rows may.

        Returns:
            Tensor `(..., m)`.
        """
        if not given.keys() <= {self.rows, self.matrix, self.bias}:
            return None
        rows, matrix, bias = given[self.rows], given[self.matrix], given.get(self.bias)
        if not (ordinary(rows) and ordinary(matrix)):
            return None
        if rows.dim() < 2 or matrix.dim() != 2 or matrix.requires_grad:
            return None
        matrix = matrix.mT if self.transposed else matrix
        if bias is not None and (not ordinary(bias) or bias.requires_grad or bias.shape != matrix.shape[1:]):
            return None
        if not faster(rows.detach(), matrix, rows.shape[:-1].numel()):
            return None
        found: Tensor = Multiplication.apply(rows, matrix, bias)
        return found


def ordinary(tensor: Any) -> bool:
    """Whether something is a tensor of torch's own kind, and its elements are in memory."""
    return type(tensor) is Tensor and tensor.layout == torch.strided


class Multiplication(torch.autograd.Function):
    """$Y = X M + c$, with a gradient for X alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """`(..., n)` times `(n, m)`."""
        ctx.save_for_backward(matrix)
        found = multiplied(rows.detach().flatten(0, -2), matrix, bias)
        return shaped(found, rows.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        r"""$G M^\top$."""
        (matrix,) = ctx.saved_tensors
        with without_autocast(grad.device.type):
            if torch.is_grad_enabled() or not in_memory(grad):  # create_graph=True, or is_grads_batched=True
                return grad @ matrix.mT, None, None
            return shaped(multiplied(grad.flatten(0, -2), matrix.mT), grad.shape), None, None


def shaped(rows: Tensor, like: torch.Size) -> Tensor:
    """All rows `(N, m)` as `(..., m)`: no view to autograd, which forbids to change views that functions return."""
    found: Tensor = torch.ops.aten._unsafe_view(rows, [*like[:-1], rows.shape[1]])
    return found
