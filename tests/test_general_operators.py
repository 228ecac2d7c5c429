"""Bare parameters in any operator: each line of the table is a model of its own.

Inputs are x of shape (B, T, D); "w:D5 b:5" gives the module parameters w of shape (D, 5) and b of shape (5,).
The sizes are also taken equal to one another, so that nothing can be told apart by its size.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import Bare, check, exact_or_refused, place

SIZES = {"B2T3D4": (2, 3, 4), "B3T3D4": (3, 3, 4), "B4T3D4": (4, 3, 4), "all 3": (3, 3, 3), "B1": (1, 3, 4)}

ELEMENTWISE = {
    "add": (lambda m, x: x + m.a, "a:D"),
    "add from the left": (lambda m, x: m.a + x, "a:TD"),
    "add a full one": (lambda m, x: x + m.a, "a:1TD"),
    "add a column": (lambda m, x: x + m.a, "a:T1"),
    "add twice": (lambda m, x: x + m.a + m.a, "a:D"),
    "add with alpha": (lambda m, x: torch.add(x, m.a, alpha=2), "a:D"),
    "subtract": (lambda m, x: x - m.a, "a:D"),
    "subtract from": (lambda m, x: m.a - x, "a:TD"),
    "rsub": (lambda m, x: torch.rsub(x, m.a, alpha=3), "a:D"),
    "multiply": (lambda m, x: x * m.a, "a:D"),
    "multiply out of place, then in place": (lambda m, x: (x * m.a).mul_(2), "a:D"),
    "divide": (lambda m, x: x / (m.a.abs() + 1), "a:D"),
    "divide by": (lambda m, x: m.a / (x.abs() + 1), "a:TD"),
    "scalar": (lambda m, x: x * m.t, "t:"),
    "one-element": (lambda m, x: x * m.t, "t:1"),
    "temperature": (lambda m, x: (x * m.t.exp()).softmax(-1), "t:"),
    "gate": (lambda m, x: torch.sigmoid(m.g) * x, "g:D"),
    "layer scale of a residual": (lambda m, x: x + m.a * x.tanh(), "a:D"),
    "softplus": (lambda m, x: F.softplus(m.a) * x, "a:D"),
    "softmax over a parameter": (lambda m, x: x * m.a.softmax(0), "a:D"),
    "where": (lambda m, x: torch.where(x > 0, x, m.a), "a:D"),
    "where, both": (lambda m, x: torch.where(x > 0, m.b, m.a), "a:D b:T1"),
    "masked fill": (lambda m, x: x.masked_fill(x > 0, m.t), "t:"),
    "power": (lambda m, x: (x.abs() + 0.5) ** m.a, "a:D"),
    "power of": (lambda m, x: (m.a.abs() + 0.5).pow(x), "a:D"),
    "maximum": (lambda m, x: torch.maximum(x, m.a), "a:D"),
    "clamp": (lambda m, x: x.clamp(min=m.a), "a:D"),
    "lerp": (lambda m, x: torch.lerp(x, m.a, 0.3), "a:D"),
    "lerp by a parameter": (lambda m, x: torch.lerp(x, x.sin(), m.a), "a:TD"),
    "addcmul": (lambda m, x: torch.addcmul(x, x, m.a, value=2), "a:D"),
    "addcdiv": (lambda m, x: torch.addcdiv(m.a, x, x.abs() + 1), "a:D"),
    "prelu": (lambda m, x: F.prelu(x, m.a), "a:T"),
    "snake": (lambda m, x: x + (m.a * x).sin().square() / m.a, "a:D"),
    "norm of a parameter": (lambda m, x: x * m.a.norm(), "a:TD"),
    "sum of a parameter": (lambda m, x: x * m.a.sum(), "a:TD"),
    "detached in place": (lambda m, x: x * (m.a * 2).detach_() + x.sin() * m.a, "a:D"),
    "detached and not": (lambda m, x: x * m.a + x.sin() * m.a.detach(), "a:D"),
    "atan2": (lambda m, x: torch.atan2(x, m.a), "a:D"),
    "logaddexp": (lambda m, x: torch.logaddexp(x, m.a), "a:TD"),
    "hypot": (lambda m, x: torch.hypot(m.a, x), "a:T1"),
}

PRODUCTS = {
    "matmul": (lambda m, x: x @ m.w, "w:D5"),
    "matmul from the left": (lambda m, x: m.w @ x, "w:TT"),
    "matmul with the transpose": (lambda m, x: x.matmul(m.w.t()), "w:5D"),
    "matmul by name": (lambda m, x: torch.matmul(input=x, other=m.w), "w:D5"),
    "bmm by name": (lambda m, x: torch.bmm(input=x, mat2=m.w.expand(len(x), -1, -1)), "w:1D5"),
    "mm by name": (lambda m, x: torch.mm(input=x[:, 0], mat2=m.w), "w:D5"),
    "vecdot": (lambda m, x: torch.linalg.vecdot(x, m.w), "w:TD"),
    "vecdot by name": (lambda m, x: torch.linalg.vecdot(x=m.w, y=x, dim=1), "w:1TD"),
    "vecdot of examples": (lambda m, x: torch.linalg.vecdot(x * m.w, x.sin()), "w:D"),
    "matmul with a vector": (lambda m, x: x @ m.w, "w:D"),
    "vector from the left": (lambda m, x: m.w @ x, "w:T"),
    "batched matmul": (lambda m, x: x @ m.w, "w:1D5"),
    "heads": (lambda m, x: x[:, None] @ m.w, "w:2D5"),
    "einsum btd,de": (lambda m, x: torch.einsum("btd,de->bte", x, m.w), "w:D5"),
    "einsum, weight first": (lambda m, x: torch.einsum("de,btd->bte", m.w, x), "w:D5"),
    "einsum over positions": (lambda m, x: torch.einsum("btd,td->bt", x, m.w), "w:TD"),
    "einsum by position": (lambda m, x: torch.einsum("btd,tde->bte", x, m.w), "w:TD5"),
    "einsum without batch letter first": (
        lambda m, x: torch.einsum("btd,de->tbe", x, m.w).transpose(0, 1),
        "w:D5",
    ),
    "einsum with dots": (lambda m, x: torch.einsum("...d,de->...e", x, m.w), "w:D5"),
    "einsum of three": (lambda m, x: torch.einsum("btd,de,ef->btf", x, m.u, m.w), "u:D2 w:25"),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, dims=([2], [0])), "w:D5"),
    "tensordot over two": (lambda m, x: torch.tensordot(x, m.w, dims=2), "w:TD5"),
    "bmm with an expanded parameter": (lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)), "w:D5"),
    "bmm with a repeated parameter": (lambda m, x: torch.bmm(x, m.w.repeat(len(x), 1, 1)), "w:D5"),
    "baddbmm": (lambda m, x: torch.baddbmm(m.b, x, m.w.expand(len(x), -1, -1)), "b:5 w:D5"),
    "addmm": (lambda m, x: torch.addmm(m.b, x[:, 0], m.w), "b:5 w:D5"),
    "addmm, folded": (
        lambda m, x: torch.addmm(m.b, x.reshape(-1, x.shape[-1]), m.w).view(*x.shape[:2], 5),
        "b:5 w:D5",
    ),
    "mm": (lambda m, x: torch.mm(x[:, 0], m.w), "w:D5"),
    "mm from the left, transposed": (lambda m, x: (m.w @ x[:, 0].t()).t(), "w:5D"),
    "mv": (lambda m, x: torch.mv(x[:, 0], m.w), "w:D"),
    "inner": (lambda m, x: torch.inner(x, m.w), "w:5D"),
    "derived weight": (lambda m, x: F.linear(x, m.u @ m.w), "u:52 w:2D"),
    "low rank beside full": (lambda m, x: F.linear(x, m.w) + (x @ m.a) @ m.b, "w:5D a:D2 b:25"),
    "linear": (lambda m, x: F.linear(x, m.w, m.b), "w:5D b:5"),
    "linear, weight named": (lambda m, x: F.linear(input=x, weight=m.w, bias=m.b), "w:5D b:5"),
    "linear with a part of a weight": (lambda m, x: F.linear(x, m.w[:3], m.b[:3]), "w:5D b:5"),
    "linear with a normalised weight": (lambda m, x: F.linear(x, F.normalize(m.w)), "w:5D"),
    "bilinear": (lambda m, x: F.bilinear(x, x.sin(), m.w, m.b), "w:5DD b:5"),
    "quadratic form": (lambda m, x: (x @ m.w * x).sum(-1), "w:DD"),
    "gram with a metric": (lambda m, x: x @ m.w @ x.transpose(1, 2), "w:DD"),
    "conv1d": (lambda m, x: F.conv1d(x, m.w, m.b, padding=1), "w:5T3 b:5"),
    "conv1d, depthwise": (lambda m, x: F.conv1d(x, m.w, padding=2, dilation=2, groups=x.shape[1]), "w:T13"),
    "conv2d": (lambda m, x: F.conv2d(x[:, None], m.w, m.b), "w:5123 b:5"),
    "transposed conv": (lambda m, x: F.conv_transpose1d(x, m.w, m.b, stride=2), "w:T53 b:5"),
    "attention to learned keys": (
        lambda m, x: F.scaled_dot_product_attention(x, m.k.expand(len(x), -1, -1), m.v.expand(len(x), -1, -1)),
        "k:5D v:5D",
    ),
    "attention by a learned query": (
        lambda m, x: F.scaled_dot_product_attention(m.q.expand(len(x), -1, -1), x, x),
        "q:2D",
    ),
    "attention bias": (lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.bias), "bias:TT"),
    "distances to centres": (lambda m, x: torch.cdist(x, m.c.expand(len(x), -1, -1)), "c:5D"),
    "distances by hand": (lambda m, x: (x[:, :, None] - m.c).square().sum(-1), "c:5D"),
    "cosine similarity": (lambda m, x: F.cosine_similarity(x, m.c, dim=-1), "c:D"),
    "layer norm": (lambda m, x: F.layer_norm(x, x.shape[2:], m.w, m.b), "w:D b:D"),
    "rms norm": (lambda m, x: F.rms_norm(x, x.shape[2:], m.w), "w:D"),
    "group norm": (lambda m, x: F.group_norm(x, 1, m.w, m.b), "w:T b:T"),
    "instance norm": (lambda m, x: F.instance_norm(x, weight=m.w, bias=m.b), "w:T b:T"),
    "batch norm by fixed statistics": (
        lambda m, x: F.batch_norm(x, x.new_zeros(x.shape[1]), x.new_ones(x.shape[1]), m.w, m.b),
        "w:T b:T",
    ),
}


def set_first(m, x):
    h = x * 1
    h[:, 0] = m.cls
    return h


def set_last_columns(m, x):
    h = x * 1
    h[..., -2:] = m.a * x[..., :1]
    return h


def add_in_place(m, x):
    h = x.sin()
    h += m.a
    h.mul_(m.b).add_(m.a, alpha=0.5)
    return h


def add_to_a_part(m, x):
    h = x.sin()
    h[:, 1:] += m.a
    h[:, :, 0] -= 1
    return h


def copy_in(m, x):
    h = x.new_zeros(x.shape)
    h.copy_(x)
    h[:, -1].copy_(m.a)
    return h


def fill_a_buffer(m, x):
    """A result put together in an empty tensor, row by row."""
    out = torch.empty(len(x), 2, x.shape[2], dtype=x.dtype)
    out[:, 0] = x[:, 0] * m.a
    out[:, 1] = m.a
    return out


def recurrence(m, x):
    h, seen = m.h.expand(len(x), -1), []
    for step in x.unbind(1):
        h = torch.tanh(step @ m.w + h @ m.u + m.b)
        seen.append(h)
    return torch.stack(seen, 1)


def recurrence_from_zeros(m, x):
    h = x.new_zeros(len(x), 5)
    for t in range(x.shape[1]):
        h = torch.tanh(F.linear(x[:, t], m.w, m.b) + h)
    return h


def prefix(m, x):
    """An input-free network makes tokens that are put before every example."""
    tokens = torch.tanh(m.p @ m.w)
    return torch.cat([tokens.expand(len(x), -1, -1), x], 1) @ m.w


def windows(m, x):
    """Examples cut into pieces that are folded into the batch axis, and put together again."""
    b, t, d = x.shape
    pieces = x.reshape(b * t, 1, d) @ m.w + m.a
    return pieces.view(b, t, -1)


def heads(m, x):
    b, t, d = x.shape
    q, k, v = (x @ m.w).view(b, t, 3, 2, d).permute(2, 0, 3, 1, 4).reshape(3, b * 2, t, d)
    out = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)
    return out.view(b, 2, t, d).transpose(1, 2).reshape(b, t, 2 * d)


SHAPES = {
    "class token": (lambda m, x: torch.cat([m.cls.expand(len(x), -1, -1), x], 1), "cls:11D"),
    "class token by expand_as": (lambda m, x: torch.cat([m.cls.expand_as(x[:, :1]), x], 1), "cls:11D"),
    "class token by repeat": (lambda m, x: torch.cat([m.cls.repeat(len(x), 1, 1), x], 1), "cls:11D"),
    "class token by tile": (lambda m, x: torch.cat([x, m.cls.tile(len(x), 1, 1)], 1), "cls:1D"),
    "class token by repeat_interleave": (
        lambda m, x: torch.cat([x, m.cls.repeat_interleave(len(x), 0)], 1),
        "cls:11D",
    ),
    "class token by index": (
        lambda m, x: torch.cat([x, m.cls[torch.zeros(len(x), dtype=torch.long)]], 1),
        "cls:11D",
    ),
    "class token by broadcast_to": (
        lambda m, x: torch.cat([m.cls.broadcast_to(len(x), 1, x.shape[2]), x], 1),
        "cls:D",
    ),
    "class token by stacking": (lambda m, x: torch.cat([torch.stack([m.cls] * len(x)), x], 1), "cls:1D"),
    "class token on zeros": (
        lambda m, x: torch.cat([x.new_zeros(len(x), 1, x.shape[2]) + m.cls, x], 1),
        "cls:D",
    ),
    "stack": (lambda m, x: torch.stack([x, m.a.expand_as(x)], 2), "a:D"),
    "a part of a position table": (lambda m, x: x + m.pos[: x.shape[1]], "pos:7D"),
    "the whole position table": (lambda m, x: x + m.pos, "pos:TD"),
    "a part of a batched position table": (lambda m, x: x + m.pos[:, : x.shape[1]], "pos:17D"),
    "positions by arange": (lambda m, x: x + m.pos[torch.arange(x.shape[1])], "pos:7D"),
    "positions by expanded arange": (
        lambda m, x: x + F.embedding(torch.arange(x.shape[1]).expand(len(x), -1), m.pos),
        "pos:7D",
    ),
    "positions by repeated arange": (
        lambda m, x: x + m.pos[torch.arange(x.shape[1])[None].repeat(len(x), 1)],
        "pos:7D",
    ),
    "positions by cumulated mask": (
        lambda m, x: x + F.embedding(torch.ones_like(x[..., 0], dtype=torch.long).cumsum(1), m.pos),
        "pos:7D",
    ),
    "relative positions": (
        lambda m, x: x @ x.mT + m.r[torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1]) + 3],
        "r:7",
    ),
    "column of a table": (lambda m, x: x + m.table[:, 1], "table:D2"),
    "view of a parameter": (lambda m, x: x * m.a.view(1, 1, -1), "a:D"),
    "reshaped parameter": (lambda m, x: x @ m.w.reshape(x.shape[2], 5), "w:5D"),
    "chunks of a parameter": (lambda m, x: F.linear(x, m.w.chunk(2)[1]) * m.w.unbind(0)[0].sum(), "w:4D"),
    "concatenated parameters": (lambda m, x: F.linear(x, torch.cat([m.u, m.w])), "u:2D w:3D"),
    "stacked parameters": (lambda m, x: x @ torch.stack([m.u, m.w], 1), "u:D w:D"),
    "upper triangle of a parameter": (lambda m, x: m.w.tril() @ x, "w:TT"),
    "diagonal": (lambda m, x: x @ torch.diag(m.a), "a:D"),
    "padding": (lambda m, x: F.pad(x @ m.w, (1, 1)), "w:D5"),
    "set an item": (set_first, "cls:D"),
    "set columns": (set_last_columns, "a:2"),
    "add in place": (add_in_place, "a:D b:TD"),
    "add to a part in place": (add_to_a_part, "a:D"),
    "copy in": (copy_in, "a:D"),
    "fill a buffer": (fill_a_buffer, "a:D"),
    "recurrence": (recurrence, "h:5 w:D5 u:55 b:5"),
    "recurrence from zeros": (recurrence_from_zeros, "w:5D b:5"),
    "input-free network": (prefix, "p:2D w:DD"),
    "output without the input": (lambda m, x: m.a.expand(len(x), -1).sin(), "a:D"),
    "windows": (windows, "w:D5 a:15"),
    "heads": (heads, "w:DS"),
    "folded by reshape": (
        lambda m, x: F.linear(x.reshape(-1, x.shape[2]), m.w, m.b).view(*x.shape[:2], 5),
        "w:5D b:5",
    ),
    "folded by flatten": (lambda m, x: F.linear(x.flatten(0, 1), m.w).unflatten(0, x.shape[:2]), "w:5D"),
    "folded by view, kept": (lambda m, x: (x.reshape(-1, x.shape[2]) * m.a).view(len(x), -1), "a:D"),
    "folded time first": (
        lambda m, x: (
            F.linear(x.transpose(0, 1).reshape(-1, x.shape[2]), m.w).view(x.shape[1], len(x), 5).transpose(0, 1)
        ),
        "w:5D",
    ),
    "time first inside": (lambda m, x: F.linear(x.transpose(0, 1), m.w, m.b).transpose(0, 1), "w:5D b:5"),
    "time first with positions": (
        lambda m, x: (x.transpose(0, 1) + m.pos[:, None]).transpose(0, 1),
        "pos:TD",
    ),
    "batch last": (lambda m, x: (m.w @ x.permute(1, 2, 0) + m.b).permute(2, 0, 1), "w:5D b:51"),
    "flattened": (lambda m, x: x.flatten(1) @ m.w, "w:F5"),
    "pooled": (lambda m, x: F.linear(x.mean(1), m.w, m.b), "w:5D b:5"),
    "sorted within an example": (lambda m, x: x.sort(1).values * m.a, "a:TD"),
    "top of an example": (lambda m, x: x.topk(2, dim=1).values @ m.w, "w:D5"),
    "gathered by the example": (
        lambda m, x: (x @ m.w).gather(1, x[..., :1].argsort(1).expand(-1, -1, 5)),
        "w:D5",
    ),
    "examples by slices": (lambda m, x: torch.cat([x[:1] * m.a, x[1:] * m.a]), "a:D"),
}

CASES = ELEMENTWISE | PRODUCTS | SHAPES
OPTIONAL = {"examples by slices", "class token by stacking", "output without the input"}
"""What perex may refuse: in these, the batch axis becomes something else on the way."""


def spelled(shapes: str) -> dict[str, str]:
    return dict(shape.split(":") for shape in shapes.split())


def sizes_of(size: str) -> dict[str, int]:
    b, t, d = SIZES[size]
    return {"B": b, "T": t, "D": d, "F": t * d, "S": 6 * d}


SAVED = {"temperature", "power", "power of", "hypot", "distances to centres", "recurrence from zeros"}
"""Torch itself allows no in-place operator behind these: they keep their output for the backward."""


def exact(case: str, size: str, where: str) -> None:
    function, shapes = CASES[case]
    torch.manual_seed(1)
    model, inputs = place(Bare(function, sizes_of(size), **spelled(shapes)), where, torch.randn(*SIZES[size]))
    (exact_or_refused if case in OPTIONAL else check)(model, inputs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_operator(case, size):
    exact(case, size, "alone")


@pytest.mark.parametrize("case", CASES)
def test_operator_on_what_requires_grad(case):
    """And an in-place operator follows, where torch allows it."""
    exact(case, "B3T3D4", "later" if case in SAVED else "later+inplace")


TABLES = {
    "index": (lambda m, ids: m.table[ids], "table:54"),
    "F.embedding": (lambda m, ids: F.embedding(ids, m.table), "table:54"),
    "F.embedding with padding": (lambda m, ids: F.embedding(ids, m.table, padding_idx=1), "table:54"),
    "index_select": (lambda m, ids: m.table.index_select(0, ids.flatten()).view(*ids.shape, 4), "table:54"),
    "take": (lambda m, ids: torch.take(m.table, ids), "table:5"),
    "one-hot": (lambda m, ids: F.one_hot(ids, 5).to(m.table) @ m.table, "table:54"),
    "two indices": (lambda m, ids: m.table[ids, ids.flip(1)], "table:554"),
    "row and columns": (lambda m, ids: m.table[:, ids].transpose(0, 1), "table:45"),
    "mask": (lambda m, ids: torch.where((ids > 2)[..., None], m.table[0], m.table[1]), "table:24"),
    "F.embedding_bag": (lambda m, ids: F.embedding_bag(ids, m.table, mode="sum"), "table:54"),
    "tied by F.linear": (lambda m, ids: F.linear(F.embedding(ids, m.table).sin(), m.table), "table:54"),
    "tied by matmul": (lambda m, ids: m.table[ids].tanh() @ m.table.t(), "table:54"),
}


@pytest.mark.parametrize("shape", [(2, 3), (3, 3), (4, 5)], ids=str)
@pytest.mark.parametrize("case", TABLES)
def test_look_up(case, shape):
    function, shapes = TABLES[case]
    torch.manual_seed(1)
    check(*place(Bare(function, **spelled(shapes)), "first", torch.randint(5, shape)))
