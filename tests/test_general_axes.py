"""Which rows belong to which example: other batch axes, inputs without one, and batches that are rearranged.

Where a rearranged batch is too much, a refusal will do; a wrong number never.
"""

from __future__ import annotations

import pytest
import torch
from oracle import Bare, Shared, check, exact_or_refused, scramble
from torch import Tensor, nn

SHAPES = [(2, 3, 4), (3, 3, 4), (4, 4, 4), (1, 3, 4)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def with_layers(function, **layers: nn.Module) -> nn.Module:
    """A module whose forward is `function(module, *inputs)` and whose children are `layers`."""
    net = Bare(function)
    for name, layer in layers.items():
        net.add_module(name, layer)
    return scramble(net)


# ------------------------------------------------------------------- the batch is not the first axis

TIME_FIRST = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)),
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)),
    "attention": lambda: with_layers(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2)),
    "encoder layer": lambda: nn.TransformerEncoderLayer(4, 2, 5, 0.0),
    "batch first inside": lambda: with_layers(
        lambda m, x: m.up(x.transpose(0, 1)).sin().transpose(0, 1), up=nn.Linear(4, 3)
    ),
    "positions": lambda: with_layers(lambda m, x: x + m.pos(torch.arange(len(x)))[:, None], pos=nn.Embedding(7, 4)),
}


@shapes
@pytest.mark.parametrize("case", TIME_FIRST)
def test_batch_second(case, shape):
    check(scramble(TIME_FIRST[case]()), (torch.randn(*shape),), batch_dim=1)


@shapes
def test_batch_last(shape):
    net = with_layers(lambda m, x: m.a(x.movedim(2, 0)).sin().movedim(0, 2), a=nn.Linear(shape[1], 5))
    check(net, (torch.randn(*shape),), batch_dim=2)


@shapes
def test_negative_batch_dim(shape):
    net = with_layers(lambda m, x: m.a(x.movedim(2, 0)).sin().movedim(0, 2), a=nn.Linear(shape[1], 5))
    exact_or_refused(net, (torch.randn(*shape),), batch_dim=-1)


# ------------------------------------------------------------------- inputs without a batch axis


@shapes
def test_position_ids_handed_over_with_one_row(shape):
    b, t, d = shape
    net = with_layers(lambda m, x, ids: m.out(x + m.pos(ids)), pos=nn.Embedding(t, d), out=nn.Linear(d, 2))
    inputs = torch.randn(*shape), Shared(torch.arange(t)[None])
    exact_or_refused(net, inputs) if b == 1 else check(net, inputs)


@shapes
def test_position_ids_without_batch_axis(shape):
    """(T,) ids, also where T == B: row t then looks like example t."""
    _, t, d = shape
    net = with_layers(lambda m, x, ids: m.out(x + m.pos(ids)), pos=nn.Embedding(t, d), out=nn.Linear(d, 2))
    exact_or_refused(net, (torch.randn(*shape), Shared(torch.arange(t))))


@shapes
def test_a_mask_between_positions(shape):
    """(T, T), also where T == B."""
    _, t, d = shape
    net = with_layers(lambda m, x, mask: m.a(x, x, x, attn_mask=mask)[0],
                      a=nn.MultiheadAttention(d, 2, batch_first=True))  # fmt: skip
    exact_or_refused(net, (torch.randn(*shape), Shared(torch.ones(t, t).triu(1).bool())))


@shapes
def test_a_matrix_that_mixes_positions(shape):
    """An adjacency matrix of the T positions, shared by the batch."""
    _, t, d = shape
    net = with_layers(lambda m, x, adj: adj @ m.w(x), w=nn.Linear(d, 5))
    exact_or_refused(net, (torch.randn(*shape), Shared(torch.randn(t, t).double())))


@shapes
@pytest.mark.parametrize("scale", [torch.tensor(0.7), 0.7], ids=["tensor", "number"])
def test_a_scalar_argument(shape, scale):
    net = with_layers(lambda m, x, s: m.w(x * s) * s, w=nn.Linear(shape[2], 5))
    check(net, (torch.randn(*shape), Shared(scale)))


# ------------------------------------------------------------------- rows that move


def there_and_back(m: nn.Module, x: Tensor) -> Tensor:
    order = x[:, 0, 0].argsort()
    out = m.w(x[order])
    return out[order.argsort()]


def stacked_twice(m: nn.Module, x: Tensor) -> Tensor:
    one, two = m.w(torch.cat([x, x.sin()])).chunk(2)
    return one * two


def interleaved(m: nn.Module, x: Tensor) -> Tensor:
    return m.w(x.repeat_interleave(2, 0) * 1.5).view(len(x), 2, *x.shape[1:-1], -1)


def only_some(m: nn.Module, x: Tensor) -> Tensor:
    out = x.new_zeros(*x.shape[:-1], 5)
    keep = x[:, 0, 0] > 0
    out[keep] = m.w(x[keep])
    return out


def packed(m: nn.Module, x: Tensor) -> Tensor:
    """Only some positions of each example, packed one behind the other."""
    keep = x[..., 0] > 0
    out = x.new_zeros(*x.shape[:-1], 5)
    out[keep] = m.w(x[keep])
    return out


def scattered(m: nn.Module, x: Tensor) -> Tensor:
    rows = torch.arange(len(x)).flip(0)
    return x.new_zeros(*x.shape[:-1], 5).index_copy(0, rows, m.w(x[rows]))


def one_by_one(m: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([m.w(row) for row in x])


def one_by_one_in_a_list(m: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([m.w(x[i : i + 1]) for i in range(len(x))])


def two_halves(m: nn.Module, x: Tensor) -> Tensor:
    """Micro-batches inside the forward."""
    return torch.cat([m.w(part) for part in x.split(2)])


def folded_in_any_order(m: nn.Module, x: Tensor) -> Tensor:
    b, t, d = x.shape
    order = torch.arange(b * t).flip(0)
    return m.w(x.reshape(b * t, d)[order]).flip(0).view(b, t, -1)


def examples_in_channels(m: nn.Module, x: Tensor) -> Tensor:
    """The batch folded into the channel axis of one grouped operation, as in StyleGAN's modulation."""
    b, t, d = x.shape
    w = m.w.weight * x.mean(1)[:, None]  # a weight for each example: (b, 5, d)
    out = nn.functional.conv1d(x.mT.reshape(1, b * d, t), w.reshape(b * 5, d, 1), groups=b)
    return out.view(b, 5, t)


def in_and_out_of_numpy_shape(m: nn.Module, x: Tensor) -> Tensor:
    """Strides taken by hand."""
    y = x.contiguous().as_strided(x.shape, x.contiguous().stride())
    return m.w(y)


def overlapping_chunks(m: nn.Module, x: Tensor) -> Tensor:
    """Windows that share rows, in memory whose dimensions are in another order, as Longformer's."""
    y = x.transpose(0, 1).contiguous().transpose(0, 1)
    b, t, d = y.shape
    windows = y.as_strided((b, t - 1, 2, d), (y.stride(0), y.stride(1), y.stride(1), y.stride(2)))
    return m.w(windows)


def past_its_own_rows(m: nn.Module, x: Tensor) -> Tensor:
    """From a piece of every example into memory that is another piece's."""
    piece = x[:, :1]
    return m.w(piece.as_strided(x.shape, x.stride(), piece.storage_offset()))


MOVES = [there_and_back, overlapping_chunks, past_its_own_rows, stacked_twice, interleaved, only_some, packed,
         scattered, one_by_one, one_by_one_in_a_list, two_halves, folded_in_any_order, examples_in_channels,
         in_and_out_of_numpy_shape]  # fmt: skip


@shapes
@pytest.mark.parametrize("function", MOVES, ids=lambda f: f.__name__)
def test_rearranged_batch_is_exact_or_refused(function, shape):
    net = nn.Sequential(with_layers(function, w=nn.Linear(shape[2], 5)), nn.Tanh())
    exact_or_refused(net, (torch.randn(*shape),))


def test_overlapping_chunks_are_exact():
    check(with_layers(overlapping_chunks, w=nn.Linear(4, 5)), (torch.randn(3, 5, 4),))


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 3, 3), (1, 3, 4)], ids=str)
def test_images_cut_into_windows(shape):
    """The batch axis grows and shrinks again: windows of an image, folded and unfolded."""

    def windows(m: nn.Module, x: Tensor) -> Tensor:
        b = len(x)
        x = x.view(b, 2, 3, 2, 3, 4).transpose(2, 3).reshape(b * 4, 9, 4)
        x = m.attention(x, x, x)[0] + m.bias(x)
        return x.view(b, 2, 2, 3, 3, 4).transpose(2, 3).reshape(b, 36, 4)

    net = with_layers(windows, attention=nn.MultiheadAttention(4, 2, batch_first=True), bias=nn.Linear(4, 4))
    check(net, (torch.randn(shape[0], 36, 4),))
