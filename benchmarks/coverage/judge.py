"""One architecture, one library: are its norms those of the loop?"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from inputs import BATCH, Inputs
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

PARAMETER, TOTAL = 1e-6, 1e-7  # relative to the example's norm
Norms = dict[str, Tensor]  # squared, (B,), by parameter


def outputs(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in what a model returns, by path."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield path, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from outputs(item, f"{path}.{name}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from outputs(item, f"{path}[{number}]")


@dataclasses.dataclass
class Weights:
    """How one output enters the loss.

    Attributes:
        axis: its dimension that holds the examples.
        apart: whether an example's rows lie apart, as row `t * B + b`, rather than one after the other.
        values: the weights, (B, numbers in an example's piece).
    """

    axis: int
    apart: bool
    values: Tensor

    def pieces(self, out: Tensor, batch: int) -> Tensor:
        """An output by examples, (batch, numbers in an example's piece)."""
        rows = out.movedim(self.axis, 0)
        rows = rows.unflatten(0, (-1, batch)).transpose(0, 1) if self.apart else rows
        return rows.reshape(batch, -1)


@dataclasses.dataclass
class Loss:
    """A random projection of every output that has rows of examples, another for each example."""

    weights: dict[str, Weights]

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs) -> Loss:
        """Find the axes, by running the batch and one example of it."""
        random = torch.Generator().manual_seed(2)
        many = dict(outputs(model(**inputs.all())))
        weights = {}
        for path, one in outputs(model(**inputs.one(0))):
            whole = many.get(path)
            if whole is None or whole.dim() != one.dim() or not (whole.requires_grad and one.requires_grad):
                continue
            axes = [d for d, (a, b) in enumerate(zip(whole.shape, one.shape, strict=True)) if a != b]
            if len(axes) == 1 and whole.shape[axes[0]] == BATCH * one.shape[axes[0]] and one.numel():
                values = torch.randn(BATCH, one.numel(), generator=random, dtype=torch.float64) / one.numel() ** 0.5
                forms = [Weights(axes[0], apart, values) for apart in (False, True)]
                expected = forms[0].pieces(one, 1)[0]
                weights[path] = min(forms, key=lambda w: float((w.pieces(whole, BATCH)[0] - expected).abs().max()))
        if not weights:
            raise ValueError(f"no output has rows of examples: {[(p, tuple(v.shape)) for p, v in many.items()]}")
        return cls(weights)

    def each(self, out: Any) -> Tensor:
        """The losses of the batch, `(B,)`."""
        found = dict(outputs(out))
        return sum((w.pieces(found[path], BATCH) * w.values).sum(1) for path, w in self.weights.items())

    def one(self, out: Any, rows: dict[str, Tensor]) -> Tensor:
        """The loss of a batch of one, by its rows of the weights."""
        found = dict(outputs(out))
        return sum((w.pieces(found[path], 1)[0] * rows[path]).sum() for path, w in self.weights.items())

    def rows(self, index: int) -> dict[str, Tensor]:
        """The weights of one example."""
        return {path: w.values[index] for path, w in self.weights.items()}


def tracked(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that have gradients."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def spelled_out() -> Iterator[None]:
    """Batch norm by running statistics as plain arithmetic, for the oracles.

    On CPU, torch's own backward of it reads the output's gradient in the wrong order where strides are ambiguous, as
    those of a batch of one with transposed gradients are (seen in 2.13, against finite differences).
    """
    original = nn.functional.batch_norm

    def batch_norm(
        x: Tensor, mean: Tensor, var: Tensor, weight: Any = None, bias: Any = None, training: bool = False, *more: Any
    ) -> Tensor:
        if training or mean is None:
            return original(x, mean, var, weight, bias, training, *more)
        shape = -1, *[1] * (x.dim() - 2)
        eps = more[1] if len(more) > 1 else 1e-5
        out = (x - mean.view(shape)) / (var.view(shape) + eps).sqrt()
        out = out if weight is None else out * weight.view(shape)
        return out if bias is None else out + bias.view(shape)

    nn.functional.batch_norm = batch_norm
    try:
        yield
    finally:
        nn.functional.batch_norm = original


@spelled_out()
def by_loop(model: nn.Module, inputs: Inputs, loss: Loss) -> tuple[Norms, Tensor, dict[str, Tensor]]:
    """The oracle. Returns squared norms, losses, and the sum of the gradients."""
    named = tracked(model)
    squares: dict[str, list[Tensor]] = {name: [] for name in named}
    losses, total = [], {name: torch.zeros_like(p) for name, p in named.items()}
    for index in range(BATCH):
        value = loss.one(model(**inputs.one(index)), loss.rows(index))
        grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        losses.append(value.detach())
        for (name, p), g in zip(named.items(), grads, strict=True):
            squares[name].append(p.new_zeros(()) if g is None else g.double().square().sum())
            if g is not None:
                total[name] += g
    return {name: torch.stack(values) for name, values in squares.items()}, torch.stack(losses), total


@spelled_out()
def by_batch(model: nn.Module, inputs: Inputs, loss: Loss) -> Norms:
    """The gradient of each loss in the graph of the whole batch; the same as the loop's, where a row is left alone."""
    named = tracked(model)
    losses = loss.each(model(**inputs.all()))
    squares: dict[str, list[Tensor]] = {name: [] for name in named}
    for one in losses:
        grads = torch.autograd.grad(one, list(named.values()), allow_unused=True, retain_graph=True)
        for (name, p), g in zip(named.items(), grads, strict=True):
            squares[name].append(p.new_zeros(()) if g is None else g.square().sum())
    return {name: torch.stack(values) for name, values in squares.items()}


@spelled_out()
def batch_gap(model: nn.Module, inputs: Inputs, loss: Loss, loop: tuple[Norms, Tensor, dict[str, Tensor]]) -> float:
    """How far the batch is from its examples, without any library: in losses, and in the sum of gradients."""
    _, losses, total = loop
    found = loss.each(model(**inputs.all()))
    grads = torch.autograd.grad(found.sum(), list(tracked(model).values()), allow_unused=True)
    off = sum((t if g is None else g - t).square().sum() for g, t in zip(grads, total.values(), strict=True))
    scale = sum(t.square().sum() for t in total.values())
    return max(float((off / scale).sqrt()), float(((found - losses).abs() / losses.abs().max()).max()))


def by_perex(model: nn.Module, inputs: Inputs, loss: Loss) -> Norms:
    """Ours, through `px.backward`."""
    import perex

    with perex.attach(model, param_grads=False) as px:
        px.backward(loss.each(model(**inputs.all())))
        return px.squared_norms(by="parameter")


def by_training(model: nn.Module, inputs: Inputs, loss: Loss) -> Norms:
    """Ours, in an ordinary training step: `loss.backward()`, with `.grad`, which has to be what it is without us."""
    import perex

    loss.each(model(**inputs.all())).mean().backward()
    plain = {name: p.grad for name, p in tracked(model).items()}
    model.zero_grad()
    torch.manual_seed(0)
    with perex.attach(model) as px:
        loss.each(model(**inputs.all())).mean().backward()
        norms = px.squared_norms(by="parameter")
    scale = torch.stack([g.norm() for g in plain.values() if g is not None]).norm()
    for name, p in tracked(model).items():
        expected = plain[name]
        if (p.grad is None) != (expected is None):
            raise AssertionError(f".grad of {name} is {'missing' if p.grad is None else 'there without need'}")
        if expected is not None and float((p.grad - expected).norm() / scale) > 1e-9:
            raise AssertionError(f".grad of {name} is off by {float((p.grad - expected).norm() / scale):.1e}")
    return norms


def by_vmap(model: nn.Module, inputs: Inputs, loss: Loss) -> Norms:
    """A gradient for every example, by `torch.func`.

    A mask that hides nothing is left out where it is in the way, and attention is written out where that helps.
    """
    unmasked = {n: t for n, t in inputs.tensors.items() if not (n.endswith("attention_mask") and bool(t.all()))}
    first: Exception | None = None
    choices: list[tuple[dict[str, Tensor], str | None]] = [(inputs.tensors, None), (unmasked, None)]
    if hasattr(model, "set_attn_implementation"):  # a model of transformers
        usual = model.config._attn_implementation
        choices.append((unmasked, "eager"))
    for tensors, attention in choices:
        try:
            if attention:
                model.set_attn_implementation(attention)
            return mapped(model, Inputs(tensors, inputs.constants), loss)
        except Exception as error:
            first = first or error
        finally:
            if attention:
                model.set_attn_implementation(usual)
    assert first is not None
    raise first


def mapped(model: nn.Module, inputs: Inputs, loss: Loss) -> Norms:
    """One attempt of it."""
    parameters = {name: p.detach() for name, p in tracked(model).items()}
    constants = dict(model.named_buffers()) | {n: p for n, p in model.named_parameters() if not p.requires_grad}

    def of_one(parameters: dict[str, Tensor], pieces: dict[str, Tensor], rows: dict[str, Tensor]) -> Tensor:
        return loss.one(functional_call(model, (parameters, constants), (), pieces | inputs.constants), rows)

    pieces = {name: value.reshape(BATCH, inputs.rows(name), *value.shape[1:]) for name, value in inputs.tensors.items()}
    grads = vmap(grad(of_one), in_dims=(None, 0, 0), randomness="different")(
        parameters, pieces, {path: w.values for path, w in loss.weights.items()}
    )
    return {name: g.flatten(1).square().sum(1) for name, g in grads.items()}


def by_opacus(model: nn.Module, inputs: Inputs, loss: Loss) -> Norms:
    """Opacus's norm mode. It looks at modules in training mode only; dropout is zero, and batch norm stays as it is."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    expected = loss.each(model(**inputs.all())).detach()  # with gradients: without, torch may take other paths
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    wrapped = GradSampleModuleFastGradientClipping(
        model, batch_first=True, loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True, strict=False
    )
    losses = loss.each(wrapped(**inputs.all()))
    if not torch.allclose(losses, expected, rtol=1e-6, atol=1e-9):
        raise RuntimeError("in training mode, which Opacus needs, the model computes something else")
    losses.sum().backward()
    wrapped.get_norm_sample()  # raises where the norms are not of one batch
    return {name: p._norm_sample.square() for name, p in tracked(model).items()}


WAYS = {"perex": by_perex, "training": by_training, "vmap": by_vmap, "opacus": by_opacus}


def compare(found: Norms, expected: Norms) -> dict[str, Any]:
    """The largest differences, relative to the examples' own norms, and where."""
    total = sum(expected.values()).sqrt()
    worst, where = 0.0, ""
    missing = sorted(expected.keys() - found.keys())
    for name, value in expected.items():
        if name not in found:
            continue
        if found[name].shape != value.shape:
            return {"status": "wrong", "error": math.inf, "where": f"{name}: shape {tuple(found[name].shape)}"}
        off = float(((found[name].double().sqrt() - value.sqrt()).abs() / total).nan_to_num(math.inf).max())
        if off > worst:
            worst, where = off, name
    if missing and float(sum(expected[name].sum() for name in missing)) > 0:
        return {"status": "wrong", "error": math.inf, "where": f"no norm for {', '.join(missing[:3])}"}
    both = [name for name in expected if name in found]
    whole = float(((sum(found[n].double() for n in both).sqrt() - total).abs() / total).nan_to_num(math.inf).max())
    status = "exact" if worst <= PARAMETER and whole <= TOTAL else "wrong"
    return {"status": status, "error": max(worst, whole), "where": where}
