"""Operators that multiply rows by a matrix, done by perex where it multiplies faster than they do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perex.kernels.large import faster, multiplied
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
        if any(type(tensor) is not Tensor or tensor.layout != torch.strided for tensor in (rows, matrix)):
            return None
        if rows.dim() < 2 or matrix.dim() != 2:
            return None
        if bias is not None and bias.shape != (matrix.shape[0 if self.transposed else 1],):
            return None
        matrix = matrix.mT if self.transposed else matrix
        if matrix.requires_grad or not faster(rows.detach().flatten(0, -2), matrix):
            return None
        found: Tensor = Multiplication.apply(rows, matrix, bias)
        return found


class Multiplication(torch.autograd.Function):
    """$Y = X M + c$, with a gradient for X alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """`(..., n)` times `(n, m)`."""
        ctx.save_for_backward(matrix)
        found = multiplied(rows.detach().flatten(0, -2), matrix, bias)
        return found.view(*rows.shape[:-1], matrix.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        r"""$G M^\top$."""
        (matrix,) = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        with without_autocast(grad.device.type):
            again = torch.is_grad_enabled()  # create_graph=True
            found = flat @ matrix.mT if again else multiplied(flat, matrix.mT)
        return found.view(*grad.shape[:-1], matrix.shape[0]), None, None
