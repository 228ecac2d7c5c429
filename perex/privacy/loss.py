"""The loss of a private step: a number to look at, and behind it the losses of the examples."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from perex.capture.forward import Forward
from perex.errors import LossError
from perex.privacy.errors import PrivacyError
from perex.privacy.rows import RowCheck, forwards_behind
from perex.scoring.errors import ScoringError
from perex.scoring.losses import PerExampleLosses
from perex.scoring.nest import tensors

LINEAR: dict[Any, Callable[..., Any]] = {
    Tensor.mul: operator.mul,
    torch.mul: operator.mul,
    Tensor.__mul__: operator.mul,
    Tensor.__rmul__: operator.mul,
    Tensor.mul_: operator.mul,
    Tensor.__imul__: operator.mul,
    Tensor.div: operator.truediv,
    torch.div: operator.truediv,
    Tensor.__truediv__: operator.truediv,
    Tensor.div_: operator.truediv,
    Tensor.__itruediv__: operator.truediv,
    Tensor.add: operator.add,
    torch.add: operator.add,
    Tensor.__add__: operator.add,
    Tensor.__radd__: operator.add,
    Tensor.add_: operator.add,
    Tensor.__iadd__: operator.add,
    Tensor.sub: operator.sub,
    torch.sub: operator.sub,
    Tensor.__sub__: operator.sub,
    Tensor.__rsub__: lambda a, b: b - a,
    Tensor.sub_: operator.sub,
    Tensor.__isub__: operator.sub,
    Tensor.neg: operator.neg,
    torch.neg: operator.neg,
    Tensor.__neg__: operator.neg,
    Tensor.neg_: operator.neg,
}
"""What may be done with a loss before it is run backward; by numbers, and among losses of the same examples."""

UNTAGGED = (Tensor.detach, Tensor.as_subclass, Tensor.data.__get__)  # type: ignore[attr-defined]
"""What makes an ordinary tensor of a loss, on purpose."""


class Origin(Protocol):
    """What a loss comes from, and goes back to: the controller of a private model."""

    def batch_of(self, values: Sequence[Tensor]) -> int:
        """The number of examples in the forward that made some outputs."""

    def edges(self) -> Any:
        """Where the examples are in the model's latest outputs, by their place in the graph."""

    def latest(self) -> Forward:
        """The latest forward."""

    def receiver(self) -> object:
        """Who hears of the model's forwards."""

    def is_scale(self, factor: Tensor) -> bool:
        """Whether a factor is what the scaler multiplies losses by."""

    def backward(self, losses: Tensor, forwards: frozenset[Forward], doubtful: bool) -> None:
        """Run the backward of the examples' losses, of some forwards; see `RowCheck.doubtful`."""


class Number(Tensor):
    """A scalar that was computed from a private loss, and is none: to look at."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """To all functions, it is an ordinary tensor; numbers that come of it are none to run backward either."""
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
            if not isinstance(out, Tensor) or isinstance(out, Number) and func not in UNTAGGED:
                return out
            loose = out.is_floating_point() and not out.requires_grad and torch.is_grad_enabled()
            if loose and func not in UNTAGGED:
                return out.as_subclass(Number)
            return out.as_subclass(Tensor) if isinstance(out, Number) else out

    def backward(
        self, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
    ) -> None:
        """There is none.

        Raises:
            PrivacyError: always.
        """
        raise PrivacyError(
            "backward: this was made of a private loss by a function other than +, -, and * and / by numbers, so the "
            "examples' losses behind it are gone. Run the criterion's own loss backward, or a sum or multiple of it; "
            "whatever else a loss needs can go into the criterion"
        )

    def detach(self) -> Tensor:
        """The number alone."""
        return plain(self)

    def __format__(self, form: str) -> str:
        return format(plain(self), form)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return repr(plain(self))

    def __deepcopy__(self, memo: Any) -> Tensor:
        return plain(self).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)


class PrivateLoss(Number):
    """The mean or sum of the examples' losses, whose `backward` clips each example's gradient.

    It is a scalar tensor for all other purposes: print it, log it, `.item()` it. Sums of such losses of one batch, and
    products with numbers, are such losses too; the only tensor that it may be multiplied by is a scaler's.

    Attributes:
        losses: `(B,)`, the loss of each example, with their graph; not scaled.
    """

    losses: Tensor
    _origin: Origin
    _forwards: frozenset[Forward]
    _doubtful: bool
    _scaled: bool

    @staticmethod
    def of(
        losses: Tensor,
        value: Tensor,
        origin: Origin,
        forwards: frozenset[Forward],
        doubtful: bool,
        scaled: bool = False,
    ) -> Any:
        """Make one of the losses of a batch, the number that they are shown as, and where they come from."""
        loss = value.as_subclass(PrivateLoss)
        loss.losses, loss._origin, loss._forwards = losses, origin, forwards
        loss._doubtful, loss._scaled = doubtful, scaled
        return loss

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry the examples' losses through what is linear; to all else, it is an ordinary tensor."""
        name, own = getattr(func, "__name__", ""), bool(args) and isinstance(args[0], PrivateLoss)
        in_place = own and (name.endswith("_") and not name.startswith("_") or name in AUGMENTED)
        known = LINEAR.get(func)
        if known is None or kwargs or not own and name in AUGMENTED + IN_PLACE:
            if in_place:
                raise PrivacyError(f"loss.{name}: would change the number and not the examples' losses behind it")
            return super().__torch_function__(func, types, args, kwargs)
        if known is operator.truediv and not own:  # one over a loss is not linear
            return super().__torch_function__(func, types, args, kwargs)
        combined = combine(known, args)
        if not in_place:
            return combined
        loss = args[0]
        with torch._C.DisableTorchFunctionSubclass():
            loss.copy_(combined)
        loss.losses, loss._forwards = combined.losses, combined._forwards
        loss._doubtful, loss._scaled = combined._doubtful, combined._scaled
        return loss

    def backward(
        self, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
    ) -> None:
        """Run the one backward, and add the sum of clipped gradients to `.grad`.

        Raises:
            PrivacyError: an argument was given; a gradient that is not private is in `.grad` already; or an example's
                gradient is not finite.
            PerexError: perex cannot vouch for the examples' gradients; the message says which module, and why.
        """
        if gradient is not None or retain_graph or create_graph or inputs is not None:
            raise PrivacyError("loss.backward: takes no arguments where training is private; multiply the loss instead")
        self._origin.backward(self.losses, self._forwards, self._doubtful)


AUGMENTED = ("__imul__", "__itruediv__", "__iadd__", "__isub__")
IN_PLACE = ("mul_", "div_", "add_", "sub_")


def combine(known: Callable[..., Any], args: Sequence[Any]) -> Any:
    """The private loss that an operator of `LINEAR` makes of losses and numbers."""
    one, *others = (arg for arg in args if isinstance(arg, PrivateLoss))
    forwards, doubtful, scaled = one._forwards, one._doubtful, one._scaled
    multiplies = known in (operator.mul, operator.truediv)
    parts: list[Any] = []
    for arg in args:
        if isinstance(arg, PrivateLoss):
            if multiplies and others or arg._origin is not one._origin:
                raise PrivacyError("loss: the product of two losses, or a sum of two models', is no private loss")
            if not forwards & arg._forwards:  # two examples would be clipped as one
                raise PrivacyError("loss: losses of two forwards do not add up: run each one backward on its own")
            if len(arg.losses) != len(one.losses):
                raise PrivacyError(f"loss: of {len(one.losses)} and of {len(arg.losses)} examples do not add up")
            if arg._scaled != one._scaled:
                raise PrivacyError("loss: one was scaled by the scaler and another was not: scale their sum")
            forwards, doubtful = forwards | arg._forwards, doubtful or arg._doubtful
            parts.append(arg.losses)
        elif isinstance(arg, Number):
            raise PrivacyError(
                "loss: a number that was made of a private loss by another function than +, -, * and / was combined "
                "with one: it has no gradient any more. Use `.detach()` on it if it should have none"
            )
        elif isinstance(arg, Tensor) and (arg.requires_grad or arg.numel() != 1):
            raise PrivacyError(
                "loss: a tensor that requires grad, or one of several numbers, was combined with a private loss: "
                "it would reach the parameters without being clipped. Put it into the criterion, or, for a penalty "
                "on the parameters, use the optimizer's weight_decay"
            )
        elif isinstance(arg, Tensor) and multiplies:
            if known is not operator.mul or scaled or not one._origin.is_scale(arg):
                raise PrivacyError(
                    "loss: multiplied or divided by a tensor. What depends on the batch (its number of tokens, the "
                    "loss itself) changes every example's gradient by what the others are, which no clipping bounds; "
                    "put what is one example's own into the criterion, and make a constant a Python number. A scaler "
                    "is for PrivacyEngine(grad_scaler=...)"
                )
            scaled = True
            parts.append(1.0)  # the scaler's: the losses themselves stay as they are
        else:
            parts.append(arg)
    value = known(*(plain(arg) if isinstance(arg, Tensor) else arg for arg in args))
    return PrivateLoss.of(known(*parts), value.detach(), one._origin, forwards, doubtful, scaled)


def plain(tensor: Tensor) -> Tensor:
    """An ordinary tensor of the same memory."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


class PrivateCriterion:
    """A criterion whose loss is private: it returns a `PrivateLoss`.

    The loss of an example is what the criterion returns on that example alone: its outputs and targets as a batch of
    one, or, where these hold several rows for each example (tokens, after `logits.view(-1, V)`), its own rows.

    Args:
        criterion: any function of the model's outputs and of targets, of these in any form, that returns a number.
        reduction: `"mean"` or `"sum"`, how the examples' losses are shown as one number.
        origin: the controller of the model whose outputs it is for.
    """

    def __init__(self, criterion: Callable[..., Tensor], reduction: str, origin: Origin) -> None:
        self.criterion = criterion
        self.reduction = reduction
        self._origin = origin
        self._rows = RowCheck()
        self._losses = PerExampleLosses(_Called(criterion), flattened=True, advice=ADVICE)

    def __repr__(self) -> str:
        return f"PrivateCriterion({self.criterion!r})"

    def __call__(self, *args: Any, shape: Any = None, **kwargs: Any) -> PrivateLoss:
        """The loss of a batch.

        Args:
            args: as the criterion takes them.
            shape: not needed; Opacus asks for it.
            kwargs: as the criterion takes them.

        Raises:
            PrivacyError: which rows of an argument are an example's own cannot be told.
            LossError: the criterion does not return one number for one example.
        """
        if not torch.is_grad_enabled():  # to be looked at, as in a validation
            plain: Any = self.criterion(*args, **kwargs)
            return plain
        values = tensors((args, kwargs))
        batch = self._origin.batch_of(values)
        rows = {len(value) for value in values if value.grad_fn is not None and value.dim()}
        if batch > 1 and rows == {1}:
            raise PrivacyError(
                f"criterion: the model's output has one row, but its inputs were taken for {batch} examples, as many "
                "as another one than the first has rows. Let the model hold what all examples share, and let every "
                "other input have the examples in the same dimension; or leave out batches of one"
            )
        self._rows.refuse_lists((*enumerate(args), *kwargs.items()), batch)
        self._losses.refusals = self._rows.refusals(values, batch, self._origin.edges())
        try:
            losses = self._losses(args, kwargs, batch)
        except ScoringError as error:
            raise PrivacyError(f"criterion: {str(error).replace('loss_fn', 'it')}") from error
        if not losses.requires_grad:
            raise LossError("criterion: the losses do not depend on the private model's outputs, or grad is off")
        value = losses.detach().sum()
        if self.reduction == "mean" and len(losses):
            value = value / len(losses)
        forwards = forwards_behind([losses], self._origin.receiver()) or {self._origin.latest()}
        doubtful = self._rows.doubtful or any(forward.fed for forward in forwards)
        made = PrivateLoss.of(losses, value, self._origin, frozenset(forwards), doubtful)
        loss: PrivateLoss = made
        return loss


ADVICE = (
    "the criterion may use what has a row for each example, its outputs and targets, and what it holds itself: give it "
    "what all examples share beforehand (functools.partial, or an attribute), and batches by their first dimension. To "
    "leave out examples or tokens, use `ignore_index`, or weights of zero"
)


class _Called:
    """A criterion as a function of its arguments and its keyword arguments."""

    def __init__(self, criterion: Callable[..., Tensor]) -> None:
        self.criterion = criterion
        self.reduction = getattr(criterion, "reduction", None)

    def __call__(self, args: Any, kwargs: Any) -> Tensor:
        return self.criterion(*args, **kwargs)
