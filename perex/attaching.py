"""The one call that begins it all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from perex.capture.parameters import Selection
from perex.errors import AttachError
from perex.kernels.strategies import Preferences, known_strategies
from perex.quantities import Quantity
from perex.tracker import KEEPS, Tracker


def attach(
    model: nn.Module,
    *quantities: Quantity,
    params: Selection = None,
    loss_reduction: Literal["mean", "sum"] = "mean",
    batch_dim: int = 0,
    param_grads: bool = True,
    forwards: Literal["same", "further"] | None = None,
    audit: bool = True,
    grad_scaler: torch.amp.GradScaler | None = None,
    strategies: str | Sequence[str] = (),
    autotune: bool = False,
    memory: Literal["auto", "high", "low", "none"] = "auto",
) -> Tracker:
    r"""Attach perex to a model, to read per-example gradient norms after a backward.

    For a batch with losses $\ell_b$, it gives $\|\partial \ell_b / \partial \theta\|$ for every example $b$, of
    each parameter and of all together, exactly and without a backward for each example.

    Args:
        model: any module. Its code runs unchanged; its `state_dict` and outputs stay as they are.
        quantities: further statistics to reduce gradients to; see `Tracker.read`.
        params: which parameters to track: None for all that require grad, names or globs such as
            `["layer4.*", "fc.weight"]`, or a function of `(name, parameter)`, which is asked in each forward.
        loss_reduction: how the loss that is run backward comes from the examples' losses: `"mean"` or `"sum"`.
        batch_dim: the dimension of the model's inputs that holds the examples.
        param_grads: whether `.grad` is computed too. With False it is left alone, and weight gradients are
            never computed: the fastest way when only statistics are wanted. (Outputs then agree to rounding: torch
            may choose other kernels, as it does for frozen weights, and perex multiplies large matrices by whichever
            of the CPU's libraries is faster. With True they are the same to the bit. So is `.grad`, but for large
            weights whose gradient comes out of the same product as its norm, or of a faster one than autograd's; for
            parameters that several layers read before they meet examples, as queries are, which may be added up in
            another order; and under autocast for those that are used several times: autocast adds their gradients up
            in half precision, and perex in float32.)
        forwards: what several forwards before one backward hold: the `"same"` examples, as the two sides of
            a siamese network, or `"further"` ones. None refuses what it cannot know.
        audit: whether `px.backward(losses)` checks the first batch, and each whose inputs have new shapes, for
            examples that influence each other: a few of them are run again alone and compared; each loss may depend
            on its own example's outputs only; and a backward with other weights on the losses, which comes first and
            runs gradient hooks too, has to bring gradients in proportion.
        grad_scaler: the scaler of the loss that is run backward, as in `scaler.scale(loss).backward()`: norms are then
            of the loss before scaling. `px.backward(losses)` scales by itself.
        strategies: ways to the norms to take wherever they apply, the first one first, in place of the cheapest: of
            linear layers `"direct"`, `"Gram"`, `"compiled direct"`, `"compiled Gram"`; of convolutions `"call per
            example"`, `"grouped calls"`, `"unfolded"`, `"pixel Gram"`, `"compiled direct"`, `"compiled pixel Gram"`; on
            GPUs, with Triton, also `"Triton direct"`, `"Triton Gram"` and, of embeddings, `"Triton segments"`.
            `px.report()` shows what was taken.
        autotune: whether to measure the ways that apply, once for each shape, and take the fastest, rather than the
            one that counting operations and bytes says is. The first steps are slower for that.
        memory: what `clip_`, `reweight_` and `gradients` may take. `"high"`: inputs and output gradients of layers are
            kept from each backward to the next forward. `"auto"`: those of the first backward, where they take at most
            32 MiB and nothing is checkpointed; and of later ones, if the first one's were asked for. `"low"`: of
            `px.backward(losses)`, the graph alone, of which `clip_` runs the backward again; or, with
            `param_grads=False`, they are kept, if they fit in where the graph was. `"none"`: nothing is kept, and these
            are refused.

    Returns:
        A `Tracker`, which is also a context manager that detaches on exit.

    Raises:
        AttachError: the model is scripted, compiled, `DataParallel` or attached already; an argument is wrong.

    Example:
        >>> import torch, perex
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> x = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 5.0]])
        >>> with perex.attach(model) as px:
        ...     model(x).mean().backward()
        >>> px.norms()
        tensor([3., 5.])
    """
    if loss_reduction not in ("mean", "sum"):
        raise AttachError(f"loss_reduction={loss_reduction!r}: it is 'mean' or 'sum'")
    if forwards not in (None, "same", "further"):
        raise AttachError(f"forwards={forwards!r}: it is None, 'same' or 'further'")
    if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
        raise AttachError(f"batch_dim={batch_dim!r}: it is a dimension of the inputs, counted from 0")
    if memory not in KEEPS:
        raise AttachError(f"memory={memory!r}: it is one of {', '.join(map(repr, KEEPS))}")
    if grad_scaler is not None and not callable(getattr(grad_scaler, "scale", None)):
        raise AttachError(f"grad_scaler: expected a torch.amp.GradScaler, got {type(grad_scaler).__name__}")
    for quantity in quantities:
        if not isinstance(quantity, Quantity):
            raise AttachError(f"{quantity!r} is no perex.Quantity; parameters are chosen with `params=`")
    names = (strategies,) if isinstance(strategies, str) else tuple(strategies)
    for name in names:
        if name not in known_strategies():
            raise AttachError(f"strategies: {name!r} is none of {', '.join(sorted(known_strategies()))}")
    return Tracker(
        model,
        quantities,
        params,
        loss_reduction,
        batch_dim,
        param_grads,
        forwards,
        audit,
        grad_scaler,
        Preferences(names, autotune),
        memory,
    )
