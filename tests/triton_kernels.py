"""Fused kernels against float64, in Triton's interpreter or, where there is a GPU, on it.

tests/test_triton.py runs this file, each part in a process of its own: a process in which torch imported Triton already
cannot interpret any more.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perex
from perex.factors import Outer, Patches, Rows
from perex.factors.outline import outline
from perex.kernels import affine, outer, segments
from perex.kernels.geometry import Geometry
from perex.kernels.spot import Spot, at
from perex.kernels.strategies import Preferences, preferring
from perex.kernels.triton import affine as fused_affine
from perex.kernels.triton import convolution as fused_convolution
from perex.kernels.triton import outer as fused
from perex.kernels.triton import rows as fused_rows
from perex.kernels.triton import tiles, turning
from perex.kernels.triton.available import interpreted, precision, usable

assert interpreted() or torch.cuda.is_available(), "run tests/test_triton.py"
DEVICE = "cpu" if interpreted() else "cuda"

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HERE = Spot(DEVICE, torch.float32)


interpreted_only = pytest.mark.skipif(not interpreted(), reason="on a GPU, fused ways are taken unasked")


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    if interpreted():
        for name in ("LARGEST", "LARGEST_PLAIN"):
            monkeypatch.setattr(tiles, name, 16)  # so that small sizes have many tiles
    with torch.device(DEVICE):
        yield


def close(found: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of float32 sums: products of half-precision numbers are exact in float32."""
    assert found.dtype == torch.float32 and found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=2e-6 if interpreted() else 2e-5, atol=0)


# Outer products

SIZES = {
    "odd": (3, 1, 37, 19, 35),
    "groups": (2, 3, 18, 5, 17),
    "one position": (4, 1, 1, 33, 3),
    "one entry": (2, 1, 3, 1, 1),
    "whole tiles": (1, 2, 32, 16, 32),
    "many tiles": (1, 1, 81, 3, 2),
}
if not interpreted():
    SIZES |= {"large": (2, 1, 300, 515, 390), "large, aligned": (2, 2, 272, 384, 512), "long": (1, 1, 3000, 136, 40)}


def multiplied_out(left: Tensor, right: Tensor) -> Tensor:
    return (left.double().mT @ right.double()).square().sum((1, 2, 3))


@pytest.mark.parametrize("form", [fused.direct, fused.gram])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_outer(size, dtype, form):
    batch, groups, positions, m, n = SIZES[size]
    left, right = (torch.randn(batch, groups, positions, k).to(dtype) for k in (m, n))
    close(form(left, right), multiplied_out(left, right))


@pytest.mark.parametrize("kind", [*SIZES, "transposed", "expanded", "sliced", "unsqueezed"])
def test_outer_of_copies_with_positions_innermost(kind, monkeypatch):
    """What TF32 is multiplied from; here the copies alone, multiplied exactly, and in pieces of a few examples."""
    if kind in SIZES:
        batch, groups, positions, m, n = SIZES[kind]
        left, right = (torch.randn(batch, groups, positions, k) for k in (m, n))
    else:
        left, right = strided()[kind]
    for x in (left, right):
        found = turning.lengthwise(x)
        assert found.stride(2) == 1 and found.shape[2] % turning.ALIGNED == 0
        assert torch.equal(found[:, :, : x.shape[2]], x) and not found[:, :, x.shape[2] :].any()
    expected = fused.direct(left, right)
    monkeypatch.setattr(fused, "turning", lambda *stacks: any(x.stride(2) != 1 for x in stacks))
    for most in (2**26, 1):
        monkeypatch.setattr(tiles, "MOST", most)
        found = fused.direct(left, right)
        close(found, multiplied_out(left, right))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_some_examples_alone(dtype):
    left, right = torch.randn(5, 2, 21, 18).to(dtype), torch.randn(5, 2, 21, 7).to(dtype)
    wanted = torch.tensor([1, 0, 1, 1, 0], dtype=torch.uint8)
    own = wanted.bool()
    close(fused.direct(left, right, wanted)[own], multiplied_out(left, right)[own])
    factor = patches("strided", 5, dtype)
    found = fused_convolution.direct(factor.x.transpose(0, 1), factor.grads.transpose(0, 1), factor.geometry, wanted)
    swapped = Patches(factor.x.transpose(0, 1), factor.grads.transpose(0, 1), factor.geometry)
    close(found[own], by_backend(swapped)[own])


def strided() -> dict[str, tuple[Tensor, Tensor]]:
    left, right = torch.randn(2, 2, 21, 18), torch.randn(2, 2, 21, 7)
    wide = torch.randn(5, 3, 50, 40)
    return {
        "transposed": (left.mT.contiguous().mT, right.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)),
        "expanded": (left[:, :, :1].expand(2, 2, 21, 18), right[:1, :1].expand(2, 2, 21, 7)),
        "sliced": (wide[1::2, :2, 3:45:2, 1:37:2], wide[:2, 1:, 4:25, 33:]),
        "unsqueezed": (left[:, 0].unsqueeze(1), right[:, 1].unsqueeze(1)),
    }


@pytest.mark.parametrize("form", [fused.direct, fused.gram])
@pytest.mark.parametrize("kind", ["transposed", "expanded", "sliced", "unsqueezed"])
def test_outer_of_any_strides(kind, form):
    left, right = strided()[kind]
    close(form(left, right), multiplied_out(left, right))


@pytest.mark.parametrize("shape", [(0, 1, 3, 4), (3, 1, 0, 4), (3, 0, 2, 4), (3, 1, 2, 0)])
def test_nothing_to_multiply(shape):
    for form in (fused.direct, fused.gram):
        assert torch.equal(form(torch.ones(shape), torch.ones(*shape[:3], 5)), torch.zeros(shape[0]))


def test_positions_that_cancel_are_multiplied_out():
    left, right = torch.randn(3, 1, 9, 20), torch.randn(3, 1, 9, 20)
    lefts, rights = torch.cat((left, -1.0001 * left), 2), torch.cat((right, right), 2)
    lefts[1] = left[1].repeat(1, 2, 1)  # here nothing cancels
    expected = multiplied_out(lefts, rights)
    torch.testing.assert_close(fused.gram(lefts, rights).double(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_trusted_as_far_as_products_resolve(dtype):
    """A tenth of its terms' sizes is enough of a sum for float32, and for halves, but not for TF32."""
    before, terms = torch.get_float32_matmul_precision(), torch.tensor([[[0.1], [0.5]], [[1.0], [1.0]]])
    try:
        for setting in ("highest", "high"):
            torch.set_float32_matmul_precision(setting)
            found = fused.settled(terms, dtype, lambda doubts: 7.0 * doubts.unsqueeze(1)).sum(1)
            coarse = setting == "high" and dtype == torch.float32
            assert found.tolist() == pytest.approx([7.0 if coarse else 0.1, 0.5])
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_number_that_is_none_spoils_its_example_alone():
    left, right = torch.randn(3, 1, 20, 4), torch.randn(3, 1, 20, 4)
    left[1, 0, 3, 2] = float("nan")
    for form in (fused.direct, fused.gram):
        assert form(left, right).isnan().tolist() == [False, True, False]


def test_half_precision_is_added_up_in_float32():
    left, right = torch.full((1, 1, 300, 2), 100.0).half(), torch.full((1, 1, 300, 2), 100.0).half()
    for form in (fused.direct, fused.gram):
        assert float(form(left, right)) == pytest.approx(4 * (300 * 1e4) ** 2)  # far beyond float16


# Convolutions

GEOMETRIES = {
    # weight, stride, padding, dilation, transposed, output padding, groups, input
    "plain": ((5, 3, 3, 3), (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (7, 6)),
    "padded": ((18, 3, 3, 3), (1, 1), (1, 2), (1, 1), False, (0, 0), 1, (4, 5)),
    "strided": ((3, 2, 3, 2), (2, 3), (1, 0), (1, 1), False, (0, 0), 1, (9, 11)),
    "dilated": ((3, 2, 2, 3), (1, 2), (2, 1), (3, 2), False, (0, 0), 1, (7, 8)),
    "groups": ((6, 2, 3, 3), (1, 1), (1, 1), (1, 1), False, (0, 0), 3, (5, 5)),
    "depthwise": ((4, 1, 3, 3), (2, 2), (1, 1), (1, 1), False, (0, 0), 4, (5, 6)),
    "one by one": ((7, 5, 1, 1), (2, 1), (0, 0), (1, 1), False, (0, 0), 1, (5, 4)),
    "one place": ((3, 2, 4, 5), (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (4, 5)),
    "line": ((6, 4, 3), (2,), (1,), (2,), False, (0,), 1, (11,)),
    "line, groups": ((6, 2, 3), (1,), (2,), (1,), False, (0,), 2, (5,)),
    "transposed": ((4, 3, 3, 2), (2, 3), (1, 0), (1, 2), True, (1, 0), 2, (4, 3)),
    "line, transposed": ((4, 3, 3), (2,), (1,), (1,), True, (1,), 1, (5,)),
    "many channels": ((18, 17, 3, 2), (1, 2), (1, 0), (1, 1), False, (0, 0), 1, (6, 7)),
    "space": ((3, 2, 2, 3, 2), (1, 2, 1), (1, 1, 0), (1, 1, 2), False, (0, 0, 0), 1, (3, 5, 4)),
    "space, transposed": ((4, 2, 2, 3, 2), (1, 2, 1), (1, 1, 0), (1, 1, 2), True, (0, 1, 0), 2, (3, 2, 4)),
}


def patches(name: str, rows: int, dtype: torch.dtype = torch.float32) -> Patches:
    weight, *options, groups, spatial = GEOMETRIES[name]
    geometry = Geometry(torch.Size(weight), *options, groups)
    x = torch.randn(2, rows, weight[0] if geometry.transposed else weight[1] * groups, *spatial).to(dtype)
    out = torch.ops.aten.convolution(
        x[:, 0].float(), torch.zeros(weight), None, geometry.stride, geometry.padding, geometry.dilation,
        geometry.transposed, geometry.output_padding, groups,
    )  # fmt: skip
    return Patches(x, torch.randn(2, rows, *out.shape[1:]).to(dtype), geometry)


def by_backend(factor: Patches) -> Tensor:
    exact = Patches(factor.x.double(), factor.grads.double(), factor.geometry)
    return exact.dense(0, factor.batch).flatten(1).square().sum(1)


CONVOLUTIONS = [fused_convolution.direct, fused_convolution.pixel_gram]


@pytest.mark.parametrize("form", CONVOLUTIONS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_convolution(name, rows, form):
    factor = patches(name, rows)
    close(form(factor.x, factor.grads, factor.geometry), by_backend(factor))


@pytest.mark.parametrize("form", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["strided", "line", "transposed"])
def test_convolution_in_each_dtype(name, dtype, form):
    factor = patches(name, 2, dtype)
    close(form(factor.x, factor.grads, factor.geometry), by_backend(factor))


def test_pixels_that_cancel_are_multiplied_out():
    factor = patches("padded", 2)
    factor.x[1, 1], factor.grads[1, 1] = -1.0001 * factor.x[1, 0], factor.grads[1, 0]
    found = fused_convolution.pixel_gram(factor.x, factor.grads, factor.geometry)
    torch.testing.assert_close(found.double(), by_backend(factor), rtol=1e-2, atol=0)


def test_convolution_of_any_strides():
    factor = patches("padded", 2)
    x, grads = factor.x, factor.grads
    cases = {
        "channels last": (
            x.movedim(2, -1).contiguous().movedim(-1, 2),
            grads.movedim(2, -1).contiguous().movedim(-1, 2),
        ),
        "expanded": (x[:, :1].expand_as(x), grads[:1].expand_as(grads)),
        "constant": (x, grads[..., :1, :1].expand_as(grads)),
        "sliced": (F.pad(x, (1, 2, 3, 1))[..., 3:-1, 1:-2], torch.stack((grads, grads), -1)[..., 1]),
    }
    for left, right in cases.values():
        for form in CONVOLUTIONS:
            close(form(left, right, factor.geometry), by_backend(Patches(left, right, factor.geometry)))


def test_no_image():
    geometry = patches("plain", 1).geometry
    for batch, rows in ((0, 1), (2, 0)):
        for form in CONVOLUTIONS:
            found = form(torch.ones(batch, rows, 3, 7, 6), torch.ones(batch, rows, 5, 5, 4), geometry)
            assert torch.equal(found, torch.zeros(batch))


# Planes

PLANES = {
    "images": (3, 1, 5, 4, 7),
    "several images": (2, 3, 5, 4, 7),
    "lines": (2, 1, 40, 70),
    "no space": (3, 1, 20),
    "large": (1, 1, 2, 40, 41),
}


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PLANES)
def test_planes(name, dtype, last):
    x, grads = torch.randn(PLANES[name]).to(dtype), torch.randn(PLANES[name]).to(dtype)
    if last:
        x, grads = (t.movedim(2, -1).contiguous().movedim(-1, 2) for t in (x, grads))
    mean, variance = torch.randn(x.shape[2]), torch.rand(x.shape[2]) + 0.5
    found = fused_affine.plane_sums(x, grads, mean, variance, 1e-5)
    numbers = (t.double() for t in (x, grads, mean, variance))
    for one, other in zip(found, affine.by_backend(*numbers, 1e-5), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7, 20), (2, 1, 5), (2, 40, 64), (1, 3, 1)])
def test_normalised_rows(shape, dtype, centred):
    x, grads = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    wide, given = x.double(), grads.double()
    size = wide.var(2, correction=0, keepdim=True) if centred else wide.square().mean(2, keepdim=True)
    normalised = (wide - wide.mean(2, keepdim=True) * centred) * (size + 1e-5).rsqrt()
    for view in (lambda t: t, lambda t: t.mT.contiguous().mT):
        weight, bias = fused_affine.row_sums(view(x), view(grads), 1e-5, centred)
        torch.testing.assert_close(weight.double(), (given * normalised).sum(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bias.double(), given.sum(1), rtol=1e-5, atol=1e-5)


# Rows of a table

IDS = {
    "some repeated": torch.tensor([[2, 7, 2, 0, 2], [1, 2, 3, 4, 1], [7, 7, 7, 7, 0]]),
    "all equal": torch.full((3, 21), 4),
    "all distinct": torch.stack([torch.randperm(40)[:19] for _ in range(2)]),
    "one position": torch.tensor([[3], [3]]),
    "32 bits, transposed": torch.randint(5, (13, 3), dtype=torch.int32).mT,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 10, 300])
@pytest.mark.parametrize("name", IDS)
def test_rows(name, width, dtype):
    ids = IDS[name].to(DEVICE)
    grads = torch.randn(*ids.shape, width).to(dtype)
    table = torch.zeros(len(ids), 40, width, dtype=torch.float64)
    table.scatter_add_(1, ids.long().unsqueeze(2).expand_as(grads), grads.double())
    close(fused_rows.squared_norm(ids, grads), table.square().sum((1, 2)))


def test_rows_of_any_strides():
    ids, grads = torch.randint(4, (3, 9)), torch.randn(20, 9, 3)
    for view in (grads[3:16:2].permute(2, 1, 0), grads[0, :, :1].T.unsqueeze(2).expand(3, 9, 7), grads[:3, :, ::2]):
        close(fused_rows.squared_norm(ids, view), segments.segments(view.double(), ids, 4))


def test_no_row():
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        assert torch.equal(
            fused_rows.squared_norm(torch.zeros(shape[:2]).long(), torch.ones(shape)), torch.zeros(shape[0])
        )


# How they are chosen

LEFT, RIGHT = torch.Size((4, 1, 8, 64)), torch.Size((4, 1, 8, 64))


def test_fit_tensors():
    assert usable(HERE) and usable(Spot(DEVICE, torch.bfloat16))
    assert not any(usable(Spot(DEVICE, dtype)) for dtype in (torch.float64, torch.complex64, torch.int64))


def test_precision(monkeypatch):
    assert [precision(dtype) for dtype in DTYPES] == ["ieee", "tf32", "tf32"]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    assert precision(torch.float32) == "ieee"


@interpreted_only
def test_interpreted_ways_are_taken_by_name_only():
    left, right = torch.randn(LEFT), torch.randn(RIGHT)
    for asked, way in (((), "Gram"), (("Triton Gram",), "Triton Gram"), (("Triton direct", "Gram"), "Triton direct")):
        with preferring(Preferences(asked, autotune=not asked)), at(HERE):
            assert outer.plan(LEFT, RIGHT).way in (way, f"compiled {way}")
            close(outer.squared_norm(left, right), multiplied_out(left, right))
            assert outer.plan(LEFT, RIGHT).way.startswith("Triton") == bool(asked)
    with preferring(Preferences(("Triton direct",))), at(Spot(DEVICE, torch.float64)):
        assert outer.plan(LEFT, RIGHT).way in ("Gram", "compiled Gram")
        assert outer.squared_norm(left.double(), right.double()).dtype == torch.float64


def test_one_position_is_left_to_another_way():
    with preferring(Preferences(("Triton direct",))), at(HERE):
        assert outer.plan(torch.Size((4, 1, 1, 8)), torch.Size((4, 1, 1, 8))).way == "one position"


def test_plans_through_outlines():
    kinds = {
        "Triton direct": [Outer(torch.randn(2, 5, 3), torch.randn(2, 5, 4), torch.Size((3, 4))), patches("plain", 1)],
        "Triton segments": [Rows(torch.randint(6, (4, 3)), torch.randn(4, 3, 5), torch.Size((6, 5)))],
    }
    for way, factors in kinds.items():
        for factor in factors:
            outlined = outline(factor)
            with preferring(Preferences((way,))), at(outlined.spot()):
                assert outlined.factor().plan().way == way
                assert outlined.factor().plan() == factor.plan()


# Whole models


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(7, 6), nn.Linear(6, 9), nn.Linear(6, 7, bias=False)
        self.back = nn.Linear(9, 6)
        self.head.weight = self.embedding.weight  # tied

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        return self.head(h + self.back(self.hidden(h).tanh())).logsumexp(2).mean(1)


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3, stride=2, groups=1, dilation=2), nn.Flatten(2),
        nn.Conv1d(4, 6, 2, groups=2), nn.ReLU(), nn.Linear(3, 5), nn.Flatten(), nn.Linear(30, 1), nn.Flatten(0),
    )  # fmt: skip


MODELS = {
    "text": (Text, lambda: torch.randint(7, (3, 20)), {"Triton segments", "Triton direct"}),
    "text, Gram": (Text, lambda: torch.randint(7, (3, 20)), {"Triton segments", "Triton Gram"}),
    "images": (images, lambda: torch.randn(3, 3, 8, 8), {"Triton direct"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_against_a_loop(name):
    make, inputs, strategies = MODELS[name]
    model, x = make(), inputs()
    expected = []
    for b in range(len(x)):
        grads = torch.autograd.grad(model(x[b : b + 1]).sum(), list(model.parameters()))
        expected.append(torch.stack([grad.double().norm() for grad in grads]).norm())
    with perex.attach(model, strategies=sorted(strategies), loss_reduction="sum") as px:
        model(x).sum().backward()
        found, ways = px.norms(), {way for row in px.report().rows for way in row.ways}
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=0)
    assert strategies <= ways


def test_strides_beyond_32_bits():
    """In a storage of which only a few pages are ever touched."""
    far = 2**31 + 16
    storage = torch.empty(far + 64, dtype=torch.float16)
    for place in (0, far):
        storage[place : place + 64] = torch.randn(64)
    left = storage.as_strided((2, 1, 3, 4), (far, 7, 4, 1))
    right = storage.as_strided((1, 1, 2, 8), (7, 7, far, 1)).expand(2, 1, 2, 8)
    close(fused.direct(left[:, :, :2], right), multiplied_out(left[:, :, :2], right))
    close(fused.gram(left[:, :, :2], right), multiplied_out(left[:, :, :2], right))
    ids = torch.tensor([[1, 1], [0, 1]])
    expected = segments.segments(right.squeeze(1).double(), ids, 2)
    close(fused_rows.squared_norm(ids, right.squeeze(1)), expected)
    geometry = Geometry(torch.Size((1, 1, 2)), (1,), (0,), (1,), False, (0,), 1)
    x = storage.as_strided((2, 2, 1, 6), (0, far, far, 1))
    close(fused_convolution.direct(x, x[..., :5], geometry), by_backend(Patches(x, x[..., :5], geometry)))
