"""Losses: a number for each element, for each row, or a sum or mean over the batch."""

from __future__ import annotations

from perex.capture.axis import Axis, Label
from perex.capture.carry import Operation, family
from perex.capture.families.elementwise import aligned


@family(
    """
    mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div
    soft_margin_loss poisson_nll_loss gaussian_nll_loss
    """
)
def pointwise_loss(op: Operation) -> Label:
    """Losses of one number an element."""
    if op.kwargs.get("reduction") == "none":
        return aligned(op)
    ndim = max(tensor.dim() for tensor, _ in op.inputs)
    places = {axis.moved(axis.dim - tensor.dim() + ndim) for tensor, axis in op.batched()}
    return op.reduced() if len(places) == 1 else op.mixed("pairs examples with each other: do the shapes agree?")


@family(
    """
    cross_entropy nll_loss cosine_embedding_loss margin_ranking_loss hinge_embedding_loss multi_margin_loss
    multilabel_margin_loss multilabel_soft_margin_loss triplet_margin_loss
    """
)
def row_loss(op: Operation) -> Label:
    """Losses of one number a row, classes on dimension 1."""
    axes = {axis for _, axis in op.batched()}
    axis = axes.pop()
    if axes:
        return op.mixed("pairs examples with each other: are input and target in the same order?")
    if op.kwargs.get("reduction") != "none":
        return uneven(op, axis) or op.reduced()
    inputs = [op.arg(i, name) for i, name in enumerate(("input", "target", "negative"))]
    return axis if not axes and axis.dim == 0 and op.only(*inputs) else op.unknown()


def uneven(op: Operation, axis: Axis) -> Label:
    """A mean over targets that are not as many, or as heavy, in each example is no mean of the examples' losses."""
    target = op.arg(1, "target")
    if op.name not in ("cross_entropy", "nll_loss") or op.kwargs.get("reduction", "mean") != "mean":
        return None
    if op.arg(2, "weight") is not None:
        return op.bent("averages over the batch by class weights, so an example's share depends on the others' classes")
    if (
        target.is_floating_point()
        or op.axis(target) not in (None, axis)
        or target.size(axis.dim) != axis.size(op.batch)
    ):
        return None
    counted = axis.front(target != op.kwargs.get("ignore_index", -100), op.batch).reshape(op.batch, -1).sum(1)
    if counted.numel() and bool((counted != counted[0]).any()):
        return op.bent("averages over the batch's targets, of which examples have different numbers (some are ignored)")
    return None


@family("ctc_loss")
def ctc_loss(op: Operation) -> Label:
    """`(T, N, C)` log-probabilities, and a number for each of the N sequences; the lengths say what is read."""
    axis = op.axis(op.arg(0, "log_probs"))
    if axis is None or axis.dim != 1:
        return op.mixed("works along the batch axis")
    if op.arg(5, "reduction", op.kwargs.get("reduction", "mean")) == "none":
        return axis.moved(0)
    return op.bent("divides by the lengths of targets, of which examples have different ones")
