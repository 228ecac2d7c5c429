"""Products of large matrices by oneDNN, and operators that are run as such products where no weight has a gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Bare, grid, scramble
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import perex
from perex.kernels import large
from perex.rules import product

B, T, D = 4, 3, 5
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture
def onednn(monkeypatch):
    """Multiply by oneDNN, however small the matrices are and whoever made the CPU."""
    if not HAS_ONEDNN:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(large, "WORTH_A_CALL", 1)
    monkeypatch.setattr(large, "WORTH_PREPARING", 1)
    monkeypatch.setattr(large, "onednn_is_faster", lambda: True)


@pytest.fixture
def taken(monkeypatch):
    """Run operators as products wherever that can be done, in any precision; what was multiplied, with each."""
    found: list[Tensor] = []
    real = product.multiplied

    def noted(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        found.append(real(a, b, bias))
        return found[-1]

    monkeypatch.setattr(product, "faster", lambda a, b, rows=None: not (a.requires_grad or b.requires_grad))
    monkeypatch.setattr(product, "multiplied", noted)
    return found


# Products


def laid_out(matrix: Tensor, how: str) -> Tensor:
    """The same numbers in another order in memory."""
    if how == "transposed":
        return matrix.mT.contiguous().mT
    if how == "part":
        wide = torch.randn(*matrix.shape[:-1], matrix.shape[-1] + 3)
        wide[..., 2:-1] = matrix
        return wide[..., 2:-1]
    return matrix


@given(
    st.sampled_from([(), (1,), (3,), (2, 2)]),
    st.tuples(*[st.sampled_from([1, 2, 7, 16, 33])] * 3),
    st.tuples(*[st.sampled_from(["as it is", "transposed", "part"])] * 2),
)
@grid(150)
def products_of(stack: tuple[int, ...], sizes: tuple[int, int, int], how: tuple[str, str]) -> None:
    m, k, n = sizes
    a, b = laid_out(torch.randn(*stack, m, k), how[0]), laid_out(torch.randn(*stack, k, n), how[1])
    assert large.faster(a, b)
    found = large.multiplied(a, b)
    assert found.is_contiguous() and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), a.double() @ b.double(), rtol=1e-4, atol=1e-4)


def test_products(onednn):
    products_of()


def test_what_is_no_number_stays_none(onednn):
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    a[1, 2], b[0, 0] = torch.inf, torch.nan
    expected = a @ b
    assert torch.equal(large.multiplied(a, b).isfinite(), expected.isfinite())


@pytest.mark.parametrize("bias", [torch.randn(10)[::2], torch.randn(5, 3)[:, 1], torch.randn(1).expand(5)])
def test_biases_in_any_order(bias, onednn):
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    for left in (a, a.mT.contiguous().mT):
        torch.testing.assert_close(large.multiplied(left, b, bias), a @ b + bias)
    torch.testing.assert_close(
        large.multiplied(a.expand(2, 3, 4), b.expand(2, 4, 5), bias), (a @ b + bias).expand(2, 3, 5)
    )


def test_signs_that_are_put_off(onednn):
    """torch notes a sign in place of changing it, in imaginary parts of conjugates."""
    a, bias = (torch.randn(*shape, dtype=torch.complex64).conj().imag for shape in ((3, 4), (5,)))
    b = torch.randn(4, 5)
    assert a.is_neg() and large.faster(a, b)
    torch.testing.assert_close(large.multiplied(a, b, bias), a.resolve_neg() @ b + bias.resolve_neg())
    torch.testing.assert_close(large.multiplied(b.mT, a.mT), b.mT @ a.resolve_neg().mT)


def test_rows_that_overlap(onednn):
    """Frames of a signal, and one row or one number for all."""
    frames, other = torch.randn(40).unfold(0, 8, 4), torch.randn(8, 9)  # (9, 8)
    assert frames.stride() == (4, 1)
    for a, b in (
        (frames, other),
        (other, frames),
        (other.mT, frames.mT),
        (frames.mT, other.mT),
        (torch.randn(6, 8), torch.randn(8, 1).expand(8, 5)),
        (torch.randn(6, 8), torch.randn(1, 5).expand(8, 5)),
        (torch.randn(1, 1).expand(6, 8), torch.randn(1, 1).expand(8, 5)),
    ):
        torch.testing.assert_close(large.multiplied(a, b), a @ b)


@pytest.mark.parametrize("param_grads", [True, False])
def test_layers_on_frames_of_a_signal(param_grads, onednn):
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
    x = torch.randn(B, 40)
    with perex.attach(model, param_grads=param_grads, loss_reduction="sum") as px:
        for _ in range(4):
            frames = x.unfold(1, 8, 4)
            px.backward(summed(model(frames)))
        found = px.norms()
    expected = alone(copy.deepcopy(model).double(), x.double().unfold(1, 8, 4))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_what_onednn_is_not_asked_for(onednn, monkeypatch):
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert large.faster(a, b)
    assert not large.faster(a.double(), b.double()) and not large.faster(a.half(), b.half())
    assert not large.faster(a.requires_grad_(), b)
    assert not large.faster(a.detach().to("meta"), b.to("meta"))
    torch._C._set_mkldnn_enabled(False)  # `torch.backends.mkldnn.flags` warns of GPUs that are not there
    try:
        assert not large.faster(a.detach(), b)
    finally:
        torch._C._set_mkldnn_enabled(True)
    monkeypatch.setattr(large, "WORTH_PREPARING", 61)
    assert not large.faster(a.detach(), b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_other_precisions_are_as_before(dtype):
    a, b = torch.randn(2, 3, 4, dtype=dtype), torch.randn(2, 4, 5, dtype=dtype)
    wide = a.float() @ b.float() if dtype in (torch.bfloat16, torch.float16) else a @ b
    assert torch.equal(large.multiplied(a, b), wide)
    assert torch.equal(large.multiplied(a[0], b[0]), a[0] @ b[0])


@pytest.mark.parametrize("vendor", ["Intel(R) Xeon(R)", "AMD EPYC"])
@pytest.mark.parametrize("broken", [None, RuntimeError, AttributeError, TypeError, "wrong"])
def test_when_it_is_taken(vendor, broken, monkeypatch):
    """Where MKL leaves out AVX-512, and torch's operator does what it did."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        if isinstance(broken, type):
            raise broken("no such operator")
        return a @ b + (broken == "wrong")

    known = {"avx512_f": True, "cpu_name": vendor}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(large, "by_onednn", product)
    assert large.onednn_is_faster.__wrapped__() == (vendor == "AMD EPYC" and broken is None)
    known["avx512_f"] = False
    assert not large.onednn_is_faster.__wrapped__()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not large.onednn_is_faster.__wrapped__()


def test_operations_are_counted():
    """By a formula of ours where torch's operator is called, and by torch's own elsewhere."""
    assert large._operations((300, 512), (600, 512)) == 2 * 300 * 512 * 600
    a, b = torch.randn(300, 512), torch.randn(512, 600)
    with FlopCounterMode(display=False) as counter:
        large.multiplied(a, b)
    assert counter.get_total_flops() == 2 * 300 * 512 * 600


# Operators that are products


def summed(out: Tensor) -> Tensor:
    return out.sin().flatten(1).sum(1)


def alone(model: nn.Module, x: Tensor) -> Tensor:
    chosen = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for b in range(len(x)):
        grads = torch.autograd.grad(summed(model(x[b : b + 1])).sum(), chosen, allow_unused=True)
        norms.append(sum(g.square().sum() for g in grads if g is not None).sqrt())
    return torch.stack(norms)


def bare(function: Callable[..., Any], **shapes: str) -> Callable[[], nn.Module]:
    return lambda: Bare(function, {"D": D}, a="D", **shapes)


def frozen(name: str) -> nn.Module:
    layer = nn.Linear(D, 6)
    getattr(layer, name).requires_grad_(False)
    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), layer)


class Reentering(nn.Module):
    """Runs its first two layers in a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, D))
        self.outer = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(checkpoint(self.inner, x, use_reentrant=False))


CASES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    # How many products are computed in the forward, and of how many the rows need gradients when the input does not.
    "layers": (lambda: nn.Sequential(nn.Linear(D, 7), nn.ReLU(), nn.Linear(7, 3)), 2, 1),
    "in place": (lambda: nn.Sequential(nn.Linear(D, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)), 2, 1),
    "no bias": (lambda: nn.Sequential(nn.Linear(D, 7, bias=False), nn.Linear(7, 3, bias=False)), 2, 1),
    "matmul": (bare(lambda m, x: torch.tanh((x * m.a) @ m.v) @ m.w, v="D7", w="72"), 2, 2),
    "torch.matmul": (bare(lambda m, x: torch.matmul(x * m.a, other=m.v), v="D7"), 1, 1),
    "addmm": (bare(lambda m, x: torch.addmm(m.c, (x * m.a).flatten(0, -2), m.v).unflatten(0, x.shape[:-1]),
                   v="D7", c="7"), 1, 1),
    "addmm, one number": (bare(lambda m, x: torch.addmm(m.c, (x * m.a).flatten(0, -2), m.v).unflatten(0, x.shape[:-1]),
                               v="D7", c="1"), 0, 0),
    "addmm, scaled": (bare(lambda m, x: torch.addmm(m.c, (x * m.a).flatten(0, -2), m.v, beta=2, alpha=3)
                           .unflatten(0, x.shape[:-1]), v="D7", c="7"), 0, 0),
    "by name": (bare(lambda m, x: F.linear(bias=m.c, weight=m.v, input=x * m.a), v="6D", c="6"), 1, 1),
    "rows used twice": (bare(lambda m, x: F.linear(x * m.a, m.v) * F.linear(x * m.a, m.w), v="6D", w="6D"), 2, 2),
    "a residual": (bare(lambda m, x: x * m.a + F.linear(x * m.a, m.v), v="DD"), 1, 1),
    "one weight twice": (bare(lambda m, x: F.linear(F.linear(x * m.a, m.v).tanh(), m.v), v="DD"), 2, 2),
    "its transpose": (bare(lambda m, x: F.linear(x * m.a, m.v) @ m.v, v="7D"), 2, 2),
    "a weight of one row": (bare(lambda m, x: F.linear(x * m.a, m.v), v="1D"), 1, 1),
    "a vector": (bare(lambda m, x: F.linear(x * m.a, m.v), v="D"), 0, 0),
    "written over": (bare(lambda m, x: F.linear(x * m.a, m.v).mul_(2).relu_(), v="DD"), 1, 1),
    "frozen weight": (lambda: frozen("weight"), 2, 1),
    "frozen bias": (lambda: frozen("bias"), 2, 1),
    "checkpoint": (Reentering, 1, 1),
}  # fmt: skip


def made(case: str) -> nn.Module:
    torch.manual_seed(2)
    return scramble(CASES[case][0]().double())


@pytest.mark.parametrize("shape", [(B, D), (B, T, D), (B, 2, T, D), (1, T, D)])
@pytest.mark.parametrize("case", CASES)
def test_norms_and_gradients_of_inputs(case, shape, taken):
    """From the second step on, when calls are known."""
    if case == "a vector" and len(shape) == 2:
        return  # one number an example
    model, plain = made(case), made(case)
    with perex.attach(model, param_grads=False, audit=False) as px:
        for step in range(5):
            x = torch.randn(shape, dtype=torch.float64, requires_grad=step % 2 == 1)
            taken.clear()
            px.backward(summed(model(x)) * len(x))
            torch.testing.assert_close(px.norms(), alone(plain, x.detach()) * len(x), rtol=1e-9, atol=1e-12)
            if x.requires_grad:
                given = torch.autograd.grad(summed(plain(x)).sum(), x)[0]
                torch.testing.assert_close(x.grad, given, rtol=1e-9, atol=1e-12)
        _, forward, backward = CASES[case]
        if len(x) > 1:  # else nothing is remembered of a call
            assert len(taken) == forward + backward


@pytest.mark.parametrize("case", CASES)
def test_clipped_sums(case, taken):
    model, plain = made(case), made(case)
    x = torch.randn(B, T, D, dtype=torch.float64)
    with perex.attach(model, param_grads=False, audit=False, memory="high", loss_reduction="sum") as px:
        for _ in range(3):
            model.zero_grad()
            summed(model(x)).sum().backward()
            px.clip_(0.7)
    norms = alone(plain, x)
    (summed(plain(x)) * (0.7 / norms.clamp(min=0.7))).sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        if other.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_gradients_of_parameters_keep_their_bits(taken):
    """With `param_grads`, the input's gradient is autograd's."""
    model, plain = made("layers"), made("layers")
    with perex.attach(model, audit=False):
        for _ in range(3):
            x = torch.randn(B, D, dtype=torch.float64)
            for one in (model, plain):
                one.zero_grad()
                summed(one(x)).sum().backward()
    assert not taken
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def known(model: nn.Module, **options: Any) -> perex.Tracker:
    """Attached, and the model's calls known."""
    px = perex.attach(model, param_grads=False, audit=False, **options)
    for _ in range(2):
        px.backward(summed(model(torch.randn(B, T, D, dtype=torch.float64))))
    return px


def test_a_graph_that_runs_twice(taken):
    model, plain = made("layers"), made("layers")
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    with known(model, loss_reduction="sum") as px:
        losses = summed(model(x)).sum()
        losses.backward(retain_graph=True)
        first = px.norms()
        losses.backward()
        assert torch.equal(px.norms(), first)
    torch.testing.assert_close(first, alone(plain, x.detach()))
    torch.testing.assert_close(x.grad, 2 * torch.autograd.grad(summed(plain(x)).sum(), x)[0])


def test_gradients_that_are_differentiated_again(taken):
    """With respect to the input it is allowed, and exact."""
    model, plain = made("layers"), made("layers")
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)

    def second(one: nn.Module) -> Tensor:
        (slope,) = torch.autograd.grad(summed(one(x)).sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    with known(model):
        taken.clear()
        found = second(model)
        assert taken
    torch.testing.assert_close(found, second(plain), rtol=1e-9, atol=1e-12)


def test_a_penalty_on_gradients_is_refused(taken):
    model = made("layers")
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    with known(model) as px:
        out = summed(model(x))
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (out.mean() + slope.square().sum()).backward()
        with pytest.raises(perex.UnsupportedError, match="gradient penalty"):
            px.norms()


def test_a_weight_that_changes_before_the_backward(taken):
    model = made("layers")
    with known(model):
        losses = summed(model(torch.randn(B, T, D, dtype=torch.float64))).sum()
        with torch.no_grad():
            model[2].weight.mul_(2)
        with pytest.raises(RuntimeError, match="inplace operation"):
            losses.backward()


def test_hooks_of_modules_see_the_gradients_of_inputs(taken):
    model, plain = made("layers"), made("layers")
    seen: list[list[Tensor]] = [[], []]
    for one, grads in zip((model, plain), seen, strict=True):
        one[2].register_full_backward_hook(lambda m, given, got, grads=grads: grads.append(given[0]))
    x = torch.randn(B, T, D, dtype=torch.float64)
    with known(model) as px:
        seen[0].clear()
        px.backward(summed(model(x)) * B)
    summed(plain(x)).sum().backward()
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-9, atol=1e-12)


def test_what_is_saved_elsewhere_is_left_to_autograd(taken):
    """Hooks on saved tensors count what is saved, as checkpoints do."""
    model = made("layers")
    with known(model) as px, torch.autograd.graph.save_on_cpu():
        taken.clear()
        x = torch.randn(B, T, D, dtype=torch.float64)
        px.backward(summed(model(x)))
        torch.testing.assert_close(px.norms(), alone(made("layers"), x), rtol=1e-9, atol=1e-12)
    assert not taken


def test_sparse_rows_are_left_to_autograd(taken):
    model = bare(lambda m, x: torch.sparse.mm(x, m.v) if x.is_sparse else (x * m.a) @ m.v, v="D7")().double()
    with known(model) as px:
        x = torch.randn(B, D, dtype=torch.float64)
        px.backward(summed(model(x)))
        torch.testing.assert_close(px.norms(), alone(copy.deepcopy(model), x), rtol=1e-9, atol=1e-12)


class Own(Tensor):
    """Somebody's kind of tensor."""


def test_other_kinds_of_tensors_are_left_to_the_operator(taken):
    kinds = {"rows": torch.randn(B, D).as_subclass(Own), "matrix": torch.randn(D, 7)}
    assert product.Product("rows", "matrix").run(kinds) is None
    kinds = {"rows": torch.randn(B, D), "matrix": torch.randn(D, 7).as_subclass(Own)}
    assert product.Product("rows", "matrix").run(kinds) is None
    kinds = {"rows": torch.randn(B, D), "matrix": torch.randn(D, 7).to_sparse()}
    assert product.Product("rows", "matrix").run(kinds) is None
    assert not taken


@pytest.mark.parametrize("batch", [0, 1])
def test_few_examples(batch, taken):
    model = made("layers")
    with known(model) as px:
        for _ in range(2):
            x = torch.randn(batch, T, D, dtype=torch.float64)
            px.backward(summed(model(x)) * batch)
            expected = alone(made("layers"), x) if batch else torch.zeros(0, dtype=torch.float64)
            torch.testing.assert_close(px.norms(), expected, rtol=1e-9, atol=1e-12)


def test_under_autocast_autograd_does_it(taken):
    model = made("layers").float()
    with perex.attach(model, param_grads=False, audit=False) as px:
        for _ in range(3):
            with torch.autocast("cpu"):
                losses = summed(model(torch.randn(B, T, D)).float())
            px.backward(losses)
    assert not taken


def test_a_backward_inside_autocast(taken):
    """What the forward did in float32, the backward does, too."""
    model, plain = made("layers").float(), made("layers")
    x = torch.randn(B, T, D)
    with perex.attach(model, param_grads=False, audit=False) as px:
        for _ in range(3):
            losses = summed(model(x)) * B
            with torch.autocast("cpu"):
                px.backward(losses)
        assert taken
        torch.testing.assert_close(px.norms().double(), alone(plain, x.double()) * B, rtol=1e-5, atol=0)


def test_in_float32_by_onednn(onednn):
    """All of it as it runs where it pays: taps, norms and sums by oneDNN."""
    for case in CASES:
        model, plain = made(case).float(), made(case)
        x = torch.randn(B, T, D)
        for param_grads in (True, False):
            with perex.attach(model, audit=False, param_grads=param_grads, loss_reduction="sum") as px:
                for _ in range(4):
                    model.zero_grad()
                    px.backward(summed(model(x)))
                torch.testing.assert_close(px.norms().double(), alone(plain, x.double()), rtol=1e-5, atol=1e-5)


def test_a_weight_that_is_not_tracked(taken):
    """It is left alone as all parameters are, and the tap gives the gradient of the rows."""
    model, plain = made("layers"), made("layers")
    x = torch.randn(B, T, D, dtype=torch.float64)
    with known(model, params=["0.*", "2.bias"], loss_reduction="sum") as px:
        taken.clear()
        px.backward(summed(model(x)))
        assert len(taken) == 3 and all(p.grad is None for p in model.parameters())
        found = px.norms()
    plain[2].weight.requires_grad_(False)
    torch.testing.assert_close(found, alone(plain, x), rtol=1e-9, atol=1e-12)


def test_layers_that_are_not_tracked(taken):
    """Those in front of the first that is are products, too, and those behind it pass gradients on."""
    x = torch.randn(B, T, D, dtype=torch.float64)
    for params, products in ((["2.*"], 2), (["0.*"], 3)):
        model, plain = made("layers"), made("layers")
        with known(model, params=params, loss_reduction="sum") as px:
            taken.clear()
            px.backward(summed(model(x)))
            assert len(taken) == products and all(p.grad is None for p in model.parameters())
            found = px.norms()
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(name.startswith(params[0][0]))
        torch.testing.assert_close(found, alone(plain, x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("change", ["relu", "add", "item"])
def test_writing_over_what_a_frozen_layer_gives(change, taken):
    def forward(m: Bare, x: Tensor) -> Tensor:
        h = m.frozen(m.first(x).tanh()) if change == "relu" else m.frozen(x)
        if change == "relu":
            h = F.relu(h, inplace=True)
        elif change == "add":
            h.add_(m.first(x))
        else:
            h[..., :2] = m.first(x)[..., :2]
        return m.last(h)

    def make() -> nn.Module:
        torch.manual_seed(3)
        model = Bare(forward)
        model.first, model.frozen, model.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 2)
        model.frozen.requires_grad_(False)
        return model.double()

    model, plain, x = make(), make(), torch.randn(B, T, D, dtype=torch.float64)
    with perex.attach(model, param_grads=False, audit=False, loss_reduction="sum") as px:
        for _ in range(4):
            px.backward(summed(model(x)))
            torch.testing.assert_close(px.norms(), alone(plain, x), rtol=1e-9, atol=1e-12)
    assert taken


def test_a_bias_of_examples_keeps_its_gradient(taken):
    """Here `addmm` adds numbers of examples to frozen rows."""
    model = Bare(lambda m, x: torch.addmm(m.g(x).squeeze(1), m.w, x.t()).t(), {"D": D}, w="DD")
    model.g = nn.Linear(D, 1)
    model.double().w.requires_grad_(False)
    x = torch.randn(B, D, dtype=torch.float64)
    with perex.attach(model, param_grads=False, audit=False, loss_reduction="sum") as px:
        for _ in range(4):
            px.backward(summed(model(x)))
            torch.testing.assert_close(px.norms(), alone(copy.deepcopy(model), x), rtol=1e-9, atol=1e-12)
    given = {"rows": x, "matrix": x.T.contiguous(), "bias": torch.ones(B).double().requires_grad_()}
    assert product.Product("rows", "matrix", "bias").run(given) is None


def test_several_gradients_at_once(taken):
    model, plain = made("layers"), made("layers")
    x = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    with known(model) as px:
        for _ in range(2):
            px.backward(summed(model(torch.randn(B, D, dtype=torch.float64))))
        taken.clear()
        out = summed(model(x))
        found = torch.autograd.grad(out, x, torch.eye(B, dtype=torch.float64), is_grads_batched=True)[0]
        assert taken
    expected = torch.autograd.grad(summed(plain(x)), x, torch.eye(B, dtype=torch.float64), is_grads_batched=True)[0]
    torch.testing.assert_close(found, expected)


def test_modes_of_others_see_the_operators(taken):
    seen: list[Any] = []

    class Doubling(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.linear:
                seen.append(func)
                args = (args[0], args[1] * 2, *args[2:])
            return func(*args, **(kwargs or {}))

    model, plain = made("layers"), made("layers")
    x = torch.randn(B, D, dtype=torch.float64)
    with perex.attach(model, param_grads=False, audit=False) as px:
        for _ in range(4):
            seen.clear()
            with Doubling():
                out = model(x)
            assert len(seen) == 2
            px.backward(summed(out))
    with Doubling():
        torch.testing.assert_close(out, plain(x))
    assert not taken


def test_arguments_that_the_rule_does_not_know():
    layer = nn.Linear(D, 7).double().requires_grad_(False)
    model = Bare(
        lambda m, x: torch.addmm(m.c, x * m.a, layer.weight.T) + 0 * m.a.sum(), {"D": D}, a="D", c="7"
    ).double()
    x = torch.randn(B, D, dtype=torch.float64)
    with perex.attach(model, param_grads=False, audit=False, loss_reduction="sum") as px:
        for _ in range(3):
            px.backward(summed(model(x)))
        torch.testing.assert_close(px.norms(), alone(copy.deepcopy(model), x))


def test_outputs_are_as_the_operator_lays_them_out(taken):
    for rows in (torch.randn(B, T, D), torch.randn(T, B, D).transpose(0, 1), torch.randn(B, D), torch.randn(D, B).T):
        layer = nn.Linear(D, 7).double()
        with perex.attach(layer, param_grads=False, audit=False) as px:
            for _ in range(3):
                out = layer(rows.double())
                px.backward(summed(out))
        expected = layer(rows.double())
        assert out.stride() == expected.stride()
        torch.testing.assert_close(out, expected)


def test_nothing_is_kept():
    """A product's gradient needs the matrix alone, which is there anyway."""
    assert (
        product.Multiplication.apply(torch.ones(2, 3, requires_grad=True), torch.ones(3, 4), None).grad_fn is not None
    )
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        product.Multiplication.apply(torch.ones(2, 3, requires_grad=True), torch.ones(3, 4), None)
    assert [t.shape for t in kept] == [(3, 4)]
