"""What factors answer beyond norms, each kind against its multiplied-out gradients."""

import itertools
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from perex.factors import Dense, Derived, Factor, Few, Outer, Part, Patches, Place, Pulled, Rows, Total
from perex.factors.terms import added
from perex.kernels import blocks
from perex.kernels.geometry import Geometry
from perex.summing import Treatment, sum_of

B, V, D = 5, 6, 4  # the parameter is (V, D)
SHAPE = torch.Size((V, D))


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def few(factor: Factor, batch: int) -> Few:
    """The gradients of a batch's second and fourth example, of a factor of two."""
    return Few(factor.take(torch.tensor([0, 1])), [1, 3], batch)


def part(batch: int) -> Part:
    """Every other row of the parameter, transposed."""
    place = Place(SHAPE, (D, V // 2), (1, 2 * D), D)
    return Part(Outer(random(batch, 3, D), random(batch, 3, V // 2), torch.Size((D, V // 2))), place)


def pulled(batch: int) -> Pulled:
    """Of a weight that is a function of the parameter."""
    parameter = random(V, D).requires_grad_()
    inner = Outer(random(batch, 3, D), random(batch, 3, 2), torch.Size((D, 2)))
    return Pulled(inner, Derived(parameter.sin().mT @ random(V, 2), parameter), SHAPE)


KINDS = {
    "dense": lambda b: Dense(random(b, V, D)),
    "outer": lambda b: Outer(random(b, 3, V), random(b, 3, D), SHAPE),
    "outer, one position": lambda b: Outer(random(b, 1, V), random(b, 1, D), SHAPE),
    "outer, many positions": lambda b: Outer(random(b, 40, V), random(b, 40, D), SHAPE),
    "outer, no position": lambda b: Outer(random(b, 0, V), random(b, 0, D), SHAPE),
    "rows": lambda b: Rows(torch.randint(V, (b, 7)), random(b, 7, D), SHAPE),
    "rows, none": lambda b: Rows(torch.randint(V, (b, 0)), random(b, 0, D), SHAPE),
    "few": lambda b: few(KINDS["outer"](b), b),
    "few rows": lambda b: few(KINDS["rows"](b), b),
    "part": part,
    "pulled": pulled,
    "few pulled": lambda b: few(pulled(b), b),
    "few parts": lambda b: few(part(b), b),
    "total": lambda b: Total([KINDS[name](b) for name in ("dense", "outer", "rows", "few", "part")]),
}


def multiplied_out(factor: Factor) -> Tensor:
    return factor.dense(0, factor.batch).flatten(1)


@pytest.fixture(params=[1, 2**20], ids=["blocks of one", "one block"], autouse=True)
def block(request, monkeypatch):
    """All of it in pieces as small as can be, too."""

    monkeypatch.setattr(blocks, "BLOCK", request.param)


def agrees(factor: Factor) -> None:
    """All that a factor answers of itself is what its multiplied-out gradients say."""
    expected = multiplied_out(factor)
    weights, direction = random(factor.batch), random(*factor.shape)
    rows, entries = factor.shape[0], factor.shape.numel() // factor.shape[0]
    left, right = random(rows, 3), random(entries, 3)
    torch.testing.assert_close(factor.weighted_sum(weights).flatten(), weights @ expected)
    torch.testing.assert_close(factor.along(direction), expected @ direction.flatten())
    matrices = expected.reshape(factor.batch, rows, entries)
    projected = torch.einsum("bmn,mk,nk->bk", matrices, left, right)
    torch.testing.assert_close(factor.project(left, right), projected)
    torch.testing.assert_close(factor.pairs(factor), expected @ expected.T)
    torch.testing.assert_close(multiplied_out(factor.condensed()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind(kind):
    agrees(KINDS[kind](B))


@pytest.mark.parametrize(("first", "second"), list(itertools.product(KINDS, KINDS)))
def test_pairs_of_two_batches(first, second):
    one, two = KINDS[first](B), KINDS[second](B + 2)
    torch.testing.assert_close(one.pairs(two), multiplied_out(one) @ multiplied_out(two).T)


def test_a_direction_that_is_a_view():
    factor = part(B)
    direction = random(3, D, V)[1].T  # of other strides, and not at the start of its memory
    torch.testing.assert_close(factor.along(direction), multiplied_out(factor) @ direction.flatten())


CONVOLUTIONS = [
    # weight, input, output, stride, padding, dilation, transposed, output padding, groups
    ((6, 3, 3), (3, 8), (6, 6), (1,), (0,), (1,), False, (0,), 1),
    ((6, 3, 3, 2), (6, 8, 7), (6, 4, 4), (2, 2), (1, 1), (1, 2), False, (0, 0), 2),
    ((4, 1, 3, 3), (4, 5, 5), (4, 5, 5), (1, 1), (1, 1), (1, 1), False, (0, 0), 4),
    ((6, 2, 3, 3), (6, 4, 4), (4, 8, 8), (2, 2), (1, 1), (1, 1), True, (1, 1), 2),
    ((4, 3, 2, 2, 2), (3, 3, 4, 3), (4, 2, 3, 2), (1, 1, 1), (0, 0, 0), (1, 1, 1), False, (0, 0, 0), 1),
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=lambda options: f"{len(options[3])}d, groups {options[-1]}")
@pytest.mark.parametrize("images", [1, 2])
def test_convolutions(options, images):
    weight, x, out, *others = options
    geometry = Geometry(torch.Size(weight), *others)
    one, two = (Patches(random(b, images, *x), random(b, images, *out), geometry) for b in (B, B + 2))
    agrees(one)
    torch.testing.assert_close(one.pairs(two), multiplied_out(one) @ multiplied_out(two).T)
    agrees(few(one, B))


def test_complex_gradients():
    factor = Dense(random(B, V, D, dtype=torch.complex128))
    flat, direction = factor.values.flatten(1), random(V, D, dtype=torch.complex128)
    torch.testing.assert_close(factor.along(direction), (flat * direction.flatten().conj()).sum(1).real)
    torch.testing.assert_close(factor.pairs(factor), (flat @ flat.mH).real)
    weights = random(B)
    torch.testing.assert_close(factor.weighted_sum(weights).flatten(), weights.to(flat) @ flat)


def test_batches_of_none():
    for kind in ("dense", "outer", "rows"):
        factor = KINDS[kind](0)
        assert factor.weighted_sum(random(0)).shape == SHAPE and not factor.weighted_sum(random(0)).any()
        assert factor.along(random(V, D)).shape == (0,)
        assert factor.pairs(KINDS["outer"](B)).shape == (0, B) and KINDS["outer"](B).pairs(factor).shape == (B, 0)


def elements(factor: Factor) -> int:
    """How many elements of gradients, and of what they are made of, a factor holds."""
    inner = [factor] if not isinstance(factor, Total) else factor.factors
    while any(isinstance(one, (Few, Part)) for one in inner):
        inner = [one.factor if isinstance(one, (Few, Part)) else one for one in inner]
    return sum(v.numel() for one in inner for v in vars(one).values() if isinstance(v, Tensor))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "pulled" not in kind])  # those lose their graph
def test_condensed_is_never_larger(kind):
    factor = KINDS[kind](B)
    assert elements(factor.condensed()) <= elements(factor)


def test_what_is_kept_of_long_sequences_is_multiplied_out():
    long, short = (Outer(random(B, t, V), random(B, t, D), SHAPE) for t in (40, 2))
    assert isinstance(long.condensed(), Dense)
    assert short.condensed() is short
    assert long.condensed().plan().flops == long.dense_flops() + 2 * B * V * D
    images = Patches(random(B, 1, 3, 9, 9), random(B, 1, 4, 9, 9), square(4, 3))
    assert isinstance(images.condensed(), Dense)


def square(rows: int, columns: int) -> Geometry:
    """A padded 3x3 convolution."""
    return Geometry(torch.Size((rows, columns, 3, 3)), (1, 1), (1, 1), (1, 1), False, (0, 0), 1)


# Examples that are treated otherwise


def among(examples: Iterable[int]) -> Tensor:
    """Booleans `(B,)`."""
    return torch.isin(torch.arange(B), torch.tensor(list(examples)))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_without_some_and_with_others_apart(kind, several):
    factor, weights = KINDS[kind](B), random(B)
    for skip, apart, doubt in itertools.product([None, [0], [1, 3], range(B)], [None, [2], range(B)], [None, [0, 4]]):
        who = [None if some is None else among(some) for some in (skip, apart)]
        doubts = None if doubt is None else among(doubt)
        found = sum_of(factor, weights, Treatment(*who), doubts, several)
        kept = weights if who[0] is None else weights * ~who[0]
        expected = (kept @ multiplied_out(factor)).reshape(factor.shape)
        torch.testing.assert_close(found.whole(), expected)
        twice = found.plus(sum_of(factor, weights, Treatment(*who), doubts, several))
        torch.testing.assert_close(twice.whole(), 2 * expected)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_bound_what_is_added_up(kind):
    factor = KINDS[kind](B)
    sizes = factor.sizes()
    if sizes is not None:
        assert bool((sizes + 1e-9 >= multiplied_out(factor).norm(dim=1)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_terms_add_up_to_the_squared_norm(kind):
    factor = KINDS[kind](B)
    torch.testing.assert_close(factor.terms().total(), multiplied_out(factor).square().sum(1))
    others = [KINDS[name](B) for name in ("dense", "outer", "rows")]
    whole = added([factor.terms(), *(other.terms() for other in others)])
    expected = sum(multiplied_out(each).square().sum(1) for each in (factor, *others))
    torch.testing.assert_close(whole, expected)
