r"""Products with a weight: $y_t = W x_t$, so $G_b = \sum_t g_{bt} x_{bt}^\top$."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from perex.factors import Dense, Factor, Outer
from perex.kernels.products import HALVES, widen
from perex.rules.call import Captured
from perex.rules.product import Product
from perex.rules.registry import operator_rule


def positions(rows: Tensor) -> Tensor:
    """`(B, ..., d)` as `(B, T, d)`, all positions of an example in one dimension."""
    return rows.unsqueeze(1) if rows.dim() == 2 else rows.flatten(1, -2)


def summed(rows: Tensor, shape: torch.Size) -> Tensor:
    """`(B, ..., *shape)` summed over positions to `(B, *shape)`, half precision in float32."""
    between = tuple(range(1, rows.dim() - len(shape)))
    return added(rows, between) if between else widen(rows)


def added(rows: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Summed over some dimensions, half precision in float32."""
    return rows.sum(dims, dtype=torch.float32 if rows.dtype in HALVES else None)


@operator_rule(
    F.linear,
    arguments="input weight bias",
    parameters="weight bias",
    saves={"weight": "input"},
    narrow=True,
    multiplies=True,
    substitute=Product("input", "weight", "bias", transposed=True),
)
def linear(captured: Captured) -> dict[str, Factor]:
    r"""`F.linear`: $W$ is `(d_out, d_in)`, and the bias's gradient is $\sum_t g_{bt}$."""
    factors: dict[str, Factor] = {}
    if captured.wants("weight"):
        weight = captured.shape("weight")
        if len(weight) == 1:  # a vector of weights gives one number a position
            x = captured.examples("input")
            factors["weight"] = Dense(summed(widen(captured.grad).unsqueeze(-1) * widen(x), weight))
        else:
            factors["weight"] = Outer(positions(captured.grad), positions(captured.examples("input")), weight)
    if captured.wants("bias"):
        factors["bias"] = Dense(summed(captured.grad, captured.shape("bias")))
    return factors


@operator_rule(
    torch.matmul,
    torch.mm,
    Tensor.matmul,
    Tensor.mm,
    Tensor.__matmul__,
    arguments="input other",
    parameters="other",
    saves={"other": "input"},
    applies=lambda tensors: tensors["other"].dim() == 2 and tensors["input"].dim() >= 2,
    narrow=True,
    multiplies=True,
    substitute=Product("input", "other"),
)
def matmul(captured: Captured) -> dict[str, Factor]:
    r"""`x @ W`: $W$ is `(d_in, d_out)`, so $G_b = \sum_t x_{bt} g_{bt}^\top$."""
    x = positions(captured.examples("input"))
    return {"other": Outer(x, positions(captured.grad), captured.shape("other"))}


@operator_rule(
    torch.addmm,
    Tensor.addmm,
    arguments="input mat1 mat2",
    parameters="input mat2",
    saves={"mat2": "mat1"},
    applies=lambda tensors: tensors["input"].dim() == 1,
    narrow=True,
    multiplies=True,
    substitute=Product("mat1", "mat2", "input"),
)
def addmm(captured: Captured) -> dict[str, Factor]:
    """`bias + x @ W`: HF's `Conv1D`, which stores `W` as `(d_in, d_out)`."""
    grad = positions(captured.grad)
    factors: dict[str, Factor] = {}
    if captured.wants("mat2"):
        factors["mat2"] = Outer(positions(captured.examples("mat1")), grad, captured.shape("mat2"))
    if captured.wants("input"):
        factors["input"] = Dense(added(grad, (1,)).sum_to_size(captured.batch, *captured.shape("input")))
    return factors


@operator_rule(
    F.bilinear,
    arguments="input1 input2 weight bias",
    parameters="weight bias",
    saves={"weight": "input1 input2"},
)
def bilinear(captured: Captured) -> dict[str, Factor]:
    r"""$y_{to} = x_t^\top W_o z_t$: an outer product of $g_t$ with $x_t z_t^\top$."""
    grad = positions(captured.grad)
    factors: dict[str, Factor] = {}
    if captured.wants("weight"):
        x, z = positions(captured.examples("input1")), positions(captured.examples("input2"))
        pairs = (x.unsqueeze(3) * z.unsqueeze(2)).flatten(2)  # (B, T, d1 * d2)
        factors["weight"] = Outer(grad, pairs, captured.shape("weight"))
    if captured.wants("bias"):
        factors["bias"] = Dense(grad.sum(1))
    return factors
