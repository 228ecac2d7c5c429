"""Operators on single elements, and those that reduce or work along some dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from perex.capture.axis import Axis, Label, arranged
from perex.capture.carry import Operation, dims_of, factory, family, normal, result_tensor

family("arange linspace logspace eye zeros ones full empty new_zeros new_ones new_full new_empty new_tensor")(factory)


def aligned(op: Operation, arguments: list[tuple[Tensor, Axis]] | None = None) -> Label:
    """The batch axis under broadcasting: dimensions are matched from the right."""
    out = result_tensor(op)
    places = set()
    for tensor, axis in op.batched() if arguments is None else arguments:
        place = axis.moved(axis.dim - tensor.dim() + out.dim())
        if place.dim < 0 or out.size(place.dim) != axis.size(op.batch):
            return op.mixed("broadcasts over the batch axis")
        places.add(place)
    return places.pop() if len(places) == 1 else op.agreed(places)


@family(
    """
    abs absolute acos arccos acosh arccosh add addcdiv addcmul and angle arcsin arcsinh arctan arctan2 arctanh
    asin asinh atan atan2 atanh bernoulli bfloat16 bitwise_and bitwise_left_shift bitwise_not bitwise_or
    bitwise_right_shift bitwise_xor bool broadcast_to ceil celu clamp clamp_max clamp_min clip clone complex
    conj conj_physical contiguous copy copysign cos cosh cpu cuda deg2rad detach digamma div divide double
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout elu empty_like entr eq erf erfc
    erfcx erfinv exp exp2 expand expand_as expit expm1 exponential fill fix float float_power floor
    floor_divide floordiv fmax fmin fmod frac full_like gammaln ge gelu greater greater_equal gt half
    hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 i0e i1 i1e igamma igammac int invert
    isclose isfinite isinf isnan isneginf isposinf isreal ldexp le leaky_relu lerp less less_equal lgamma log
    log10 log1p log2 log_ndtr logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit
    logsigmoid long lshift lt masked_fill maximum minimum mish mod mul multiply mvlgamma nan_to_num ndtr ndtri
    ne neg negative nextafter normal not_equal ones_like or polar polygamma pos positive pow psi rad2deg
    rand_like randn_like real reciprocal relu relu6 remainder requires_grad resolve_conj resolve_neg round
    rrelu rshift rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink softsign
    sqrt square sub subtract tan tanh tanhshrink threshold true_divide truediv trunc uniform
    where xlog1py xlogy xor zero zeros_like zeta imag
    """
)
def pointwise(op: Operation) -> Label:
    """One element in, one element out, with broadcasting."""
    if op.name == "where" and len(op.args) + len(op.kwargs) == 1:
        return positions(op)
    return aligned(op)


def positions(op: Operation) -> Label:
    """Where a mask is true, one position a row: a row is of the example in whose part of the mask it is."""
    mask, axis = op.batched()[0]
    op.sized = True
    owners = axis.ids(op.batch)[mask.detach().nonzero()[:, axis.dim].cpu()]
    return arranged(0, owners, op.batch)


@family("isin bucketize searchsorted")
def looked_up(op: Operation) -> Label:
    """Each element of one argument looked up in another that is the same for all examples."""
    x = op.arg(1, "input") if op.name == "searchsorted" else op.arg(0, "input", op.kwargs.get("elements"))
    table = op.arg(0, "sorted_sequence") if op.name == "searchsorted" else None
    axis = op.axis(x)
    if axis is not None and table is not None and op.axis(table) is not None:  # a row of the table for each row of x
        return axis if axis == op.axis(table) and x.dim() - 1 != axis.dim else op.mixed()
    return axis if axis is not None and op.only(x) else op.mixed("looks examples up among each other")


@family("to type type_as")
def conversion(op: Operation) -> Label:
    """The first argument in another form; of a second one, only the form is read."""
    return op.axis(op.args[0])


def over(op: Operation, dims: list[int], keepdim: bool) -> Label:
    """The axis after a reduction of its tensor over `dims`."""
    (tensor, axis), *others = op.batched()
    if others:
        return op.unknown()
    if axis.dim in dims and axis.owners is not None and op.name == "mean":
        return op.bent("averages over rows, of which examples have different numbers")
    if axis.dim in dims:
        return op.reduced() if op.name in ("sum", "mean", "nansum") else op.bent("reduces the batch axis")
    return axis if keepdim else axis.moved(axis.dim - sum(d < axis.dim for d in dims))


@family(
    """
    all amax amin any argmax argmin count_nonzero logsumexp mean median mode nanmean nanmedian nansum
    prod sum aminmax
    """
)
def reduction(op: Operation) -> Label:
    """Reductions called as `f(input, dim, keepdim)`."""
    dims = dims_of(op.arg(1, "dim", op.kwargs.get("axis")), op.batched()[0][0].dim())
    return over(op, dims, bool(op.arg(2, "keepdim", False)))


@family("max min")
def extremum(op: Operation) -> Label:
    """`max(input, dim)`, or the larger of two tensors."""
    other = op.arg(1, "other")
    return aligned(op) if isinstance(other, Tensor) else reduction(op)


@family("std var std_mean var_mean")
def spread(op: Operation) -> Label:
    """`std(input, dim, ...)`, or `std(input, unbiased)` over everything."""
    dim = op.arg(1, "dim", op.kwargs.get("axis"))
    dims = dims_of(None if isinstance(dim, bool) else dim, op.batched()[0][0].dim())
    return over(op, dims, bool(op.arg(3, "keepdim", False)))


@family("norm vector_norm quantile nanquantile kthvalue renorm")
def reduction_with_order(op: Operation) -> Label:
    """Reductions called as `f(input, order, dim, keepdim)`."""
    order = op.arg(1, "q")
    if op.name == "renorm" or isinstance(order, Tensor) and order.dim():  # several quantiles: a new dimension
        return op.unknown()
    default = -1 if op.name == "kthvalue" else None
    dims = dims_of(op.arg(2, "dim", default), op.batched()[0][0].dim())
    return over(op, dims, bool(op.arg(3, "keepdim", False)))


@family(
    """
    cumsum cumprod cummax cummin logcumsumexp softmax log_softmax softmin sort argsort flip glu
    fft ifft rfft irfft hfft ihfft fftn ifftn rfftn irfftn fft2 ifft2 rfft2 irfft2 fftshift ifftshift
    """
)
def along(op: Operation) -> Label | list[Label]:
    """Operators that work along some dimensions and keep all of them."""
    tensor, axis = op.batched()[0]
    if op.name.endswith(("fft", "fft2", "fftn")):  # f(input, n, dim)
        default: object = (-2, -1) if op.name.endswith("2") else None if op.name.endswith("n") else -1
        dim = op.arg(2, "dim", default)
    elif op.name in ("fftshift", "ifftshift"):
        dim = op.arg(1, "dim")
    else:
        default = () if op.name == "flip" else -1
        dim = op.arg(1, "dim", op.kwargs.get("dims", default))
        if isinstance(dim, bool):  # sort(input, descending) is not a form torch has; argsort has stable first
            return op.unknown()
        if op.name == "flip" and isinstance(dim, int):
            dim = [d for d in op.args[1:] if isinstance(d, int)]
        if dim is None:  # softmax picks a dimension itself
            dim = 0 if tensor.dim() in (0, 1, 3) else 1
    if axis.dim not in dims_of(dim, tensor.dim()):
        return axis
    if op.name == "sort" and tensor.dim() == 1 and not tensor.is_floating_point():  # a value stays its example's own
        return [arranged(0, axis.ids(op.batch)[op.results[1].cpu()], op.batch), op.mixed()]
    return arranged(axis.dim, axis.ids(op.batch).flip(0), op.batch) if op.name == "flip" else op.mixed()


@family("topk")
def topk(op: Operation) -> Label:
    """`topk(input, k, dim)`."""
    tensor, axis = op.batched()[0]
    return op.mixed() if axis.dim == normal(op.arg(2, "dim", -1), tensor.dim()) else axis


@family("multinomial")
def multinomial(op: Operation) -> Label:
    """`multinomial(weights, n)`: numbers of columns, drawn for each row."""
    tensor, axis = op.batched()[0]
    return axis if axis.dim == 0 and tensor.dim() == 2 and len(op.batched()) == 1 else op.mixed()


@family("roll")
def roll(op: Operation) -> Label:
    """`roll(input, shifts, dims)`."""
    tensor, axis = op.batched()[0]
    dims = dims_of(op.arg(2, "dims"), tensor.dim())
    if axis.dim not in dims or op.arg(2, "dims") is None:
        return op.mixed() if axis.dim in dims else axis
    shifts = op.arg(1, "shifts")
    each = zip(dims, [shifts] if isinstance(shifts, int) else shifts, strict=False)
    shift = sum(shift for dim, shift in each if dim == axis.dim)  # a dimension may be there twice
    return arranged(axis.dim, axis.ids(op.batch).roll(shift), op.batch)


@family("normalize")
def normalize(op: Operation) -> Label:
    """`normalize(input, p, dim)`."""
    tensor, axis = op.batched()[0]
    return op.mixed() if axis.dim in dims_of(op.arg(2, "dim", 1), tensor.dim()) else axis


@family("cosine_similarity pairwise_distance")
def similarity(op: Operation) -> Label:
    """Pointwise in two tensors, then reduced over one dimension."""
    x, y = op.args[:2]
    ndim = max(x.dim(), y.dim())
    cosine = op.name == "cosine_similarity"
    dim = normal(op.arg(2, "dim", 1) if cosine else -1, ndim)
    places = {a.moved(a.dim - t.dim() + ndim) for t, a in op.batched()}
    if len(places) != 1:
        return op.mixed("pairs examples with each other")
    axis = places.pop()
    if axis.dim == dim:
        return op.reduced()
    kept = not cosine and op.arg(4, "keepdim", False)
    return axis if kept or axis.dim < dim else axis.moved(axis.dim - 1)


@family("tril triu")
def triangle(op: Operation) -> Label:
    """Masks of the last two dimensions."""
    tensor, axis = op.batched()[0]
    return op.mixed("masks by position in the batch") if axis.dim >= tensor.dim() - 2 else axis


@family("nonzero argwhere")
def nonzero(op: Operation) -> Label:
    """Where a tensor is not zero: `(N, ndim)`, or with `as_tuple` a row of positions for each dimension."""
    return positions(op)


@family("masked_select")
def masked_select(op: Operation) -> Label:
    """`x[mask]`, with x and mask broadcast against each other."""
    x, mask = op.args[:2]
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    places = [axis.moved(axis.dim - tensor.dim() + len(shape)) for tensor, axis in op.batched()]
    axis = op.agreed(places)
    if not isinstance(axis, Axis):
        return axis
    owners = axis.ids(op.batch)[mask.detach().expand(shape).nonzero()[:, axis.dim].cpu()]
    return arranged(0, owners, op.batch)


@family("bincount histc unique unique_consecutive")
def by_value(op: Operation) -> Label:
    """Results whose size depends on values."""
    return op.unknown("arranges its result by value")
