"""Runs of a model on a few examples, together and one by one, each from the same state."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from perex.capture.parameters import selector
from perex.capture.state import State, starting_from
from perex.scoring.nest import leaves, map_leaves, tensors

Compute = Callable[[nn.Module, Any, int | None], Tensor]  # model, batch and B, to losses (B,)
SEED = 0


class Trial:
    """A model and a few examples, run as often as wanted; every run begins with the same state and seed.

    Args:
        model: the model; what its modules hold is put back after each run.
        batch: examples, `n` of them.
        compute: from model and batch to losses.
        params: which parameters to look at, as in `attach`.
        batch_dim: the dimension that holds the examples.
        n: number of examples.
    """

    def __init__(self, model: nn.Module, batch: Any, compute: Compute, params: Any, batch_dim: int, n: int) -> None:
        self.model, self.batch, self.compute = model, batch, compute
        self.batch_dim, self.n = batch_dim, n
        self.parameters = tracked(model, params)
        self.before = State(model, copies=True)

    @contextmanager
    def run(self, seed: int = SEED) -> Iterator[None]:
        """Seed all generators; begin with what modules held at first, and leave them so."""
        with starting_from(self.before, self.model):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            yield

    def together(self, seed: int = SEED) -> Tensor:
        """Losses of the batch, `(n,)`."""
        with self.run(seed):  # with gradients, for a forward may register hooks
            return self.compute(self.model, self.batch, self.n).detach()

    def example(self, i: int) -> Any:
        """A batch of example `i` alone."""
        return take(self.batch, i, i + 1, self.n, self.batch_dim)

    def alone(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loop: losses `(n,)`, and gradient norms `(n,)` by parameter, a backward for each example."""
        losses, norms = [], []
        for i in range(self.n):
            loss, grads = self.gradients(self.example(i), 1)
            losses.append(loss[0])
            norms.append([torch.zeros((), device="cpu") if grad is None else size(grad) for grad in grads])
        columns = zip(*norms, strict=True)
        return torch.stack(losses), {
            name: torch.stack([norm.cpu().double() for norm in column])
            for name, column in zip(self.parameters, columns, strict=True)
        }

    def gradients(self, batch: Any, n: int) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Losses of `n` examples, and the gradients of their sum."""
        with self.run():
            losses = self.compute(self.model, batch, n)
            grads: tuple[Tensor | None, ...] = (None,) * len(self.parameters)
            if losses.requires_grad:
                grads = torch.autograd.grad(losses.sum(), list(self.parameters.values()), allow_unused=True)
        return losses.detach(), grads

    def differs(self, tolerance: float) -> str | None:
        """Where examples begin to influence each other: in the first module whose outputs show it; None in none."""
        batched = self.seen(self.batch)
        for i in range(self.n):
            for (path, name, before, after), (_, _, own_before, own_after) in zip(
                batched, self.seen(self.example(i)), strict=False
            ):
                what = f"module '{path}' ({name})" if path else f"the model's own forward ({name})"
                if not same_rows(before, own_before, i, self.n, tolerance):
                    parent = path.rpartition(".")[0]
                    return f"{f'module {parent!r}' if parent else 'the model'}, in its own forward before '{path}'"
                if not same_rows(after, own_after, i, self.n, tolerance):
                    return what
        return None

    def seen(self, batch: Any) -> list[tuple[str, str, list[Tensor], list[Tensor]]]:
        """Path, class, inputs and outputs of every module call, in the order in which calls end."""
        found: list[tuple[str, str, list[Tensor], list[Tensor]]] = []

        def watch(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
                before = [tensor.detach().clone() for tensor in tensors((args, kwargs))]
                found.append(
                    (path, type(module).__name__, before, [tensor.detach().clone() for tensor in tensors(out)])
                )

            return hook

        handles = [
            module.register_forward_hook(watch(path), with_kwargs=True) for path, module in self.model.named_modules()
        ]
        try:
            with self.run():
                self.compute(self.model, batch, None)
        finally:
            for handle in handles:
                handle.remove()
        return found


def tracked(model: nn.Module, params: Any) -> dict[str, nn.Parameter]:
    """The parameters that `attach(model, params=params)` tracks, by name."""
    chosen, found = selector(params), {}
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for parameter, own in names.items():
        if parameter.requires_grad and any(chosen(name, parameter) for name in own):
            found[own[0]] = parameter
    return found


def size(grad: Tensor) -> Tensor:
    """The norm of a gradient."""
    values = grad.detach().coalesce().values() if grad.is_sparse else grad.detach()
    return values.abs().double().norm() if values.device.type != "mps" else values.abs().cpu().double().norm()


def count(batch: Any, batch_dim: int) -> int | None:
    """How many examples a batch holds, by its first tensor that has dimensions."""
    found: list[Tensor] = []
    mapped(lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) and leaf.dim() else None, batch)
    return next((tensor.size(batch_dim if tensor.dim() > batch_dim else 0) for tensor in found), None)


def sizes(batch: Any, batch_dim: int) -> set[int]:
    """The sizes of all tensors where examples may be."""
    found: set[int] = set()

    def look(leaf: Any) -> None:
        if isinstance(leaf, Tensor) and leaf.dim():
            found.add(leaf.size(batch_dim if leaf.dim() > batch_dim else 0))

    mapped(look, batch)
    return found


def take(batch: Any, start: int, stop: int, n: int, batch_dim: int) -> Any:
    """Examples `start` to `stop` of a batch of `n`; what has no row for each example stays as it is."""

    def rows(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        dim = batch_dim if leaf.dim() > batch_dim else 0
        return leaf.narrow(dim, start, stop - start) if leaf.size(dim) == n else leaf

    return mapped(rows, batch)


def mapped(change: Callable[[Any], Any], batch: Any) -> Any:
    """`map_leaves`, which also opens mappings that move themselves (a tokenizer's output) and NumPy arrays."""

    def leaf_of(leaf: Any) -> Any:
        if isinstance(leaf, Mapping):
            rebuilt: Any = copy.copy(leaf)
            for key, value in leaf.items():
                rebuilt[key] = mapped(change, value)
            return rebuilt
        return change(torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf)

    return map_leaves(leaf_of, batch)


def same_rows(batched: list[Tensor], alone: list[Tensor], i: int, n: int, tolerance: float) -> bool:
    """Whether the rows of example `i` are what it has alone; true of tensors whose shapes cannot be matched."""
    for whole, own in zip(batched, alone, strict=False):
        if not whole.is_floating_point() or whole.dim() != own.dim():
            continue
        dims = [d for d in range(own.dim()) if whole.shape[d] != own.shape[d]]
        if len(dims) > 1 or dims and whole.shape[dims[0]] != n * own.shape[dims[0]] or not dims and n > 1:
            continue
        rows = whole.narrow(dims[0], i * own.shape[dims[0]], own.shape[dims[0]]) if dims else whole
        if not bool(close(rows, own, tolerance).all()):
            return False
    return True


def close(found: Tensor, expected: Tensor, tolerance: float) -> Tensor:
    """Whether entries agree, in relation to the largest one; what is not finite has to be the same."""
    finite = expected[expected.isfinite()].abs()
    scale = finite.max() if finite.numel() else torch.ones_like(expected, dtype=expected.dtype).sum()
    near = (found - expected).abs() <= tolerance * scale
    return near | (found == expected) | (found.isnan() & expected.isnan())


class Precision(TorchDispatchMode):
    """Finds the lowest precision that a float64 model's numbers go through.

    Attributes:
        lowest: the dtype of the coarsest result that was computed from float64 numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lowest = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and look at its results."""
        out = func(*args, **(kwargs or {}))
        if any(leaf.dtype == torch.float64 for leaf in leaves((args, kwargs or {})) if isinstance(leaf, Tensor)):
            for leaf in leaves(out):
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype.itemsize < self.lowest.itemsize:
                    self.lowest = leaf.dtype
        return out
