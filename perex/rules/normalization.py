r"""Norm layers and slopes: $y = w \hat{x} + b$, so the gradients are $\sum g \hat{x}$ and $\sum g$."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from perex.factors import Dense, Factor
from perex.rules.call import Captured
from perex.rules.linear import summed
from perex.rules.registry import operator_rule


def affine(captured: Captured, normalize: Callable[[Tensor, float], Tensor], trailing: bool) -> dict[str, Factor]:
    r"""The two sums, over every dimension that the weight does not have.

    Args:
        captured: the call.
        normalize: makes $\hat{x}$, in the layout of the output, from the input and `eps`.
        trailing: whether the weight spans the last dimensions (layer norm) or dimension 1 (all others).
    """
    grad = captured.grads[0]
    assert grad is not None

    def by_example(value: Tensor, shape: torch.Size) -> Factor:
        """Sum `(N, ...)` values of each example to `(B, *shape)`."""
        rows = captured.call.out_axes[0].rows(value, captured.batch)  # (B, *batch-of-one shape)
        return Dense(summed(rows if trailing else rows.movedim(2, -1), shape))

    factors: dict[str, Factor] = {}
    if captured.wants("weight"):
        normalized = normalize(captured.value("input"), captured.option("eps", 1e-5))
        factors["weight"] = by_example(normalized.mul_(grad), captured.shape("weight"))
    if captured.wants("bias"):
        factors["bias"] = by_example(grad, captured.shape("bias"))
    return factors


@operator_rule(
    F.layer_norm,
    arguments="input normalized_shape weight bias eps",
    parameters="weight bias",
    saves={"weight": "input"},
)
def layer_norm(captured: Captured) -> dict[str, Factor]:
    """Over the last dimensions, with a weight for each of their entries."""
    shape = captured.value("normalized_shape")
    return affine(captured, lambda x, eps: F.layer_norm(x, shape, eps=eps), trailing=True)


@operator_rule(
    F.rms_norm,
    arguments="input normalized_shape weight eps",
    parameters="weight",
    saves={"weight": "input"},
)
def rms_norm(captured: Captured) -> dict[str, Factor]:
    """Layer norm without centring and bias; the default `eps` is that of the input's own type."""
    shape, given = captured.value("normalized_shape"), captured.option("eps", None)
    index = captured.call.template("input").number
    own = torch.finfo(captured.tensors[index].dtype).eps if given is None else given
    return affine(captured, lambda x, eps: F.rms_norm(x, shape, eps=own), trailing=True)


@operator_rule(
    F.group_norm,
    arguments="input num_groups weight bias eps",
    parameters="weight bias",
    saves={"weight": "input"},
)
def group_norm(captured: Captured) -> dict[str, Factor]:
    """Over groups of channels, with a weight for each channel."""
    groups = captured.value("num_groups")
    return affine(captured, lambda x, eps: F.group_norm(x, groups, eps=eps), trailing=False)


@operator_rule(
    F.instance_norm,
    arguments="input running_mean running_var weight bias use_input_stats momentum eps",
    parameters="weight bias",
    saves={"weight": "input running_mean running_var"},
)
def instance_norm(captured: Captured) -> dict[str, Factor]:
    """Over each image and channel, or with running statistics."""
    if captured.option("use_input_stats", True):
        return affine(captured, lambda x, eps: F.instance_norm(x, eps=eps), trailing=False)
    return affine(captured, partial(with_running_statistics, captured), trailing=False)


@operator_rule(
    F.batch_norm,
    arguments="input running_mean running_var weight bias training momentum eps",
    parameters="weight bias",
    saves={"weight": "input running_mean running_var"},
    narrow=True,
)
def batch_norm(captured: Captured) -> dict[str, Factor]:
    r"""With running statistics; with those of the batch it never gets here.

    Both sums of torch's own backward, $\sum g (x - \mu) / \sigma$ and $\sum g$ for each channel, with the channels of
    all examples side by side.
    """
    batch = captured.batch
    (channels,) = captured.shape("weight" if captured.wants("weight") else "bias")
    grad = captured.grads[0]
    assert grad is not None
    grad = captured.call.out_axes[0].rows(grad, batch)  # (B, N, C, *spatial), N rows an example
    x = captured.rows("input") if captured.wants("weight") else grad  # or anything, if not asked for
    grad, x = (rows.transpose(0, 1).flatten(1, 2).contiguous() for rows in (grad, x))  # (N, B * C, *spatial)
    dtype, eps = torch.promote_types(x.dtype, torch.float32), captured.option("eps", 1e-5)
    ones = torch.ones(batch * channels, dtype=dtype, device=x.device)
    mean, variance = ones, ones
    if captured.wants("weight"):
        mean, variance = (captured.value(name).to(dtype).repeat(batch) for name in ("running_mean", "running_var"))
    inverse = (variance + eps).rsqrt()  # as CUDA wants what the forward saved, which was none of the batch's
    _, weight, bias = torch.ops.aten.native_batch_norm_backward(
        grad, x, ones, mean, variance, mean, inverse, False, eps, [False, True, True]
    )
    sums = {"weight": weight, "bias": bias}
    return {name: Dense(sums[name].view(batch, channels)) for name in sums if captured.wants(name)}


def with_running_statistics(captured: Captured, x: Tensor, eps: float) -> Tensor:
    """Normalise by stored mean and variance of each channel."""
    return F.batch_norm(x, captured.value("running_mean"), captured.value("running_var"), eps=eps)


@operator_rule(
    torch.prelu, F.prelu, Tensor.prelu, arguments="input weight", parameters="weight", saves={"weight": "input"}
)
def prelu(captured: Captured) -> dict[str, Factor]:
    r"""$y = x$ above zero and $w x$ below, with one slope or one for each channel of dimension 1."""
    x, weight = captured.value("input"), captured.shape("weight")
    grad = captured.grads[0]
    assert grad is not None
    below = torch.where(x < 0, grad * x, 0)
    if math.prod(weight) == 1:
        rows = captured.call.out_axes[0].front(below, captured.batch)
        return {"weight": Dense(rows.flatten(1).sum(1).reshape(captured.batch, *weight))}
    rows = captured.call.out_axes[0].rows(below, captured.batch).movedim(2, -1)
    return {"weight": Dense(summed(rows, weight))}
