"""What becomes of the output gradients that arrive at one tap: factors, made by a rule, of each wanted parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from perex.capture.derived import of_parameters
from perex.capture.forward import Tapped
from perex.capture.parameters import Entry, Shared
from perex.errors import PerexError
from perex.factors import Aligned, Factor, Few
from perex.factors.narrow import narrow
from perex.kernels.spot import Spot, at
from perex.result import Result
from perex.rules.call import Call, Captured


def factors_of(
    tapped: Tapped, saved: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> Iterator[tuple[Any, Entry, Factor]]:
    """The gradients that a call brings, by slot and parameter."""
    call = tapped.call
    captured = Captured(call, saved, grads, tapped.left)
    found = call.rule.function(captured)
    for slot, source in call.slots.items():
        factor = check_factor(call, slot, found.get(slot), captured.batch)
        if captured.dtype is not None:
            factor = narrow(factor)
        if isinstance(source, Entry):
            yield slot, source, of_examples(tapped, factor.whole if isinstance(factor, Aligned) else factor)
            continue
        for entry, part in of_parameters(source, factor):
            yield slot, entry, of_examples(tapped, part)


def check_factor(call: Call, slot: object, factor: Factor | None, batch: int) -> Factor:
    """What a rule returned for one parameter, when it fits that parameter."""
    source = call.slots[slot]
    tensor = source.tensor if isinstance(source, Shared) else source.parameter
    if factor is None:
        raise PerexError(f"rule '{call.rule.name}' returned nothing for '{slot}' of module '{call.where}'")
    if factor.shape != tensor.shape or factor.batch != batch:
        raise PerexError(
            f"rule '{call.rule.name}' returned gradients of shape {(factor.batch, *factor.shape)} for '{slot}' of "
            f"module '{call.where}', which needs {(batch, *tensor.shape)}"
        )
    return factor


def of_examples(tapped: Tapped, factor: Factor) -> Factor:
    """The gradients that a call brings, for all examples of the forward."""
    examples = tapped.call.examples
    return factor if examples is None else Few(factor, examples, tapped.forward.batch)


def note_overflow(result: Result, tapped: Tapped, grads: Sequence[Tensor | None]) -> None:
    """Remember examples whose half-precision gradients became infinite."""
    call = tapped.call
    for grad, axis in zip(grads, call.out_axes, strict=True):
        if grad is not None and grad.dtype == torch.float16:  # bfloat16 reaches as far as float32
            if grad.numel():
                rows = axis.front(grad, call.batch).reshape(call.batch, -1)
                largest = torch.linalg.vector_norm(rows, torch.inf, dim=1)  # in one pass; of NaN, NaN
                result.overflow(tapped.forward, largest.isinf(), call.examples)


def whereabouts(saved: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Have blocks of temporaries as large as fits a GPU, where tensors are on one."""
    here = next((tensor for tensor in saved if tensor.is_cuda), None)
    return nullcontext() if here is None else at(Spot("cuda", here.dtype))
