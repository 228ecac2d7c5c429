"""Sums with a bare parameter: position tables, biases, shifts. The input's values are not needed again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perex.capture.axis import Single
from perex.factors import Dense, Factor
from perex.rules.call import Captured, own_rows
from perex.rules.registry import operator_rule


def summed(captured: Captured, name: str, scale: float) -> Factor:
    """The output gradient, times `scale`, summed to argument `name`'s shape for each example."""
    grad, axis, batch = captured.grads[0], captured.call.out_axes[0], captured.batch
    assert grad is not None
    shape = captured.shape(name)
    rows = axis.rows(grad if scale == 1 else grad * scale, batch)  # (B, *batch-of-one shape)
    if isinstance(axis, Single):
        return Dense(rows.sum_to_size(batch, *aligned(rows.dim() - 1, shape)).reshape(batch, *shape))
    place = axis.dim - grad.dim() + len(shape)  # where the argument would have the batch axis
    if place < 0 or shape[place] == 1:
        return Dense(rows.sum_to_size(batch, *aligned(rows.dim() - 1, shape)).reshape(batch, *shape))
    own = list(shape)
    own[place] = rows.shape[axis.dim + 1]
    values = rows.sum_to_size(batch, *aligned(rows.dim() - 1, own)).reshape(batch, *own)
    return own_rows(values, axis.moved(place), batch, shape)


def aligned(ndim: int, shape: Any) -> list[int]:
    """A shape with ones in front, up to `ndim` dimensions."""
    return [1] * (ndim - len(shape)) + list(shape)


@operator_rule(
    torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, arguments="input other alpha", parameters="input other"
)
def add(captured: Captured) -> dict[str, Factor]:
    """`input + alpha * other`, either side a parameter."""
    scales = {"input": 1, "other": captured.option("alpha", 1)}
    return {name: summed(captured, name, scale) for name, scale in scales.items() if captured.wants(name)}


@operator_rule(torch.sub, Tensor.sub, Tensor.__sub__, arguments="input other alpha", parameters="input other")
def sub(captured: Captured) -> dict[str, Factor]:
    """`input - alpha * other`, either side a parameter."""
    scales = {"input": 1, "other": -captured.option("alpha", 1)}
    return {name: summed(captured, name, scale) for name, scale in scales.items() if captured.wants(name)}


def fill(target: Tensor, value: Tensor) -> Tensor:
    """What `target` holds after `value` was written over all of it."""
    return value.to(target.dtype).expand_as(target)


@operator_rule(fill, arguments="target value", parameters="value")
def write(captured: Captured) -> dict[str, Factor]:
    """A parameter written into rows of the batch: `x[:, 0] = token`."""
    return {"value": summed(captured, "value", 1)}


def returned(value: Tensor) -> Tensor:
    """An output of the model that derives from parameters alone, and has a row for each example."""
    return value.view_as(value)


@operator_rule(returned, arguments="value", parameters="value")
def given_out(captured: Captured) -> dict[str, Factor]:
    """What a model returns of parameters alone."""
    return {"value": summed(captured, "value", 1)}


def spread(value: Tensor) -> Tensor:
    """What every example is given of parameters, a row or more each."""
    return value.view_as(value)


@operator_rule(spread, arguments="value", parameters="value")
def row(captured: Captured) -> dict[str, Factor]:
    """A parameter that was expanded or repeated to the batch: an example's own rows."""
    return {"value": summed(captured, "value", 1)}
