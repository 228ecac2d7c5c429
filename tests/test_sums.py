"""`.grad` where it comes with the norm: taps give the sum of what was multiplied out for its squares."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import no_trace, scramble
from ranks import Ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import perex
from perex.factors import Factor, Outer, Patches
from perex.kernels import large, outer, sums
from perex.kernels.geometry import Geometry

B, T, D = 4, 6, 3
STEPS = 4  # the first finds out, and the calls of the second are remembered: the third shares


@pytest.fixture(autouse=True, params=[True, False], ids=["with norms", "after norms"])
def always(request, monkeypatch):
    """Share where it can be done, and not only where it pays."""
    monkeypatch.setattr(Factor, "sums_cheaply", lambda factor: factor.summed_plan() is not None)
    monkeypatch.setattr(Factor, "sums_with_norms", lambda factor: request.param)


class Of(nn.Module):
    """A model whose forward is a function of its layers."""

    def __init__(self, function: Callable[..., Any], **layers: Any):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


def frozen(layer: nn.Module, name: str) -> nn.Module:
    getattr(layer, name).requires_grad_(False)
    return layer


IMAGES = (B, 2, 5, 6)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 2, bias=False)), (B, T, D), 2),
    "one position": (lambda: nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 2)), (B, D), 2),
    "in place": (lambda: nn.Sequential(nn.Linear(D, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)), (B, T, D), 2),
    "a product": (lambda: Of(lambda m, x: torch.tanh(x @ m.v) @ m.w, v=weight(D, 4), w=weight(4, 2)), (B, T, D), 2),
    "addmm": (lambda: Of(lambda m, x: torch.addmm(m.b, x, m.w), b=weight(2), w=weight(D, 2)), (B, D), 1),
    "convolution": (lambda: nn.Conv2d(2, 3, 3, padding=1, bias=False), IMAGES, 1),
    "strided": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1)), IMAGES, 2),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3, 2, 1, dilation=2), IMAGES, 0),
    "one dimension": (lambda: nn.Conv1d(2, 3, 3, dilation=2), (B, 2, 9), 1),
    "circular": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (B, 2, 9), 1),
    "twice": (lambda: Of(lambda m, x: m.b(m.a(m.a(x).tanh())), a=nn.Linear(D, D), b=nn.Linear(D, 2)), (B, 2, D), 1),
    "tied": (lambda: Of(lambda m, x: F.linear(torch.tanh(m.a(x)), m.a.weight.T), a=nn.Linear(D, 4)), (B, T, D), 0),
    "frozen weight": (lambda: nn.Sequential(frozen(nn.Linear(D, 4), "weight"), nn.Linear(4, 2)), (B, T, D), 1),
    "frozen bias": (lambda: nn.Sequential(frozen(nn.Linear(D, 4), "bias"), nn.Linear(4, 2)), (B, T, D), 1),
}  # fmt: skip


def made(case: str) -> tuple[nn.Module, Tensor]:
    make, shape, _ = CASES[case]
    torch.manual_seed(1)
    return scramble(make().double()), torch.randn(shape, dtype=torch.float64)


def losses_of(out: Tensor) -> Tensor:
    return out.sin().flatten(1).sum(1)


def alone(model: nn.Module, x: Tensor) -> Tensor:
    """Norms by the loop."""
    rows = []
    trained = [p for p in model.parameters() if p.requires_grad]
    for b in range(len(x)):
        grads = torch.autograd.grad(losses_of(model(x[b : b + 1])).sum(), trained)
        rows.append(torch.stack([g.norm() for g in grads]).norm())
    return torch.stack(rows)


@pytest.fixture
def given(monkeypatch) -> list[str]:
    """Names of the gradients that taps gave."""
    names: list[str] = []
    receive = perex.backward.Backwards.receive

    def watched(self: Any, call: Any, saved: Any, grads: Any, sums: Any) -> Any:
        found = receive(self, call, saved, grads, sums)
        assert set(found) == set(sums)
        names.extend(sums)
        return found

    monkeypatch.setattr(perex.backward.Backwards, "receive", watched)
    return names


def agree(model: nn.Module, plain: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
            assert p.grad.stride() == q.grad.stride(), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("call", ["loss", "losses"])
def test_gradients_and_norms(case, call, given):
    """Over steps of an optimizer, beside the same without perex."""
    model, x = made(case)
    plain = copy.deepcopy(model)
    trained = [[p for p in m.parameters() if p.requires_grad] for m in (model, plain)]
    optimizers = [torch.optim.SGD(own, lr=0.1, momentum=0.9) for own in trained]
    with no_trace(model, versions=False), perex.attach(model) as px:
        for step in range(STEPS):
            given.clear()
            if step != 1:  # gradients of two steps add up
                for optimizer in optimizers:
                    optimizer.zero_grad()
            losses = losses_of(model(x + step))
            losses.mean().backward() if call == "loss" else px.backward(losses)
            losses_of(plain(x + step)).mean().backward()
            agree(model, plain)
            torch.testing.assert_close(px.norms(), alone(plain, x + step), rtol=1e-9, atol=0)
            for optimizer in optimizers:
                optimizer.step()
    assert len(given) >= CASES[case][2], "the test of the test: it is shared"


def ready(case: str = "linear", steps: int = STEPS - 1, **options: Any) -> Any:
    """A model that shares from the next forward on, its tracker, and the same without perex."""
    model, x = made(case)
    plain, px = copy.deepcopy(model), perex.attach(model, **options)
    for _ in range(steps):
        px.backward(losses_of(model(x)))
    model.zero_grad()
    return model, px, plain, x


def test_a_graph_that_is_kept(given):
    model, px, plain, x = ready()
    for m in (model, plain):
        loss = losses_of(m(x)).mean()
        loss.backward(retain_graph=True)
        loss.backward()
    agree(model, plain)
    assert given
    torch.testing.assert_close(px.norms(), alone(plain, x))


def penalized(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """What a penalty on all gradients gives."""
    x = x.clone().requires_grad_()
    grads = torch.autograd.grad(losses_of(model(x)).mean(), [x, *model.parameters()], create_graph=True)
    penalty = torch.stack([g.square().sum() for g in grads]).sum()
    return list(torch.autograd.grad(penalty, [x, *model.parameters()], allow_unused=True))


@pytest.mark.parametrize("case", ["linear", "one position", "strided", "a product", "addmm"])
def test_gradients_of_gradients(case, given):
    """They need the parameters' graph, which a forward that shares does not have: refused once, then never shared."""
    model, px, plain, x = ready(case)
    with pytest.raises(perex.UnsupportedError, match="create_graph=True.*again"):
        penalized(model, x)
    for _ in range(STEPS):
        given.clear()
        for found, expected in zip(penalized(model, x), penalized(plain, x), strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                torch.testing.assert_close(found, expected)
        losses_of(model(x)).mean().backward()
        assert not given


@pytest.mark.parametrize("steps", [0, 1])
def test_gradients_of_gradients_from_the_first_steps_on(steps):
    model, px, plain, x = ready("linear", steps)
    for _ in range(STEPS):
        for found, expected in zip(penalized(model, x), penalized(plain, x), strict=True):
            torch.testing.assert_close(found, expected)


def test_while_nobody_looks(given):
    """Paused, detached, after an error: `.grad` is there all the same."""
    model, px, plain, x = ready()
    losses_of(plain(x)).mean().backward()
    px.pause()
    losses_of(model(x)).mean().backward()
    px.resume()
    assert given
    agree(model, plain)
    for why in ("detached", "stray"):
        model, px, plain, x = ready()
        out = model(x)
        for m, result in ((model, out), (plain, plain(x))):
            m.zero_grad()
            if why == "detached":
                px.detach()
                losses_of(result).mean().backward()
            else:
                losses_of(result)[:2].sum().backward()
        agree(model, plain)


def test_some_inputs_only(given):
    """`torch.autograd.grad` towards one parameter computes that one's gradient alone."""
    model, px, plain, x = ready()
    given.clear()
    (found,) = torch.autograd.grad(losses_of(model(x)).mean(), [model[2].weight])
    (expected,) = torch.autograd.grad(losses_of(plain(x)).mean(), [plain[2].weight])
    torch.testing.assert_close(found, expected)
    assert given == ["weight"]


def test_frozen_and_unfrozen():
    model, px, plain, x = ready()
    for frozen_now in (True, False, False, False):
        for m in (model, plain):
            m.zero_grad()
            m[2].weight.requires_grad_(not frozen_now)
            losses_of(m(x)).mean().backward()
        agree(model, plain)


def test_hooks_on_the_parameter_and_uses_elsewhere():
    """A hook gets the sum and may change it; a use that perex does not see is still noticed, and is in `.grad`."""
    model, px, plain, x = ready()
    for m in (model, plain):
        m[0].weight.register_hook(lambda g: 2 * g)
        losses_of(m(x)).mean().backward()
    agree(model, plain)
    for m in (model, plain):
        m.zero_grad()
        (losses_of(m(x)).mean() + m[2].weight.square().sum()).backward()
    agree(model, plain)
    with pytest.raises(perex.PerexError, match="2.weight"):
        px.norms()


def test_where_autograd_goes_on_computing_it(given):
    """Under autocast, in checkpoints and with saved tensors elsewhere, nothing is shared."""
    model, px, plain, x = ready()
    model.float(), plain.float()
    given.clear()
    for m in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            losses = losses_of(m(x.float()).float())
        losses.mean().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    for context in ("checkpoint", "saved elsewhere"):
        model, px, plain, x = ready()
        given.clear()
        for m in (model, plain):
            with torch.autograd.graph.save_on_cpu() if context == "saved elsewhere" else torch.enable_grad():
                losses = losses_of(checkpoint(m, x, use_reentrant=False) if context == "checkpoint" else m(x))
            losses.mean().backward()
        agree(model, plain)
        assert not given


def test_clipping_afterwards():
    model, px, plain, x = ready(memory="high")
    losses = losses_of(model(x))
    px.backward(losses)
    found = px.clip_(0.5)
    expected = alone(plain, x)
    torch.testing.assert_close(found, expected)
    total: Any = 0
    for b in range(B):
        grads = torch.autograd.grad(losses_of(plain(x[b : b + 1])).sum(), list(plain.parameters()))
        total = total + torch.cat([g.flatten() for g in grads]) * min(1.0, 0.5 / float(expected[b]))
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), total)


def test_two_forwards_before_one_backward():
    model, px, plain, x = ready(forwards="further")
    for m in (model, plain):
        (losses_of(m(x)).sum() + losses_of(m(x + 1)).sum()).backward()
    agree(model, plain)


def ddp_case(rank: int) -> None:
    model, x = made("linear")
    plain = copy.deepcopy(model)
    wrapped, other = DistributedDataParallel(model), DistributedDataParallel(plain)
    Factor.sums_cheaply = lambda factor: factor.summed_plan() is not None  # type: ignore[method-assign]
    with perex.attach(wrapped) as px:
        for step in range(STEPS):
            for m in (wrapped, other):
                m.zero_grad()
                losses_of(m(x + rank + step)).mean().backward()
            agree(model, plain)
            torch.testing.assert_close(px.norms(), alone(plain, x + rank + step))


def test_ddp():
    with Ranks() as ranks:
        ranks(ddp_case)


def test_no_memory_is_held():
    """Between steps nothing outlives the backward but `.grad`."""
    model, px, plain, x = ready()
    px.backward(losses_of(model(x)))
    assert px._backwards.result is not None
    assert all(not share.kept and not share.open for share in px._backwards.result.shares.values())


# When it pays


def outer_of(batch: int, positions: int, m: int, n: int, device: str = "meta") -> Outer:
    left, right = (torch.empty(batch, positions, k, device=device) for k in (m, n))
    return Outer(left, right, torch.Size((m, n)))


@pytest.mark.parametrize(
    ("factor", "pays"),
    [  # where `@` multiplies as fast as anything
        (outer_of(2, 512, 768, 256), True),  # multiplied out for the norm anyway
        (outer_of(4, 256, 1536, 512), True),  # the Gram matrix costs more than a pass over each product
        (outer_of(16, 64, 768, 256), True),  # likewise, by the kernel in C
        (outer_of(64, 16, 768, 256), False),  # the Gram matrix is cheap
        (outer_of(256, 1, 1024, 1024), False),  # so is a product of norms
        (outer_of(2, 40, 8, 8), False),  # too small to be worth it
        (Patches(torch.empty(64, 1, 32, 16, 16, device="meta"), torch.empty(64, 1, 64, 16, 16, device="meta"),
                 Geometry(torch.Size((64, 32, 3, 3)), (1, 1), (1, 1), (1, 1), False, (0, 0), 1)), True),
    ],
)  # fmt: skip
def test_where_it_pays(factor, pays, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(large, "onednn_is_faster", lambda: False)
    for strategies in (outer.NORMS, sums.OUTER):
        monkeypatch.setattr(strategies, "picked", {})
    assert factor.sums_cheaply() == pays


def test_small_models_keep_their_bits(monkeypatch):
    """Below some millions of multiply-adds autograd's own gradient stays, to the bit."""
    monkeypatch.undo()
    model, px, plain, x = ready()
    for m in (model, plain):
        losses_of(m(x)).mean().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_strategy_that_was_asked_for_is_taken(given):
    model, px, plain, x = ready(strategies=["Gram"])
    losses_of(model(x)).mean().backward()
    assert not given and "Gram" in px.report().rows[0].ways


@pytest.mark.parametrize("block", [1, 7, 2**20])
def test_norm_and_sum_in_blocks(block, monkeypatch):
    from perex.kernels import blocks

    monkeypatch.setattr(blocks, "BLOCK", block)
    left, right = torch.randn(5, 7, 3, dtype=torch.float64), torch.randn(5, 7, 4, dtype=torch.float64)
    norms, total = sums.direct(left, right)
    whole = left.mT @ right
    torch.testing.assert_close(norms, whole.flatten(1).square().sum(1))
    torch.testing.assert_close(total, whole.sum(0))


def test_a_small_head_behind_layers_that_share_does_not_hide_that_gradients_have_no_graph():
    """The first tap to run shares nothing; those behind it do."""
    model = nn.Sequential(nn.Linear(130, 130), nn.ReLU(), nn.Linear(130, 130), nn.ReLU(), nn.Linear(130, 3)).double()
    x = torch.randn(4, 256, 130).double()

    def run(**options: bool) -> None:
        model.zero_grad()
        model(x).sin().flatten(1).sum(1).mean().backward(**options)

    with perex.attach(model) as px:
        for _ in range(4):
            run()
            px.norms()
        assert any(known.call and known.call.sharing.names for known in px._session.memo.known.values())
        with pytest.raises(perex.UnsupportedError, match="create_graph=True.*again"):
            run(create_graph=True)
        run(create_graph=True)
    assert all(p.grad.requires_grad for p in model.parameters())
    model.zero_grad()


@pytest.mark.parametrize("make", [lambda: nn.Linear(128, 128), lambda: nn.Conv1d(128, 128, 3, padding=1)])
def test_reports_of_products_that_give_norms_and_gradients(make, monkeypatch):
    monkeypatch.setattr(Factor, "sums_with_norms", lambda factor: True)
    model, x = make(), torch.randn(4, 128, 128)
    with perex.attach(model) as px:
        for _ in range(4):
            model(x).sin().mean().backward()
            assert {row.operator for row in px.report().rows} <= {"linear", "conv1d"}
        assert "with the sum" in px.report().rows[0].ways[0]
