"""Is every loss one example's own? A check of losses against the model's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from perex.capture.axis import Held, Single
from perex.capture.outputs import Output
from perex.capture.suspects import SINK
from perex.errors import ExamplesMixError
from perex.kernels.blocks import example_blocks


def check_losses(losses: Tensor, outputs: Sequence[Output], batch: int, first: int = 0) -> None:
    r"""Raise if a loss depends on the outputs of other examples than its own.

    With weights $w_i$ on the losses, row $o_j$ of an output gets $\sum_i w_i \, \partial \ell_i / \partial o_j$. If
    only $i = j$ contributes, that is $w_j$ times what weights of one give. Round $k$ takes two to the power of digit
    $k$ of $i$, so any two examples have different weights in some round, and multiplying is exact in floating point.
    Only the operators between outputs and losses run, once a round: once or twice, with digits from 0 to 31.

    Args:
        losses: `(N,)`, one loss an example; N is the batch, or a multiple of it with further forwards.
        outputs: the model's outputs.
        batch: number of examples in the outputs, B.
        first: which loss is that of the outputs' first example.

    Raises:
        ExamplesMixError: a loss depends on other examples.
    """
    edges = behind_sinks(losses, [output.edge for output in outputs])
    if not edges or len(losses) < first + batch or len(losses) < 2:
        return
    numbers = torch.arange(len(losses), device=losses.device)
    grads = pulled(losses, edges, torch.ones_like(losses))
    half = any(grad is not None and grad.dtype.itemsize < 4 for grad in grads)
    plain = [digest(grad, output.axis, batch) for grad, output in zip(grads, outputs, strict=True)]
    del grads  # as large as the outputs
    bits = 1 if half or losses.dtype.itemsize < 4 else 5  # of a digit: half precision has no room for more
    for shift in range(0, (len(losses) - 1).bit_length(), bits):
        weights = 2 ** (numbers >> shift & (2**bits - 1))
        own = weights[first : first + batch]
        for grad, once, output in zip(pulled(losses, edges, weights.to(losses)), plain, outputs, strict=True):
            found, axis = digest(grad, output.axis, batch), output.axis
            if found is None or once is None:
                continue
            whose = slice(axis.example, axis.example + 1) if isinstance(axis, Single) else slice(0, batch)
            example = first_unlike(found, once, own[whose])
            if example is not None:
                example += whose.start or 0
                raise ExamplesMixError(
                    f"losses: the losses of other examples depend on the model's output for example {example}, as in a "
                    "contrastive loss or one with statistics of the batch. Then no example has a gradient of its own: "
                    "make each loss depend on its own row alone"
                )


RUN = 64
"""How many neighbours in an example's gradient are added up, times random factors, before two are compared."""


class Digest(NamedTuple):
    """What two gradients of an output are compared by.

    Attributes:
        sums: of runs of each example's numbers, times factors, and the numbers after the last whole run, `(B, k)`.
        size: the largest sum of a run's absolute values, `(B, 1)`.
        eps: what the gradient's numbers resolve.
    """

    sums: Tensor
    size: Tensor
    eps: float


def digest(grad: Tensor | None, axis: Held, batch: int) -> Digest | None:
    """A gradient in a sixty-fourth of its size; as it is in half precision, where sums leave more room for errors.

    None of one that is not there, or empty.
    """
    if grad is None or grad.numel() == 0:
        return None
    grad = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad.unsqueeze(-1)
    rows, eps = axis.front(grad, batch).flatten(1), torch.finfo(grad.dtype).eps  # (B, n)
    if rows.dtype.itemsize < 4:
        return Digest(rows, rows.abs().amax(1, keepdim=True), eps)
    whole = rows.shape[1] // RUN * RUN
    factors = (1 + torch.rand(RUN, generator=torch.Generator().manual_seed(0), device="cpu")).to(rows)  # no two cancel
    sums, sizes = [], []
    for i, j in example_blocks(len(rows), rows.shape[1]):
        runs, rest = rows[i:j, :whole].unflatten(1, (-1, RUN)), rows[i:j, whole:]
        sums.append(torch.cat([runs @ factors, rest], 1))
        sizes.append(torch.cat([torch.linalg.vector_norm(runs, 1, 2), rest.abs()], 1).amax(1, keepdim=True))
    return Digest(torch.cat(sums), torch.cat(sizes), eps)


def first_unlike(found: Digest, once: Digest, weights: Tensor) -> int | None:
    """The first example whose gradient is not its weight times what it was under weights of one."""
    own = weights.to(once.sums).unsqueeze(1)
    expected = once.sums * own
    numbers = torch.finfo(once.sums.dtype)
    least = (4 if numbers.bits < 32 else 16 * RUN) * numbers.tiny * numbers.eps  # where few digits are left, or none
    close = (found.sums - expected).abs() <= (8 * once.eps * (once.size * own)).nan_to_num() + least * own
    over = ~((once.size * own).abs() < numbers.max / (4 * RUN)) & ~found.sums.isfinite()  # too large to tell
    same = close | (found.sums == expected) | (found.sums.isnan() & expected.isnan()) | over
    return None if bool(same.all()) else int((~same).any(1).nonzero()[0])


def pulled(losses: Tensor, edges: Sequence[GradientEdge], weights: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the weighted sum of losses with respect to the outputs."""
    total = (losses * weights).sum()  # `grad_outputs` would do, but for them torch imports sympy: 40 MB
    return torch.autograd.grad(total, list(edges), retain_graph=True, allow_unused=True)


def behind_sinks(losses: Tensor, edges: Sequence[GradientEdge]) -> list[GradientEdge]:
    """The same edges, or for those that lead out of a sink the edges into it, so that it does not run."""
    places = {(edge.node, edge.output_nr): number for number, edge in enumerate(edges)}
    found, ends = list(edges), {edge.node for edge in edges}
    seen, waiting = set(), [losses.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node in ends:
            continue
        seen.add(node)
        for number, source in enumerate(node.next_functions):
            place = None if source[0] is None else places.get((source[0], source[1]))
            if place is not None and node.name() == SINK:
                found[place] = GradientEdge(node, number)
            waiting.append(source[0])
    return found
