"""Families of operators that carry the batch axis in the same way.

Each handler gets an `Operation` with at least one argument that has a batch axis, and returns the label of
the result: an `Axis`, or a `Lost` with the reason. A result that perex cannot be sure about is `Lost`.
Operators on dimensions as such (views, indexing, concatenation) are in `perex.capture.views`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perex.capture.axis import Axis, Label
from perex.capture.carry import FAMILIES, Operation, dims_of, factory, family, normal, result_tensor

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
    return places.pop() if len(places) == 1 else op.mixed("pairs examples with each other")


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
        return op.unknown("finds positions")
    return aligned(op)


@family("to type type_as")
def conversion(op: Operation) -> Label:
    """The first argument in another form; of a second one, only the form is read."""
    return op.axis(op.args[0])


def over(op: Operation, dims: list[int], keepdim: bool) -> Label:
    """The axis after a reduction of its tensor over `dims`."""
    (tensor, axis), *others = op.batched()
    if others:
        return op.unknown()
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
def along(op: Operation) -> Label:
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
    return op.mixed() if axis.dim in dims_of(dim, tensor.dim()) else axis


@family("topk")
def topk(op: Operation) -> Label:
    """`topk(input, k, dim)`."""
    tensor, axis = op.batched()[0]
    return op.mixed() if axis.dim == normal(op.arg(2, "dim", -1), tensor.dim()) else axis


@family("roll")
def roll(op: Operation) -> Label:
    """`roll(input, shifts, dims)`."""
    tensor, axis = op.batched()[0]
    return op.mixed() if axis.dim in dims_of(op.arg(2, "dims"), tensor.dim()) else axis


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


@family("matmul mm bmm mv dot vdot vecdot")
def matmul(op: Operation) -> Label:
    """`(..., m, k) @ (..., k, n)`; one-dimensional arguments lose the dimension they lend."""
    x, y = (op.args[1], op.args[0]) if op.name == "__rmatmul__" else op.args[:2]
    if op.name in ("vdot", "vecdot", "dot"):
        return op.contracted() if x.dim() == 1 == y.dim() else op.unknown()
    out = result_tensor(op)
    places = set()
    for tensor, other, contracted, row in ((x, y, -1, -2), (y, x, -2, -1)):
        axis = op.axis(tensor)
        if axis is None:
            continue
        back = axis.dim - tensor.dim()
        if tensor.dim() == 1 or back == contracted:
            return op.contracted()
        if back == row:
            places.add(axis.moved(out.dim() - 1 if row == -1 or other.dim() == 1 else out.dim() - 2))
        else:
            lent = 1 if other.dim() == 1 else 0  # the missing dimension is gone from the result
            places.add(axis.moved(out.dim() + back + lent))
    return places.pop() if len(places) == 1 else op.mixed("pairs examples with each other")


@family("addmm addmv baddbmm addbmm")
def matmul_with_bias(op: Operation) -> Label:
    """`input + x @ y`, where the batch axis of the product decides."""
    if op.name.startswith("addbmm"):
        return op.unknown("sums over its first dimension")
    product = Operation("matmul", op.args[1:3], {}, op.out, op.labels, op.batch)
    if len(op.args) < 3 or not product.batched():
        return op.unknown()
    label = matmul(product)
    bias = op.axis(op.args[0])
    if bias is not None and aligned(op, [(op.args[0], bias)]) != label:
        return op.mixed("pairs examples with each other")
    return label


@family("tensordot")
def tensordot(op: Operation) -> Label:
    """`tensordot(x, y, dims)`: what is left of x, then what is left of y."""
    x, y = op.args[:2]
    dims = op.arg(2, "dims", 2)
    if isinstance(dims, int):
        dims = (range(x.dim() - dims, x.dim()), range(dims))
    if isinstance(dims, Tensor) or len(op.batched()) != 1:
        return op.unknown()
    contracted = [dims_of(list(d), t.dim()) if len(d) else [] for d, t in zip(dims, (x, y), strict=True)]
    first = op.axis(x) is not None
    axis, taken = op.batched()[0][1], contracted[0 if first else 1]
    if axis.dim in taken:
        return op.contracted()
    before = 0 if first else x.dim() - len(contracted[0])
    return axis.moved(before + axis.dim - sum(d < axis.dim for d in taken))


@family("inner")
def inner(op: Operation) -> Label:
    """`inner(x, y)`: the last dimensions contracted; what is left of x, then what is left of y."""
    x, y = op.args[:2]
    if len(op.batched()) != 1 or x.dim() == 0 or y.dim() == 0:
        return op.unknown()
    tensor, axis = op.batched()[0]
    if axis.dim == tensor.dim() - 1:
        return op.contracted()
    return axis if op.axis(x) is not None else axis.moved(axis.dim + x.dim() - 1)


@family("cdist")
def cdist(op: Operation) -> Label:
    """`(..., P, d)` and `(..., R, d)` to `(..., P, R)`."""
    x, y = op.args[:2]
    out = result_tensor(op)
    places = set()
    for tensor, place in ((x, -2), (y, -1)):
        axis = op.axis(tensor)
        if axis is not None:
            back = axis.dim - tensor.dim()
            if back == -1:
                return op.contracted()
            places.add(axis.moved(out.dim() + (place if back == -2 else back)))
    return places.pop() if len(places) == 1 else op.mixed("pairs examples with each other")


@family("outer ger kron cross chain_matmul multi_dot block_diag cartesian_prod meshgrid")
def between(op: Operation) -> Label:
    """Products of which perex follows none."""
    return op.unknown("combines tensors in a way perex does not follow")


@family("einsum")
def einsum(op: Operation) -> Label:
    """The letter of the batch axis must be one letter everywhere and survive into the result."""
    equation, operands = op.args[0], list(op.args[1:])
    if not isinstance(equation, str):
        return op.unknown("is called without an equation string")
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    left, _, right = equation.replace(" ", "").partition("->")
    out = result_tensor(op)

    def letters(term: str, ndim: int) -> list[str]:
        """One name a dimension; the dimensions of an ellipsis are named from the right."""
        before, dots, after = term.partition("...")
        hidden = ndim - len(before) - len(after)
        return list(before) + ([f".{hidden - i}" for i in range(hidden)] if dots else []) + list(after)

    terms = left.split(",")
    if "->" not in equation:
        flat = left.replace(",", "").replace("...", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(flat) if flat.count(c) == 1))
    names = set()
    found: set[Axis] = set()
    for term, operand in zip(terms, operands, strict=True):
        axis = op.axis(operand)
        if axis is not None:
            named = letters(term, operand.dim())
            names.add(named[axis.dim])
            found.add(axis.moved(0))
            if named.count(named[axis.dim]) > 1:
                return op.mixed("takes a diagonal of the batch axis")
    named = letters(right, out.dim())
    if len(names) != 1 or len(found) != 1:
        return op.mixed("pairs examples with each other")
    name = names.pop()
    return found.pop().moved(named.index(name)) if name in named else op.contracted()


@family("linear")
def linear(op: Operation) -> Label:
    """`(..., d_in)` to `(..., d_out)`, the same weight for every example."""
    x = op.arg(0, "input")
    axis = op.axis(x)
    if axis is None or len(op.batched()) != 1:
        return op.mixed("has a weight that differs between examples")
    return axis if axis.dim < x.dim() - 1 else op.contracted()


@family("bilinear")
def bilinear(op: Operation) -> Label:
    """Two inputs `(..., d)` that share all but the last dimension."""
    x, z = op.args[:2]
    axes = {axis for _, axis in op.batched()}
    axis = axes.pop()
    return op.mixed() if axes or axis.dim == x.dim() - 1 or not op.only(x, z) else axis


BY_FREQUENCY = (
    "divides gradients by how often an id occurs in the whole batch. Set `scale_grad_by_freq=False` on this module"
)


@family("embedding one_hot")
def lookup(op: Operation) -> Label:
    """Ids of any shape, a vector for each."""
    if op.arg(5, "scale_grad_by_freq", False):
        return op.refused(BY_FREQUENCY)
    axis = op.axis(op.arg(0, "input"))
    if axis is None or len(op.batched()) != 1:
        return op.mixed("has a table that differs between examples")
    return axis


def lookup_weight_first(op: Operation) -> Label:
    """`torch.embedding(weight, ids)`, which F.embedding calls."""
    axis = op.axis(op.arg(1, "indices"))
    if op.arg(3, "scale_grad_by_freq", False):
        return op.refused(BY_FREQUENCY)
    return axis if axis is not None and len(op.batched()) == 1 else op.mixed()


FAMILIES[torch.embedding] = lookup_weight_first


@family("embedding_bag")
def embedding_bag(op: Operation) -> Label:
    """A row of the result for each bag: a row of the ids, or a run of them that begins at an offset."""
    if op.arg(5, "scale_grad_by_freq", False):
        return op.refused(BY_FREQUENCY)
    offsets = op.arg(2, "offsets")
    if offsets is None:
        ids, weights = op.arg(0, "input"), op.arg(8, "per_sample_weights")
        axes = {axis for _, axis in op.batched()}
        axis = axes.pop()
        return op.mixed() if axes or axis.dim or op.axis(ids) is None or not op.only(ids, weights) else axis
    if op.axis(op.arg(1, "weight")) is not None:
        return op.mixed("has a table that differs between examples")
    if op.axis(offsets) not in (None, Axis(0)) or result_tensor(op).size(0) != op.batch:
        return op.unknown("does not have one bag for each example")
    return Axis(0)


embedding_bag.decides = True  # type: ignore[attr-defined]  # bags are examples, whatever the ids are


@family(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d interpolate upsample grid_sample "
    "pixel_shuffle pixel_unshuffle channel_shuffle fold affine_grid local_response_norm group_norm instance_norm"
)
def image(op: Operation) -> Label:
    """`(N, C, ...)` to `(N, C', ...)`: rows are images, each on its own."""
    x: Tensor = op.args[0] if op.args else op.kwargs["input"]
    if op.name.startswith("conv") and x.dim() != int(op.name[-2]) + 2:
        return op.mixed("works on one image, and finds the batch axis inside it")
    if not op.only(x, op.arg(1, "grid") if op.name == "grid_sample" else None):
        return op.mixed("has a weight that differs between examples")
    axes = {axis for _, axis in op.batched()}
    axis = axes.pop()
    return axis if not axes and axis.dim == 0 else op.mixed()


FAMILIES[torch.nn.functional.unfold] = image


def window(op: Operation) -> Label:
    """`x.unfold(dim, size, step)`: windows along a dimension, their content in a new last one."""
    x, axis = op.batched()[0]
    return op.unknown() if axis.dim == normal(op.args[1], x.dim()) else axis


FAMILIES[Tensor.unfold] = window


@family("batch_norm")
def batch_norm(op: Operation) -> Label:
    """Pointwise with stored statistics; with statistics of the batch, examples mix."""
    if op.arg(5, "training", False):
        return op.refused(
            "normalises over the batch, so every example depends on all others. Call `.eval()` on this module "
            "(to use its running statistics; it needs some), or replace it by GroupNorm, LayerNorm or "
            "InstanceNorm"
        )
    axis = op.axis(op.args[0])
    return axis if axis is not None and axis.dim != 1 and len(op.batched()) == 1 else op.mixed()


@family(
    """
    avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d
    lp_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices max_unpool1d
    max_unpool2d max_unpool3d adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices
    adaptive_max_pool3d_with_indices fractional_max_pool2d fractional_max_pool3d
    fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices
    """
)
def pool(op: Operation) -> Label:
    """Windows over the last dimensions; those before them are left alone."""
    x = op.args[0] if op.args else op.kwargs["input"]
    windows = int(next(c for c in op.name if c.isdigit()))
    if not op.only(x, op.arg(1, "indices") if "unpool" in op.name else None):
        return op.mixed()
    axes = {axis for _, axis in op.batched()}
    axis = axes.pop()
    return axis if not axes and axis.dim < x.dim() - windows else op.mixed()


@family("layer_norm rms_norm")
def last_dims_norm(op: Operation) -> Label:
    """Statistics over the last dimensions, named by `normalized_shape`."""
    x, axis = op.args[0], op.axis(op.args[0])
    shape = op.arg(1, "normalized_shape")
    if axis is None or len(op.batched()) != 1:
        return op.mixed("has a weight that differs between examples")
    return axis if axis.dim < x.dim() - len(shape) else op.mixed()


@family("prelu")
def prelu(op: Operation) -> Label:
    """Pointwise, with a slope for each channel of dimension 1."""
    axis = op.axis(op.args[0])
    return axis if axis is not None and len(op.batched()) == 1 else op.mixed()


@family("scaled_dot_product_attention")
def attention(op: Operation) -> Label:
    """`(..., T, d)` queries, keys and values: leading dimensions are independent."""
    inside = any(axis.dim - tensor.dim() >= -2 for tensor, axis in op.batched())
    return op.mixed("attends across the batch") if inside else aligned(op)


@family(
    """
    mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div
    soft_margin_loss poisson_nll_loss gaussian_nll_loss
    """
)
def pointwise_loss(op: Operation) -> Label:
    """Losses of one number an element."""
    return aligned(op) if op.kwargs.get("reduction") == "none" else op.reduced()


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
    if target.is_floating_point() or op.axis(target) != axis:
        return None
    counted = axis.front(target != op.kwargs.get("ignore_index", -100), op.batch).reshape(op.batch, -1).sum(1)
    if counted.numel() and bool((counted != counted[0]).any()):
        return op.bent("averages over the batch's targets, of which examples have different numbers (some are ignored)")
    return None


@family("lstm gru rnn_tanh rnn_relu")
def recurrent(op: Operation) -> Label | list[Label]:
    """`(input, hx, weights, ..., batch_first)`: outputs follow the input, states have examples on dim 1."""
    x = op.args[0]
    if len(op.args) != 9 or x.dim() != 3:
        return op.unknown("is called on packed or unbatched sequences")
    want = Axis(0 if op.args[8] else 1)
    states = op.args[1] if isinstance(op.args[1], (list, tuple)) else [op.args[1]]
    if op.axis(x) != want or any(op.axis(h) not in (None, Axis(1)) for h in states) or not op.only(x, *states):
        return op.mixed("works along the batch axis: is `batch_first` right?")
    states_out: list[Label] = [Axis(1)] * (len(op.out) - 1)
    return [want, *states_out]


@family("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def recurrent_cell(op: Operation) -> Label:
    """`(input, hx, weights)`, examples on dimension 0 everywhere."""
    x, state = op.args[:2]
    axes = {axis for _, axis in op.batched()}
    own = op.only(x, *(state if isinstance(state, (list, tuple)) else (state,)))
    return Axis(0) if axes == {Axis(0)} and own and x.dim() == 2 else op.mixed()


@family("bincount histc unique unique_consecutive nonzero argwhere masked_select")
def by_value(op: Operation) -> Label:
    """Results whose size depends on values."""
    return op.unknown("arranges its result by value")
