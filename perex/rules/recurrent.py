r"""Packed sequences: a recurrent operator on rows of sequences of different lengths.

Example $b$ alone is its own rows in order, $x_{b1}, \dots, x_{bT_b}$, so its gradient is that of the operator on one
sequence. torch's recurrent operators are `(data, batch_sizes, hx, weights, bias, layers, dropout, train,
bidirectional)` on packed rows, and `(input, hx, weights, ..., bidirectional, batch_first)` otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perex.capture.axis import Held, Single
from perex.capture.carry import tensors_in
from perex.factors import Dense, Factor
from perex.kernels.products import widen
from perex.rules.call import Captured, unpack
from perex.rules.registry import Rule


def is_packed(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether this is a recurrent operator on packed rows."""
    if getattr(func, "__name__", "") not in ("lstm", "gru", "rnn_tanh", "rnn_relu") or len(args) != 9:
        return False
    return isinstance(args[1], Tensor) and not args[1].is_floating_point()


def of_example(tensor: Tensor, axis: Held, example: int, batch: int) -> Tensor:
    """The rows of one example, in order."""
    if isinstance(axis, Single):
        return tensor
    rows = (axis.ids(batch) == example).nonzero().flatten()
    return tensor.index_select(axis.dim, rows.to(tensor.device))


def packed(captured: Captured) -> dict[Any, Factor]:
    """Per-example gradients of all wanted tensors of the call, one sequence at a time."""
    call, batch = captured.call, captured.batch
    wanted = list(call.slots)
    fixed = {index: widen(tensor) for index, tensor in captured.tensors.items()}
    data, _, state, weights, *options = call.args
    held = {i: axis for i, axis in enumerate(call.axes) if axis is not None and i in fixed} | call.rows
    found: list[list[Tensor]] = []
    for b in range(batch):
        own = {i: of_example(fixed[i], axis, b, batch) for i, axis in held.items()}
        own[data.number] = own[data.number].unsqueeze(1)  # (T_b, 1, d)
        grads = [
            None if grad is None else of_example(grad, axis, b, batch)
            for grad, axis in zip(captured.grads, call.out_axes, strict=True)
        ]
        grads[0] = None if grads[0] is None else grads[0].unsqueeze(1)

        with torch.enable_grad():
            inputs = {i: (own.get(i, fixed[i])).detach().requires_grad_() for i in wanted}
            tensors = {**fixed, **own, **inputs}
            args = [unpack(part, tensors) for part in (data, state, weights)]  # type: ignore[arg-type]
            results = tensors_in(call.func(*args, *options, False))
            pairs = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None]
            outputs, given = [y for y, _ in pairs], [g.to(y.dtype) for y, g in pairs]
            parts = torch.autograd.grad(outputs, list(inputs.values()), given, materialize_grads=True)
        found.append(list(parts))
    factors: dict[Any, Factor] = {}
    for index, each in zip(wanted, zip(*found, strict=True), strict=True):
        values, axis = torch.stack(each), call.rows.get(index)
        factors[index] = Dense(values if axis is None else axis.unrows(values, batch))
    return factors


PACKED = Rule("packed sequence", (), frozenset(), {}, packed)
