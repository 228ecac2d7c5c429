"""Operators that are followed as others which do the same, where they meet parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def recurrent_layers(func: Callable[..., Any]) -> Callable[..., Any]:
    """A recurrent operator with dropout between its layers, one layer after the other.

    The operator draws its masks inside, where they cannot be repeated; between calls of one layer each, dropout is an
    operator like any other. Sequences have time in front on the way, as inside the operator, so the draws are the same.
    """

    def layer_by_layer(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        is_packed = isinstance(args[0], Tensor) and not args[0].is_floating_point()
        if is_packed:
            sizes, hx, weights, bias, layers, dropout, train, bidirectional = args
        else:
            hx, weights, bias, layers, dropout, train, bidirectional, batch_first = args
            x = x.transpose(0, 1) if batch_first else x
        several = isinstance(hx, (list, tuple))
        directions, each = 1 + bidirectional, len(weights) // layers
        states: list[Sequence[Tensor]] = []
        for layer in range(layers):
            here = slice(layer * directions, (layer + 1) * directions)
            state = [h[here] for h in hx] if several else hx[here]
            own = weights[layer * each : (layer + 1) * each]
            options = (bias, 1, 0.0, train, bidirectional)
            x, *last = func(x, sizes, state, own, *options) if is_packed else func(x, state, own, *options, False)
            states.append(last)
            x = F.dropout(x, dropout, train) if layer < layers - 1 else x
        if not is_packed and batch_first:
            x = x.transpose(0, 1)
        return x, *(torch.cat(parts) for parts in zip(*states, strict=True))

    return layer_by_layer


def has_dropout(args: tuple[Any, ...]) -> bool:
    """Whether a recurrent operator would drop something between layers."""
    if len(args) != 9:
        return False
    packed = isinstance(args[1], Tensor) and not args[1].is_floating_point()
    layers, dropout, train = args[5:8] if packed else args[4:7]
    return bool(layers > 1 and dropout > 0 and train)


RECURRENT = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})


def masked_gather(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """`masked_scatter` as a look-up: which element of the source a place reads is a number of its own."""
    mask = mask.expand_as(x)
    with torch._C.DisableTorchFunction():
        numbers = mask.flatten().cumsum(0).sub_(1).clamp_(0).reshape(mask.shape)
    numbers = torch.where(mask, numbers, 0)  # and so labelled as the mask is
    return torch.where(mask, source.reshape(-1)[numbers], x)


def rewritten(func: Any, args: tuple[Any, ...], shared: bool = False) -> Callable[..., Any] | None:
    """What to run in place of an operator call, if anything; `shared` where parameters are among the arguments."""
    if func in RECURRENT and has_dropout(args):
        return recurrent_layers(func)
    if shared and func in (torch.masked_scatter, Tensor.masked_scatter) and len(args) == 3:
        return masked_gather
    return None
