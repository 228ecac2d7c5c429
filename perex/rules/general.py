r"""The general path: any operator, by its own vector-Jacobian product, one example at a time.

For the shared argument $S$ of an operator that maps row to row, $y_b = f(x_b, S)$, the per-example gradient
is $G_b = J_S f(x_b, S)^\top g_b$. It is mapped over examples with `torch.func.vmap`; an operator that vmap
has no rule for is run example by example. Gradients of large arguments are made as they are reduced, some examples'
at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from perex.capture.carry import tensors_in
from perex.errors import UnsupportedError
from perex.factors import Dense, Factor, Mapped
from perex.kernels.blocks import block
from perex.kernels.products import widen
from perex.rules.call import Captured, own_rows, unpack
from perex.rules.registry import Rule


def general(captured: Captured) -> dict[Any, Factor]:
    """Per-example gradients of all wanted tensors of the call, by their numbers."""
    call, batch = captured.call, captured.batch
    wanted = list(call.slots)
    if not batch:
        return {i: Dense(widen(captured.tensors[i]).new_zeros(0, *captured.tensors[i].shape)) for i in wanted}
    rows: dict[int, Tensor] = {}  # what differs between examples, (B, *batch-of-one shape)
    fixed: dict[int, Tensor] = {}
    for index, kept in captured.tensors.items():
        tensor = widen(kept)
        axis = call.axes[index] or call.rows.get(index)
        if axis is None:
            fixed[index] = tensor
        else:
            rows[index] = axis.rows(tensor, batch, repeat=True)
    minded = [*wanted, *captured.differentiable] if call.minds else []
    outputs = [k for k, grad in enumerate(captured.grads) if grad is not None]
    grads = [call.out_axes[k].rows(grad, batch) for k, grad in enumerate(captured.grads) if grad is not None]

    def operator(own: dict[int, Tensor], asked: Sequence[int], *shared: Tensor) -> tuple[Tensor, ...]:
        """The operator on one example's rows."""
        tensors = {**fixed, **own, **dict(zip(asked, shared, strict=True))}
        args, kwargs = unpack(call.args, tensors), unpack(call.kwargs, tensors)  # type: ignore[arg-type]
        produced = tensors_in(call.func(*args, **kwargs))
        return tuple(produced[k] for k in outputs)

    def mapped(asked: Sequence[int], start: int, stop: int) -> tuple[Tensor, ...]:
        """Gradients of some examples for the tensors that are asked for."""
        through = sorted({*asked, *minded})

        def pulled_back(own: dict[int, Tensor], own_grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
            """The gradients of one example, from its rows and its output gradients."""
            inputs = [own[i] if i in own else fixed[i] for i in through]
            produced, vjp = torch.func.vjp(partial(operator, own, through), *inputs)[:2]
            found = dict(zip(through, vjp(given_to(produced, own_grads)), strict=True))
            return tuple(found[i] for i in asked)

        def by_autograd(own: dict[int, Tensor], own_grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
            """The same for an operator that torch.func cannot see into, such as one from a library."""
            inputs = {i: (own[i] if i in own else fixed[i]).detach().requires_grad_() for i in through}
            produced = operator(own, through, *inputs.values())
            to = [inputs[i] for i in asked]
            if not any(y.requires_grad for y in produced):
                return tuple(torch.zeros_like(value) for value in to)
            return torch.autograd.grad(produced, to, given_to(produced, own_grads), materialize_grads=True)

        of_rows = {index: tensor[start:stop] for index, tensor in rows.items()}
        of_grads = [grad[start:stop] for grad in grads]
        try:
            with torch.enable_grad(), warnings.catch_warnings():  # without grad, an LSTM keeps no workspace
                # An operator without a batching rule is run example by example inside vmap: slower, as exact.
                warnings.filterwarnings("ignore", "There is a performance drop")
                return torch.func.vmap(pulled_back)(of_rows, of_grads)
        except Exception:  # whatever it raises where it is called in another way than it was made for
            each = [alone(by_autograd, of_rows, of_grads, b) for b in range(stop - start)]
            return tuple(torch.stack(parts) for parts in zip(*each, strict=True))

    def alone(run: Callable[..., Any], of_rows: dict[int, Tensor], of_grads: list[Tensor], b: int) -> Any:
        """What a function gives for one example."""
        try:
            with torch.enable_grad():  # contiguous, as cuDNN wants it of states
                return run({i: r[b].contiguous() for i, r in of_rows.items()}, [g[b] for g in of_grads])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            place = f"In module '{call.where}'" if call.where else "In the model's own forward"
            raise UnsupportedError(
                f"{place}, `{call.name}` raised {error!r} when it was run on one example alone, whose gradient perex "
                "takes so. Compute it in operators that treat examples alike"
            ) from error

    large = [i for i in wanted if i not in rows and batch * call.shapes[i].numel() > block()]
    small = [i for i in wanted if i not in large]
    factors: dict[Any, Factor] = {i: Mapped(batch, call.shapes[i], partial(one, mapped, i)) for i in large}
    if small:
        for index, values in zip(small, mapped(small, 0, batch), strict=True):
            factors[index] = own_rows(values, call.rows.get(index), batch, call.shapes[index])
    return factors


def given_to(produced: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients for results, in their dtypes; and copies, for a function of the user's own may write into them."""
    return tuple(g.to(y.dtype, copy=True) for g, y in zip(grads, produced, strict=True))


def one(mapped: Callable[..., tuple[Tensor, ...]], index: int, start: int, stop: int) -> Tensor:
    """What is mapped over some examples for one tensor."""
    return mapped([index], start, stop)[0]


GENERAL = Rule("general", (), frozenset(), {}, general)
