"""The operators behind layers, from linear to recurrent."""

from __future__ import annotations

import torch
from torch import Tensor

from perex.capture.axis import Axis, Label, arranged
from perex.capture.carry import DECIDES, FAMILIES, Operation, family, normal, result_tensor
from perex.capture.families.elementwise import aligned


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


DECIDES.add(embedding_bag)  # bags are examples, whatever the ids are


@family(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d interpolate upsample "
    "pixel_shuffle pixel_unshuffle channel_shuffle fold affine_grid local_response_norm group_norm instance_norm"
)
def image(op: Operation) -> Label:
    """`(N, C, ...)` to `(N, C', ...)`: rows are images, each on its own."""
    x: Tensor = op.args[0] if op.args else op.kwargs["input"]
    if op.name.startswith("conv") and x.dim() != int(op.name[-2]) + 2:
        return op.mixed("works on one image, and finds the batch axis inside it")
    if not op.only(x):
        return op.mixed("has a weight that differs between examples")
    axes = {axis for _, axis in op.batched()}
    axis = axes.pop()
    return axis if not axes and axis.dim == 0 else op.mixed()


@family("grid_sample")
def grid_sample(op: Operation) -> Label:
    """Images `(N, C, ...)` read at `(N, *positions, 2)`: each position reads its own image, or the one for all."""
    x, grid = op.arg(0, "input"), op.arg(1, "grid")
    read, positions = op.axis(x), op.axis(grid)
    if not op.only(x, grid) or read is not None and read.dim != 0:
        return op.mixed()
    if positions is None or positions.dim == 0:
        return op.agreed(axis for axis in (read, positions) if axis is not None)
    return op.mixed("reads images of several examples") if read is not None else positions.moved(positions.dim + 1)


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
    q, k = op.arg(0, "query"), op.arg(1, "key")
    mask = op.arg(3, "attn_mask")
    if any(axis.dim - tensor.dim() == -2 for tensor, axis in op.batched()) and isinstance(mask, Tensor):
        return in_blocks(op, q, k, op.arg(2, "value"), mask)
    inside = any(axis.dim - tensor.dim() >= -2 for tensor, axis in op.batched())
    return op.mixed("attends across the batch") if inside else aligned(op)


def in_blocks(op: Operation, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Label:
    """Sequences of several examples in one, where the mask keeps each among its own."""
    op.valued = True
    found = op.axis(q), op.axis(k), op.axis(v)
    places = [axis is not None and axis.dim - t.dim() == -2 for t, axis in zip((q, k, v), found, strict=True)]
    if not all(places) or found[0] is None or found[1] is None or found[2] is None or op.axis(mask) is not None:
        return op.mixed("attends across the batch")
    mine, theirs = found[0].ids(op.batch), found[1].ids(op.batch)
    foreign = (mine[:, None] != theirs).to(mask.device)
    attends = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    apart = not bool((attends & foreign).any()) and torch.equal(theirs, found[2].ids(op.batch))
    return found[0].moved(result_tensor(op).dim() - 2) if apart else op.mixed("attends across the batch")


@family("lstm gru rnn_tanh rnn_relu")
def recurrent(op: Operation) -> Label | list[Label]:
    """`(input, hx, weights, ..., batch_first)`: outputs follow the input, states have examples on dim 1."""
    x, second = op.args[:2]
    if len(op.args) == 9 and isinstance(second, Tensor) and not second.is_floating_point():
        return packed(op)
    if len(op.args) != 9 or x.dim() != 3:
        return op.unknown("is called on unbatched sequences")
    want = Axis(0 if op.args[8] else 1)
    states = op.args[1] if isinstance(op.args[1], (list, tuple)) else [op.args[1]]
    if op.axis(x) != want:
        found = op.axis(x)  # perhaps a part of the batch, or in another order
        if found is None:  # the same for all examples, whose first states differ
            own = next((axis for axis in map(op.axis, states) if axis is not None and axis.dim == 1), None)
            fits = own is not None and own.size(op.batch) == x.shape[want.dim]
            found = own.moved(want.dim) if own is not None and fits else None
        if found is None or found.dim != want.dim:
            return op.mixed("works along the batch axis: is `batch_first` right?")
        want = found
    if any(op.axis(h) not in (None, want.moved(1)) for h in states) or not op.only(x, *states):
        return op.mixed("has a first state that is in another order than its input")
    states_out: list[Label] = [want.moved(1)] * (len(op.out) - 1)
    return [want, *states_out]


def packed(op: Operation) -> Label | list[Label]:
    """`(data, batch_sizes, hx, weights, ...)`: step t has the first `batch_sizes[t]` sequences, longest first."""
    data, sizes = op.args[0], op.args[1].tolist()
    axis = op.axis(data)
    states = op.args[2] if isinstance(op.args[2], (list, tuple)) else [op.args[2]]
    if axis is None or axis.dim != 0 or not op.only(data, *states):
        return op.mixed("has rows of examples in another place than its input")
    ids = axis.ids(op.batch)
    first = ids[: sizes[0]]
    if not torch.equal(ids, torch.cat([first[:size] for size in sizes])):
        return op.mixed("has rows of several examples in one sequence")
    order = arranged(1, first, op.batch)
    if any(op.axis(h) not in (None, order) for h in states):
        return op.mixed("has a first state that is in another order than its input")
    return [axis, *[order] * (len(op.out) - 1)]


def pack(op: Operation) -> list[Label]:
    """Sequences `(B, T, ...)`, longest first, as all first steps, then all second steps, and so on."""
    x, batch_first = op.arg(0, "input"), op.arg(2, "batch_first")
    axis = op.axis(x)
    if axis is None or axis.dim != (0 if batch_first else 1):
        return [op.mixed(), None]
    ids = axis.ids(op.batch)
    return [arranged(0, torch.cat([ids[:size] for size in op.out[1].tolist()]), op.batch), None]


def unpack(op: Operation) -> list[Label]:
    """The reverse of `pack`, and the lengths."""
    axis = op.axis(op.arg(0, "data"))
    if axis is None or axis.dim:
        return [op.mixed(), None]
    first = axis.ids(op.batch)[: int(op.arg(1, "batch_sizes")[0])]
    return [arranged(0 if op.arg(2, "batch_first") else 1, first, op.batch), arranged(0, first, op.batch)]


FAMILIES[torch._VF._pack_padded_sequence] = pack
FAMILIES[torch._VF._pad_packed_sequence] = unpack


@family("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def recurrent_cell(op: Operation) -> Label:
    """`(input, hx, weights)`, rows of the same examples on dimension 0 everywhere."""
    x, state = op.args[:2]
    axes = {axis for _, axis in op.batched()}
    own = op.only(x, *(state if isinstance(state, (list, tuple)) else (state,)))
    axis = min(axes, key=repr)
    return axis if len(axes) == 1 and axis.dim == 0 and own and x.dim() == 2 else op.mixed()
