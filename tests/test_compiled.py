"""Kernels in C: over shapes, options, layouts, dtypes, vectors and threads; and perex without them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import BUILT, check, grid, without_kernels
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import perex
from perex.factors import Outer
from perex.kernels import affine, convolution, pooling, sums
from perex.kernels import outer as kernels
from perex.kernels.compiled import direct, gram, library, outer, pairs, planes, shape
from perex.kernels.compiled.pooling import pooled
from perex.kernels.geometry import Geometry, weight_gradient

VECTORS = [bits for bits in (256, 512) if bits <= library.bits()]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

needs_kernels = pytest.mark.skipif(not BUILT, reason="no C compiler, or a CPU without AVX2")


@pytest.fixture
def threads():
    """Run on other numbers of threads, and on as many as before afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def laid_out(images: Tensor, layout: str) -> Tensor:
    """The same numbers `(B, R, C, *spatial)`, in another order in memory."""
    if layout == "channels last":
        return images.movedim(2, -1).contiguous().movedim(-1, 2)
    if layout == "a part":
        return torch.stack((images, images + 1), -1)[..., 0]
    if layout == "examples inside":
        return images.movedim(0, -1).contiguous().movedim(-1, 0)
    return images


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Geometry]:
    """Convolutions with channels and places that fill vectors, or not, in one or two dimensions."""
    nd, groups, turned = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.booleans())
    kernel, stride, dilation, padding = (
        draw(st.tuples(*[st.integers(least, most)] * nd)) for least, most in ((1, 7), (1, 3), (1, 3), (0, 3))
    )
    inner, outer = (groups * draw(st.sampled_from(sizes)) for sizes in ([1, 2, 3, 5, 9], [1, 4, 16, 33, 70]))
    padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "padding": padding, "groups": groups}
    least = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    sides = [size + draw(st.integers(0, 20)) for size in least]
    batch, images = draw(st.integers(1, 5)), draw(st.integers(1, 2))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d) if turned else (nn.Conv1d, nn.Conv2d)
    layer = kind[nd - 1](inner, outer, kernel, **options, dtype=dtype)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(batch, images, inner, *sides, dtype=dtype, generator=generator)
    out = layer(x.flatten(0, 1)).detach()
    grads = torch.randn(out.shape, dtype=dtype, generator=generator).unflatten(0, (batch, images))
    layouts = st.sampled_from(["as they come", "channels last", "a part", "examples inside"])
    geometry = Geometry(
        layer.weight.shape, layer.stride, layer.padding, layer.dilation, turned, layer.output_padding, groups
    )  # fmt: skip
    return laid_out(x, draw(layouts)), laid_out(grads, draw(layouts)), geometry


def by_backend(x: Tensor, grads: Tensor, geometry: Geometry) -> Tensor:
    return torch.stack([weight_gradient(x[b].double(), grads[b].double(), geometry) for b in range(len(x))])


@needs_kernels
@pytest.mark.parametrize("cached", [1, shape.CACHED], ids=["a row at a time", "whole images"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("bits", VECTORS)
def test_multiplied_out(bits, count, cached, threads, monkeypatch):
    monkeypatch.setattr(library, "bits", lambda: bits)
    monkeypatch.setattr(shape, "CACHED", cached)
    threads(count)

    @grid(150)
    @given(cases())
    def drawn(case):
        x, grads, geometry = case
        expected, tolerance = by_backend(*case), TOLERANCE[x.dtype]
        squares = expected.flatten(1).square().sum(1)
        for summing in (False, True):
            found, total = direct.squares_and_sum(*case, summing)
            torch.testing.assert_close(found.sum(1).double(), squares, rtol=tolerance, atol=tolerance)
            if total is not None:
                wanted = expected.sum(0)
                assert total.dtype == x.dtype and total.shape == wanted.shape
                assert (total - wanted).abs().max() <= tolerance * (1 + wanted.abs().max())

    drawn()


@needs_kernels
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("bits", VECTORS)
def test_from_pairs_of_pixels(bits, count, threads, monkeypatch):
    monkeypatch.setattr(library, "bits", lambda: bits)
    threads(count)

    @grid(150)
    @given(cases())
    def drawn(case):
        tolerance = TOLERANCE[case[0].dtype]
        squares = by_backend(*case).flatten(1).square().sum(1)
        found, sizes = gram.inner_products(*case)
        assert ((found - squares).abs() <= tolerance * sizes + 1e-30).all()
        assert (sizes >= (1 - tolerance) * found.abs()).all()

    drawn()


@st.composite
def sums_of_outer_products(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Sides that fill tiles and blocks, or not; positions that are packed at once, or not."""
    batch, groups, positions = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 2)),
        draw(st.sampled_from([1, 2, 7, 64, 400])),
    )
    sides = draw(st.tuples(*[st.sampled_from([1, 2, 11, 12, 31, 32, 33, 96, 301])] * 2))
    dtype, generator = (
        draw(st.sampled_from(list(TOLERANCE))),
        torch.Generator().manual_seed(draw(st.integers(0, 2**31))),
    )
    found = []
    for side in sides:
        values = torch.randn(batch, groups, positions, side, dtype=dtype, generator=generator)
        order = draw(st.permutations(range(4)))
        values = values.permute(order).contiguous().permute([order.index(d) for d in range(4)])
        found.append(torch.stack((values, values + 1), -1)[..., 0] if draw(st.booleans()) else values)
    return found[0], found[1]


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("bits", VECTORS)
def test_outer_products(bits, count, threads, monkeypatch):
    monkeypatch.setattr(library, "bits", lambda: bits)
    threads(count)

    @grid(150)
    @given(sums_of_outer_products())
    def drawn(both):
        left, right = both
        tolerance = 3 * TOLERANCE[left.dtype]
        gradients = left.double().mT @ right.double()
        squares = gradients.flatten(1).square().sum(1)
        for way in (kernels.compiled_direct, kernels.compiled_gram):
            found = way(left, right).double()
            found = found.sum(1) if found.dim() == 2 else found  # of terms
            torch.testing.assert_close(found, squares, rtol=tolerance, atol=tolerance)
        found, total = outer.squares_and_sum(left[:, 0], right[:, 0], summing=True)
        squares, wanted = gradients[:, 0].flatten(1).square().sum(1), gradients[:, 0].sum(0)
        torch.testing.assert_close(found.sum(1).double(), squares, rtol=tolerance, atol=tolerance)
        assert total.dtype == left.dtype and total.shape == wanted.shape
        assert (total - wanted).abs().max() <= tolerance * (1 + wanted.abs().max())

    drawn()


@needs_kernels
@pytest.mark.parametrize("sides", [(33, 45), (24, 64)])
def test_what_is_wrong_with_one_example_stays_with_it(sides):
    """Also no zero that fills up a tile is multiplied with infinity and counted."""
    left, right = (torch.rand(6, 1, 9, side) + 0.5 for side in sides)
    expected = kernels.compiled_direct(left, right)
    left[1, 0, 3, 3], right[4, 0, 0, 0], right[2, 0, 0, 1] = torch.nan, torch.inf, torch.inf
    found = kernels.compiled_direct(left, right)
    assert found[1].isnan() and found[4].isposinf() and found[2].isposinf()
    assert torch.equal(found[[0, 3, 5]], expected[[0, 3, 5]])


@needs_kernels
def test_long_sums_of_outer_products_lose_no_digits():
    left, right = torch.full((1, 1, 200_001, 13), 0.1), torch.full((1, 1, 200_001, 7), 0.3)
    expected = float((left[0, 0].double().T @ right[0, 0].double()).square().sum())
    assert abs(float(kernels.compiled_direct(left, right)) / expected - 1) < 1e-4


@needs_kernels
def test_sums_over_many_examples_lose_no_digits():
    """Of one sign, where each adds to what is large already."""
    examples = 50_000
    left, right = torch.full((examples, 2, 13), 0.1), torch.full((examples, 2, 33), 0.3)
    norms, total = sums.of_outer(left, right)
    found, total_of_all = outer.squares_and_sum(left, right, summing=True)
    assert norms.shape == (examples,) and torch.equal(found.sum(1), norms)
    for one in (total, total_of_all):
        assert (one.double() / (examples * 2 * 0.03) - 1).abs().max() < 1e-5
    geometry = Geometry(torch.Size((4, 3, 1, 2)), (1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    _, total = direct.squares_and_sum(
        torch.full((examples, 1, 3, 1, 3), 0.1), torch.full((examples, 1, 4, 1, 2), 0.3), geometry, summing=True
    )
    assert (total.double() / (examples * 2 * 0.03) - 1).abs().max() < 1e-5


@needs_kernels
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_nothing_to_multiply(shape):
    batch, positions, m, n = shape
    found, total = outer.squares_and_sum(torch.ones(batch, positions, m), torch.ones(batch, positions, n), summing=True)
    assert torch.equal(found.sum(1), torch.zeros(batch)) and torch.equal(total, torch.zeros(m, n))
    both = torch.ones(batch, 1, positions, m), torch.ones(batch, 1, positions, n)
    assert torch.equal(kernels.compiled_direct(*both).sum(1), torch.zeros(batch))
    assert torch.equal(kernels.compiled_gram(*both), torch.zeros(batch))


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("bits", VECTORS)
def test_from_pairs_of_positions(bits, count, threads, monkeypatch):
    """With inner products of one side at hand, or not."""
    monkeypatch.setattr(library, "bits", lambda: bits)
    threads(count)

    @grid(150)
    @given(sums_of_outer_products(), st.booleans())
    def drawn(both, at_hand):
        left, right = (side[:, 0] for side in both)
        found, sizes = pairs.inner_products(left, right, pairs.of_one(right) if at_hand else None)
        terms = (left.double() @ left.double().mT) * (right.double() @ right.double().mT)
        absolute = terms.abs().sum((1, 2))
        assert ((found - terms.sum((1, 2))).abs() <= TOLERANCE[left.dtype] * absolute).all()
        torch.testing.assert_close(sizes.double(), absolute, rtol=10 * TOLERANCE[left.dtype], atol=1e-12)

    drawn()


@needs_kernels
def test_numbers_that_are_none_stay_so():
    """An example with infinity, or with NaN, has no finite norm; those beside it have their own."""
    torch.manual_seed(0)
    left, right = torch.randn(4, 1, 21, 40), torch.randn(4, 1, 21, 33)
    wanted = kernels.compiled_gram(left, right)
    left[1, 0, 20, 3], right[2, 0, 0, 32] = torch.inf, torch.nan
    found = kernels.compiled_gram(left, right)
    assert torch.equal(found[[0, 3]], wanted[[0, 3]]) and not found[[1, 2]].isfinite().any()


@needs_kernels
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("bits", VECTORS)
def test_sums_over_planes(bits, count, threads, monkeypatch):
    monkeypatch.setattr(library, "bits", lambda: bits)
    threads(count)

    @grid(100)
    @given(st.data())
    def drawn(data):
        size, dtype = st.integers(1, 5), data.draw(st.sampled_from(list(TOLERANCE)))
        shape = data.draw(st.tuples(size, st.integers(1, 2), size, *[st.sampled_from([1, 3, 4, 16, 31, 67])] * 2))
        x, grads = (torch.randn(shape, dtype=dtype) for _ in range(2))
        mean, variance = torch.randn(shape[2], dtype=dtype), torch.rand(shape[2], dtype=dtype)
        layouts = [data.draw(st.sampled_from(["as they come", "examples inside", "channels last"])) for _ in range(2)]
        found = planes.plane_sums(laid_out(x, layouts[0]), laid_out(grads, layouts[1]), mean, variance, 1e-3)
        if found is None:  # numbers of a channel lie apart
            assert set(layouts) != {"as they come"}
            return
        rows = [t.double() for t in (x, grads, mean.view(-1, 1, 1), variance.view(-1, 1, 1))]
        products = rows[1] * (rows[0] - rows[2]) / (rows[3] + 1e-3).sqrt()
        for added, terms in zip(found, (products, rows[1]), strict=True):
            assert added.dtype == dtype
            assert ((added - terms.sum((1, 3, 4))).abs() <= TOLERANCE[dtype] * terms.abs().sum((1, 3, 4))).all()

    drawn()


@needs_kernels
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("bits", VECTORS)
def test_sums_over_rows(bits, count, threads, monkeypatch):
    """Rows that fill vectors, or not, far from zero too; more of them than are added up at once."""
    monkeypatch.setattr(library, "bits", lambda: bits)
    threads(count)

    @grid(100)
    @given(sums_of_outer_products(), st.booleans())
    def drawn(both, centred):
        x = both[0][:, 0] * 2 + 5
        grads = torch.randn_like(x)
        found = affine.row_sums(x, grads, 1e-3, centred)
        assert found is not None
        mean = x.double().mean(2, keepdim=True) if centred else 0
        centre = x.double() - mean
        products = grads.double() * centre / (centre.square().mean(2, keepdim=True) + 1e-3).sqrt()
        for added, terms in zip(found, (products, grads.double()), strict=True):
            assert added.dtype == x.dtype
            assert ((added - terms.sum(1)).abs() <= 4 * TOLERANCE[x.dtype] * (terms.abs().sum(1) + 1)).all()

    drawn()


@needs_kernels
def test_norms_of_linear_layers_with_their_sum(monkeypatch):
    """From the second step on, `.grad` comes out of the tiles that are squared, and is plain training's to rounding."""
    torch.manual_seed(0)
    monkeypatch.setattr(outer, "ELSEWHERE", outer.COST)  # wherever it pays
    for strategies in (kernels.NORMS, sums.OUTER):
        monkeypatch.setattr(strategies, "picked", {})
    model, x = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)), torch.randn(8, 64, 256)
    px = perex.attach(model)
    for _ in range(3):
        model.zero_grad()
        px.backward(model(x).square().mean((1, 2)))
    assert str(px.report()).count("compiled direct, with the sum") == 2
    norms, grads = px.norms(), [p.grad for p in model.parameters()]
    px.detach()
    model.zero_grad()
    model(x).square().mean().backward()
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-7)
    for b, norm in enumerate(norms):
        grads = torch.autograd.grad(model(x[b]).square().mean(), list(model.parameters()))
        torch.testing.assert_close(norm, torch.stack([g.norm() for g in grads]).norm(), rtol=1e-5, atol=0)


@needs_kernels
@pytest.mark.parametrize("run", [convolution.compiled_direct, convolution.compiled_pixel_gram])
def test_what_is_wrong_with_one_example_is_its_own(run):
    geometry = Geometry(torch.Size((5, 4, 3, 3)), (1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    x, grads = torch.randn(6, 1, 4, 7, 7), torch.randn(6, 1, 5, 7, 7)
    expected = run(x, grads, geometry)
    x[1, 0, 0, 3, 3], grads[4, 0, 0, 0, 0] = torch.nan, torch.inf
    found = run(x, grads, geometry)
    assert not found[[1, 4]].isfinite().any()
    assert torch.equal(found[[0, 2, 3, 5]], expected[[0, 2, 3, 5]])


@needs_kernels
def test_terms_that_cancel_are_multiplied_out():
    """With inputs that are all alike and gradients that add up to nothing, the Gram form has no digit left."""
    geometry = Geometry(torch.Size((4, 3, 1, 1)), (1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    grads = torch.randn(3, 1, 4, 8, 8)
    grads[1] -= grads[1].mean((-1, -2), keepdim=True)
    x = torch.full((3, 1, 3, 8, 8), 1000.0)
    expected = by_backend(x, grads, geometry).flatten(1).square().sum(1)
    found = convolution.compiled_pixel_gram(x, grads, geometry).double()
    exact = by_backend(x, grads, geometry)[1].abs().max()
    assert (found - expected).abs()[[0, 2]].max() <= 1e-4 * expected[0]
    assert found[1] <= 12 * (1e-3 + exact) ** 2 * 64  # what rounding the sum of 64 gradients leaves


@needs_kernels
@pytest.mark.parametrize("run", [convolution.compiled_direct, convolution.compiled_pixel_gram])
def test_where_kernels_cannot_read_other_ways_do(run):
    geometry = Geometry(torch.Size((5, 4, 3, 3)), (1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    x, grads = torch.randn(6, 1, 4, 7, 7), torch.randn(6, 1, 5, 7, 7)
    expected = run(x, grads, geometry)
    followed = x.clone().requires_grad_()
    found = run(followed, grads, geometry)
    torch.testing.assert_close(found.detach(), expected)
    assert torch.autograd.grad(found.sum(), followed)[0].abs().sum() > 0
    stacked = torch.func.vmap(lambda x, g: run(x, g, geometry))(torch.stack((x, x)), torch.stack((grads, grads)))
    torch.testing.assert_close(stacked, torch.stack((expected, expected)))


@needs_kernels
@pytest.mark.parametrize("way", ["compiled direct", "compiled pixel Gram"])
def test_operations_are_counted(way):
    geometry = Geometry(torch.Size((32, 3, 3, 3)), (1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    x, grads = torch.randn(4, 1, 3, 8, 8), torch.randn(4, 1, 32, 8, 8)
    plan = convolution.NORMS.ways[way].plan(x.shape, grads.shape, geometry)
    with FlopCounterMode(display=False) as counter:
        convolution.NORMS.ways[way].run(x, grads, geometry)
    assert counter.get_total_flops() == plan.flops > 0


@needs_kernels
def test_there_are_none_for_three_dimensions_or_other_numbers():
    geometry = Geometry(torch.Size((2, 2, 1, 1, 1)), (1,) * 3, (0,) * 3, (1,) * 3, False, (0,) * 3, 1)
    volumes = torch.Size((3, 1, 2, 4, 4, 4))
    assert direct.plan(volumes, volumes, geometry) is None and gram.plan(volumes, volumes, geometry) is None
    long = replace(geometry, weight_shape=torch.Size((2, 2, shape.LONGEST + 1)), stride=(1,))
    assert not shape.applies(long)
    layer = nn.Conv2d(2, 3, 3, dtype=torch.complex128)
    with perex.attach(layer, loss_reduction="sum") as px:
        layer(torch.randn(3, 2, 5, 5, dtype=torch.complex128)).abs().sum().backward()
        assert "compiled" not in str(px.report())


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 40, 3), nn.Flatten(), nn.LazyLinear(5)
    )  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("param_grads", [True, False])
def test_a_model_takes_them(param_grads, monkeypatch):
    monkeypatch.setattr(pooling, "WORTH_REORDERING", 1)
    model, x = net(), torch.randn(8, 3, 16, 16)
    model(x)
    with perex.attach(model, param_grads=param_grads) as px:
        for _ in range(3):
            nn.functional.cross_entropy(model(x), torch.arange(8) % 5).backward()
        assert str(px.report()).count("compiled") == 2


def test_a_model_without_them():
    model, x = net().double(), torch.randn(8, 3, 16, 16, dtype=torch.float64)
    model(x)
    with without_kernels():
        check(model, (x,))
        with perex.attach(model) as px:
            nn.functional.cross_entropy(model(x), torch.arange(8) % 5).backward()
            assert "compiled" not in str(px.report())


def test_another_version_is_not_called(monkeypatch):
    monkeypatch.setattr(library, "VERSION", library.VERSION + 1)
    library.library.cache_clear()
    try:
        assert library.library() is None
    finally:
        monkeypatch.undo()
        library.library.cache_clear()
    assert (library.library() is not None) == BUILT


def test_they_were_built():
    """Not a test of the build if there is no compiler; where there is one, a build that failed is not to go unseen."""
    if shutil.which("gcc") is None or not library.Path(library.__file__).with_name("kernels.c").exists():
        pytest.skip("no C compiler")
    assert BUILT


@needs_kernels
@pytest.mark.parametrize("width", [7, 8, 35])
@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
def test_pixels_that_no_place_meets_do_not_count(width, poison):
    """Rows between those that a stride picks: the products of the last of an odd number of places end before them."""
    geometry = Geometry(torch.Size((32, 3, 2, 3)), (3, 1), (0, 0), (1, 1), False, (0, 0), 1)
    x, grads = (torch.randn(4, 1, *size, dtype=torch.float64) for size in ((3, 33, width), (32, 11, width - 2)))
    expected = by_backend(x, grads, geometry)
    x[..., 2::3, :] = poison
    squares = expected.flatten(1).square().sum(1)
    for run in (convolution.compiled_direct, convolution.compiled_pixel_gram):
        torch.testing.assert_close(run(x, grads, geometry), squares)
    found, total = direct.squares_and_sum(x, grads, geometry, True)
    torch.testing.assert_close(found.sum(1), squares)
    torch.testing.assert_close(total, expected.sum(0))


@needs_kernels
def test_pooling_that_vectors_are_too_wide_for_is_left_to_others():
    images = torch.randn(2, 3, 64, 64)
    for window, step in (([64, 64], [64, 64]), ([2, 2], [2, 20000]), ([8, 8], [1, 5])):
        assert pooled(images, [window, step, [0, 0], [1, 1], False]) is None
    assert pooled(torch._neg_view(images), [[2, 2], [2, 2], [0, 0], [1, 1], False]) is None
    assert pooled(images[:0], [[2, 2], [2, 2], [0, 0], [1, 1], False]) is None
    assert pooled(images, [[2, 2], [2, 2], [0, 0], [1, 1], False]) is not None


@needs_kernels
@pytest.mark.parametrize(
    "size, kernel", [((512, 512), (1, 1)), ((300, 300), (3, 3)), ((2**18,), (3,)), ((1, 9001), (1, 5))]
)
def test_long_sums_keep_their_digits(size, kernel):
    """Numbers of one sign over many places: the sum of one place after the other would lose three digits."""
    ones = (1,) * len(size)
    geometry = Geometry(torch.Size((4, 2, *kernel)), ones, (0,) * len(size), ones, False, (0,) * len(size), 1)
    x = torch.full((2, 1, 2, *size), 0.3)
    grads = torch.full((2, 1, 4, *(n - k + 1 for n, k in zip(size, kernel, strict=True))), 0.7)
    expected = by_backend(x, grads, geometry)
    found, total = direct.squares_and_sum(x, grads, geometry, True)
    torch.testing.assert_close(found.sum(1).double(), expected.flatten(1).square().sum(1), rtol=2e-4, atol=0)
    torch.testing.assert_close(total.double(), expected.sum(0), rtol=1e-4, atol=0)


@needs_kernels
def test_options_that_torch_refuses_are_left_to_it():
    images = torch.randn(8, 16, 32, 32)
    for window, step, padding, spread in (
        (2, 0, 0, 1), (3, 1, -60, 1), (2, 2, 1, 0), (3, 1, 3, 1), (0, 1, 0, 1), (-1, 1, 0, 1), (2, 2, 0, -1),
    ):  # fmt: skip
        assert pooled(images, [[window] * 2, [step] * 2, [padding] * 2, [spread] * 2, False]) is None
    assert pooled(torch._efficientzerotensor((8, 16, 32, 32)), [[2] * 2, [2] * 2, [0] * 2, [1] * 2, False]) is None


@needs_kernels
def test_no_examples():
    geometry = Geometry(torch.Size((4, 3, 3, 3)), (1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    x, grads = torch.randn(0, 1, 3, 8, 8), torch.randn(0, 1, 4, 8, 8)
    found, total = direct.squares_and_sum(x, grads, geometry, True)
    assert found.shape[0] == 0 and not total.any()
    assert gram.inner_products(x, grads, geometry)[0].shape == (0,)


LAYERS = {
    "linear": (lambda: nn.Linear(8, 8), (4, 8)),
    "over positions": (lambda: nn.Linear(8, 8), (4, 6, 8)),
    "layer norm": (lambda: nn.LayerNorm(8), (4, 6, 8)),
    "RMS norm": (lambda: nn.RMSNorm(8), (4, 6, 8)),
    "convolution": (lambda: nn.Conv2d(2, 8, 3), (4, 2, 8, 8)),
    "batch norm": (lambda: nn.BatchNorm2d(2).eval(), (4, 2, 8, 8)),
}


@pytest.mark.parametrize("param_grads", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_without_memory(name, param_grads):
    """The backward of `sgn` gives tensors of zeros that have no memory, for anybody to read at address 0."""
    make, shape = LAYERS[name]
    model, x = make(), torch.randn(shape)
    for way in [None, *(way for way in ("compiled direct", "compiled Gram", "compiled pixel Gram") if BUILT)]:
        with perex.attach(model, param_grads=param_grads, strategies=[way] if way else []) as px:
            for _ in range(2):
                px.backward(model(x).sgn().flatten(1).sum(1))
        assert torch.equal(px.norms(), torch.zeros(4))


@needs_kernels
def test_numbers_whose_sign_is_a_flag():
    """As in `x.conj().imag`: what lies in memory is -x."""
    torch.manual_seed(0)
    x, grads = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    flagged = torch._neg_view(x)
    assert not library.runnable(flagged)
    factor = Outer(grads, flagged, torch.Size((8, 8)))
    torch.testing.assert_close(factor.squared_norm(), Outer(grads, -x, torch.Size((8, 8))).squared_norm())
    torch.testing.assert_close(sums.of_outer(grads, flagged)[1], sums.of_outer(grads, -x)[1])
    assert affine.row_sums(flagged, grads, 1e-5, True) is None
