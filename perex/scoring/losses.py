"""The loss of each example: what the criterion returns on that example alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from perex.errors import LossError
from perex.scoring.errors import ScoringError
from perex.scoring.nest import leaves, map_leaves

ADVICE = "pass step=lambda model, batch: losses to compute the losses, one for each example, yourself"


class PerExampleLosses:
    """A criterion, turned into a function from a batch to the loss of each example in it.

        losses[b] = loss_fn(output[b:b+1], target[b:b+1])

    A batch of one makes every `reduction`, class weight and normaliser mean what it means for one example.
    `loss_fn` is only called, never changed. All examples go through it at once (`torch.vmap`) where that is
    possible and, on the first batch, agrees with one call for each; otherwise it is called once for each.

    Where one example gives several numbers, as `MSELoss(reduction="none")` does on vectors, they are summed
    if the criterion's `reduction` is `"none"`; of any other criterion they are refused.

    Args:
        loss_fn: a criterion `(output, target) -> Tensor`.
        flattened: whether tensors may hold several rows for each example, one example's after the other's, as token
            scores do after `.view(-1, V)`: these are all handed over for it then. What is no tensor is handed on.
        advice: what errors say that can be done.

    Example:
        >>> losses = PerExampleLosses(torch.nn.MSELoss())
        >>> losses(torch.zeros(3, 2), torch.tensor([[1., 1.], [0., 2.], [0., 0.]]), 3)
        tensor([1., 2., 0.])
    """

    def __init__(self, loss_fn: Callable[[Any, Any], Tensor], flattened: bool = False, advice: str = ADVICE) -> None:
        self.loss_fn = loss_fn
        self.flattened = flattened
        self.advice = advice
        self.refusals: Mapping[int, Exception] = {}  # by the id of a tensor, what its use raises
        self.at_once: bool | None = None  # not known before the first batch

    def __call__(self, output: Any, target: Any, batch_size: int) -> Tensor:
        """Return the losses of a batch.

        Args:
            output: what the model returned: a tensor `(B, ...)`, or a tuple, mapping or dataclass of them.
            target: what the pool gave beside the model's input; the same forms.
            batch_size: B.

        Returns:
            Losses `(B,)`, with their graph.

        Raises:
            ScoringError: the batch's size disagrees with `output` or `target`, or the criterion uses a part
                of them that has no row for each example.
            LossError: the criterion does not return one number for one example.
        """
        found = [*self._rows("model output", output, batch_size), *self._rows("target", target, batch_size)]
        if batch_size == 0:
            return _nobodys(found)
        several = [len(tensor) != batch_size for tensor in found]
        flat = [t.reshape(batch_size, -1, *t.shape[1:]) if s else t for t, s in zip(found, several, strict=True)]

        def alone(*rows_of_one: Tensor) -> Tensor:
            pairs = zip(rows_of_one, several, strict=True)
            batches_of_one = iter(row if own else row.unsqueeze(0) for row, own in pairs)
            return self._one_number(*(self._fill(tree, batch_size, batches_of_one) for tree in (output, target)))

        def one_by_one(count: int) -> Tensor:
            return torch.stack([alone(*(rows_of[b] for rows_of in flat)) for b in range(count)])

        if self.at_once is not False:
            losses = _vmapped(alone, flat)
            if self.at_once is None:
                few = min(batch_size, 3)
                self.at_once = losses is not None and _same(losses[:few], one_by_one(few))
            if losses is not None and self.at_once:
                return losses
        return one_by_one(batch_size)

    def _one_number(self, output: Any, target: Any) -> Tensor:
        """Call the criterion on a batch of one and return its number, shape `()`."""
        loss = self.loss_fn(output, target)
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            kind = loss.dtype if isinstance(loss, Tensor) else type(loss).__name__
            raise LossError(f"loss_fn returned a {kind}; it must return a tensor of floating-point numbers")
        if loss.numel() != 1 and getattr(self.loss_fn, "reduction", None) != "none":
            raise LossError(
                f"loss_fn returned {loss.numel()} numbers, of shape {tuple(loss.shape)}, for one example; "
                "let it return one, for instance with .sum() or .mean()"
            )
        return loss.sum()

    def _is_per_example(self, leaf: Any, batch_size: int) -> bool:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or id(leaf) in self.refusals:
            return False
        several = self.flattened and batch_size > 0 and len(leaf) > batch_size and len(leaf) % batch_size == 0
        return len(leaf) == batch_size or several

    def _rows(self, name: str, tree: Any, batch_size: int) -> list[Tensor]:
        """List the tensors in `tree` that have a row for each example; refuse if there is none."""
        found = [leaf for leaf in leaves(tree) if self._is_per_example(leaf, batch_size)]
        if not found and any(leaf is not None for leaf in leaves(tree)) and not self.flattened:
            raise ScoringError(
                f"the {name} is {_describe(tree)}, but the batch has {batch_size} examples; {self.advice}"
            )
        return found

    def _fill(self, tree: Any, batch_size: int, batches_of_one: Any) -> Any:
        """Replace each tensor of `_rows(tree)` by the next of `batches_of_one`, and bar the use of all else."""

        def change(leaf: Any) -> Any:
            if leaf is None or self.flattened and not isinstance(leaf, Tensor):
                return leaf
            if self._is_per_example(leaf, batch_size):
                return next(batches_of_one)
            barred = torch.empty(0, device="cpu").as_subclass(_NotPerExample)
            barred.__dict__["error"] = self.refusals.get(id(leaf)) or ScoringError(
                f"loss_fn uses {_describe(leaf)}, which has no row for each example; {self.advice}"
            )
            return barred

        return map_leaves(change, tree)


class _NotPerExample(Tensor):
    """Stands in for a part of the output or target without a row for each example: any use is refused."""

    error: Exception

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise next(arg.__dict__["error"] for arg in leaves((args, kwargs or {})) if isinstance(arg, cls))


def _nobodys(found: list[Tensor]) -> Tensor:
    """The losses of no example, `(0,)`, with the graph of all that has one."""
    tensors = [tensor for tensor in found if tensor.is_floating_point()]
    wanted = [tensor for tensor in tensors if tensor.requires_grad] or tensors[:1]
    if not wanted:
        raise ScoringError("an empty batch's output holds no tensor of floating-point numbers without rows")
    sums = [tensor.sum(tuple(range(1, tensor.dim()))) if tensor.dim() > 1 else tensor for tensor in wanted]
    return sum(sums[1:], sums[0])  # of a dtype each, perhaps


def _describe(leaf: Any) -> str:
    shape = f" of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else ""
    return f"a {type(leaf).__name__}{shape}"


def _vmapped(alone: Callable[..., Tensor], rows: list[Tensor]) -> Tensor | None:
    """Return `alone` mapped over all examples; None where vmap cannot follow it, or warns of trouble."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            losses: Tensor = torch.vmap(alone)(*rows)
            return losses
    except Exception:  # a call for each example will work, or raise the criterion's own error
        return None


def _same(losses: Tensor, reference: Tensor) -> bool:
    """Tell whether losses `(B,)` agree to rounding; under autocast vmap may compute in another dtype."""
    tolerance = 32 * torch.finfo(reference.dtype).eps
    return losses.dtype == reference.dtype and torch.allclose(losses, reference, tolerance, tolerance, equal_nan=True)
