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

        def pulled_back(own: dict[int, Tensor], own_grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
            """The gradients of one example, from its rows and its output gradients."""
            inputs = [own[i] if i in own else fixed[i] for i in asked]
            produced, vjp = torch.func.vjp(partial(operator, own, asked), *inputs)[:2]
            return vjp(tuple(g.to(y.dtype) for g, y in zip(own_grads, produced, strict=True)))

        def by_autograd(own: dict[int, Tensor], own_grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
            """The same for an operator that torch.func cannot see into, such as one from a library."""
            inputs = [(own[i] if i in own else fixed[i]).detach().requires_grad_() for i in asked]
            produced = operator(own, asked, *inputs)
            given = [g.to(y.dtype) for g, y in zip(own_grads, produced, strict=True)]
            return torch.autograd.grad(produced, inputs, given, materialize_grads=True)

        of_rows = {index: tensor[start:stop] for index, tensor in rows.items()}
        of_grads = [grad[start:stop] for grad in grads]
        try:
            with torch.enable_grad(), warnings.catch_warnings():  # without grad, an LSTM keeps no workspace
                # An operator without a batching rule is run example by example inside vmap: slower, as exact.
                warnings.filterwarnings("ignore", "There is a performance drop")
                return torch.func.vmap(pulled_back)(of_rows, of_grads)
        except Exception:  # whatever it raises where it is called in another way than it was made for
            with torch.enable_grad():
                each = [
                    # contiguous, as cuDNN wants it of states
                    by_autograd({i: r[b].contiguous() for i, r in of_rows.items()}, [g[b] for g in of_grads])
                    for b in range(stop - start)
                ]
            return tuple(torch.stack(parts) for parts in zip(*each, strict=True))

    large = [i for i in wanted if i not in rows and batch * call.shapes[i].numel() > block()]
    small = [i for i in wanted if i not in large]
    factors: dict[Any, Factor] = {i: Mapped(batch, call.shapes[i], partial(one, mapped, i)) for i in large}
    if small:
        for index, values in zip(small, mapped(small, 0, batch), strict=True):
            factors[index] = own_rows(values, call.rows.get(index), batch, call.shapes[index])
    return factors


def one(mapped: Callable[..., tuple[Tensor, ...]], index: int, start: int, stop: int) -> Tensor:
    """What is mapped over some examples for one tensor."""
    return mapped([index], start, stop)[0]


GENERAL = Rule("general", (), frozenset(), {}, general)
