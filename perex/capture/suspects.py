"""Code of the user's own in the backward, autograd functions and hooks: does each keep examples apart?

The graph's other nodes are torch's, whose operators capture has followed. So each of the user's is run by itself, with
random output gradients: in the batch, and in examples that run alone. What it gives an example has to be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from perex.capture.axis import Axis
from perex.capture.carry import tensors_in
from perex.capture.record import close, sampled
from perex.errors import ExamplesMixError, PerexError, UnsupportedError

SINK = "_DDPSinkBackward"
"""The node behind the outputs of `DistributedDataParallel`. Its first run starts what synchronises a static graph."""


class Suspect(NamedTuple):
    """Something of the user's that gradients go through.

    Attributes:
        name: what errors call it.
        run: from gradients of its outputs to gradients of its inputs.
        takes: tensors without memory, like these gradients.
        device: where they are.
        alone: like the gradients of one example, where that is known.
    """

    name: str
    run: Callable[..., Any]
    takes: tuple[Tensor, ...]
    device: torch.device
    alone: tuple[Tensor, ...] | None = None


def of_function(node: Any) -> Suspect:
    """An autograd function, by its node."""
    metadata = node._input_metadata
    takes = tuple(torch.empty(tuple(one.shape), dtype=one.dtype, device="meta") for one in metadata)
    call = next((found.tapped.call for found in nodes([node]) if hasattr(found, "tapped")), None)  # the tap before it
    place = f", behind module '{call.where}'," if call is not None and call.where else ""
    name = f"The autograd function '{node._forward_cls.__name__}'{place}"
    return Suspect(name, node.apply, takes, metadata[0].device)


def of_hook(hook: Callable[[Tensor], Tensor | None], tensor: Tensor) -> Suspect:
    """A gradient hook of a tensor."""

    def run(grad: Tensor) -> Tensor:
        found = hook(grad)
        return grad if found is None else found

    name = getattr(hook, "__qualname__", repr(hook))
    like = torch.empty_like(tensor, device="meta", requires_grad=False)
    return Suspect(f"The gradient hook {name}", run, (like,), tensor.device)


def of_module_hook(
    hook: Callable[..., Any], module: nn.Module, path: str, inputs: Any, outputs: Any, held: Callable[[Tensor], Any]
) -> Suspect:
    """A backward hook of a module, `hook(module, grad_input, grad_output)`.

    Args:
        hook: the hook.
        module: its module.
        path: the module's path.
        inputs: what the module was called with.
        outputs: what it returned.
        held: where the examples are in a tensor, if it has any.
    """
    values, count = [*inputs, *tensors_in(outputs)], len(inputs)
    wanted = [isinstance(value, Tensor) and value.requires_grad for value in values]
    present = [value for value, want in zip(values, wanted, strict=True) if want]

    def run(*grads: Tensor) -> Any:
        given = iter(grads)
        every = [next(given) if want else None for want in wanted]
        found = hook(module, tuple(every[:count]), tuple(every[count:]))
        kept = every[:count] if found is None else found if isinstance(found, tuple) else (found,)
        return [grad for grad in kept if grad is not None]

    takes = tuple(torch.empty_like(t, device="meta", requires_grad=False) for t in present)
    axes = [held(t) for t in present]
    alone = tuple(
        like if not isinstance(axis, Axis) else like.narrow(axis.dim, 0, axis.outer * axis.inner)
        for like, axis in zip(takes, axes, strict=True)
    )
    return Suspect(
        f"A backward hook of module '{path}'", run, takes, present[0].device if present else torch.device("cpu"), alone
    )


def nodes(roots: Iterable[Node | None]) -> Iterator[Any]:
    """All nodes of the graph behind some."""
    waiting, seen = [node for node in roots if node is not None], set()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += [source for source, _ in node.next_functions if source is not None]


def of_user(node: Any) -> bool:
    """Whether a node is of an autograd function that is not of torch or perex."""
    return isinstance(node, BackwardCFunction) and not written_in(node).startswith(("perex.", "torch."))


def written_in(node: Any) -> str:
    """The name of the Python module that an autograd function was written in."""
    module: str = getattr(node, "_forward_cls", type(node)).__module__
    return module


def user_code(roots: Iterable[Node | None]) -> tuple[list[Any], list[Any]]:
    """The nodes in a graph of the user's autograd functions, in the order they were applied; those of modules' hooks.

    None behind outputs of `DistributedDataParallel` with a static graph: that may be run once.
    """
    functions, hooks = [], []
    for node in nodes(roots):
        if node.name() == SINK:
            return [], []
        if of_user(node):
            functions.append(node)
        elif isinstance(node, BackwardCFunction) and written_in(node) == "torch.nn.modules._functions":
            hooks.append(node)
    return sorted(functions, key=lambda node: int(node._sequence_nr())), hooks


class Trial:
    """What a suspect of a batch makes of random gradients.

    Args:
        suspect: in the graph of the batch.

    Raises:
        UnsupportedError: it cannot be run for this.
        ExamplesMixError: what it gives is not in proportion to what it gets.
    """

    def __init__(self, suspect: Suspect) -> None:
        self.suspect = suspect
        self.given = [torch.randn(like.shape, dtype=like.dtype, device=suspect.device) for like in suspect.takes]
        self.made = applied(suspect, self.given)
        twice = applied(suspect, [-2 * grad for grad in self.given])
        for one, other in zip(self.made, twice, strict=True):
            if one is not None and other is not None and not close(sampled(-2 * one), sampled(other)):
                raise mixing(suspect)

    def fits(self, single: Suspect, example: int, batch: int) -> bool:
        """Whether an example's suspect, run alone, gives the example's rows of what the batch's gives."""
        shared = all(grad.shape == like.shape for grad, like in zip(self.given, single.takes, strict=True))
        for first in (True, False):  # in rows of several examples, theirs come one example after the other, or in turns
            pairs = zip(self.given, single.takes, strict=True)
            own = [own_rows(grad, like.shape, example, batch, first) for grad, like in pairs]
            same = True
            for one, other in zip(self.made, applied(single, own), strict=True):
                if one is None or other is None:
                    continue
                whole = one.shape == other.shape and not shared  # a sum over examples, as of a weight
                rows = one if whole else own_rows(one, other.shape, example, batch, first)
                same = same and (whole or close(sampled(rows), sampled(other)))
            if same and not shared:
                same = self.sums(single, own, example, batch, first)
            if same:
                return True
        return False

    def sums(self, single: Suspect, own: Sequence[Tensor], example: int, batch: int, first: bool) -> bool:
        """Whether what it sums over examples is what it gives for one, where all others' gradients are zero."""
        masked = [torch.zeros_like(grad) for grad in self.given]
        for mask, rows in zip(masked, own, strict=True):
            own_rows(mask, rows.shape, example, batch, first).copy_(rows)
        pairs = zip(applied(self.suspect, masked), applied(single, own), strict=True)
        sums = [(a, b) for a, b in pairs if a is not None and b is not None and a.shape == b.shape]
        return all(close(sampled(a), sampled(b)) for a, b in sums)


def applied(suspect: Suspect, grads: Sequence[Tensor]) -> list[Tensor | None]:
    """Run it."""
    try:
        with torch.no_grad():
            found = suspect.run(*[grad.clone() for grad in grads])  # which it may write into
    except Exception as error:
        raise UnsupportedError(
            f"{suspect.name} raised {error!r} when perex ran its backward once more, with random gradients, to see "
            "whether it keeps examples apart. If it can run once only, or minds gradients of "
            "other sizes, attach(..., audit=False) does without that"
        ) from error
    return list(found) if isinstance(found, (tuple, list)) else [found]


def own_rows(tensor: Tensor, alone: torch.Size, example: int, batch: int, first: bool) -> Tensor:
    """The part of one example in a tensor of a batch, in the shape that it has alone.

    Raises:
        ValueError: shapes do not tell.
    """
    if tensor.shape == alone:
        return tensor
    dims = [dim for dim, (size, own) in enumerate(zip(tensor.shape, alone, strict=True)) if size != own]
    if len(dims) != 1 or tensor.size(dims[0]) != batch * alone[dims[0]]:
        raise ValueError("shapes")
    dim, own = dims[0], alone[dims[0]]
    if first:
        return tensor.unflatten(dim, (batch, own)).select(dim, example)
    return tensor.unflatten(dim, (own, batch)).select(dim + 1, example)


def compared(trials: Sequence[Trial], suspects: Sequence[Suspect], example: int, batch: int) -> PerexError | None:
    """The error if one of a batch's suspects gives an example something else than alone, or if that cannot be told."""
    count = len(suspects)
    if len(trials) == batch * count and batch > 1:  # each example has its own: one after the other, or in turns
        orders = [trials[example * count : (example + 1) * count], trials[example::batch]]
    else:
        orders = [trials]
    error: PerexError | None = None
    for order in orders:
        error = None
        for trial, single in zip(order, suspects, strict=False):
            try:
                fits = trial.fits(single, example, batch)
            except ValueError:
                return untold(trial.suspect)
            if not fits:
                error = mixing(trial.suspect)
        if len(order) != count:
            error = untold(trials[0].suspect)
        if error is None:
            return None
    return error


def mixing(suspect: Suspect) -> PerexError:
    """The error for one that does not treat examples alone."""
    return ExamplesMixError(
        f"{suspect.name} does not treat examples alone in its backward: what an example gets there is another gradient "
        "when it is alone in the batch, or not in proportion to its loss. It works across examples, uses a statistic "
        "of the batch or its size, clips, or draws random numbers. Then no example has a gradient of its own. Take it "
        "off; or, if that is an effect of rounding, attach(..., audit=False) does without this check"
    )


def untold(suspect: Suspect) -> PerexError:
    """The error for one that cannot be compared."""
    return UnsupportedError(
        f"{suspect.name} is applied to other shapes, or another number of times, when an example is alone, so perex "
        "cannot tell whether its backward keeps examples apart. If it does, attach(..., audit=False) goes without "
        "this check; perex.verify compares with the loop"
    )
