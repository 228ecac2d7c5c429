r"""Look-ups in a table: $G_b = \sum_t e_{id_{bt}} g_{bt}^\top$."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from perex.factors import Factor, Rows
from perex.rules.call import Captured
from perex.rules.registry import operator_rule


def keep(ids: Tensor, grads: Tensor, padding_idx: int | None, rows: int) -> Tensor:
    """The gradients `(B, T, d)` with those of the padding row set to zero, as torch leaves that row alone."""
    if padding_idx is None:
        return grads
    return grads.masked_fill((ids == padding_idx % rows).unsqueeze(2), 0)


@operator_rule(
    F.embedding,
    arguments="input weight padding_idx max_norm norm_type scale_grad_by_freq sparse",
    parameters="weight",
    saves={"weight": "input"},
    narrow=True,
)
def embedding(captured: Captured) -> dict[str, Factor]:
    """`F.embedding`: every position reads one row."""
    weight = captured.shape("weight")
    ids = captured.examples("input")
    ids = ids.reshape(len(ids), ids.shape[1:].numel())  # not -1: the batch may be empty
    grads = captured.grad.reshape(*ids.shape, weight[1])
    return {"weight": Rows(ids, keep(ids, grads, captured.option("padding_idx", None), weight[0]), weight)}


@operator_rule(
    F.embedding_bag,
    arguments=(
        "input weight offsets max_norm norm_type scale_grad_by_freq mode sparse per_sample_weights "
        "include_last_offset padding_idx"
    ),
    parameters="weight",
    saves={"weight": "input weight offsets per_sample_weights"},
)
def embedding_bag(captured: Captured) -> dict[str, Factor]:
    """`F.embedding_bag`: each bag is the sum, mean or maximum of the rows it names.

    The bags are laid out as `(N, L)` ids with a mask, L the longest bag; row n of them is output row n.
    """
    weight = captured.value("weight")
    ids, weights, present = bags(captured)
    padding_idx = captured.option("padding_idx", None)
    if padding_idx is not None:
        present = present & (ids != padding_idx % len(weight))
    grads = captured.grads[0]
    assert grads is not None
    mode = captured.option("mode", "mean")
    if mode == "max" and ids.shape[1]:
        values = weight[ids].masked_fill(~present.unsqueeze(2), float("-inf"))
        winner = values.max(1)  # (N, d): each output entry reads one position of its bag
        share = torch.zeros_like(values).scatter_(1, winner.indices.unsqueeze(1), 1.0)
    else:
        share = weights.unsqueeze(2)
        if mode == "mean":
            share = share / present.sum(1).clamp_min(1)[:, None, None]
    share = share * present.unsqueeze(2)
    spread = torch.where(share != 0, grads.unsqueeze(1) * share, 0)  # (N, L, d)
    axis, batch = captured.call.out_axes[0], captured.batch
    by_example = axis.front(spread, batch).flatten(1, -2)
    ids = axis.front(ids, batch).flatten(1)
    return {"weight": Rows(ids, by_example, weight.shape)}


def bags(captured: Captured) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, weights and a mask of what is present, each `(N, L)`, for 2-d input and for offsets alike."""
    ids: Tensor = captured.value("input")
    offsets: Tensor | None = captured.value("offsets")
    weights: Tensor | None = captured.value("per_sample_weights")
    dtype = captured.value("weight").dtype
    weights = torch.ones_like(ids, dtype=dtype) if weights is None else weights
    if offsets is None:
        return ids.long(), weights, torch.ones_like(ids, dtype=torch.bool)
    starts = offsets.long()
    if not captured.option("include_last_offset", False):
        starts = torch.cat((starts, starts.new_tensor([len(ids)])))
    lengths = starts.diff()
    columns = torch.arange(int(lengths.max()) if len(lengths) else 0, device=ids.device)
    present = columns < lengths.unsqueeze(1)
    where = (starts[:-1].unsqueeze(1) + columns).clamp_max(max(len(ids) - 1, 0))
    if len(ids) == 0:
        empty = torch.zeros_like(present, dtype=torch.long)
        return empty, empty.to(dtype), present
    return ids[where].long(), weights[where], present
