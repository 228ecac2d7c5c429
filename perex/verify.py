"""Is perex right about your model? A comparison with the loop over single examples."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from perex.capture.state import State, starting_from
from perex.errors import ArgumentError
from perex.scoring.losses import PerExampleLosses
from perex.scoring.score import Step, _by_criterion, _by_step, _device_of
from perex.scoring.state import Mode, frozen, prepared
from perex.trial import Compute, Precision, Trial, count, mapped, sizes, take
from perex.verdict import first_line, judge, name_of
from perex.verification import Verification


def verify(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    *,
    step: Step | None = None,
    params: Any = None,
    examples: int = 4,
    mode: Mode = "eval",
    batch_dim: int = 0,
) -> Verification:
    r"""Compare perex with a backward for each example, on a few examples of your own, in float64.

    For every parameter $\theta$ and example $b$, $\|\partial \ell_b / \partial \theta\|$ from one batched backward is
    held against the gradient of $\ell_b$ with example $b$ alone in the batch. Losses are compared alike, which tells
    examples that influence each other from an error of perex. All of it runs on a copy: the model is left as it is.

    Args:
        model: any module.
        batch: a batch as in `score`: a pair `(x, y)` with `loss_fn`, anything with `step`. Tensors, however nested,
            that are as long as the first hold an example in each row; the others are the same for all.
        loss_fn: a criterion, as in `score`.
        step: instead of it, `step(model, batch)` returns the losses `(B,)`. It has to call the model it is given.
        params: which parameters to compare, as in `attach`.
        examples: how many of the batch's examples to take, at most.
        mode: `"eval"`, `"train"`, or None for as it is. A model that draws random numbers in that mode cannot be
            compared, as the batch and the single examples draw different ones.
        batch_dim: the dimension of the inputs that holds the examples, as in `attach`.

    Returns:
        A `Verification`, which prints as a sentence and a table, and is true where perex agrees. A refusal is not
        raised but reported: see `Verification.verdict`.

    Raises:
        ArgumentError: an argument cannot be used as given.
        ScoringError: model, batch and criterion do not go together, whether or not perex is attached.
        LossError: the losses are not one number for each example.

    Example:
        >>> import torch, perex
        >>> model = torch.nn.Linear(3, 2)
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> found = perex.verify(model, batch, torch.nn.CrossEntropyLoss())
        >>> bool(found), found.verdict, [row.parameter for row in found.rows]
        (True, 'agrees', ['weight', 'bias'])
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is of type {type(model).__name__}; pass an nn.Module")
    if (loss_fn is None) == (step is None):
        raise ArgumentError("pass either loss_fn, or step=lambda model, batch: losses")
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise ArgumentError(f"examples={examples!r}: it is a positive whole number")
    found = count(batch, batch_dim)
    if not found:
        raise ArgumentError("batch: holds no tensor with examples; pass one batch, such as next(iter(loader))")
    n = chosen(examples, found, batch, batch_dim)
    few = take(batch, 0, n, found, batch_dim)

    def trial(subject: nn.Module, double: bool) -> Trial:
        """The examples, ready to run in one precision."""
        criterion = loss_fn
        if isinstance(loss_fn, nn.Module) and double:
            criterion = copy.deepcopy(loss_fn).double()
        compute: Compute
        compute = _by_step(step) if step is not None else _by_criterion(PerExampleLosses(criterion))  # type: ignore[arg-type]
        home = _device_of(subject)

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf.to(home) if hasattr(leaf, "to") else leaf
            return leaf.detach().to(home, torch.float64 if double and leaf.is_floating_point() else leaf.dtype)

        return Trial(subject, mapped(moved, few), compute, params, batch_dim, n)

    with untouched(model), torch.inference_mode(False), torch.enable_grad(), frozen(loss_fn):
        return in_best_precision(model, mode, trial)


def in_best_precision(model: nn.Module, mode: Mode, trial: Callable[[nn.Module, bool], Trial]) -> Verification:
    """Compare on a float64 copy where the model has one and runs in it; otherwise in its own precision."""
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        note = f"the model cannot be copied ({first_line(error)}), so this ran on itself, and in its own precision"
        with prepared(model, mode, None), starting_from(State(model, copies=True), model):
            return judge(trial(model, False), own_dtype(model), [note])
    if mode is not None:
        copied.train(mode == "train")
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        double = trial(copied.double(), True)
        with Precision() as precision:
            double.together()
        double.gradients(double.batch, double.n)
    except Exception as error:
        reason = error
    else:
        notes: list[str] = []
        if precision.lowest != torch.float64:
            notes.append(
                f"parts of the model compute in {name_of(precision.lowest)} even so, which bounds the comparison"
            )
        return judge(double, precision.lowest, notes)
    finally:
        torch.set_default_dtype(before)
    own = trial(copy.deepcopy(model), False)
    if mode is not None:
        own.model.train(mode == "train")
    own.together()  # what raises here is no matter of precision: it is the user's to see
    note = f"the model does not run in float64 ({first_line(reason)}), so this is in its own precision"
    return judge(own, own_dtype(model), [note])


def chosen(examples: int, found: int, batch: Any, batch_dim: int) -> int:
    """How many of a batch's examples to take: no number that an input which is the same for all has by chance."""
    others = sizes(batch, batch_dim) - {found}
    wanted = min(examples, found)
    return next((n for n in range(wanted, 1, -1) if n not in others), wanted)


def own_dtype(model: nn.Module) -> torch.dtype:
    """The coarsest precision among a model's parameters."""
    found = [p.dtype if p.is_floating_point() else p.dtype.to_real() for p in model.parameters()]
    return min(found, key=lambda dtype: dtype.itemsize, default=torch.float32)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put the random number generators back at the end."""
    device = _device_of(model)
    states = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
