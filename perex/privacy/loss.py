"""The loss of a private step: a number to look at, and behind it the losses of the examples."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perex.errors import LossError
from perex.privacy.errors import PrivacyError
from perex.scoring.losses import PerExampleLosses

Backward = Callable[[Tensor], None]

LINEAR: dict[Any, Callable[..., Any]] = {
    Tensor.mul: operator.mul,
    torch.mul: operator.mul,
    Tensor.__mul__: operator.mul,
    Tensor.__rmul__: operator.mul,
    Tensor.div: operator.truediv,
    torch.div: operator.truediv,
    Tensor.__truediv__: operator.truediv,
    Tensor.add: operator.add,
    torch.add: operator.add,
    Tensor.__add__: operator.add,
    Tensor.__radd__: operator.add,
    Tensor.sub: operator.sub,
    torch.sub: operator.sub,
    Tensor.__sub__: operator.sub,
    Tensor.__rsub__: lambda a, b: b - a,
    Tensor.neg: operator.neg,
    torch.neg: operator.neg,
    Tensor.__neg__: operator.neg,
}
"""What may be done with a loss before it is run backward; by numbers, and among losses of the same examples."""


class PrivateLoss(Tensor):
    """The mean or sum of the examples' losses, whose `backward` clips each example's gradient.

    It is a scalar tensor for all other purposes: print it, log it, `.item()` it. Sums of such losses of one batch, and
    products with numbers, are such losses too.

    Attributes:
        losses: `(B,)`, the loss of each example, with their graph.
    """

    losses: Tensor
    _reduction: str
    _run: Backward
    _forward: int

    @staticmethod
    def of(losses: Tensor, reduction: str, run: Backward, forward: int) -> PrivateLoss:
        """Make one of the losses of a batch, and of what its backward is to do with them."""
        value = losses.detach().sum()
        if reduction == "mean" and len(losses):
            value = value / len(losses)
        loss = value.as_subclass(PrivateLoss)
        loss.losses, loss._reduction, loss._run, loss._forward = losses, reduction, run, forward
        return loss

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry the examples' losses through what is linear; to all else, it is an ordinary tensor."""
        known = LINEAR.get(func)
        if known is None or kwargs:
            with torch._C.DisableTorchFunctionSubclass():
                out = func(*args, **(kwargs or {}))
            return out.as_subclass(Tensor) if isinstance(out, PrivateLoss) else out
        one, *others = (arg for arg in args if isinstance(arg, PrivateLoss))
        parts = []
        for arg in args:
            if isinstance(arg, PrivateLoss):
                if known in (operator.mul, operator.truediv) and others or arg._run != one._run:
                    raise PrivacyError("loss: the product of two losses, or a sum of two models', is no private loss")
                if arg._forward != one._forward:  # two examples would be clipped as one
                    raise PrivacyError("loss: losses of two forwards do not add up: run each one backward on its own")
                if len(arg.losses) != len(one.losses):
                    raise PrivacyError(f"loss: of {len(one.losses)} and of {len(arg.losses)} examples do not add up")
                parts.append(arg.losses)
            elif isinstance(arg, Tensor) and (arg.requires_grad or arg.numel() != 1):
                raise PrivacyError(
                    "loss: a tensor that requires grad, or one of several numbers, was combined with a private loss: "
                    "it would reach the parameters without being clipped. Put it into the criterion, or, for a penalty "
                    "on the parameters, use the optimizer's weight_decay"
                )
            else:
                parts.append(arg)
        return PrivateLoss.of(known(*parts), one._reduction, one._run, one._forward)

    def backward(
        self, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
    ) -> None:
        """Run the one backward, and add the sum of clipped gradients to `.grad`.

        Raises:
            PrivacyError: an argument was given; or a gradient that is not private is in `.grad` already.
            PerexError: perex cannot vouch for the examples' gradients; the message says which module, and why.
        """
        if gradient is not None or retain_graph or create_graph or inputs is not None:
            raise PrivacyError("loss.backward: takes no arguments where training is private; multiply the loss instead")
        self._run(self.losses)

    def detach(self) -> Tensor:
        """The number alone."""
        return self.as_subclass(Tensor)

    def __format__(self, form: str) -> str:
        return format(self.detach(), form)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.as_subclass(Tensor).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


class PrivateCriterion:
    """A criterion whose loss is private: it returns a `PrivateLoss`.

    The loss of an example is what the criterion returns on that example alone: its outputs and targets as a batch of
    one, or, where these hold several rows for each example (tokens, after `logits.view(-1, V)`), its own rows.

    Args:
        criterion: any function of the model's outputs and of targets, of these in any form, that returns a number.
        reduction: `"mean"` or `"sum"`, how the examples' losses are shown as one number.
        batch_size: gives the number of examples in the latest forward.
        number: gives the number of that forward.
        run: what the backward does with the examples' losses.
    """

    def __init__(
        self,
        criterion: Callable[..., Tensor],
        reduction: str,
        batch_size: Callable[[], int],
        number: Callable[[], int],
        run: Backward,
    ) -> None:
        self.criterion = criterion
        self.reduction = reduction
        self._batch_size = batch_size
        self._number = number
        self._run = run
        self._losses = PerExampleLosses(_Called(criterion), flattened=True)

    def __repr__(self) -> str:
        return f"PrivateCriterion({self.criterion!r})"

    def __call__(self, *args: Any, shape: Any = None, **kwargs: Any) -> PrivateLoss:
        """The loss of a batch.

        Args:
            args: as the criterion takes them.
            shape: not needed; Opacus asks for it.
            kwargs: as the criterion takes them.

        Raises:
            LossError: the criterion does not return one number for one example.
        """
        losses = self._losses(args, kwargs, self._batch_size())
        if not losses.requires_grad:
            raise LossError("criterion: the losses do not depend on the private model's outputs, or grad is off")
        return PrivateLoss.of(losses, self.reduction, self._run, self._number())


class _Called:
    """A criterion as a function of its arguments and its keyword arguments."""

    def __init__(self, criterion: Callable[..., Tensor]) -> None:
        self.criterion = criterion
        self.reduction = getattr(criterion, "reduction", None)

    def __call__(self, args: Any, kwargs: Any) -> Tensor:
        return self.criterion(*args, **kwargs)
