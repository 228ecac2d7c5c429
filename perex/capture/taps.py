"""Identity autograd functions that perex puts into the user's graph.

All of them return `detach()` of what they get: a tensor of its own that shares memory and version counter.
So it may be changed in place (a ReLU behind a tapped layer), even where the operator saved its result or
returned a view, and autograd still notices an in-place change that would spoil a saved tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, _SingleLevelFunction

from perex.errors import PerexError, UnsupportedError

if TYPE_CHECKING:
    from perex.capture.forward import Entry, Forward, Tapped


UNDER: Any = _SingleLevelFunction
"""What `torch.autograd.Function` derives from: its `apply` is what `Function.apply` calls, also where somebody holds on
to that, as in `linear = Linear.apply`."""


class Tap(torch.autograd.Function):
    """Behind an operator in which parameters meet examples: hands the output gradient to the tracker.

    What the rule needs again is kept with `save_for_backward`, so checkpointing recomputes it, in-place
    changes are noticed, and memory goes as the backward goes. `sentinel` is an input that requires grad, so
    that the output does too when weights are detached; it also tells a full backward from one that is
    restricted to some inputs. `aliases` stand for parameters that the operator read detached: their gradients come from
    the tracker, which has them anyway.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, tapped: Tapped, saved: list[Tensor], sentinel: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the outputs, which come behind the aliases, as they are."""
        ctx.tapped = tapped  # type: ignore[attr-defined]
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        outputs = tuple([output.detach() for output in tensors[len(tapped.summed) :]])
        if tapped.without:
            ctx.mark_non_differentiable(*[outputs[number] for number in tapped.without])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Pass the gradients on, after the tracker has seen them."""
        tapped: Tapped = ctx.tapped
        summed = tapped.summed
        sums: Mapping[str, Tensor] = {}
        arrived = several = False
        for grad in grads:
            if grad is not None:
                arrived, several = True, several or stands_for_several(grad)
        if several:
            error = several_backwards(tapped)
            if summed:
                raise error
            tapped.forward.refuse(error)
        elif arrived:
            wanted: Sequence[str] = ()
            if summed:
                nodes = ctx.next_functions[1 : 1 + len(summed)]
                wanted = [n for n, (node, _) in zip(summed, nodes, strict=True) if will_run(node)]
            sums = tapped.forward.receive(tapped, ctx.saved_tensors, grads, wanted)
            if torch.is_grad_enabled():  # create_graph=True
                grads = tuple(g if g is None else Second.apply(tapped, tapped.forward.sentinel, g) for g in grads)
        return None, None, None, *[sums.get(name) for name in summed], *grads


def put(*args: Any) -> Any:
    """`Tap.apply`, past what `Function.apply` asks before: there are no taps in torch.func's transforms."""
    if torch._C._are_functorch_transforms_active():
        return Tap.apply(*args)
    return _put(*args)


_put: Any = super(UNDER, Tap).apply


def stands_for_several(grad: Tensor) -> bool:
    """Whether a gradient is one of several that run backward at once, as with `is_grads_batched=True`."""
    return type(grad) is Tensor and grad.layout == torch.strided and not torch._C._has_storage(grad)


def several_backwards(tapped: Tapped) -> UnsupportedError:
    """What is said of these."""
    return UnsupportedError(
        f"several gradients at once run backward through module '{tapped.call.where}' (is_grads_batched=True, "
        "torch.func.vmap, jacobian(vectorize=True)): examples have a gradient for each of them. Run them one by one, "
        "or in a model that perex is not attached to"
    )


def will_run(node: Any) -> bool:
    """Whether the running backward goes through an operator."""
    return node is not None and bool(torch._C._will_engine_execute_node(node))


class Second(torch.autograd.Function):
    """On an output gradient that is to be differentiated again: reports when that happens.

    A gradient of gradients (a gradient penalty, a force) uses parameters in the backward's own operators,
    which no rule covers.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, tapped: Tapped, sentinel: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient as it is."""
        ctx.tapped = tapped  # type: ignore[attr-defined]
        return grad.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        """Report, and pass the gradient on."""
        ctx.tapped.forward.refuse(
            UnsupportedError(
                f"the loss contains a gradient that went through module '{ctx.tapped.call.where}' (a gradient penalty, "
                "or a force): parameters are used in the backward itself then, where perex does not see them"
            )
        )
        return None, None, grad


class Alias(torch.autograd.Function):
    """In front of a parameter: notes the gradient of all uses that perex has seen.

    The gradient that arrives at the parameter itself must be this very tensor; another one means a use that
    went past perex. The graph holds the parameter's entry weakly, as the entry holds the graph: Python's collector does
    not see such a circle.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, entry: Entry, parameter: Tensor) -> Tensor:
        """Return the parameter's values."""
        ctx.entry = weakref.ref(entry)  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, Tensor | None]:
        """Pass the gradient on, noted."""
        entry: Entry | None = ctx.entry()
        if grad is not None and entry is not None:
            entry.note(grad)
        return None, grad


class Guard(torch.autograd.Function):
    """Behind a tensor derived from parameters alone: what the user's code holds in its place.

    Every use that perex sees reads the tensor in front of the guard. A gradient that comes through the guard
    is from a use that perex did not see.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, forward: Forward, names: str, passes: bool, derived: Tensor) -> Tensor:
        """Return the derived tensor's values."""
        ctx.found = forward, names, passes  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        return derived.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, None, None, Tensor | None]:
        """Report the use; pass the gradient on where the user wants gradients."""
        forward, names, passes = ctx.found
        if grad is not None:
            forward.refuse(
                UnsupportedError(
                    f"a tensor derived from {names} got a gradient from a use that perex did not see: it was returned "
                    "by the model or kept, and used outside its forward, or in code perex cannot see into. Use it "
                    "inside the model's forward, or leave these parameters out with `params=`"
                )
            )
        return None, None, None, grad if passes else None


class Poison(torch.autograd.Function):
    """Behind a use of a parameter whose rows belong to no one example: an error if the loss depends on it."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, forward: Forward, error: PerexError, saved: list[Tensor], sentinel: Tensor, *results: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the results' values; what is saved is what a tap would save, for a checkpoint counts it."""
        ctx.found = forward, error  # type: ignore[attr-defined]
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return tuple(result.detach() for result in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Report the error; pass the gradients on."""
        forward, error = ctx.found
        if any(grad is not None for grad in grads):
            forward.refuse(error)
        return None, None, None, None, *grads


def identity(grad: Tensor) -> tuple[int, int, int]:
    """What tells one gradient tensor from another while both live: the backward, memory and version."""
    values = grad._values() if grad.is_sparse else grad
    place = 0 if stands_for_several(grad) else values.data_ptr()  # of these, taps have said that they are none
    return torch._C._current_graph_task_id(), place, grad._version
