"""Gradients of convolution weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from perex.factors.base import Factor, double
from perex.factors.terms import Terms
from perex.kernels import sums
from perex.kernels.blocks import example_blocks
from perex.kernels.convolution import BACKEND, multiplied_out, plan, squares_of
from perex.kernels.geometry import Geometry, by_group, convolved, measures, patches, weight_gradient
from perex.kernels.outer import lengths
from perex.kernels.plan import Plan


@dataclass(eq=False)
class Patches(Factor):
    r"""$G_b = \sum_p g_{bp} u_{bp}^\top$, with $u_{bp}$ the patch of the input under output position $p$.

    Patches are not unfolded up front; see `perex.kernels.convolution` for the ways to the norm.

    Attributes:
        x: input, `(B, R, C_in, *spatial)`, R rows (images) an example.
        grads: output gradient, `(B, R, C_out, *spatial')`.
        geometry: the convolution's options, with the weight's shape.
    """

    x: Tensor
    grads: Tensor
    geometry: Geometry
    summing: bool = False

    @property
    def batch(self) -> int:  # type: ignore[override]
        """Number of examples."""
        return self.x.shape[0]

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The weight's shape."""
        return self.geometry.weight_shape

    def dense(self, start: int, stop: int) -> Tensor:
        """See `Factor.dense`."""
        return multiplied_out(self.x[start:stop], self.grads[start:stop], self.geometry)

    def squared_norm(self) -> Tensor:
        """See `Factor.squared_norm`."""
        if self.summing and self.x.numel() and self.grads.numel():
            norms, self.total = sums.of_patches(self.x, self.grads, self.geometry)
            return norms
        return self.terms().total()

    def terms(self) -> Terms:
        """See `Factor.terms`."""
        if self.summing and self.x.numel() and self.grads.numel():
            return super().terms()
        return Terms.of(squares_of(self.x, self.grads, self.geometry))

    def plan(self) -> Plan:
        """See `Factor.plan`."""
        if self.summing:
            return self.summed_plan()
        return plan(self.x.shape, self.grads.shape, self.geometry)

    def summed_plan(self) -> Plan:
        """See `Factor.summed_plan`."""
        return sums.plan_of_patches(self.x.shape, self.grads.shape, self.geometry)

    def dense_flops(self) -> int:
        """See `Factor.dense_flops`."""
        positions, rows, columns = measures(self.x.shape, self.grads.shape, self.geometry)
        return 2 * self.batch * self.geometry.groups * positions * rows * columns

    def product_cost(self) -> float:
        """See `Factor.product_cost`: the backend's convolutions are faster than matrix products."""
        return BACKEND * super().product_cost()

    def merge(self, other: Factor) -> Factor | None:
        """Uses with the same geometry and sizes are further rows."""
        if not isinstance(other, Patches) or self.geometry != other.geometry:
            return None
        if self.x.shape[2:] != other.x.shape[2:]:
            return None
        x, grads = torch.cat((self.x, other.x), 1), torch.cat((self.grads, other.grads), 1)
        return Patches(x, grads, self.geometry)

    def take(self, examples: Tensor) -> Factor:
        """See `Factor.take`."""
        examples = examples.to(self.x.device)
        return Patches(self.x[examples], self.grads[examples], self.geometry)

    def beside(self, other: Factor) -> Factor | None:
        """See `Factor.beside`: with the same geometry and sizes."""
        if not isinstance(other, Patches) or self.geometry != other.geometry:
            return None
        if self.x.shape[1:] != other.x.shape[1:] or self.grads.shape[1:] != other.grads.shape[1:]:
            return None
        return Patches(torch.cat((self.x, other.x)), torch.cat((self.grads, other.grads)), self.geometry)

    def sizes(self) -> Tensor | None:
        r"""See `Factor.sizes`: $\sum_p \|g_p\| \|u_p\| \le \sqrt K \|g\| \|x\|$, for K places of the kernel."""
        places = math.prod(self.shape[2:])
        return lengths(self.x.flatten(1), 1) * lengths(self.grads.flatten(1), 1) * places**0.5

    def precise(self, example: int) -> Tensor:
        """See `Factor.precise`."""
        one = slice(example, example + 1)
        return Patches(double(self.x[one]), double(self.grads[one]), self.geometry).dense(0, 1)[0]

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See `Factor.weighted_sum`: one call of the backend for all examples; the narrower side takes the weights."""
        x, grads = self.x, self.grads
        weights = weights.to(x).reshape(-1, *(1,) * (x.dim() - 1))
        if x.numel() <= grads.numel():
            x = x * weights
        else:
            grads = grads * weights
        return weight_gradient(x.flatten(0, 1), grads.flatten(0, 1), self.geometry)

    def along(self, direction: Tensor) -> Tensor:
        r"""$\sum_p g_p \cdot V u_p$: the convolution by $V$, times the output gradient."""
        out = convolved(self.x.flatten(0, 1), direction.to(self.x), self.geometry)
        return (out.reshape(self.grads.shape) * self.grads).flatten(1).sum(1)

    def project(self, rows: Tensor, columns: Tensor) -> Tensor:
        r"""$\sum_p (a_k \cdot g_p)(b_k \cdot u_p)$, patches unfolded a few examples at a time."""
        narrow, wide = (self.x, self.grads) if self.geometry.transposed else (self.grads, self.x)
        groups, parts = self.geometry.groups, []
        left_of = rows.to(narrow).reshape(groups, -1, rows.shape[1])  # (G, m / G, K)
        positions = narrow.shape[1] * math.prod(narrow.shape[3:])
        for i, j in example_blocks(self.batch, groups * positions * max(len(columns), rows.shape[1])):
            left = by_group(narrow[i:j], groups).flatten(2, -2) @ left_of  # (b, G, T, K)
            right = patches(wide[i:j], narrow.shape[3:], self.geometry) @ columns.to(wide)
            parts.append((left * right).sum((1, 2)))
        return torch.cat(parts)
