"""An operator run on each example's rows: what it is to that example, and to the tensors that all share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from perex.capture.carry import tensors_in
from perex.errors import UnsupportedError
from perex.kernels.products import widen
from perex.rules.call import Call, Captured, unpack


@dataclass
class RowByRow:
    """A call as it is for each example by itself.

    It is mapped over examples with `torch.func.vmap`; an operator that vmap has no rule for, or cannot see into, such
    as one from a library or an autograd function of the user's, is run by autograd, example by example.

    Attributes:
        call: the call.
        rows: tensors that differ between examples, by their numbers, `(B, *batch-of-one shape)`.
        fixed: all others.
        outputs: the numbers of results that have gradients.
        grads: these, `(B, *batch-of-one shape)`.
        minded: tensors that require grad whoever asks, because the operator may look at that.
    """

    call: Call
    rows: dict[int, Tensor]
    fixed: dict[int, Tensor]
    outputs: list[int]
    grads: list[Tensor]
    minded: list[int]

    @classmethod
    def of(cls, captured: Captured, wanted: Sequence[int]) -> RowByRow:
        """What a backward brings for a call, of which the gradients of some tensors are wanted."""
        call, batch = captured.call, captured.batch
        rows: dict[int, Tensor] = {}
        fixed: dict[int, Tensor] = {}
        for index, kept in captured.tensors.items():
            axis = call.axes[index] or call.rows.get(index)
            if axis is None:
                fixed[index] = widen(kept)
            else:
                rows[index] = axis.rows(widen(kept), batch, repeat=True)
        given = {k: grad for k, grad in enumerate(captured.grads) if grad is not None}
        grads = [call.out_axes[k].rows(grad, batch) for k, grad in given.items()]
        return cls(call, rows, fixed, list(given), grads, [*wanted, *captured.differentiable] if call.minds else [])

    def gradients(self, asked: Sequence[int], start: int, stop: int) -> tuple[Tensor, ...]:
        """The gradients of some examples for the tensors that are asked for, `(n, *batch-of-one shape)` each."""
        rows = {index: tensor[start:stop] for index, tensor in self.rows.items()}
        grads = [grad[start:stop] for grad in self.grads]
        try:
            with torch.enable_grad(), warnings.catch_warnings():  # without grad, an LSTM keeps no workspace
                # An operator without a batching rule is run example by example inside vmap: slower, as exact.
                warnings.filterwarnings("ignore", "There is a performance drop")
                return torch.func.vmap(partial(self.mapped, asked))(rows, grads)
        except Exception:  # whatever it raises where it is called in another way than it was made for
            each = [self.alone(asked, rows, grads, b) for b in range(stop - start)]
            return tuple(torch.stack(parts) for parts in zip(*each, strict=True))

    def run(self, own: dict[int, Tensor], others: dict[int, Tensor]) -> tuple[Tensor, ...]:
        """The operator on one example's rows, with others in place of some tensors."""
        tensors = {**self.fixed, **own, **others}
        args, kwargs = unpack(self.call.args, tensors), unpack(self.call.kwargs, tensors)  # type: ignore[arg-type]
        produced = tensors_in(self.call.func(*args, **kwargs))
        return tuple(produced[k] for k in self.outputs)

    def inputs(self, own: dict[int, Tensor], asked: Sequence[int]) -> dict[int, Tensor]:
        """The tensors that gradients go on to."""
        return {i: own[i] if i in own else self.fixed[i] for i in sorted({*asked, *self.minded})}

    def mapped(self, asked: Sequence[int], own: dict[int, Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of one example, by `torch.func`."""
        inputs = self.inputs(own, asked)

        def function(*values: Tensor) -> tuple[Tensor, ...]:
            return self.run(own, dict(zip(inputs, values, strict=True)))

        produced, pull = torch.func.vjp(function, *inputs.values())[:2]
        found = dict(zip(inputs, pull(given_to(produced, grads)), strict=True))
        return tuple(found[i] for i in asked)

    def by_autograd(self, asked: Sequence[int], own: dict[int, Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of one example, by autograd."""
        inputs = {i: value.detach().requires_grad_() for i, value in self.inputs(own, asked).items()}
        produced, to = self.run(own, inputs), [inputs[i] for i in asked]
        if not any(result.requires_grad for result in produced):
            return tuple(torch.zeros_like(value) for value in to)
        return torch.autograd.grad(produced, to, given_to(produced, grads), materialize_grads=True)

    def alone(
        self, asked: Sequence[int], rows: dict[int, Tensor], grads: Sequence[Tensor], b: int
    ) -> tuple[Tensor, ...]:
        """`by_autograd` of example b.

        Raises:
            UnsupportedError: the operator cannot be run on one example.
        """
        try:
            with torch.enable_grad():  # contiguous, as cuDNN wants it of states
                own = {index: tensor[b].contiguous() for index, tensor in rows.items()}
                return self.by_autograd(asked, own, [grad[b] for grad in grads])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            place = f"In module '{self.call.where}'" if self.call.where else "In the model's own forward"
            raise UnsupportedError(
                f"{place}, `{self.call.name}` raised {error!r} when it was run on one example alone, whose gradient "
                "perex takes so. Compute it in operators that treat examples alike"
            ) from error


def given_to(produced: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients for results, in their dtypes; and copies, for a function of the user's own may write into them."""
    return tuple(grad.to(result.dtype, copy=True) for grad, result in zip(grads, produced, strict=True))
