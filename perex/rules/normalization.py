r"""Norm layers and slopes: $y = w \hat{x} + b$, so the gradients are $\sum g \hat{x}$ and $\sum g$."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from perex.factors import Dense, Factor
from perex.kernels.affine import plane_sums, row_sums
from perex.kernels.products import HALVES
from perex.rules.call import Captured
from perex.rules.linear import summed
from perex.rules.registry import operator_rule
from perex.rules.rescaling import Rescaling


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


def by_rows(captured: Captured, shape: Sequence[int], eps: float, centred: bool) -> dict[str, Factor] | None:
    """The two sums from one reading of each row; None where there is no kernel for that."""
    grad, batch = captured.grads[0], captured.batch
    if grad is None or not captured.wants("weight") or not batch * math.prod(shape):
        return None
    x, grad = (
        value.reshape(batch, -1, math.prod(shape))
        for value in (captured.rows("input"), captured.call.out_axes[0].rows(grad, batch))
    )
    found = row_sums(x, grad, eps, centred)
    if found is None:
        return None
    return {
        name: Dense(value.reshape(batch, *shape))
        for name, value in zip(("weight", "bias"), found, strict=True)
        if captured.wants(name)
    }


@operator_rule(
    F.layer_norm,
    arguments="input normalized_shape weight bias eps",
    parameters="weight bias",
    saves={"weight": "input"},
)
def layer_norm(captured: Captured) -> dict[str, Factor]:
    """Over the last dimensions, with a weight for each of their entries."""
    shape = captured.value("normalized_shape")
    return by_rows(captured, shape, captured.option("eps", 1e-5), centred=True) or affine(
        captured, lambda x, eps: F.layer_norm(x, shape, eps=eps), trailing=True
    )


@operator_rule(
    F.rms_norm,
    arguments="input normalized_shape weight eps",
    parameters="weight",
    saves={"weight": "input"},
)
def rms_norm(captured: Captured) -> dict[str, Factor]:
    """Layer norm without centring and bias."""
    shape, own = captured.value("normalized_shape"), captured.option("eps", None)
    if own is None:
        x = captured.tensors[captured.call.template("input").number]
        own = default_eps(x.dtype, x.device.type)
    return by_rows(captured, shape, own, centred=False) or affine(
        captured, lambda x, eps: F.rms_norm(x, shape, eps=own), trailing=True
    )


@functools.cache
def default_eps(dtype: torch.dtype, device: str) -> float:
    """What `F.rms_norm` takes for `eps`: what the input's type resolves, or the one that it computes in.

    That is float32 where halves are computed in it, as on CPUs since some version of torch. Of so small a number as the
    one here, the one leaves a tenth.
    """
    own = torch.finfo(dtype).eps
    if dtype not in HALVES:
        return own
    small = torch.full((1, 1), 0.01, dtype=dtype, device=device)
    return own if float(F.rms_norm(small, (1,)).abs().max()) < 0.5 else torch.finfo(torch.float32).eps


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
    substitute=Rescaling(),
)
def batch_norm(captured: Captured) -> dict[str, Factor]:
    """With running statistics; with those of the batch it never gets here."""
    (channels,) = captured.shape("weight" if captured.wants("weight") else "bias")
    grad = captured.grads[0]
    assert grad is not None
    grad = captured.call.out_axes[0].rows(grad, captured.batch)  # (B, N, C, *spatial), N rows an example
    if captured.wants("weight"):
        x, mean, variance = captured.rows("input"), captured.value("running_mean"), captured.value("running_var")
    else:  # or anything
        x, mean, variance = grad, grad.new_zeros(channels), grad.new_ones(channels)
    weight, bias = plane_sums(x, grad, mean, variance, captured.option("eps", 1e-5))
    return {name: Dense(value) for name, value in (("weight", weight), ("bias", bias)) if captured.wants(name)}


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
    below = torch.where(x > 0, 0, grad * x)  # of what is no number, what is none
    if math.prod(weight) == 1:
        rows = captured.call.out_axes[0].front(below, captured.batch)
        return {"weight": Dense(rows.unsqueeze(-1).flatten(1).sum(1).reshape(captured.batch, *weight))}
    rows = captured.call.out_axes[0].rows(below, captured.batch).movedim(2, -1)
    return {"weight": Dense(summed(rows, weight))}
