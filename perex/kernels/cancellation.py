r"""Where terms of a sum cancel, what is left is rounding: then the number is computed in another way.

$\|\sum_t G_t\|^2$ as a sum of inner products is off by about $\epsilon \sum_{ts} |\langle G_t, G_s \rangle|$, however
small it is itself; multiplied out first, only by $\epsilon$ of itself and of what cancels entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def recomputed(values: Tensor, sizes: Tensor, exact: Callable[[Tensor], Tensor]) -> Tensor:
    r"""Squared norms, those replaced that are small beside the terms they are sums of.

    Args:
        values: `(B,)`, from inner products.
        sizes: `(B,)`, $\sum_{ts} |\langle G_t, G_s \rangle|$.
        exact: squared norms of some examples, `(n,)` numbers, without inner products.

    Returns:
        Tensor `(B,)`, of which no more than a quarter of the digits went to cancellation. Where a CUDA graph is being
        recorded, the others are NaN: what is to run may not depend on numbers then.
    """
    share = share_of(torch.finfo(values.dtype).eps)
    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        return values.masked_fill((values <= share * sizes) & (sizes > 0), torch.nan)
    if bool((values > share * sizes).all()):
        return values
    examples = ((values <= share * sizes) & (sizes > 0)).nonzero().flatten()
    if not examples.numel():  # no numbers, or zeros
        return values
    return values.index_copy(0, examples, exact(examples).to(values.dtype))


def share_of(eps: float) -> float:
    """What part of its terms' sizes a sum must have to be trusted, if these resolve `eps` of themselves."""
    return float(eps**0.25)
