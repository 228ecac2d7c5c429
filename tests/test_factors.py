"""The algebra of factors, each kind against its multiplied-out gradients."""

import itertools

import pytest
import torch
from torch import Tensor

from perex.factors import Dense, Factor, Outer, Patches, Rows, Total
from perex.factors.terms import Terms
from perex.kernels import blocks, convolution, outer, segments
from perex.kernels.geometry import Geometry
from perex.kernels.strategies import Preferences, preferring

B, V, D = 5, 7, 4  # the parameter is (V, D)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def conv(kernel: int = 1, groups: int = 1) -> Patches:
    geometry = Geometry(torch.Size((V, D, kernel)), (1,), (0,), (1,), False, (0,), groups)
    return Patches(random(B, 2, D * groups, 6), random(B, 2, V, 7 - kernel), geometry)


FACTORS = {
    "dense": lambda: Dense(random(B, V, D)),
    "outer": lambda: Outer(random(B, 3, V), random(B, 3, D), torch.Size((V, D))),
    "outer, one position": lambda: Outer(random(B, 1, V), random(B, 1, D), torch.Size((V, D))),
    "outer, many positions": lambda: Outer(random(B, 40, V), random(B, 40, D), torch.Size((V, D))),
    "outer, no position": lambda: Outer(random(B, 0, V), random(B, 0, D), torch.Size((V, D))),
    "rows": lambda: Rows(torch.randint(V, (B, 6)), random(B, 6, D), torch.Size((V, D))),
    "rows, none": lambda: Rows(torch.randint(V, (B, 0)), random(B, 0, D), torch.Size((V, D))),
}


def multiplied_out(factor: Factor) -> Tensor:
    return factor.dense(0, B).reshape(B, -1)


@pytest.mark.parametrize("kind", FACTORS)
def test_squared_norm(kind):
    factor = FACTORS[kind]()
    torch.testing.assert_close(factor.squared_norm(), multiplied_out(factor).square().sum(1))


@pytest.mark.parametrize(("first", "second"), list(itertools.product(FACTORS, FACTORS)))
def test_dot_and_sum(first, second):
    one, two = FACTORS[first](), FACTORS[second]()
    expected = (multiplied_out(one) * multiplied_out(two)).sum(1)
    torch.testing.assert_close(one.dot(two), expected)
    torch.testing.assert_close(one.blockwise_dot(two), expected)
    total = Total([one, two, FACTORS[first]()])
    torch.testing.assert_close(total.squared_norm(), multiplied_out(total).square().sum(1))
    torch.testing.assert_close(total.dot(one), (multiplied_out(total) * multiplied_out(one)).sum(1))


def test_sum_of_convolutions():
    for one, two in ((conv(3), conv(3)), (conv(3), Dense(random(B, V, D, 3)))):
        total = Total([one, two])
        expected = (one.dense(0, B) + two.dense(0, B)).flatten(1).square().sum(1)
        torch.testing.assert_close(total.squared_norm(), expected)


def test_uses_of_one_kind_are_merged():
    same = Total([FACTORS["outer"](), FACTORS["outer, many positions"](), FACTORS["outer"]()])
    assert [type(factor) for factor in same.factors] == [Outer]
    mixed = Total([FACTORS["outer"](), FACTORS["rows"](), FACTORS["outer"](), FACTORS["rows"]()])
    assert [type(factor) for factor in mixed.factors] == [Outer, Rows]


def test_a_sum_that_cancels_is_not_negative():
    one = FACTORS["outer"]()
    total = Total([one, Dense(-one.dense(0, B))])
    assert (total.squared_norm() >= 0).all() and total.squared_norm().max() < 1e-12


@pytest.mark.parametrize(("positions", "groups"), [(1, 1), (3, 1), (3, 2), (50, 2), (150, 1)])
def test_outer_norm_is_the_same_by_either_form(positions, groups, monkeypatch):
    left, right = random(B, groups, positions, 6), random(B, groups, positions, 5)
    expected = (left.mT @ right).square().sum((1, 2, 3))
    for block in (1, 100, 2**20):
        monkeypatch.setattr(blocks, "BLOCK", block)
        for name in outer.NORMS.plans(left.shape, right.shape):
            found = Terms.of(outer.NORMS.ways[name].run(left, right))
            torch.testing.assert_close(found.total(), expected)
        torch.testing.assert_close(outer.gram_dot(left, right, left, right), expected)
        torch.testing.assert_close(outer.squared_norm(left, right), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0.0, 1e-4, 1e-2, 1.0])
def test_positions_that_cancel(shift, dtype):
    """Where the Gram form loses its digits, the gradient is multiplied out: as a loop does."""
    left, right = random(16, 1, 1, 64).to(dtype), random(16, 1, 1, 64).to(dtype)
    lefts, rights = torch.cat((left, -(1 + shift) * left), 2), torch.cat((right, right), 2)
    expected = (lefts.double().mT @ rights.double()).square().sum((1, 2, 3))
    with preferring(Preferences(("Gram",))):
        found = outer.squared_norm(lefts, rights)
    slack = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double().sqrt(), expected.sqrt(), rtol=slack * 100, atol=slack * 64)


def test_images_that_cancel():
    x, grads = random(4, 1, 8, 5, 5), random(4, 1, 8, 5, 5)
    geometry = Geometry(torch.Size((8, 8, 3, 3)), (1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    factor = Patches(torch.cat((x, x), 1), torch.cat((grads, -grads), 1), geometry)
    with preferring(Preferences(("pixel Gram",))):
        assert float(factor.squared_norm().abs().max()) < 1e-24


def test_segments_keep_examples_and_repeated_ids_apart():
    ids = torch.tensor([[2, 2, 0], [2, 1, 2]])
    grads = torch.tensor([[[1.0], [2.0], [5.0]], [[3.0], [7.0], [-3.0]]])
    assert segments.squared_norm(ids, grads, 3).tolist() == [(1 + 2) ** 2 + 5**2, (3 - 3) ** 2 + 7**2]


@pytest.mark.parametrize("batch", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("elements", [0, 1, 2**19, 2**30])
def test_blocks_cover_the_batch_and_never_hold_all_of_it(batch, elements):
    ranges = list(blocks.example_blocks(batch, elements))
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(batch))
    assert batch < 2 or all(stop - start < batch for start, stop in ranges)
    assert all((stop - start) * elements <= max(blocks.BLOCK, elements) for start, stop in ranges)


def test_an_example_that_is_not_a_number_spoils_no_other():
    for factor in (FACTORS["outer"](), FACTORS["outer, many positions"](), FACTORS["rows"](), conv(3)):
        before = factor.squared_norm()
        for tensor in (getattr(factor, name, None) for name in ("left", "grads")):
            if tensor is not None:
                tensor[2] = float("nan")
        after = factor.squared_norm()
        assert after[2].isnan()
        keep = torch.tensor([0, 1, 3, 4])
        assert torch.equal(before[keep], after[keep])


GEOMETRIES = [
    # weight, stride, padding, dilation, transposed, output padding, groups, input
    ((6, 4, 3), (1,), (1,), (1,), False, (0,), 1, (9,)),
    ((6, 2, 3), (2,), (2,), (2,), False, (0,), 2, (11,)),
    ((6, 1, 2, 3), (2, 1), (1, 0), (1, 2), False, (0, 0), 6, (7, 8)),
    ((4, 4, 2, 1, 3), (1, 2, 1), (0, 1, 1), (1, 1, 1), False, (0, 0, 0), 1, (4, 3, 5)),
    ((4, 3, 3), (2,), (1,), (1,), True, (1,), 1, (5,)),
    ((4, 3, 3, 2), (2, 3), (1, 0), (1, 2), True, (1, 0), 2, (4, 3)),
]


@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda case: str(case[0]))
@pytest.mark.parametrize("rows", [1, 3])
def test_the_ways_to_the_norm_of_a_convolution_agree(case, rows):
    weight, *options, groups, spatial = case
    geometry = Geometry(torch.Size(weight), *options, groups)
    transposed = geometry.transposed
    x = random(B, rows, weight[0] if transposed else weight[1] * groups, *spatial)
    kernel = torch.zeros(weight, dtype=torch.float64)
    out = torch.ops.aten.convolution(
        x[:, 0], kernel, None, geometry.stride, geometry.padding, geometry.dilation, transposed,
        geometry.output_padding, groups,
    )  # fmt: skip
    factor = Patches(x, random(B, rows, *out.shape[1:]), geometry)
    expected = multiplied_out(factor).square().sum(1)
    torch.testing.assert_close(factor.squared_norm(), expected)
    for way in convolution.NORMS.plans(factor.x.shape, factor.grads.shape, geometry):
        with preferring(Preferences((way,))):
            assert factor.plan().way.startswith(way)
            torch.testing.assert_close(factor.squared_norm(), expected)
