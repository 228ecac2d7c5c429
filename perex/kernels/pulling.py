"""Vector-Jacobian products of some gradients at once, through the graph of a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perex.kernels.blocks import block_size
from perex.kernels.products import widen

ON_THE_WAY = 4
"""How many tensors of one size a product may hold at a time, each of an operator on its way."""


def at_a_time(batch: int, elements: int) -> int:
    """How many examples are pulled back at a time, where tensors of so many elements are on the way."""
    return block_size(batch, ON_THE_WAY * elements)


def pulled_back(derived: Tensor, sources: Sequence[Tensor], grads: Tensor) -> list[Tensor]:
    r"""$J^\top H_b$ for each $b$, with J the derivative of a tensor by those that it is derived from.

    The graph is retained.

    Args:
        derived: the tensor, S.
        sources: where its graph begins.
        grads: H, `(n, *S.shape)`.

    Returns:
        For each source, a tensor `(n, *source.shape)` of at least float32; zero where S does not depend on it.
    """
    if len(grads) == 0:
        return [widen(source.new_zeros(0, *source.shape)) for source in sources]
    grads = grads.to(derived.dtype)

    def product(grad: Tensor, batched: bool) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(
                derived, sources, grad, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )

    found: Sequence[Tensor | None]
    try:
        if len(grads) == 1:
            found = [None if part is None else part.unsqueeze(0) for part in product(grads[0], batched=False)]
        else:
            found = product(grads, batched=True)
    except RuntimeError:  # an operator without a batched derivative
        each = [product(grad, batched=False) for grad in grads]
        found = [None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True)]
    return [
        widen(source.new_zeros(len(grads), *source.shape) if part is None else part)
        for source, part in zip(sources, found, strict=True)
    ]
