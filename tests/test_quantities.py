"""Statistics beyond norms; every other model is asked for them in `oracle.check`."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import perex

B = 6


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(size: int = B) -> Tensor:
    return torch.randn(size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sin().square().sum(1)


def each(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The loop: gradients `(B, *shape)` by parameter."""
    rows = [torch.autograd.grad(losses_of(model, x[b : b + 1]).sum(), list(model.parameters())) for b in range(len(x))]
    names = [name for name, _ in model.named_parameters()]
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in gradients.values()], 1)


def read(quantity: perex.Quantity, model: nn.Module, x: Tensor, **options) -> perex.Tracker:
    with perex.attach(model, quantity, **options) as px:
        px.backward(losses_of(model, x))
    return px


# Inner products


def test_directions_of_all_forms():
    model, x = net(), batch()
    gradients, optimizer = each(model, x), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses_of(model, x).mean().backward()
    optimizer.step()
    momentum = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
    gradients = each(model, x)
    expected = flat(gradients) @ torch.cat([m.flatten() for m in momentum.values()])
    for direction in (momentum, list(momentum.values()), iter(momentum.values()), [p.grad for p in model.parameters()]):
        dots = perex.Dots(direction)
        torch.testing.assert_close(read(dots, model, x, param_grads=False).read(dots), expected)


def test_a_direction_is_read_anew_in_each_backward():
    model, x = net(), batch()
    direction = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    dots = perex.Dots(direction)
    with perex.attach(model, dots) as px:
        px.backward(losses_of(model, x))
        assert not px.read(dots).any()
        for tensor in direction.values():
            tensor.fill_(1.0)
        px.backward(losses_of(model, x))
        found = px.read(dots)
    torch.testing.assert_close(found, flat(each(model, x)).sum(1))


def test_two_forwards_and_directions_that_the_backward_changes():
    """With two forwards, values are only made when they are read: `.grad` is another by then."""
    model, x = net(), batch()
    losses_of(model, x).mean().backward()
    grad, expected = [p.grad for p in model.parameters()], flat(each(model, x))
    vector = torch.cat([g.flatten().clone() for g in grad])
    dots, own = perex.Dots(grad), perex.Dots("grad")
    with perex.attach(model, dots, own) as px:
        px.backward(torch.cat((losses_of(model, x[:2]), losses_of(model, x[2:]))))
        torch.testing.assert_close(px.read(dots), expected @ vector)
        with pytest.raises(perex.NotReadyError, match="its own part of the gradient only"):
            px.read(own)


def test_none_stands_for_zeros():
    model, x = net(), batch()
    dots = perex.Dots({"0.weight": None, "0.bias": None, "2.weight": None, "2.bias": torch.ones(3)})
    px = read(dots, model, x)
    gradients = each(model, x)
    torch.testing.assert_close(px.read(dots), gradients["2.bias"].sum(1))
    by = px.read(dots, by="module")
    assert set(by) == {"0", "2"} and not by["0"].any()
    cosines = dots.cosines(px, by="module")
    assert not cosines["0"].any()
    norms = torch.cat((gradients["2.weight"].flatten(1), gradients["2.bias"]), 1).norm(dim=1)
    torch.testing.assert_close(cosines["2"], gradients["2.bias"].sum(1) / norms / math.sqrt(3))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_gradient_of_the_batch_itself(reduction):
    model, x = net(), batch()
    gradients, dots = flat(each(model, x)), perex.Dots("grad")
    px = read(dots, model, x, loss_reduction=reduction)
    grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(px.read(dots), gradients @ grad)
    torch.testing.assert_close(dots.cosines(px), gradients @ grad / gradients.norm(dim=1) / grad.norm())
    assert set(dots.cosines(px, by="parameter")) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        ({"0.weight": torch.ones(5, 4)}, "no direction for parameter '0.bias'"),
        (dict.fromkeys(["0.weight", "0.bias", "2.weight", "2.bias"], torch.ones(5, 4)), r"'0.bias' has shape \(5, 4\)"),
        ([torch.ones(5, 4)], "1 directions for a model of 4 parameters"),
        ("momentum", "direction='momentum'"),
    ],
)
def test_directions_that_do_not_fit(direction, message):
    model = net()
    with pytest.raises(perex.PerexError, match=message):
        perex.attach(model, perex.Dots(direction))
    perex.attach(model).detach()  # nothing of the attempt is left


def test_a_quantity_without_a_degree():
    class Odd(perex.Quantity):
        def reduce(self, name, gradient):
            return gradient.squared_norm()

    with pytest.raises(perex.AttachError, match="Odd: a quantity says its `degree`"):
        perex.attach(net(), Odd())


# Projections


def test_variance_is_what_the_docstring_says():
    """All signs there are, for matrices so small that they can be counted; mean and variance of the inner product."""
    torch.manual_seed(2)
    for m, n in ((1, 3), (3, 1), (2, 3), (4, 4)):
        G, H = torch.randn(2, m, n, dtype=torch.float64)
        s = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=m)), dtype=torch.float64)
        t = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64)
        products = ((s @ G @ t.T) * (s @ H @ t.T)).flatten()
        torch.testing.assert_close(products.mean(), (G * H).sum())
        P, Q, M = G @ G.T, H @ H.T, G @ H.T
        g, h, gh = G.square().sum(0), H.square().sum(0), (G * H).sum(0)
        variance = (
            P.trace() * Q.trace() + 2 * (P @ Q).trace() - 2 * (P.diag() * Q.diag()).sum()
            + 2 * ((G * H).sum() ** 2 + (M @ M).trace() + M.square().sum() - 2 * M.diag().square().sum())
            - 2 * (g * h + 2 * gh**2 - 2 * (G**2 * H**2).sum(0)).sum()
            - (G * H).sum() ** 2
        )  # fmt: skip
        torch.testing.assert_close(products.var(correction=0), variance)
        assert float(variance) <= 8 * float(G.square().sum() * H.square().sum())


def test_inner_products_of_projections():
    """Unbiased over seeds, and as close as the variance says, between different batches."""
    model, x, z = net(), batch(4), 1 + batch(5)
    one, two = flat(each(model, x)), flat(each(model, z))
    found = []
    for seed in range(60):
        projections = perex.Projections(64, seed)
        with perex.attach(model, projections, param_grads=False) as px:
            px.backward(losses_of(model, x))
            first = px.read(projections)
            px.backward(losses_of(model, z))
            found.append(first @ px.read(projections).T)
    found = torch.stack(found)
    spread = one.norm(dim=1)[:, None] * two.norm(dim=1) * math.sqrt(8 / 64)
    assert bool(((found.mean(0) - one @ two.T).abs() < 4 * spread / math.sqrt(60)).all())
    assert bool((found.std(0) < spread).all())


def test_signs_are_the_same_everywhere():
    """They are fixed by seed and name, for any number of rows; the first of them are written down here."""
    a, b, c = perex.Projections(8), perex.Projections(8, seed=1), perex.Projections(3)
    assert torch.equal(a.signs("w, rows", 5)[:3], a.signs("w, rows", 3))
    assert not torch.equal(a.signs("w, rows", 5), b.signs("w, rows", 5))
    assert not torch.equal(a.signs("w, rows", 5), a.signs("v, rows", 5))
    assert torch.equal(a.signs("w, rows", 5)[:, :3], c.signs("w, rows", 5))
    assert a.signs("w, rows", 2).tolist() == SIGNS


SIGNS = [[-1, -1, -1, -1, 1, 1, -1, 1], [-1, -1, -1, -1, 1, 1, 1, -1]]


@pytest.mark.parametrize("arguments", [{"dim": 0}, {"dim": 2.5}, {"dim": 8, "seed": -1}, {"dim": True}])
def test_arguments_of_projections(arguments):
    with pytest.raises(perex.PerexError, match="it is"):
        perex.Projections(**arguments)


# The gradients


def test_chosen_parameters_only():
    model, x = net(), batch()
    grads = perex.Grads(["2.*"])
    px = read(grads, model, x)
    gradients = each(model, x)
    for found in (px.read(grads), px.read(grads, by="parameter"), px.read(grads, by="module")["2"]):
        assert set(found) == {"2.weight", "2.bias"}
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, gradients[name])
    with pytest.raises(perex.AttachError, match="'head' matches no tracked parameter"):
        perex.attach(model, perex.Grads("head"))


# The noise scale


def test_noise_scale_of_one_batch():
    model, x = net(), batch()
    gradients, noise = each(model, x), perex.NoiseScale(decay=0.5)
    with pytest.raises(perex.NotReadyError, match="before update"):
        noise.value()
    for _ in range(3):  # the same batch: the corrected averages are those of one
        px = read(noise, model, x)
        noise.update(px)

    def expected(names: list[str]) -> tuple[float, float]:
        rows = torch.cat([gradients[name].flatten(1) for name in names], 1)
        trace, mean = rows.var(0).sum(), rows.mean(0).square().sum()
        return float(trace), float(mean - trace / B)

    assert noise.parts() == pytest.approx(expected(list(gradients)))
    for name, pair in noise.parts(by="parameter").items():
        assert pair == pytest.approx(expected([name]))
    for path, pair in noise.parts(by="module").items():
        assert pair == pytest.approx(expected([f"{path}.weight", f"{path}.bias"]))
    trace, mean = expected(list(gradients))
    assert noise.value() == (pytest.approx(trace / mean) if mean > 0 else math.inf)


def test_numerator_and_denominator_are_averaged_apart():
    model, noise = net(), perex.NoiseScale(decay=0.8)
    pairs, averages, weight = [], torch.zeros(2, dtype=torch.float64), 0.0
    for k in range(5):
        x = batch() + k
        rows = flat(each(model, x))
        trace = rows.var(0).sum()
        pairs.append(torch.stack((trace, rows.mean(0).square().sum() - trace / B)))
        noise.update(read(noise, model, x))
    for pair in pairs:
        averages, weight = 0.8 * averages + 0.2 * pair, 0.8 * weight + 0.2
    assert noise.parts() == pytest.approx((averages / weight).tolist())
    assert noise.value() == pytest.approx(float(averages[0] / averages[1]))


@pytest.mark.parametrize("size", [2, 3, 5])
def test_estimates_are_unbiased(size):
    """Over all batches of one size from a small population: its covariance, and products of its different members."""
    model, pool = net(), batch()
    rows, noise, found = flat(each(model, pool)), perex.NoiseScale(decay=0.0), []
    with perex.attach(model, noise, param_grads=False) as px:
        for chosen in itertools.combinations(range(B), size):
            px.backward(losses_of(model, pool[list(chosen)]))
            noise.update(px)
            found.append(noise.parts())
    trace, signal = torch.tensor(found, dtype=torch.float64).mean(0)
    torch.testing.assert_close(trace, rows.var(0).sum())
    torch.testing.assert_close(signal, (rows.sum(0).square().sum() - rows.square().sum()) / (B * (B - 1)))


def test_a_batch_of_one_has_no_noise_to_see():
    model, noise = net(), perex.NoiseScale()
    with pytest.raises(perex.PerexError, match="at least"):
        noise.update(read(noise, model, batch(1)))
    for decay in (1.0, -0.1):
        with pytest.raises(perex.PerexError, match="decay="):
            perex.NoiseScale(decay)


# Pools


def test_statistics_of_a_pool(tmp_path):
    """Streamed in batches of four, the last one smaller; read back from files."""
    torch.manual_seed(3)
    model, x, y = net().float(), torch.randn(10, 4), torch.randint(3, (10,))
    parameters = dict(model.named_parameters())
    rows = [
        torch.autograd.grad(nn.functional.cross_entropy(model(x[b : b + 1]), y[b : b + 1]), list(parameters.values()))
        for b in range(10)
    ]
    whole = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    vector = torch.cat([d.flatten() for d in direction.values()])
    noise, projections = perex.NoiseScale(decay=0.0), perex.Projections(5)
    quantities = {"val": perex.Dots(direction), "p": projections, "g": perex.Grads("2.bias"), "noise": noise}
    options = {"batch_size": 4, "progress": False, "quantities": quantities}
    scores = perex.score(model, (x, y), nn.CrossEntropyLoss(), out=tmp_path / "s.npz", **options)
    torch.testing.assert_close(scores.extra["val"], whole @ vector)
    torch.testing.assert_close(scores.extra["val/cosine"], whole @ vector / whole.norm(dim=1) / vector.norm())
    torch.testing.assert_close(scores.extra["g/2.bias"], torch.stack([row[3] for row in rows]))
    assert scores.extra["p"].shape == (10, 5) and noise.value() > 0
    assert list(scores.columns())[3:6] == ["val", "val/cosine", "p/0"] and "noise" not in scores.extra
    best = scores.top(3, by="val/cosine")
    assert torch.equal(best.extra["p"], scores.extra["p"][best.ids])
    saved = np.load(tmp_path / "s.npz")
    assert saved["p"].shape == (10, 5) and saved["val"].tolist() == scores.extra["val"].tolist()
    scores.to_csv(tmp_path / "s.csv")
    assert (tmp_path / "s.csv").read_text().startswith("id,loss,norm,val,val/cosine,p/0,p/1")


@pytest.mark.parametrize("memory", ["whole batches", "examples"])
def test_all_pairs_of_a_pool(memory):
    """In batches of three, in an order of a sampler's own; every pair in its place."""
    torch.manual_seed(3)
    model, x, y = net(), torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    rows = []
    for b in range(8):
        loss = nn.functional.cross_entropy(model(x[b : b + 1]), y[b : b + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    whole = torch.stack(rows) @ torch.stack(rows).T
    order, gram = [5, 2, 7, 0, 1, 6, 3, 4], perex.Gram()
    size = 3 if memory == "whole batches" else 1
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=size, sampler=order)
    for _ in range(2):  # the second pool knows nothing of the first
        scores = perex.score(model, loader, nn.CrossEntropyLoss(), quantities={"k": gram}, progress=False)
        torch.testing.assert_close(scores.extra["k"], whole)
    torch.testing.assert_close(scores.norms.square(), whole.diagonal())
    best = scores.top(3)
    assert torch.equal(best.extra["k"], scores.extra["k"][best.ids])  # beside the whole pool


# Numbers of all kinds


def test_cosines_of_what_is_no_number():
    model, x = net(), batch()
    x[2] = torch.nan
    dots = perex.Dots({name: torch.ones_like(p) for name, p in model.named_parameters()})
    px = read(dots, model, x)
    assert dots.cosines(px).isnan().tolist() == [b == 2 for b in range(B)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("size", [1e-5, 1.0, 300.0])
def test_cosines_along_directions_in_few_bits(dtype, size):
    """Their squares over- and underflow."""
    model, x = net().float(), batch().float()
    size = min(size, 100.0) if dtype == torch.int8 else size
    direction = {name: (torch.randn_like(p) * size).to(dtype) for name, p in model.named_parameters()}
    dots = perex.Dots(direction)
    px = read(dots, model, x)
    along = torch.cat([v.double().flatten() for v in direction.values()])
    gradients = flat({name: g.double() for name, g in each(model, x).items()})
    if not along.any():
        assert not dots.cosines(px).any()
        return
    expected = gradients @ along / gradients.norm(dim=1) / along.norm()
    assert torch.allclose(dots.cosines(px).double(), expected, atol=1e-5)


def test_cosines_are_of_the_direction_as_it_was():
    """A momentum buffer changes with the step; the inner products are of the backward."""
    model, x = net(), batch()
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    dots = perex.Dots(direction)
    px = read(dots, model, x)
    before = dots.cosines(px)
    for tensor in direction.values():
        tensor.mul_(1e-3)
    assert torch.equal(dots.cosines(px), before)


def test_a_sparse_direction():
    model = nn.Embedding(5, 3, sparse=True).double()
    ids = torch.tensor([[1, 2], [2, 4]])
    model(ids).sin().sum().backward()
    dots = perex.Dots([model.weight.grad])
    with perex.attach(model, dots, param_grads=False) as px:
        px.backward(model(ids).sum((1, 2)))
    counts = torch.zeros(5, 1).double().index_add_(0, ids.flatten(), torch.ones(4, 1).double())
    expected = (counts * model.weight.detach().cos())[ids].sum((1, 2))
    assert torch.allclose(px.read(dots), expected)


def test_projections_of_another_model():
    """One object for several: signs are of a name and a shape."""
    projections = perex.Projections(16, seed=3)
    for shape in ((3, 4), (4, 3), (3, 4)):
        torch.manual_seed(0)
        model = nn.Linear(*shape)
        x, fresh = torch.randn(B, shape[0]), perex.Projections(16, seed=3)
        with perex.attach(model, projections, fresh) as px:
            px.backward(model(x).sin().sum(1))
        assert torch.equal(px.read(projections), px.read(fresh))


def test_noise_of_parameters_that_come_and_go():
    """Each average is corrected for its own start, and those of a frozen layer count no more."""
    model, x, noise = net(), batch(), perex.NoiseScale(decay=0.5)
    with perex.attach(model, noise, param_grads=False) as px:

        def step() -> None:
            px.backward(losses_of(model, x))
            noise.update(px)

        step()
        whole = noise.parts(by="module")
        model[0].requires_grad_(False)
        for _ in range(5):
            step()
        assert set(noise.parts(by="module")) == {"2"} and noise.parts() == pytest.approx(whole["2"])
        model[0].requires_grad_(True)
        step()
        assert noise.parts(by="module")["0"] == pytest.approx(whole["0"])
