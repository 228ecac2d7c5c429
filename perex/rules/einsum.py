r"""Einstein sums of examples with a weight, $y_{tn} = \sum_c x_{tc} W_{cn}$ for any letters: linear layers, too."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perex.capture.axis import Axis
from perex.factors import Factor, Outer, Part, Place
from perex.rules.call import Captured
from perex.rules.registry import operator_rule


class Letters(NamedTuple):
    """The dimensions of a sum of two operands, by letters.

    Attributes:
        operand: those of the first.
        other: those of the second.
        out: those of the result.
    """

    operand: str
    other: str
    out: str

    @classmethod
    def of(cls, equation: str, operand: Tensor, other: Tensor) -> Letters | None:
        """Read an equation; None if it is of another kind than those that the rule is for."""
        found = re.fullmatch(r"([a-zA-Z.]+),([a-zA-Z.]+)->([a-zA-Z.]+)", equation.replace(" ", ""))
        if found is None:
            return None
        left, right, out = found.groups()
        if "..." in left and "..." in right:
            return None
        dots = operand.dim() - len(left) + 3 if "..." in left else other.dim() - len(right) + 3
        spare = "".join(chr(code) for code in range(0x3B1, 0x3B1 + max(dots, 0)))  # letters that nobody writes
        letters = cls(*(part.replace("...", spare) for part in (left, right, out)))
        whole = "." not in "".join(letters) and all(len(set(part)) == len(part) for part in letters)
        fits = whole and (len(letters.operand), len(letters.other)) == (operand.dim(), other.dim())
        sizes = [*zip(letters.operand, operand.shape, strict=fits), *zip(letters.other, other.shape, strict=fits)]
        return letters if fits and all(dict(sizes)[letter] == size for letter, size in sizes) else None

    def summed(self, weight: str) -> str:
        """The weight's letters that are summed over, in its order."""
        return "".join(letter for letter in weight if letter not in self.out)

    def is_product(self) -> bool:
        """Whether each letter is summed over in both, or is one operand's and the result's."""
        both, out = set(self.operand) & set(self.other), set(self.out)
        return not both & out and (set(self.operand) | set(self.other)) - both == out


def applies(given: dict[str, Any]) -> bool:
    """Whether it is a product of two matrices but for the order of dimensions."""
    if {"equation", "operand", "other"} != given.keys() or not isinstance(given["equation"], str):
        return False
    letters = Letters.of(given["equation"], given["operand"], given["other"])
    return letters is not None and letters.is_product()


@operator_rule(
    torch.einsum,
    arguments="equation operand other",
    parameters="operand other",
    saves={"operand": "other", "other": "operand"},
    applies=applies,
    multiplies=True,
)
def einsum(captured: Captured) -> dict[str, Factor]:
    r"""$G_b = \sum_t x_{bt} g_{bt}^\top$, with the letters of $W$ in its own order."""
    name = "operand" if captured.wants("operand") else "other"
    source = "other" if name == "operand" else "operand"
    tensors = [torch.empty(captured.shape(key), device="meta") for key in ("operand", "other")]
    letters = Letters.of(captured.value("equation"), *tensors)
    assert letters is not None
    weight, rows = (letters.operand, letters.other)[:: 1 if name == "operand" else -1]
    summed = letters.summed(weight)
    free = "".join(letter for letter in weight if letter not in summed)
    index = captured.call.template(source).number
    axis, out_axis = captured.call.axes[index] or captured.call.rows.get(index), captured.call.out_axes[0]
    x = by_letters(captured.examples(source), without(rows, axis), summed)
    g = by_letters(captured.grad, without(letters.out, out_axis), free)
    shape = captured.shape(name)
    if weight == summed + free:
        return {name: Outer(x, g, shape)}
    if weight == free + summed:
        return {name: Outer(g, x, shape)}
    strides = torch.empty(shape, device="meta").stride()
    order = [weight.index(letter) for letter in summed + free]
    size = torch.Size([shape[dim] for dim in order])
    return {name: Part(Outer(x, g, size), Place(shape, tuple(size), tuple(strides[dim] for dim in order), 0))}


def without(letters: str, axis: Any) -> str:
    """The letters that are left with examples in front; where these have several rows, their letter stays."""
    return letters[: axis.dim] + letters[axis.dim + 1 :] if isinstance(axis, Axis) and axis.plain else letters


def by_letters(rows: Tensor, letters: str, last: str) -> Tensor:
    """`(B, *letters)` as `(B, T, n)`: `last` are the letters of n, and all others, in alphabetical order, are of T."""
    order = [*sorted(set(letters) - set(last)), *last]
    found = rows.permute(0, *(1 + letters.index(letter) for letter in order))
    middle = len(order) - len(last) + 1
    return found.reshape(rows.shape[0], math.prod(found.shape[1:middle]), math.prod(found.shape[middle:]))
